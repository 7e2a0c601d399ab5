"""Arrival processes: when requests come, drawn from a seed, for so many requests or so many seconds.

Every process begins as an observer finds it at a time of no significance: a renewal process in the middle of a gap, bursts
in either phase. So the mean number of requests in a time is the rate times that time, however bursty the process is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from math import exp, lgamma, pi, sqrt
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from tandem.spec.errors import SpecError
from tandem.spec.units import require_int, require_number
from tandem.spec.workload import Trace, Workload

Times = NDArray[np.float64]
MAX_RATE_RPS = 1e6
MAX_REQUESTS = 20_000_000
FAMILIES = ("gamma", "weibull")
CHUNK = 4096


class ArrivalProcess(Protocol):
    """When requests come."""

    name: ClassVar[str]

    @property
    def rate_rps(self) -> float:
        """Mean, requests a second."""
        ...

    def first(self, rng: np.random.Generator, count: int) -> Times:
        """The first `count` arrivals, seconds from the start, ascending."""
        ...

    def until(self, rng: np.random.Generator, duration_s: float) -> Times:
        """All arrivals before `duration_s`, seconds from the start, ascending."""
        ...


def weibull_shape(cv: float) -> float:
    """The shape of a Weibull distribution with this coefficient of variation: cv^2 = G(1 + 2/k) / G(1 + 1/k)^2 - 1."""
    low, high = 0.05, 200.0
    for _ in range(200):
        k = sqrt(low * high)
        square = exp(min(lgamma(1 + 2 / k) - 2 * lgamma(1 + 1 / k), 700.0)) - 1
        low, high = (low, k) if square < cv * cv else (k, high)
    return sqrt(low * high)


def gaps(rng: np.random.Generator, family: str, shape: float, mean_s: float, count: int) -> Times:
    """Times between arrivals of this family and shape."""
    if family == "gamma":
        return rng.gamma(shape, mean_s / shape, count)
    return mean_s * exp(-lgamma(1 + 1 / shape)) * rng.weibull(shape, count)


def rest_of_gap(rng: np.random.Generator, family: str, shape: float, mean_s: float) -> float:
    """Seconds to the next arrival from a time of no significance: a gap found in proportion to its length, cut uniformly."""
    if family == "gamma":
        found_s = float(rng.gamma(shape + 1, mean_s / shape))
    else:
        found_s = mean_s * exp(-lgamma(1 + 1 / shape)) * float(rng.gamma(1 + 1 / shape)) ** (1 / shape)
    return found_s * float(rng.random())


def renewal_times(rng: np.random.Generator, family: str, shape: float, rate_rps: float, duration_s: float) -> Times:
    """Arrivals of a renewal process within [0, duration_s), begun in the middle of a gap."""
    mean_s = 1.0 / rate_rps
    parts = [np.array([rest_of_gap(rng, family, shape, mean_s)])]
    while parts[-1][-1] < duration_s:
        left = (duration_s - parts[-1][-1]) * rate_rps
        drawn = gaps(rng, family, shape, mean_s, int(left + 3.0 * sqrt(left)) + 16)
        parts.append(parts[-1][-1] + np.cumsum(drawn))
        if sum(map(len, parts)) > 4 * MAX_REQUESTS:
            raise SpecError(f"rate_rps={rate_rps:g}: draws more than {4 * MAX_REQUESTS:,} requests in {duration_s:g} s")
    at_s = np.concatenate(parts)
    return at_s[: int(np.searchsorted(at_s, duration_s, side="left"))]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed:
    """One request every 1 / rate_rps seconds."""

    name: ClassVar[str] = "fixed"
    rate_rps: float

    def __post_init__(self) -> None:
        require_number("rate_rps", self.rate_rps, high=MAX_RATE_RPS)

    def first(self, rng: np.random.Generator, count: int) -> Times:
        """At 0, 1 / rate, 2 / rate, ..."""
        return np.arange(count, dtype=np.float64) / self.rate_rps

    def until(self, rng: np.random.Generator, duration_s: float) -> Times:
        """The same, from a phase that is drawn."""
        begin = float(rng.random())
        at_s: Times = (begin + np.arange(int(duration_s * self.rate_rps) + 1, dtype=np.float64)) / self.rate_rps
        return at_s[at_s < duration_s]


@dataclass(frozen=True, kw_only=True, slots=True)
class Poisson:
    """Exponential gaps: requests that know nothing of each other."""

    name: ClassVar[str] = "poisson"
    rate_rps: float

    def __post_init__(self) -> None:
        require_number("rate_rps", self.rate_rps, high=MAX_RATE_RPS)

    def first(self, rng: np.random.Generator, count: int) -> Times:
        """Sums of exponential gaps."""
        return np.cumsum(rng.exponential(1.0 / self.rate_rps, count))

    def until(self, rng: np.random.Generator, duration_s: float) -> Times:
        """A Poisson number of uniform times."""
        return np.sort(rng.random(int(rng.poisson(self.rate_rps * duration_s))) * duration_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Renewals:
    """Gaps of one family with coefficient of variation `cv`."""

    name: ClassVar[str]
    rate_rps: float
    cv: float

    def __post_init__(self) -> None:
        require_number("rate_rps", self.rate_rps, high=MAX_RATE_RPS)
        require_number("cv", self.cv, low=0.01, high=30.0)

    @property
    def shape(self) -> float:
        """Of the family's distribution; of the gamma's it is 1 / cv^2."""
        return 1.0 / self.cv**2 if self.name == "gamma" else weibull_shape(self.cv)

    def first(self, rng: np.random.Generator, count: int) -> Times:
        """Sums of gaps; the first is the rest of one."""
        return _renewals(rng, self.name, self.shape, self.rate_rps, count)

    def until(self, rng: np.random.Generator, duration_s: float) -> Times:
        """The same, up to a time."""
        return renewal_times(rng, self.name, self.shape, self.rate_rps, duration_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gamma(_Renewals):
    """Gamma gaps: at `cv` 1 they are Poisson's, above it requests come in clusters."""

    name: ClassVar[str] = "gamma"


