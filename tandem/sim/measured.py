"""Runs of real engines, request by request, that the simulator is held against. Origin and licence: data/measured_vllm."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from tandem.spec.design import Parallelism
from tandem.spec.errors import TraceError
from tandem.spec.workload import Trace

CALIBRATION = {
    "RTX4090_Llama-3.1-8B": "rtx-4090",
    "RTXPRO6000_Llama-3.1-8B": "rtx-pro-6000",
}
"""Runs on which factors are fitted, with their GPUs."""
VALIDATION = {
    "RTXPRO6000_Qwen3-32B": "rtx-pro-6000",
    "RTXPRO6000_Qwen3-30B-A3B-Instruct-2507": "rtx-pro-6000",
}
"""Runs on which nothing is fitted."""


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """One instance of an engine under a trace: how it was set up, what came when, and when tokens left. Times in seconds from
    the first arrival, one entry a request."""

    name: str
    model: str
    hardware: str
    parallelism: Parallelism
    max_batch: int
    """Of the whole instance, over its attention groups."""
    step_tokens: int
    """Of one attention group."""
    blocks: int | None
    """Blocks of 16 tokens that the engine reported; None where it did not."""
    trace: Trace
    first_token_s: NDArray[np.float64]
    last_token_s: NDArray[np.float64]

    @property
    def ttft_s(self) -> NDArray[np.float64]:
        """Time to the first token, from arrival."""
        return self.first_token_s - self.trace.arrival_s

    @property
    def tpot_s(self) -> NDArray[np.float64]:
        """Mean gap between the tokens after the first; NaN for answers of one token."""
        gaps = np.where(self.trace.osl > 1, self.trace.osl - 1.0, np.nan)
        return (self.last_token_s - self.first_token_s) / gaps

    @property
    def duration_s(self) -> float:
        """First arrival to last token."""
        return float(self.last_token_s.max())


def load_run(name: str) -> MeasuredRun:
    """A run of CALIBRATION or VALIDATION by its name; TraceError where there is none."""
    known = CALIBRATION | VALIDATION
    if name not in known:
        raise TraceError(f"run={name!r}: unknown; the measured runs are {', '.join(known)}")
    folder = resources.files("tandem.sim") / "data" / "measured_vllm"
    settings = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    engine, cache = settings["engine_kwargs"], settings.get("kv_cache", {})
    tp, dp = engine["tensor_parallel_size"], engine["data_parallel_size"]
    with (folder / f"{name}.csv.gz").open("rb") as raw, gzip.open(raw, "rt", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    columns = {key: np.array([float(row[key]) for row in rows]) for key in rows[0] if key != "request_id"}
    return MeasuredRun(
        name=name,
        model=engine["model"],
        hardware=known[name],
        parallelism=Parallelism(tp=tp, dp=dp, ep=tp * dp if engine["enable_expert_parallel"] else 1),
        max_batch=engine["max_num_seqs"] * dp,
        step_tokens=engine["max_num_batched_tokens"],
        blocks=cache.get("num_gpu_blocks"),
        trace=Trace(
            name=name,
            arrival_s=columns["arrival_s"],
            isl=columns["input_tokens"].astype(np.int64),
            osl=columns["output_tokens"].astype(np.int64),
        ),
        first_token_s=columns["first_token_s"],
        last_token_s=columns["last_token_s"],
    )
