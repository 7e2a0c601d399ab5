"""A user's own measurements: a cases CSV with latencies, an AIPerf export, or a file in the format of silicon_sample.csv.

Everything is read before anything is predicted, and a value that cannot be is refused with its file, row, field and value.
AIPerf's summary (profile_export_aiperf.json or .csv, as version 0.13.0 writes them) is one row: mean TTFT, mean inter-token
latency, mean lengths; the JSON also says at which concurrency. What it cannot know, the deployment, comes from options.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tandem.perf.cases import instance_of, pool_of, read_cases, required_number, whole_number
from tandem.perf.estimate import NO_DRAFT, Draft, estimate, estimate_disaggregated, perf_model
from tandem.perf.silicon import MeasuredRow, Side, is_silicon_format, read_rows
from tandem.spec.design import Pool
from tandem.spec.errors import SpecError, TandemError, TraceError

LATENCIES = {"ttft_s": 1.0, "ttft_ms": 1e-3, "tpot_s": 1.0, "tpot_ms": 1e-3}
"""Columns of measured latencies beside those of a cases file, with the seconds of their unit."""
PLAUSIBLE_S = {"ttft": (1e-3, 3600.0), "tpot": (2e-4, 5.0)}
"""What a latency can be: beyond it, its unit is not the column's. The shipped rows span 0.025 to 462 s and 2.3 to 560 ms."""
_UNITS_S = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "sec": 1.0, "s": 1.0}
_AIPERF = {
    "ttft": ("time_to_first_token", "Time to First Token"),
    "tpot": ("inter_token_latency", "Inter Token Latency"),
    "isl": ("input_sequence_length", "Input Sequence Length"),
    "osl": ("output_sequence_length", "Output Sequence Length"),
}
"""AIPerf's name of each quantity, in its JSON and in its CSV."""


def read_measurements(paths: Iterable[Path], given: Mapping[str, str], side: Side) -> list[MeasuredRow]:
    """The rows of files of any of the three formats, all on one side of the split; silicon files keep their own split.

    `given` fills cells that a file leaves empty: columns of a cases file by their names.
    """
    rows: list[MeasuredRow] = []
    for path in paths:
        rows += _read_file(path, given, side)
    if not rows:
        raise TraceError("rows: no usable row in the given files")
    first: dict[str, MeasuredRow] = {}
    for row in rows:
        other = first.setdefault(row.row_id, row)
        if other is not row:
            raise TraceError(f"{row.where}: id={row.row_id!r} is in two files ({other.where}); every row needs its own")
    return rows


