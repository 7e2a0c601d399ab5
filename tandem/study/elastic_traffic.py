"""Traffic of the elastic study: a ServeGen day, Azure code and conversation, made as dense as each service needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from tandem.sim.traces import load_trace
from tandem.spec.units import require_int, require_number
from tandem.spec.workload import Trace

DAY_S = 86_400.0
JITTER_S = 2.0
"""Copies of a recorded request arrive within so many seconds of it: bursts of seconds and longer stay what they were."""
SYNTHETIC = "synthetic-day"


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """A traffic by name; `scale` is how many times the recorded rate each service gets, so that pools are 4 to 40 workers."""

    name: str
    scale: Mapping[str, float] = field(default_factory=dict)
    start_s: float = 0.0
    duration_s: float | None = None
    drawn: bool = False
    """Whether a seed draws it, rather than a recording's copies."""


TRAFFIC: dict[str, Traffic] = {
    t.name: t
    for t in (
        Traffic(
            name="servegen-deepseek-r1", drawn=True,
            scale={"nano-9b-v2": 0.3, "qwen3-8b": 0.3, "llama-3.1-70b": 0.3, "deepseek-r1": 0.4},
        ),
        Traffic(
            name="azure-code-2023",
            scale={"nano-9b-v2": 12, "qwen3-8b": 12, "llama-3.1-70b": 12, "deepseek-r1": 10},
        ),
        Traffic(
            name="azure-conversation-2023",
            scale={"nano-9b-v2": 8, "qwen3-8b": 8, "llama-3.1-70b": 6, "deepseek-r1": 6},
        ),
        Traffic(name=SYNTHETIC, drawn=True, duration_s=300.0),
    )
}  # fmt: skip
"""What is served; the last one is for tests and trials, not for the study."""


def denser(trace: Trace, scale: float, *, seed: int = 0) -> Trace:
    """`scale` times the requests of a recording in the same time: each comes so many times (a share of 1 by chance), the first
    at its own time, copies within `JITTER_S` of it with the lengths of another request of those that came close to it.
    Below 1 requests are left out by chance."""
    require_number("scale", scale, high=1e4)
    if scale == 1:
        return trace
    rng = np.random.default_rng(seed)
    n = len(trace)
    copies = np.full(n, int(scale)) + (rng.random(n) < scale - int(scale))
    source = np.repeat(np.arange(n), copies)
    first = np.concatenate(([0], np.cumsum(copies)[:-1]))
    is_first = np.zeros(len(source), dtype=bool)
    is_first[first[copies > 0]] = True
    arrival = trace.arrival_s[source] + np.where(is_first, 0.0, rng.uniform(-JITTER_S, JITTER_S, len(source)))
    near = np.where(is_first, source, np.clip(source + rng.integers(-20, 21, len(source)), 0, n - 1))
    order = np.argsort(arrival, kind="stable")
    arrival = arrival[order] - arrival[order[0]]
    note = f"{trace.note + '; ' if trace.note else ''}{scale:g} times the recorded rate, seed {seed}"
    return replace(
        trace, arrival_s=arrival, isl=trace.isl[near][order], osl=trace.osl[near][order],
        client=None, prefix_hash=None, prefix_end=None, note=note,
    )  # fmt: skip


def synthetic_day(
    duration_s: float, mean_rps: float, *, seed: int = 0, swing: float = 0.6, isl: float = 2000.0, osl: float = 300.0
) -> Trace:
    """A day in `duration_s`: Poisson arrivals at a rate that swings by `swing` around its mean, log-normal lengths."""
    for name, value in (("duration_s", duration_s), ("mean_rps", mean_rps), ("isl", isl), ("osl", osl)):
        require_number(name, value)
    require_int("seed", seed, low=0)
    rng = np.random.default_rng(seed)
    grid = np.linspace(0.0, duration_s, 2001)
    rate = mean_rps * (1.0 - swing * np.cos(2.0 * np.pi * grid / duration_s))
    whole = np.concatenate(([0.0], np.cumsum((rate[1:] + rate[:-1]) / 2.0 * np.diff(grid))))
    count = max(2, int(rng.poisson(whole[-1])))
    arrival = np.interp(np.sort(rng.uniform(0.0, whole[-1], count)), whole, grid)

    def lengths(mean: float, sigma: float) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        drawn = rng.lognormal(np.log(mean) - sigma**2 / 2.0, sigma, count)
        return np.clip(np.rint(drawn), 1, 16 * mean).astype(np.int64)

    return Trace(
        name=SYNTHETIC, arrival_s=arrival - arrival[0], isl=lengths(isl, 0.8), osl=lengths(osl, 0.8),
        note=f"drawn, mean {mean_rps:g} requests/s, seed {seed}",
    )  # fmt: skip


def traffic_trace(traffic: Traffic, service: str, *, seed: int = 0) -> Trace:
    """The requests of a traffic for a service; `seed` draws what is drawn. Who asked is left out: prompts queue by arrival."""
    scale = traffic.scale.get(service, 1.0)
    if traffic.name == SYNTHETIC:
        return synthetic_day(traffic.duration_s or DAY_S, 20.0 * scale, seed=seed)
    begin_s, lasts_s = traffic.start_s, traffic.duration_s
    if traffic.drawn:
        drawn = load_trace(traffic.name, seed=seed, scale=scale, start_s=begin_s, duration_s=lasts_s)
        return replace(drawn, client=None)
    return denser(load_trace(traffic.name, start_s=begin_s, duration_s=lasts_s), scale, seed=seed)