@dataclass(frozen=True, kw_only=True, slots=True)
class Weibull(_Renewals):
    """Weibull gaps; at a `cv` above 1 their tail is heavier than the gamma's."""

    name: ClassVar[str] = "weibull"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bursts:
    """Poisson arrivals whose rate jumps: `factor` times as high in bursts as between them. Both last exponential times with
    means `on_s` and `off_s`; the mean rate over all of it is `rate_rps`."""

    name: ClassVar[str] = "bursts"
    rate_rps: float
    factor: float = 8.0
    on_s: float = 30.0
    off_s: float = 300.0

    def __post_init__(self) -> None:
        require_number("rate_rps", self.rate_rps, high=MAX_RATE_RPS)
        require_number("factor", self.factor, high=1e6)
        for field in ("on_s", "off_s"):
            require_number(field, getattr(self, field), low=1e-3, high=1e7)

    def first(self, rng: np.random.Generator, count: int) -> Times:
        """Sums of exponential gaps of operational time, which runs at the rate of the phase it is in."""
        return self._clock(rng, np.cumsum(rng.exponential(1.0, count)), None)

    def until(self, rng: np.random.Generator, duration_s: float) -> Times:
        """The same, up to a time."""
        return self._clock(rng, None, duration_s)

    def _clock(self, rng: np.random.Generator, due: Times | None, duration_s: float | None) -> Times:
        calm_rps = self.rate_rps * (self.on_s + self.off_s) / (self.factor * self.on_s + self.off_s)
        rates, means = np.array([calm_rps, calm_rps * self.factor]), np.array([self.off_s, self.on_s])
        phase = int(rng.random() < self.on_s / (self.on_s + self.off_s))
        at_s, passed = [np.zeros(1)], [np.zeros(1)]
        while (at_s[-1][-1] < duration_s) if duration_s is not None else (due is not None and passed[-1][-1] < due[-1]):
            if len(at_s) * CHUNK > MAX_REQUESTS:
                raise SpecError(f"on_s={self.on_s:g}: changes rate more than {MAX_REQUESTS:,} times; take longer bursts")
            phases = (phase + np.arange(CHUNK)) % 2
            lasting_s = rng.exponential(means[phases])
            at_s.append(at_s[-1][-1] + np.cumsum(lasting_s))
            passed.append(passed[-1][-1] + np.cumsum(lasting_s * rates[phases]))
        clock_s, clock = np.concatenate(at_s), np.concatenate(passed)
        if duration_s is not None:
            whole = float(np.interp(duration_s, clock_s, clock))
            due = np.sort(rng.random(int(rng.poisson(whole)))) * whole
        return np.interp(due if due is not None else np.empty(0), clock, clock_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Diurnal:
    """Poisson arrivals whose rate follows a cosine with the length of a day, from its lowest, at the start, to `peak` times
    that half a period later; the mean over a period is `rate_rps`."""

    name: ClassVar[str] = "diurnal"
    rate_rps: float
    peak: float = 3.0
    period_s: float = 86_400.0

    def __post_init__(self) -> None:
        require_number("rate_rps", self.rate_rps, high=MAX_RATE_RPS)
        if not self.peak >= 1.0:
            raise SpecError(f"peak={self.peak!r}: must be at least 1, the ratio of the highest rate to the lowest")
        require_number("peak", self.peak, high=1e6)
        require_number("period_s", self.period_s, low=1e-3, high=1e9)

    def rate_at(self, at_s: Times) -> Times:
        """Requests a second at these times."""
        swing = (self.peak - 1) / (self.peak + 1)
        return self.rate_rps * (1.0 - swing * np.cos(2 * pi * at_s / self.period_s))

    def first(self, rng: np.random.Generator, count: int) -> Times:
        """By thinning, chunk by chunk."""
        highest, parts, kept, last_s = self._highest(), [], 0, 0.0
        while kept < count:
            at_s = last_s + np.cumsum(rng.exponential(1.0 / highest, max(CHUNK, count)))
            parts.append(self._thinned(rng, at_s, highest))
            kept, last_s = kept + len(parts[-1]), float(at_s[-1])
        return np.concatenate(parts)[:count]

    def until(self, rng: np.random.Generator, duration_s: float) -> Times:
        """By thinning arrivals at the highest rate."""
        highest = self._highest()
        return self._thinned(rng, np.sort(rng.random(int(rng.poisson(highest * duration_s))) * duration_s), highest)

    def _highest(self) -> float:
        return self.rate_rps * 2 * self.peak / (self.peak + 1)

    def _thinned(self, rng: np.random.Generator, at_s: Times, highest: float) -> Times:
        return at_s[rng.random(len(at_s)) * highest < self.rate_at(at_s)]


PROCESSES: dict[str, Callable[..., ArrivalProcess]] = {
    kind.name: kind for kind in (Fixed, Poisson, Gamma, Weibull, Bursts, Diurnal)
}  # fmt: skip
"""By the name that text gives them."""


def parse_arrivals(text: str, field: str = "arrivals") -> ArrivalProcess:
    """A process out of text: its name, its rate in requests/s, and its parameters, as in `gamma:5:cv=4`.

    Raises SpecError that calls it `field` and says what there is.
    """
    said = f"{field}={text!r}"
    name, _, rest = text.partition(":")
    rate, _, given = rest.partition(":")
    if name not in PROCESSES:
        raise SpecError(f"{said}: must be {', '.join(PROCESSES)}, then :RATE in requests/s, as in poisson:5")
    kind = PROCESSES[name]
    known = _parameters(kind)
    values: dict[str, float] = {}
    for part in given.split(",") if given else ():
        key, _, value = part.partition("=")
        if key not in known or key in values:
            takes = f"takes each of {', '.join(known)} once" if known else "takes nothing after its rate"
            raise SpecError(f"{said}: {name} {takes}")
        values[key] = _number(said, key, value)
    missing = [key for key, needed in known.items() if needed and key not in values]
    if missing:
        raise SpecError(f"{said}: needs {missing[0]}, as in {name}:5:{missing[0]}=4")
    rate_rps = _number(said, "rate", rate)
    try:
        return kind(rate_rps=rate_rps, **values)
    except SpecError as wrong:
        raise SpecError(f"{said}: {wrong}") from None


def _parameters(kind: Any) -> dict[str, bool]:
    """What a process has beside its rate, and whether it must be given."""
    return {field.name: field.default is MISSING for field in fields(kind) if field.name != "rate_rps"}


def _number(said: str, field: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise SpecError(f"{said}: {field}={value!r}: must be a number") from None


def make_trace(
    process: ArrivalProcess,
    lengths: Workload | Trace | tuple[int, int],
    *,
    count: int | None = None,
    duration_s: float | None = None,
    seed: int = 0,
) -> Trace:
    """Requests of a process: `count` of them, or those of `duration_s` seconds. Lengths are drawn from the workload's points,
    rounded to whole tokens, or from a trace's requests, or are (isl, osl). Times count from the first request.

    Raises SpecError unless exactly one of `count` and `duration_s` is given, for no request, and for more than 20 million.
    """
    if (count is None) == (duration_s is None):
        raise SpecError(f"count={count!r}, duration_s={duration_s!r}: give exactly one of them")
    rng = np.random.default_rng(require_int("seed", seed, low=0, high=2**63 - 1))
    if count is not None:
        at_s = process.first(rng, require_int("count", count, high=MAX_REQUESTS))
    else:
        span_s = require_number("duration_s", duration_s, high=1e9)
        if process.rate_rps * span_s > MAX_REQUESTS:
            raise SpecError(
                f"duration_s={span_s:g}: gives about {process.rate_rps * span_s:,.0f} requests; at most {MAX_REQUESTS:,}"
            )
        at_s = process.until(rng, span_s)
    if not len(at_s):
        raise SpecError(f"duration_s={duration_s}: no request arrives at {process.rate_rps:g} requests/s; give more")
    if isinstance(lengths, tuple):
        lengths = Workload.fixed(*lengths)
    isl, osl = _lengths(lengths, rng, len(at_s))
    own = [f"{name} {getattr(process, name):g}" for name in _parameters(type(process))]
    note = ", ".join((f"{process.name.capitalize()} arrivals at {process.rate_rps:g} requests/s", *own, f"seed {seed}"))
    return Trace(name=lengths.name, arrival_s=at_s - at_s[0], isl=isl, osl=osl, note=note)


def _lengths(source: Workload | Trace, rng: np.random.Generator, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if isinstance(source, Trace):
        rows = rng.integers(len(source), size=count)
        return source.isl[rows], source.osl[rows]
    weight = np.asarray(source.weight)
    points = rng.choice(len(weight), size=count, p=weight / weight.sum())
    isl, osl = (np.maximum(np.rint(np.asarray(side)[points]), 1).astype(np.int64) for side in (source.isl, source.osl))
    return isl, osl


def poisson_trace(workload: Workload, rate_rps: float, requests: int, seed: int) -> Trace:
    """`requests` arrivals with exponential gaps; lengths are drawn from the workload's points, rounded to whole tokens."""
    return make_trace(Poisson(rate_rps=rate_rps), workload, count=require_int("requests", requests, high=10**7), seed=seed)


def _renewals(rng: np.random.Generator, family: str, shape: float, rate_rps: float, count: int) -> Times:
    drawn = gaps(rng, family, shape, 1.0 / rate_rps, count)
    drawn[0] = rest_of_gap(rng, family, shape, 1.0 / rate_rps)
    return np.cumsum(drawn)
