"""Constant sizes: the fewest GPU hours that reach a wanted attainment, and the frontier around them, found by simulating."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import numpy as np

from tandem.study.elastic_cells import CellRun, Ready, run_cell

Sizes = tuple[int, int]
MOST_RUNS = 14


@dataclass(frozen=True, kw_only=True)
class StaticSearch:
    """Constant sizes that were tried, and the cheapest that reached `wanted`; None where none did."""

    wanted: float
    runs: tuple[CellRun, ...]
    best: CellRun | None

    def hours_at(self, attainment: float) -> float | None:
        """GPU hours of the cheapest constant sizes that were tried and reach this attainment."""
        hours = [run.gpu_hours for run in self.runs if run.attainment >= attainment - 1e-12]
        return min(hours, default=None)


def late_and_slow(run: CellRun, made: Ready) -> tuple[float, float]:
    """Shares of requests that miss TTFT, and TPOT: prefill workers decide the one, decode workers the other."""
    table, slo = run.result.requests, made.slo
    late = float(np.mean(~(table.ttft_s <= slo.ttft_s))) if slo.ttft_s is not None else 0.0
    slow = float(np.mean(table.tpot_s > slo.tpot_s)) if slo.tpot_s is not None else 0.0
    return late, slow


def search_static(
    made: Ready,
    wanted: float,
    *,
    known: tuple[CellRun, ...] = (),
    start: Sizes | None = None,
    most_runs: int = MOST_RUNS,
    run: Callable[[Ready, Sizes], CellRun] = run_cell,
) -> StaticSearch:
    """Grow the pool that misses more from `start` (default: 70 % of the sizes for the busiest windows) until `wanted` is
    reached, then shrink either pool as long as it still is.

    Attainment grows with either pool, and the pools decide different bounds, so that this finds the cheapest sizes but for
    ties of a worker. Points on the way are the frontier.
    """  # fmt: skip
    tried: dict[Sizes, CellRun] = {}
    misses: dict[Sizes, tuple[float, float]] = {}

    def attempt(sizes: Sizes) -> CellRun:
        if sizes not in tried:
            tried[sizes] = run(made, sizes)
            misses[sizes] = late_and_slow(tried[sizes], made)
        return tried[sizes]

    p, d = start or (max(1, ceil(0.7 * made.peak[0])), max(1, ceil(0.7 * made.peak[1])))
    while attempt((p, d)).attainment < wanted and len(tried) < most_runs:
        late, slow = misses[p, d]
        short = wanted - tried[p, d].attainment
        grow = 1 if short < 0.1 else max(1, round((0.2 if short < 0.25 else 0.5) * (p if late >= slow else d)))
        p, d = (p + grow, d) if late >= slow else (p, d + grow)
    better = True
    while better and tried[p, d].attainment >= wanted:
        better = False
        for fewer in ((p - 1, d), (p, d - 1)):
            if min(fewer) >= 1 and len(tried) < most_runs and attempt(fewer).attainment >= wanted:
                (p, d), better = fewer, True
                break
    runs = (*known, *tried.values())
    reached = [r for r in runs if r.attainment >= wanted - 1e-12]
    return StaticSearch(wanted=wanted, runs=runs, best=min(reached, key=lambda r: r.gpu_hours, default=None))
