"""A CSV of deployments to estimate, one a row; a bad row answers with its error and the others go on (DESIGN section 11)."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tandem.perf.backend import ServingFits
from tandem.perf.estimate import NO_DRAFT, Draft, EstimateResult, Instances, estimate, estimate_disaggregated
from tandem.spec.design import Parallelism
from tandem.spec.errors import SpecError, TandemError, TraceError
from tandem.spec.units import require_int

_SHARED = ["tp", "pp", "dp", "ep", "moe_tp", "gpus"]
_POOLS = [f"{role}_{field}" for role in ("prefill", "decode") for field in ("workers", "tp", "pp", "dp", "ep", "batch")]
_ASKED = ["concurrency", "batch", "rate", "draft_tokens", "acceptance"]
COLUMNS = ["id", "model", "hardware", "backend", "precision", "mode", "isl", "osl", *_ASKED, *_SHARED, *_POOLS]
"""Columns that a cases file may have; empty cells take the default, and cells of the other mode are not read."""


def read_cases(path: Path, extra: Sequence[str] = (), given: Mapping[str, str] | None = None) -> list[dict[str, str]]:
    """The rows of a cases file, cells stripped; unknown or missing columns are refused before anything runs.

    `extra` are columns that it may have besides COLUMNS; `given` are cells for all rows that leave them empty.
    """
    known, given = [*COLUMNS, *extra], given or {}
    if not path.is_file():
        raise TraceError(f"cases={str(path)!r}: no such file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            names = [name.strip() for name in reader.fieldnames or ()]
            unknown = [name for name in names if name not in known]
            missing = [name for name in ("model", "hardware", "isl", "osl") if name not in (*names, *given)]
            if unknown:
                raise TraceError(f"{path.name}: column {unknown[0]!r} is unknown; columns are {', '.join(known)}")
            if missing:
                raise TraceError(f"{path.name}: has no column {missing[0]}; needs model, hardware, isl, osl")
            cells = []
            for number, row in enumerate(reader, start=1):
                if None in row:
                    where = f"{path.name} row {number} (line {reader.line_num})"
                    raise TraceError(f"{where}: cells: their number is not that of the {len(names)} columns")
                cells.append({k.strip(): (v or "").strip() for k, v in row.items()})
            rows = [{**given, **{k: v for k, v in row.items() if v or k not in given}} for row in cells]
    except (UnicodeDecodeError, csv.Error) as wrong:
        raise TraceError(f"{path.name}: not a readable CSV file ({wrong})") from None
    if not rows:
        raise TraceError(f"{path.name}: holds no cases below its first line")
    return rows


def estimate_cases(
    rows: list[dict[str, str]], progress: Callable[[int], None] = lambda _: None, fits: ServingFits | None = None
) -> Iterator[dict[str, Any]]:
    """For each row its id and the predictions, or its id and `error`."""
    for number, row in enumerate(rows, start=1):
        answer: dict[str, Any] = {"id": row.get("id") or str(number)}
        try:
            found = asdict(_estimate_row(row, fits))
            kept = ("ttft_s", "tpot_s", "tokens_per_s_per_gpu", "tokens_per_s_per_user", "evidence")
            answer |= {key: found[key] for key in kept}
        except TandemError as wrong:
            answer["error"] = str(wrong)
        progress(number)
        yield answer


def _number(row: dict[str, str], field: str, default: float | None = None) -> float | None:
    text = row.get(field, "")
    try:
        return float(text) if text else default
    except ValueError:
        raise SpecError(f"{field}={text!r}: must be a number") from None


def whole_number(row: dict[str, str], field: str, default: int | None = None, low: int = 1) -> int | None:
    """The whole number in a cell, or the default where it is empty; SpecError where it is anything else."""
    text = row.get(field, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not math.isfinite(value) or value != int(value) or value < low:
        raise SpecError(f"{field}={text!r}: must be a whole number of at least {low}")
    return require_int(field, int(value), low=low)


def required_number(row: dict[str, str], field: str) -> int:
    """The whole number that a cell must hold."""
    value = whole_number(row, field)
    if value is None:
        raise SpecError(f"{field}='': must be given")
    return value


def _one(row: dict[str, str], field: str) -> int:
    return whole_number(row, field, 1) or 1


def _estimate_row(row: dict[str, str], fits: ServingFits | None) -> EstimateResult:
    common: dict[str, Any] = {
        "model": row["model"],
        "hardware": row["hardware"],
        "isl": required_number(row, "isl"),
        "osl": required_number(row, "osl"),
        "precision": row.get("precision") or None,
        "backend": row.get("backend") or None,
        "concurrency": whole_number(row, "concurrency"),
        "requests_per_s": _number(row, "rate"),
        "draft": Draft(
            tokens=whole_number(row, "draft_tokens", 0, low=0) or 0,
            acceptance=_number(row, "acceptance", NO_DRAFT.acceptance) or 0.0,
        ),
        "fits": fits,
    }
    mode = row.get("mode") or "colocated"
    if mode == "disaggregated":
        prefill, decode = (pool_of(row, role, common["concurrency"]) for role in ("prefill", "decode"))
        return estimate_disaggregated(**common, prefill=prefill, decode=decode)
    batch, gpus = whole_number(row, "batch"), whole_number(row, "gpus")
    return estimate(**common, batch=batch, parallelism=instance_of(row), mode=mode, gpus=gpus)


def instance_of(row: dict[str, str]) -> Parallelism:
    """Parallelism of the instance of a co-located case."""
    tp, dp = _one(row, "tp"), _one(row, "dp")
    ep = whole_number(row, "ep")
    moe_tp = whole_number(row, "moe_tp")
    if ep is None:
        ep = tp * dp // moe_tp if moe_tp else 1
    if moe_tp is not None and moe_tp * ep not in (1, tp * dp):
        raise SpecError(f"moe_tp={moe_tp}: moe_tp*ep={moe_tp * ep} must be tp*dp={tp * dp}")
    return Parallelism(tp=tp, pp=_one(row, "pp"), dp=dp, ep=ep)


def pool_of(row: dict[str, str], role: str, concurrency: int | None) -> Instances:
    """One of the two pools of a disaggregated case."""
    field = f"{role}_"
    parallelism = Parallelism(**{axis: _one(row, field + axis) for axis in ("tp", "pp", "dp", "ep")})
    workers, group_batch = _one(row, field + "workers"), whole_number(row, field + "batch")
    if group_batch is not None:
        # As measured rows state it: the batch of one attention group, of which an instance holds dp.
        batch = group_batch * parallelism.dp
    elif role == "prefill":
        batch = parallelism.dp
    elif concurrency is not None:
        batch = -(-concurrency // workers)
    else:
        raise SpecError("decode_batch='': give decode_batch or concurrency")
    return Instances(parallelism=parallelism, batch=batch, replicas=workers)
