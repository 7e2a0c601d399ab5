"""What aiconfigurator predicts for measured rows, asked in a process of its own so that nothing of it is imported here.

It is asked as its users ask it, `cli_estimate` with the row's model, GPU, backend, lengths, parallelism and batch, in the
number format of the row; where that is the format in which the model is published, the peer chooses its kernels itself. Rows
that drafted tokens are asked as such: the peer prices the draft, and as it assumes no acceptance it is told Tandem's own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tandem.perf.backend import fingerprint
from tandem.perf.phases import ACCEPTANCE
from tandem.perf.silicon import MeasuredRow
from tandem.spec.catalog import load_spec, model_names
from tandem.spec.design import Parallelism, Pool, Precision
from tandem.spec.errors import SpecError, TandemError

PEERS = ("aiconfigurator",)
INSTALL = "pip install aiconfigurator==0.12.0"
_FORMATS = {
    "bf16": "bfloat16",
    "fp8": "fp8",
    "fp8_block": "fp8_block",
    "fp4": "nvfp4",
    "int4": "int4_wo",
    "mxfp4": "w4a16_mxfp4",
}
"""The peer's names of weight formats."""
_REASON_CHARS = 72


@dataclass(frozen=True)
class PeerAnswers:
    """TTFT and TPOT in seconds by row id, of the rows that the peer answers, and why it does not answer the others."""

    name: str
    version: str
    asked: int
    times: dict[str, tuple[float, float]]
    reasons: dict[str, int]
    """Start of the peer's own message -> rows, most frequent first."""


def ask_peer(
    name: str, rows: Sequence[MeasuredRow], progress: Callable[[str], None] = lambda _: None, python: Path | None = None
) -> PeerAnswers:
    """Predictions of another package for rows. `python` is the interpreter of the environment it is installed in.

    Raises SpecError on an unknown name, TandemError with the command that installs it where it is missing.
    """
    if name not in PEERS:
        raise SpecError(f"against={name!r}: must be {' or '.join(PEERS)}")
    interpreter = str(python) if python else sys.executable
    cases = [peer_case(row, _names(row)) for row in rows]
    times: dict[str, tuple[float, float]] = {}
    reasons: Counter[str] = Counter()
    version = ""
    with tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+") as errors:
        json.dump(cases, asked)
        asked.seek(0)
        words = [interpreter, str(Path(__file__).with_name("peer_worker.py"))]
        try:
            worker = subprocess.Popen(words, stdin=asked, stdout=subprocess.PIPE, stderr=errors, text=True)
        except OSError as wrong:
            raise SpecError(
                f"peer_python={interpreter!r}: cannot be run ({wrong.strerror}); name a Python interpreter"
            ) from None
        with worker:
            for count, line in enumerate(worker.stdout or ()):
                found = json.loads(line)
                version = found.get("version", version)
                if "why" in found:
                    reasons[found["why"][:_REASON_CHARS]] += 1
                elif "id" in found:
                    times[found["id"]] = (found["ttft_s"], found["tpot_s"])
                progress(f"{name} {count}/{len(cases)}")
        if worker.returncode == 3:
            raise TandemError(f"{name} is not installed for {interpreter}: {INSTALL}, or name its environment by --peer-python")
        if worker.returncode != 0:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise TandemError(f"{name} stopped with exit status {worker.returncode}: {last}")
    return PeerAnswers(name, version, len(cases), times, dict(reasons.most_common()))


def _names(row: MeasuredRow) -> list[str]:
    """The names under which the peer may know the model: its own, then those of the catalogue with the same arithmetic."""
    return [row.model.name, *_catalogue().get(fingerprint(row.model), ())]


@cache
def _catalogue() -> dict[str, list[str]]:
    """Names of the catalogue's models by their arithmetic."""
    found: dict[str, list[str]] = {}
    for name in model_names():
        try:
            spec = load_spec(name)
        except SpecError:
            continue
        found.setdefault(fingerprint(spec), []).append(spec.name)
    return found


def peer_case(row: MeasuredRow, names: Sequence[str]) -> dict[str, Any]:
    """The question about a row in the peer's words; batches there are those of one attention group."""
    ask: dict[str, Any] = {
        "system_name": row.hardware.name.replace("-", "_"),
        "backend_name": row.backend,
        "isl": row.isl,
        "osl": row.osl,
    }
    if str(row.precision) != str(Precision.parse(None, native=row.model.native_precision)):
        ask |= dict.fromkeys(("gemm_quant_mode", "moe_quant_mode"), _FORMATS.get(row.precision.weights, row.precision.weights))
    if row.draft_tokens:
        ask["nextn"] = row.draft_tokens
        ask["nextn_accepted"] = sum(ACCEPTANCE**i for i in range(1, row.draft_tokens + 1))
    if row.prefill is None:
        batch = max(1, -(-row.concurrency // (row.replicas * row.parallelism.dp)))
        ask |= {"mode": "agg", "batch_size": batch, **_axes(row.parallelism)}
    else:
        places = row.decode_batch or -(-row.concurrency // row.replicas)
        decode = Pool(parallelism=row.parallelism, batch=places, replicas=row.replicas, role="decode")
        ask["mode"] = "disagg"
        for pool in (row.prefill, decode):
            sizes = {"batch_size": max(1, pool.batch // pool.parallelism.dp), "num_workers": pool.replicas}
            ask |= {f"{pool.role}_{key}": value for key, value in {**sizes, **_axes(pool.parallelism)}.items()}
    return {"id": row.row_id, "models": list(names), "ask": ask}


def _axes(p: Parallelism) -> dict[str, int]:
    return {
        "tp_size": p.tp,
        "pp_size": p.pp,
        "attention_dp_size": p.dp,
        "moe_tp_size": p.moe_tp,
        "moe_ep_size": p.ep,
    }
