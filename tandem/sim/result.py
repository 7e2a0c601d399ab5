"""What a simulation gives back: one row a request as columns, a time series, decisions, and what it cost."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tandem.sched.metrics import RunStats, Spread
from tandem.sched.observation import Decision
from tandem.spec.workload import Slo

UNFINISHED, LENGTH, ERROR = 0, 1, 3
"""Values of `RequestTable.finish`."""
TIMES = (
    "prefill_start_s",
    "prefill_end_s",
    "transfer_start_s",
    "transfer_end_s",
    "decode_start_s",
    "first_token_s",
    "done_s",
)
"""Columns of times beside `arrival_s`; NaN where it has not happened."""
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Columns:
    """Where the simulator writes while it runs: arrays of plain numbers, which cost less than a tenth of objects."""

    def __init__(self, rows: int) -> None:
        nan = array("d", [np.nan])
        self.prefill_start_s, self.prefill_end_s, self.transfer_start_s = nan * rows, nan * rows, nan * rows
        self.transfer_end_s, self.decode_start_s = nan * rows, nan * rows
        self.first_token_s, self.done_s = nan * rows, nan * rows
        self.osl, self.cached = array("q", [0]) * rows, array("q", [0]) * rows
        self.preemptions, self.retries = array("i", [0]) * rows, array("i", [0]) * rows
        self.finish = array("b", [UNFINISHED]) * rows
        self.ttfts_s: list[float] = []
        """Of first tokens since a window was last looked at."""


@dataclass(frozen=True, kw_only=True)
class RequestTable:
    """One row a request, in order of arrival; times in seconds."""

    arrival_s: Floats
    isl: Ints
    osl: Ints
    """Tokens that it got; of a request that is unfinished, those at its last event."""
    cached: Ints
    preemptions: NDArray[np.int32]
    retries: NDArray[np.int32]
    finish: NDArray[np.int8]
    prefill_start_s: Floats
    prefill_end_s: Floats
    transfer_start_s: Floats
    transfer_end_s: Floats
    decode_start_s: Floats
    first_token_s: Floats
    done_s: Floats

    def __len__(self) -> int:
        return len(self.isl)

    @property
    def completed(self) -> NDArray[np.bool_]:
        """Which ones got their whole answer."""
        return np.asarray(self.finish == LENGTH)

    @cached_property
    def ttft_s(self) -> Floats:
        """Arrival to first token, as `tandem.sched.metrics.ttft_s` defines it."""
        return self.first_token_s - self.arrival_s

    @cached_property
    def tpot_s(self) -> Floats:
        """Mean gap between the tokens after the first, of finished requests of two tokens or more; else NaN."""
        gaps = np.where(self.osl > 1, self.osl - 1, 1)
        return np.where(self.osl > 1, (self.done_s - self.first_token_s) / gaps, np.nan)

    @cached_property
    def e2e_s(self) -> Floats:
        """Arrival to last token."""
        return self.done_s - self.arrival_s

    @cached_property
    def queue_s(self) -> Floats:
        """Arrival to the beginning of the prefill."""
        return self.prefill_start_s - self.arrival_s

    def meets(self, slo: Slo) -> NDArray[np.bool_]:
        """Which ones completed within both bounds, as `tandem.sched.metrics.meets` defines it."""
        good = self.completed.copy()
        if slo.ttft_s is not None:
            good &= self.ttft_s <= slo.ttft_s
        if slo.tpot_s is not None:
            good &= ~(self.tpot_s > slo.tpot_s)
        return good


@dataclass(frozen=True, kw_only=True)
class SimResult:
    """A simulation, done."""

    requests: RequestTable
    series: dict[str, Floats]
    """One value a window: at_s, waiting, decoding, prefill_workers, decode_workers, colocated_workers, starting, gpus, arrived,
    finished, ttft_s (90th percentile), tpot_s (mean)."""
    decisions: list[tuple[float, Decision]] = field(default_factory=list)
    """Those of the scaling policy that changed something, with their times."""
    gpu_seconds: float
    price_usd: float
    duration_s: float
    simulated_tokens: int
    """Output tokens, whoever got them."""
    events: int

    @property
    def gpu_hours(self) -> float:
        """GPUs that were held, from the decision to start them until they were given back."""
        return self.gpu_seconds / 3600.0

    def stats(self, slo: Slo | None = None) -> RunStats:
        """The run in numbers, by the definitions of `tandem.sched.metrics`."""
        table, whole = self.requests, self.requests.completed
        failed = int(np.sum(table.finish == ERROR))
        good = None if slo is None else int(np.sum(table.meets(slo)))
        judged = int(np.sum(whole)) + failed
        attainment = None if good is None or not judged else good / judged
        seconds = max(self.duration_s, 1e-9)

        def spread(values: Floats) -> Spread | None:
            there = values[whole]
            return Spread.of(there[~np.isnan(there)].tolist())

        return RunStats(
            arrived=len(table),
            completed=int(np.sum(whole)),
            cancelled=0,
            failed=failed,
            unfinished=int(np.sum(table.finish == UNFINISHED)),
            duration_s=self.duration_s,
            prompt_tokens=int(np.sum(table.isl[whole])),
            output_tokens=int(np.sum(table.osl[whole])),
            ttft_s=spread(table.ttft_s),
            tpot_s=spread(table.tpot_s),
            e2e_s=spread(table.e2e_s),
            queue_s=spread(table.queue_s),
            prefill_s=spread(table.prefill_end_s - table.prefill_start_s),
            transfer_s=spread(table.transfer_end_s - table.transfer_start_s),
            requests_per_s=int(np.sum(whole)) / seconds,
            tokens_per_s=int(np.sum(table.osl[whole])) / seconds,
            goodput=None if good is None else good / seconds,
            attainment=attainment,
            slo_met=None if slo is None or attainment is None else attainment >= slo.percentile / 100 - 1e-12,
        )