def _read_file(path: Path, given: Mapping[str, str], side: Side) -> list[MeasuredRow]:
    if not path.is_file():
        raise TraceError(f"rows={str(path)!r}: no such file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            head = stream.readline().strip()
        columns = next(csv.reader([head]), [])
        if head.startswith("{"):
            return [_measured(_aiperf_json(path, given), f"{path.name}", side)]
        if columns[:2] in (["Metric", "avg"], ["Metric", "Value"]):
            return [_measured(_aiperf_csv(path, given), f"{path.name}", side)]
        if is_silicon_format(columns):
            return list(read_rows(path))
    except (UnicodeDecodeError, csv.Error) as wrong:
        raise TraceError(f"{path.name}: not a readable CSV or JSON file ({wrong})") from None
    return _read_table(path, columns, given, side)


def _read_table(path: Path, columns: list[str], given: Mapping[str, str], side: Side) -> list[MeasuredRow]:
    names = [name.strip() for name in columns]
    for metric in PLAUSIBLE_S:
        if not {f"{metric}_s", f"{metric}_ms"} & set(names):
            raise TraceError(
                f"{path.name}: has no column {metric}_s or {metric}_ms; needs the columns of a cases file, TTFT and TPOT"
            )
    found: list[MeasuredRow] = []
    rows: dict[str, int] = {}
    for number, row in enumerate(read_cases(path, tuple(LATENCIES), given), start=1):
        where = f"{path.name} row {number}"
        row["id"] = row.get("id") or f"{path.stem} {number}"
        if rows.setdefault(row["id"], number) != number:
            raise TraceError(f"{where}: id={row['id']!r}: row {rows[row['id']]} has it already; every row needs its own")
        found.append(_measured(row, where, side))
    return found


def _measured(row: dict[str, str], where: str, side: Side) -> MeasuredRow:
    try:
        return replace(_measured_row(row, side), where=where)
    except TandemError as wrong:
        raise TraceError(f"{where}: {wrong}") from None


def _measured_row(row: dict[str, str], side: Side) -> MeasuredRow:
    for name in ("model", "hardware"):
        if not row.get(name):
            raise SpecError(f"{name}='': must be given, in the file or as --{name}")
    perf = perf_model(row["model"], row["hardware"], row.get("precision") or None, row.get("backend") or None)
    _refuse_idle_cells(row)
    common: dict[str, Any] = {
        "row_id": row["id"],
        "model": perf.model,
        "hardware": perf.hardware,
        "backend": perf.backend,
        "precision": perf.precision,
        "isl": required_number(row, "isl"),
        "osl": required_number(row, "osl"),
        "ttft_s": latency_s(row, "ttft"),
        "tpot_s": latency_s(row, "tpot"),
        "side": side,
        "draft_tokens": whole_number(row, "draft_tokens", 0, low=0),
    }
    asked = {name: common[name] for name in ("model", "hardware", "backend", "precision", "isl", "osl")}
    asked["draft"] = Draft(tokens=common["draft_tokens"])
    mode, concurrency = row.get("mode") or "colocated", whole_number(row, "concurrency")
    if mode == "disaggregated":
        prefill, decode = (pool_of(row, role, concurrency) for role in ("prefill", "decode"))
        estimate_disaggregated(**asked, prefill=prefill, decode=decode, concurrency=concurrency)  # refuses what cannot be
        pool = Pool(parallelism=prefill.parallelism, batch=prefill.batch, replicas=prefill.replicas, role="prefill")
        return MeasuredRow(
            **common,
            parallelism=decode.parallelism,
            replicas=decode.replicas,
            concurrency=concurrency or decode.batch * decode.replicas,
            prefill=pool,
            decode_batch=decode.batch,
        )
    if mode != "colocated":
        raise SpecError(f"mode={mode!r}: must be colocated or disaggregated")
    parallelism, batch = instance_of(row), whole_number(row, "batch")
    if (concurrency is None) == (batch is None):
        raise SpecError(
            f"concurrency={row.get('concurrency', '')!r}: give either concurrency or batch, at which it was measured"
        )
    gpus = whole_number(row, "gpus", parallelism.gpus) or parallelism.gpus
    estimate(**asked, parallelism=parallelism, gpus=gpus, concurrency=concurrency, batch=batch)  # refuses what cannot be
    replicas = gpus // parallelism.gpus
    return MeasuredRow(**common, parallelism=parallelism, replicas=replicas, concurrency=concurrency or replicas * (batch or 1))


def _refuse_idle_cells(row: Mapping[str, str]) -> None:
    """Refuse cells of a cases file that would change nothing here: rows stand at a fixed concurrency, by one acceptance."""
    if row.get("rate"):
        raise SpecError(
            f"rate={row['rate']!r}: measured rows are at a fixed number in flight; give concurrency, the mean of it"
        )
    text = row.get("acceptance", "")
    try:
        other = bool(text) and float(text) != NO_DRAFT.acceptance
    except ValueError:
        other = True
    if other:
        raise SpecError(
            f"acceptance={text!r}: leave it empty; measured rows are compared at the fitted one, {NO_DRAFT.acceptance:g}"
        )


def latency_s(row: Mapping[str, str], metric: str) -> float:
    """Seconds of `ttft` or `tpot` from the one of its two columns that is filled; SpecError on what cannot be a latency."""
    filled = [name for name in (f"{metric}_s", f"{metric}_ms") if row.get(name)]
    if len(filled) != 1:
        raise SpecError(f"{metric}_s={row.get(f'{metric}_s', '')!r}: give exactly one of {metric}_s and {metric}_ms")
    name, text = filled[0], row[filled[0]]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise SpecError(f"{name}={text!r}: must be a number above 0")
    seconds = value * LATENCIES[name]
    low, high = PLAUSIBLE_S[metric]
    if not low <= seconds <= high:
        other = f"{metric}_ms" if name.endswith("_s") and seconds > high else f"{metric}_s"
        hint = f"; if the unit is another, name the column {other}" if other != name else ""
        raise SpecError(
            f"{name}={text!r}: that is {seconds:g} s, and {metric.upper()} lies within {low:g} and {high:g} s{hint}"
        )
    return seconds


def _aiperf_json(path: Path, given: Mapping[str, str]) -> dict[str, str]:
    """The cells of profile_export_aiperf.json; `given` has the last word on what both say."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as wrong:
        raise TraceError(f"{path.name}: not a readable JSON file ({wrong})") from None
    if data.get("was_cancelled") or data.get("is_complete") is False:
        why = data.get("incomplete_reason") or "cancelled"
        raise TraceError(f"{path.name}: the run did not finish ({why}); measure it again")
    config = _mapping(data.get("input_config"))
    phase = _profiling_phase(config)
    kind = phase.get("type", "concurrency")
    if kind != "concurrency" and "concurrency" not in given:
        raise TraceError(
            f"{path.name}: phases type={kind!r}: not measured at a fixed concurrency; give --concurrency, the mean in flight"
        )
    metrics = {}
    for metric, (name, _) in _AIPERF.items():
        found = data.get(name)
        metrics[metric] = (found.get("avg"), str(found.get("unit", ""))) if isinstance(found, dict) else (None, "")
    row = _aiperf_row(path, metrics)
    known = {"model": _model_name(config), "concurrency": str(phase.get("concurrency") or "")}
    return {**{k: v for k, v in known.items() if v}, **row, **given}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _profiling_phase(config: Mapping[str, Any]) -> dict[str, Any]:
    """The measured phase of AIPerf's own configuration; older versions have one block `loadgen` instead of phases."""
    phases = config.get("phases")
    phases = [p for p in phases if isinstance(p, dict)] if isinstance(phases, list) else []
    if not phases:
        return _mapping(config.get("loadgen"))
    return next((p for p in phases if p.get("name") == "profiling"), phases[-1])


def _model_name(config: Mapping[str, Any]) -> str:
    models = config.get("models")
    if isinstance(models, dict):
        items = models.get("items")
        models = [item.get("name") for item in items if isinstance(item, dict)] if isinstance(items, list) else []
    models = models or _mapping(config.get("endpoint")).get("model_names")
    return str(models[0]) if isinstance(models, list) and models else ""


def _aiperf_csv(path: Path, given: Mapping[str, str]) -> dict[str, str]:
    """The cells of profile_export_aiperf.csv; the file says neither model nor concurrency."""
    cells: dict[str, tuple[str, str]] = {}
    with path.open(encoding="utf-8-sig", newline="") as stream:
        for line in csv.reader(stream):
            if len(line) < 2:
                continue
            title = re.fullmatch(r"(.*?)(?: \((.*)\))?", line[0])
            if title:
                cells.setdefault(title.group(1), (line[1], title.group(2) or ""))
    metrics = {metric: cells.get(title, (None, "")) for metric, (_, title) in _AIPERF.items()}
    return {**_aiperf_row(path, metrics), **given}


def _aiperf_row(path: Path, metrics: Mapping[str, tuple[Any, str]]) -> dict[str, str]:
    row = {"id": str(path)}
    for metric, (value, unit) in metrics.items():
        name = _AIPERF[metric][0]
        if value in (None, ""):
            raise TraceError(f"{path.name}: has no {name}; AIPerf writes it with --streaming")
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise TraceError(f"{path.name}: {name} avg={str(value)[:40]!r}: must be a number") from None
        if not (math.isfinite(number) and number > 0):
            raise TraceError(f"{path.name}: {name} avg={value!r}: must be a number above 0")
        if metric in PLAUSIBLE_S:
            if unit not in _UNITS_S:
                raise TraceError(f"{path.name}: {name} unit={unit!r}: must be one of {', '.join(_UNITS_S)}")
            row[f"{metric}_s"] = repr(number * _UNITS_S[unit])
        else:
            row[metric] = str(round(number))
    return row
