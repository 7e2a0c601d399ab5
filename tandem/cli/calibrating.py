"""`tandem calibrate ops`, `calibrate serving` and `validate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from tandem.cli.app import emit
from tandem.perf import silicon
from tandem.perf.calibrate_ops import calibrate_ops, write_fits
from tandem.perf.calibrate_serving import calibrate_serving, format_fits, package_source
from tandem.perf.validate import ErrorSet, error_sets, predict
from tandem.report import text
from tandem.spec.files import require_folder, write_whole

PEER = {"all": 0.151, "dense": 0.104, "moe": 0.189, "mla": 0.189, "hybrid": 0.120}
"""aiconfigurator 0.12.0's median TPOT error on the validation rows that it answers; moe and mla are one group there."""


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


def run_serving(out: Path | None, json_out: bool) -> None:
    """Refit backend overheads on the calibration rows; show each with its interval."""
    require_folder("--out", out)
    path = silicon.sample_path()
    rows = [r for r in silicon.read_rows(path) if r.side == "calibration"]
    with text.progress("calibrating backends") as step:
        fits = calibrate_serving(rows, step)
    if out is not None:
        write_whole(out, format_fits(fits, package_source(path)))
    settings = sorted({(r.backend, r.hardware.name, r.precision.weights, r.model.name): r for r in rows}.items())
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


def run_validate(json_out: bool) -> None:
    """Predict every measured row and show the errors, validation rows first."""
    rows = list(silicon.read_rows(silicon.sample_path()))
    with text.progress("validating") as step:
        sets = error_sets(predict(rows, step))
    if json_out:
        return emit({"sets": [_json(s) for s in sets]})
    t = text.table(
        "Predicted against measured, co-located rows; no coefficient was fitted on the validation side",
        "!rows", "side", "metric", ">n", ">median", ">mean error", ">ratio", ">in interval", ">aiconfigurator",
    )  # fmt: skip
    for s in sets:
        groups = s.name.count(" ")
        if groups > 1 or (groups == 1 and s.side == "calibration") or (groups == 1 and s.metric == "ttft_s"):
            continue  # the finest groups are in --json
        peer = PEER.get(s.name) if (s.side, s.metric) == ("validation", "tpot_s") else None
        t.add_row(
            s.name, s.side, s.metric.removesuffix("_s").upper(), str(s.n),
            f"{s.median_ape:.1%}", f"{s.mean_ape:.1%}", f"{s.ratio:.2f}",
            f"{s.coverage:.0%}", f"{peer:.1%}" if peer else "-",
        )  # fmt: skip
    out = text.console()
    out.print(t)
    out.print("median, mean error: absolute percentage error; ratio: predicted / measured, median; interval: the 80 % one.")
    out.print("aiconfigurator 0.12.0: TPOT median error on the 69 % of rows that it answers; moe and mla are one group there.")


def _json(s: ErrorSet) -> dict[str, Any]:
    return asdict(s) | {"name": f"{s.side} {s.metric.removesuffix('_s')} {s.name}"}
