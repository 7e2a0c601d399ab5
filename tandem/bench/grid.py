"""Closed loops over a grid of lengths and requests in flight: what predictions are fitted to and judged by."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tandem.bench.client import Target
from tandem.bench.load import Load, fixed_trace
from tandem.bench.run import run
from tandem.perf.host import ServedRow
from tandem.spec.errors import SpecError

Point = tuple[int, int, int]
"""Prompt tokens, output tokens, requests in flight."""


def measure_grid(target: Target, points: Sequence[Point], *, per_place: int, seed: int = 0) -> list[ServedRow]:
    """Each point as a loop of `per_place` requests for each in flight, after one that is not counted.

    Raises SpecError where no request of a point completes, or only with one token.
    """
    rows = []
    for number, (isl, osl, concurrency) in enumerate(points):
        trace = fixed_trace(isl, osl, per_place * concurrency)
        load = Load(trace=trace, concurrency=concurrency, seed=seed + number)
        stats = asyncio.run(run(target, load)).stats()
        if stats.ttft_s is None or stats.tpot_s is None:
            raise SpecError(f"url={target.url!r}: no request of {isl} + {osl} tokens, {concurrency} in flight, gave its answer")
        row = ServedRow(isl=isl, osl=osl, concurrency=concurrency, ttft_s=stats.ttft_s.mean, tpot_s=stats.tpot_s.mean)
        rows.append(row)
    return rows
