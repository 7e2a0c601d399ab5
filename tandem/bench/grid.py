"""Closed loops over a grid of lengths and requests in flight: what predictions are fitted to and judged by."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tandem.bench.client import Target
from tandem.bench.learn import flaw
from tandem.bench.load import Load, fixed_trace
from tandem.bench.run import run
from tandem.perf.host import ServedRow
from tandem.spec.errors import SpecError

Point = tuple[int, int, int, int]
"""Prompt tokens, output tokens, requests in flight, and requests for each of these."""


def measure_grid(target: Target, points: Sequence[Point], *, seed: int = 0) -> list[ServedRow]:
    """Each point as a closed loop. The last one is run before all others too, and not counted: a server that has just started
    is slower.

    Raises SpecError where a request of a point fails, or gets other tokens than it asked for, or all of them at once.
    """
    rows = []
    for number, (isl, osl, concurrency, per_place) in enumerate([points[-1], *points]):
        trace = fixed_trace(isl, osl, per_place * concurrency)
        load = Load(trace=trace, concurrency=concurrency, seed=seed + number)
        done = asyncio.run(run(target, load))
        stats, why = done.stats(), flaw(done, isl, osl)
        if why is not None or stats.ttft_s is None or stats.tpot_s is None:
            raise SpecError(f"url={target.url!r}: {isl} + {osl} tokens, {concurrency} in flight: {why or 'has no TPOT'}")
        times = {"ttft_s": stats.ttft_s.mean, "tpot_s": stats.tpot_s.mean}
        rows.append(ServedRow(isl=isl, osl=osl, concurrency=concurrency, per_place=per_place, **times))
    return rows[1:]
