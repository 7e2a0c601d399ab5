"""What `tandem bench` sends, out of its options."""

from __future__ import annotations

import numpy as np

from tandem.bench.load import Load, fixed_trace
from tandem.cli.simulated import Traffic
from tandem.cli.simulating import refuse
from tandem.sim.replicate import seed_of
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int

PER_PLACE = 8
"""Requests of a closed loop for each in flight, where their number is not stated."""


def loads_of(
    *,
    concurrency: int | None,
    arrivals: str | None,
    trace: str | None,
    trace_format: str | None,
    scale: float,
    start_s: float,
    duration_s: float | None,
    isl: int | None,
    osl: int | None,
    requests: int | None,
    seed: int,
    repeats: int,
) -> list[Load]:
    """A load for each repeat, its prompts and arrivals drawn anew. Raises SpecError for options that do not go together."""
    require_int("repeats", repeats, high=1000)
    for name, value in (("concurrency", concurrency), ("requests", requests)):
        if value is not None:
            require_int(name, value, high=100_000 if name == "concurrency" else 10**7)
    if concurrency is None:
        if trace is None and arrivals is None:
            raise SpecError("--concurrency: state it for a closed loop, or --arrivals or --trace for an open one")
        open_loop = Traffic(
            trace=trace, format=trace_format, scale=scale, start_s=start_s, duration_s=duration_s, isl=isl, osl=osl,
            arrivals=arrivals, requests=requests,
        )  # fmt: skip
        return [Load(trace=each, seed=seed_of(seed, k)) for k, each in enumerate(open_loop.draw(seed, repeats))]
    if arrivals is not None:
        raise refuse("--arrivals", arrivals, "an open loop, and --concurrency a closed one; give one of them")
    if trace is not None:
        if scale != 1.0:
            raise refuse("--scale", scale, "changes nothing in a closed loop, which has no times; leave it out")
        lengths = Traffic(
            trace=trace, format=trace_format, scale=1.0, start_s=start_s, duration_s=duration_s, isl=isl, osl=osl,
            arrivals=None, requests=None,
        )  # fmt: skip
        whole = lengths.draw(seed, repeats)
        first = [each if requests is None else each.rows(np.arange(min(len(each), requests))) for each in whole]
        return [Load(trace=each, concurrency=concurrency, seed=seed_of(seed, k)) for k, each in enumerate(first)]
    idle = {"--duration": duration_s, "--trace-format": trace_format, "--start": start_s or None}
    for option, given in {**idle, "--scale": None if scale == 1.0 else scale}.items():
        if given is not None:
            raise refuse(option, given, "changes nothing in a closed loop without --trace; leave it out")
    if isl is None or osl is None:
        raise SpecError("--isl, --osl: state both, or --trace")
    fixed = fixed_trace(isl, osl, PER_PLACE * concurrency if requests is None else requests)
    return [Load(trace=fixed, concurrency=concurrency, seed=seed_of(seed, k)) for k in range(repeats)]
