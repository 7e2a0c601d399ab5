"""`tandem calibrate ops`, `calibrate serving` and `validate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from tandem.cli.app import emit
from tandem.perf import silicon
from tandem.perf.calibrate_ops import calibrate_ops, write_fits
from tandem.perf.calibrate_serving import calibrate_serving, format_fits, package_source
from tandem.perf.held_out import label_sets, leave_one_out
from tandem.perf.measurements import read_measurements
from tandem.perf.peer import PeerAnswers, ask_peer
from tandem.perf.validate import ErrorSet, Predictions, answered, error_sets, predict, refuse_wrong_units
from tandem.report import text
from tandem.spec.errors import SpecError
from tandem.spec.files import require_folder, write_whole


def run_ops(systems: list[str] | None, out: Path | None, json_out: bool) -> None:
    """Refit operator curves; show each with its error."""
    require_folder("--out", out)
    with text.progress("calibrating operators") as step:
        fits = calibrate_ops(systems, step)
    if out is not None:
        write_fits(fits, out)
    measured = [f for f in fits if f.num_rows]
    if json_out:
        error = {op: median(f.median_ape for f in measured if f.op == op) for op in sorted({f.op for f in measured})}
        return emit({"fits": [asdict(f) for f in fits], "error": error})
    t = text.table("Operator curves", "GPU", "op", "format", ">rows", ">t0", ">compute", ">bandwidth", ">p", ">median error")
    for f in measured:
        t.add_row(
            f.system, f.op, f.dtype, f"{f.num_rows:,}", f"{f.t0_s * 1e6:.1f} us", f"{f.compute_efficiency:.0%}",
            f"{f.bandwidth_efficiency:.0%}", str(f.sharpness), f"{f.median_ape:.1%}",
        )  # fmt: skip
    text.console().print(t)


def run_serving(own: list[Path] | None, given: Mapping[str, str], out: Path | None, json_out: bool) -> None:
    """Refit backend overheads on the calibration rows, and a user's own with them; show each with its interval."""
    require_folder("--out", out)
    refuse_idle_options(own, given)
    mine = [r for r in read_measurements(own, given, "calibration") if r.side == "calibration"] if own else []
    path = silicon.sample_path()
    rows = [r for r in silicon.read_rows(path) if r.side == "calibration"]
    source = " and ".join([package_source(path), *(f"{len(mine)} rows of {file.name}" for file in own or ())])
    with text.progress("calibrating backends") as step:
        if mine:
            refuse_wrong_units(predict(mine, step))
        fits = calibrate_serving([*rows, *mine], step)
    if out is not None:
        write_whole(out, format_fits(fits, source))
    settings = sorted({(r.backend, r.hardware.name, r.precision.weights, r.model.name): r for r in mine or rows}.items())
    found = [(key, fits.find(r.backend, r.hardware, r.model, r.precision.weights)[0]) for key, r in settings]
    if json_out:
        names = ("backend", "hardware", "weights", "model")
        listed = [dict(zip(names, key, strict=True)) | asdict(fit) for key, fit in found]
        return emit({"fits": listed, "error": {m: {k: list(v) for k, v in g.items()} for m, g in fits.spread.items()}})
    t = text.table(
        "What backends make of the kernels",
        "backend", "GPU", "weights", "!model", ">rows", ">step", ">sequence", ">launch x", ">gemm x", ">attention x",
        ">experts x", ">network x", ">prefill x", ">TPOT 80 %",
    )  # fmt: skip
    for (backend, gpu, weights, model), f in found:
        gemm = f.gemm if weights == "bf16" else f.quantised_gemm
        t.add_row(
            backend, gpu, weights, model.split("/")[-1], str(f.num_rows), text.ms(f.step_s), f"{f.sequence_s * 1e6:.0f} us",
            *(f"{x:.2f}" for x in (f.launch, gemm, f.attention, f.moe, f.network, f.prefill)),
            f"{f.tpot_p10:.2f} to {f.tpot_p90:.2f}",
        )  # fmt: skip
    text.console().print(t)


def run_validate(
    rows: list[Path] | None,
    given: Mapping[str, str],
    against: str | None,
    peer_python: Path | None,
    report: Path | None,
    json_out: bool,
) -> None:
    """Predict measured rows, as they are and by coefficients that never saw their GPU or model, and show the errors."""
    require_folder("--report", report)
    refuse_idle_options(rows, given)
    if peer_python is not None and not against:
        raise SpecError(f"--peer-python={str(peer_python)!r}: changes nothing without --against; give both, or neither")
    found, source = (
        (read_measurements(rows, given, "validation"), ", ".join(path.name for path in rows))
        if rows
        else (list(silicon.read_rows(silicon.sample_path())), package_source(silicon.sample_path()))
    )
    with text.progress("validating") as step:
        judged = [r for r in found if r.side == "validation"]
        peer = ask_peer(against, judged, step, peer_python) if against else None
        times = peer.times if peer else None
        predictions = predict(found, step)
        if rows:
            refuse_wrong_units(predictions)
        held_out = [] if rows else leave_one_out(found, step)
        sets = [*error_sets(predictions, times), *(s for h in held_out for s in h.sets())]
        sets += label_sets(predictions, held_out, step)
    shares = answered(predictions, times)
    if report is not None:
        from tandem.report.validate_html import validate_page

        write_whole(report, validate_page(predictions, sets, held_out, shares, peer, source))
    if json_out:
        found_sets = {"source": source, "sets": [_json(s) for s in sets], "answered": shares, "peer": _peer_json(peer)}
        return emit(found_sets | ({"rows": _rows_json(predictions, times or {})} if rows else {}))
    from tandem.report import validate_text

    out = text.console()
    for t in ([validate_text.rows_table(predictions)] if rows else []) + validate_text.tables(sets):
        out.print(t)
    if peer is not None:
        out.print(validate_text.peer_table(sets, f"{peer.name} {peer.version}"))
    for line in validate_text.sentences(shares, peer):
        out.print(line)
    if report is not None:
        out.print(f"report: {report}")


def refuse_idle_options(rows: list[Path] | None, given: Mapping[str, str]) -> None:
    """Refuse options that describe rows of a file where no file is given."""
    if given and not rows:
        name = next(iter(given))
        raise SpecError(f"--{name}={given[name]!r}: describes rows of a file; give --rows FILE, or leave it out")


def _json(s: ErrorSet) -> dict[str, Any]:
    return asdict(s) | {"name": f"{s.side} {s.metric.removesuffix('_s')} {s.name}", "predictor": "tandem"}


def _rows_json(p: Predictions, peer: Mapping[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """A user's own rows; those of the package are not passed on."""
    listed = []
    for i, row in enumerate(p.rows):
        entry: dict[str, Any] = {"id": row.row_id, "evidence": p.evidence[i]}
        for metric in ("ttft_s", "tpot_s"):
            times = {"value": getattr(p, metric)[i], "low": p.low[metric][i], "high": p.high[metric][i]}
            entry[metric] = {"measured": getattr(row, metric), **{k: float(v) for k, v in times.items()}}
        if row.row_id in peer:
            entry["peer"] = dict(zip(("ttft_s", "tpot_s"), peer[row.row_id], strict=True))
        listed.append(entry)
    return listed


def _peer_json(peer: PeerAnswers | None) -> dict[str, Any] | None:
    if peer is None:
        return None
    answers = {"asked": peer.asked, "answered": len(peer.times), "reasons": peer.reasons}
    return {"name": peer.name, "version": peer.version, **answers}
