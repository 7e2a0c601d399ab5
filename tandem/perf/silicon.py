"""Measured serving rows: read, checked, split. They judge the performance model and, on one side only, calibrate it.

The rows are silicon_sample.csv of the PyPI package aiconfigurator-core (Apache-2.0; extra `[calibrate]`), read from the
installed package and never copied. A row is kept when its concurrency is known, equals batch x attention groups, and it
uses at most 8 GPUs with consistent parallelism; a disaggregated one when workers and batches of both pools are stated. Rows
of one (model, GPU, precision, ISL, OSL) are all on one side. A cell that cannot be is refused with its file and row.
"""

from __future__ import annotations

import csv
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.design import BACKENDS, Parallelism, Pool, Precision
from tandem.spec.errors import SpecError, TandemError, TraceError
from tandem.spec.hardware import HardwareSpec
from tandem.spec.model import ModelSpec

Side = Literal["calibration", "validation"]
_NEEDED = (
    "id", "silicon_data_source", "backend", "model_path", "system", "precision", "mode", "isl", "osl", "batch_size", "tp_size",
    "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size", "silicon_ttft_ms", "silicon_tpot_ms",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MeasuredRow:
    """One measurement at fixed concurrency: seconds, with everything needed to predict it.

    `parallelism` and `replicas` are those of the co-located instance, or of the decode pool where `prefill` is given.
    """

    row_id: str
    model: ModelSpec
    hardware: HardwareSpec
    backend: str
    precision: Precision
    parallelism: Parallelism
    isl: int
    osl: int
    concurrency: int
    ttft_s: float
    tpot_s: float
    side: Side
    replicas: int = 1
    prefill: Pool | None = None
    draft_tokens: int = 0
    """Tokens drafted by multi-token prediction in each step; the rows do not state it (see `_draft_tokens`)."""
    decode_batch: int | None = None
    """Places of a decode instance, where the source states them beside a pool's concurrency."""
    where: str = field(default="", compare=False)
    """File and row that it was read from, for messages."""


def sample_path() -> Path:
    """Where the installed aiconfigurator-core keeps its measured rows; a TandemError that says how to get it."""
    try:
        root = resources.files("aiconfigurator_core")
    except ModuleNotFoundError:
        raise TandemError(
            "aiconfigurator-core is not installed: pip install 'tandem-lm[calibrate]' brings the measured rows"
        ) from None
    return Path(str(root)) / "systems" / "silicon_sample.csv"


def side_of(model_path: str, system: str, precision: str, isl: str, osl: str) -> Side:
    """The split of docs/accuracy.md: a quarter of the groups, chosen by checksum, is for validation only."""
    key = f"{model_path}|{system}|{precision}|{isl}|{osl}".encode()
    return "validation" if zlib.crc32(key) % 4 == 0 else "calibration"


def read_rows(path: Path) -> Iterator[MeasuredRow]:
    """The usable rows of a file in the format of silicon_sample.csv, co-located and disaggregated."""
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        missing = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
        if missing:
            raise SpecError(f"{path.name}: has no column {missing[0]}; needs {', '.join(_NEEDED)}")
        seen: dict[str, int] = {}
        for number, row in enumerate(reader, start=1):
            where = f"{path.name} row {number} (line {reader.line_num})"
            try:
                measured = _checked_row(row)
                if seen.setdefault(row["id"], number) != number:
                    raise SpecError(f"id={row['id']!r}: row {seen[row['id']]} has it already; every row needs its own")
            except TandemError as wrong:
                raise TraceError(f"{where}: {wrong}") from None
            if measured is not None:
                yield replace(measured, where=where)


def is_silicon_format(columns: Iterable[str]) -> bool:
    """Whether the columns of a CSV file are those of silicon_sample.csv, which states latencies in its own two columns."""
    return {"silicon_ttft_ms", "silicon_tpot_ms"} <= set(columns)


def _checked_row(row: dict[str, str]) -> MeasuredRow | None:
    if None in row.values() or None in row:
        raise SpecError("cells: their number is not that of the columns")
    for name in ("silicon_ttft_ms", "silicon_tpot_ms"):
        _milliseconds(name, row[name])
    for name in ("isl", "osl"):
        _count(name, row[name], low=1 if name == "isl" else 2)
    if row["backend"] not in BACKENDS:
        raise SpecError(f"backend={row['backend']!r}: must be one of {', '.join(BACKENDS)}")
    if row["mode"] not in ("agg", "disagg"):
        raise SpecError(f"mode={row['mode']!r}: must be agg or disagg")
    return _colocated_row(row) if row["mode"] == "agg" else _disaggregated_row(row)


def _milliseconds(name: str, text: str) -> float:
    """A latency in seconds from a cell in milliseconds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise SpecError(f"{name}={text!r}: must be a number of milliseconds above 0")
    return value / 1e3


def _concurrency(row: dict[str, str]) -> int | None:
    found = re.search(r"silicon_concurrency=(\d+)", row["silicon_data_source"]) or re.search(r"_c(\d+)(?:_|$)", row["id"])
    return int(found.group(1)) if found else None


def _count(name: str, text: str, low: int = 0) -> int:
    """A whole number; an empty cell counts as 1. A 0 is some converter's mark for "none" and makes a row unusable."""
    try:
        value = float(text) if text or low else 1.0
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value == int(value) and value >= low):
        raise SpecError(f"{name}={text!r}: must be a whole number of at least {low}")
    return int(value)


