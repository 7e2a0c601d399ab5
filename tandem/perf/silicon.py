"""Measured serving rows: read, checked, split. They judge the performance model and, on one side only, calibrate it.

The rows are silicon_sample.csv of the PyPI package aiconfigurator-core (Apache-2.0; extra `[calibrate]`), read from the
installed package and never copied. A row is kept when its concurrency is known, equals batch x attention groups, and it
uses at most 8 GPUs with consistent parallelism; a disaggregated one when workers and batches of both pools are stated. Rows of one (model, GPU, precision, ISL, OSL) are all on one side.
"""

from __future__ import annotations

import csv
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.design import Parallelism, Pool, Precision
from tandem.spec.errors import SpecError, TandemError
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
    """The split of facts/validation.md: a quarter of the groups, chosen by checksum, is for validation only."""
    key = f"{model_path}|{system}|{precision}|{isl}|{osl}".encode()
    return "validation" if zlib.crc32(key) % 4 == 0 else "calibration"


def read_rows(path: Path) -> Iterator[MeasuredRow]:
    """The usable rows of a file in the format of silicon_sample.csv, co-located and disaggregated."""
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        missing = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
        if missing:
            raise SpecError(f"{path.name}: has no column {missing[0]}; needs {', '.join(_NEEDED)}")
        for row in reader:
            measured = _colocated_row(row) if row["mode"] == "agg" else _disaggregated_row(row)
            if measured is not None:
                yield measured


def _concurrency(row: dict[str, str]) -> int | None:
    found = re.search(r"silicon_concurrency=(\d+)", row["silicon_data_source"]) or re.search(r"_c(\d+)(?:_|$)", row["id"])
    return int(found.group(1)) if found else None


def _count(text: str) -> int:
    return int(float(text)) if text else 1


def _colocated_row(row: dict[str, str]) -> MeasuredRow | None:
    tp, pp, dp = (_count(row[k]) for k in ("tp_size", "pp_size", "attention_dp_size"))
    moe_tp, ep = _count(row["moe_tp_size"]), _count(row["moe_ep_size"])
    concurrency, batch = _concurrency(row), _count(row["batch_size"])
    consistent = moe_tp * ep in (1, tp * dp) and tp * pp * dp <= 8
    if concurrency is None or batch * dp != concurrency or not consistent:
        return None
    parallelism = Parallelism(tp=tp, pp=pp, dp=dp, ep=ep if moe_tp * ep == tp * dp else 1)
    return MeasuredRow(**_common(row), parallelism=parallelism, concurrency=concurrency)


def _common(row: dict[str, str]) -> dict[str, Any]:
    model, hardware = load_spec(row["model_path"]), load_hardware(row["system"])
    return {
        "row_id": row["id"],
        "model": model,
        "hardware": hardware,
        "backend": row["backend"],
        "precision": Precision.parse(row["precision"], native=model.native_precision),
        "isl": int(row["isl"]),
        "osl": int(row["osl"]),
        "ttft_s": float(row["silicon_ttft_ms"]) / 1e3,
        "tpot_s": float(row["silicon_tpot_ms"]) / 1e3,
        "side": side_of(row["model_path"], row["system"], row["precision"], row["isl"], row["osl"]),
    }


def _disaggregated_row(row: dict[str, str]) -> MeasuredRow | None:
    """A row whose workers and batches of both pools are stated; without a stated concurrency it is that of all decode slots."""
    stated = all(row.get(f"{role}_{field}") for role in ("prefill", "decode") for field in ("batch_size", "num_workers"))
    if not stated or "0" in (row["prefill_moe_ep_size"], row["decode_moe_ep_size"]):
        return None
    prefill, decode = (_pool_of(row, role) for role in ("prefill", "decode"))
    slots = decode.batch * decode.replicas
    return MeasuredRow(
        **_common(row),
        parallelism=decode.parallelism,
        concurrency=_concurrency(row) or slots,
        replicas=decode.replicas,
        prefill=prefill,
    )


def _pool_of(row: dict[str, str], role: Literal["prefill", "decode"]) -> Pool:
    tp, pp, dp, ep = (_count(row[f"{role}_{k}"]) for k in ("tp_size", "pp_size", "attention_dp_size", "moe_ep_size"))
    moe_tp, replicas = _count(row[f"{role}_moe_tp_size"]), _count(row[f"{role}_num_workers"])
    parallelism = Parallelism(tp=tp, pp=pp, dp=dp, ep=ep if moe_tp * ep == tp * dp else 1)
    return Pool(parallelism=parallelism, batch=_count(row[f"{role}_batch_size"]) * dp, replicas=replicas, role=role)