def _colocated_row(row: dict[str, str]) -> MeasuredRow | None:
    tp, pp, dp, moe_tp, ep, batch = (
        _count(k, row[k]) for k in ("tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size", "batch_size")
    )
    concurrency = _concurrency(row)
    consistent = min(tp, pp, dp, batch) > 0 and moe_tp * ep in (1, tp * dp) and tp * pp * dp <= 8
    if concurrency is None or batch * dp != concurrency or not consistent:
        return None
    parallelism = Parallelism(tp=tp, pp=pp, dp=dp, ep=ep if moe_tp * ep == tp * dp else 1)
    common = _common(row)
    return MeasuredRow(
        **common, parallelism=parallelism, concurrency=concurrency, draft_tokens=_draft_tokens(row, common["model"], dp)
    )


_DRAFTING_IMAGES = {"1.2.0rc6.post3": "2026-02-01", "1.1.0rc2.post2": "2026-01-10"}
"""TensorRT-LLM image -> first day from which DeepSeek-R1 was measured on it with multi-token prediction only."""


def _draft_tokens(row: dict[str, str], model: ModelSpec, dp: int) -> int:
    """Draft tokens of a co-located row, which the file does not state but its software version gives away.

    InferenceX ran DeepSeek-R1 on TensorRT-LLM twice, without and with multi-token prediction, on different images: its
    perf-changelog.yaml names them (github.com/SemiAnalysisAI/InferenceX, pull requests 392, 594, 620, 632, 642: with it on
    1.1.0rc2.post2 in January 2026 and 1.2.0rc6.post3 since February, without it on 1.2.0rc6.post2). Its launch scripts draft
    3 tokens, and 1 with attention data parallelism. The measured latency plays no part in the label.
    """
    day = re.search(r"measured=(\d{4}-\d{2}-\d{2})", row["silicon_data_source"])
    first = _DRAFTING_IMAGES.get(row.get("backend_version", ""))
    ran_it = row["backend"] == "trtllm" and row["model_path"].endswith("DeepSeek-R1") and first is not None
    if not ran_it or day is None or day.group(1) < str(first) or "multi-token prediction" not in model.omitted:
        return 0
    return 1 if dp > 1 else 3


def _common(row: dict[str, str]) -> dict[str, Any]:
    model, hardware = load_spec(row["model_path"]), load_hardware(row["system"])
    return {
        "row_id": row["id"],
        "model": model,
        "hardware": hardware,
        "backend": row["backend"],
        "precision": Precision.parse(row["precision"], native=model.native_precision),
        "isl": _count("isl", row["isl"], low=1),
        "osl": _count("osl", row["osl"], low=2),
        "ttft_s": _milliseconds("silicon_ttft_ms", row["silicon_ttft_ms"]),
        "tpot_s": _milliseconds("silicon_tpot_ms", row["silicon_tpot_ms"]),
        "side": side_of(row["model_path"], row["system"], row["precision"], row["isl"], row["osl"]),
    }


def _disaggregated_row(row: dict[str, str]) -> MeasuredRow | None:
    """A row whose workers and batches of both pools are stated; without a stated concurrency it is that of all decode slots."""
    stated = all(row.get(f"{role}_{field}") for role in ("prefill", "decode") for field in ("batch_size", "num_workers"))
    if not stated or "0" in (row.get("prefill_moe_ep_size"), row.get("decode_moe_ep_size")):
        return None
    prefill, decode = (_pool_of(row, role) for role in ("prefill", "decode"))
    slots = decode.batch * decode.replicas
    return MeasuredRow(
        **_common(row),
        parallelism=decode.parallelism,
        concurrency=_concurrency(row) or slots,
        replicas=decode.replicas,
        prefill=prefill,
        decode_batch=decode.batch,
    )


def _pool_of(row: dict[str, str], role: Literal["prefill", "decode"]) -> Pool:
    def cell(name: str) -> int:
        return _count(f"{role}_{name}", row.get(f"{role}_{name}", ""))

    tp, pp, dp, ep, moe_tp = (cell(k) for k in ("tp_size", "pp_size", "attention_dp_size", "moe_ep_size", "moe_tp_size"))
    parallelism = Parallelism(tp=tp, pp=pp, dp=dp, ep=ep if moe_tp * ep == tp * dp else 1)
    return Pool(parallelism=parallelism, batch=cell("batch_size") * dp, replicas=cell("num_workers"), role=role)
