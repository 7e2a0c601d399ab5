"""Runs of a simulation under other draws of its traffic: intervals of every measure, and paired differences.

Intervals are Student's, 95 %, over independent replications. Two deployments that are compared get the same arrivals in each
replication, so that their difference has an interval of its own, which is narrower than those of the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import atan, cos, pi, sin, sqrt
from typing import Any

import numpy as np

from tandem.spec.errors import SpecError
from tandem.spec.units import require_int, require_number
from tandem.spec.workload import Trace

CONFIDENCE = 0.95
MEASURES = (
    "ttft_s",
    "tpot_s",
    "e2e_s",
    "queue_s",
    "goodput",
    "attainment",
    "requests_per_s",
    "tokens_per_s",
    "gpu_hours",
    "price_usd",
)
"""Entries of a run's JSON that get intervals; spreads get one for each of their numbers."""
DEAL_S = 60.0
"""Lengths of a recorded trace are dealt anew within windows of this many seconds."""


def student_t(freedom: int) -> float:
    """Half width of a 95 % interval in standard errors, for a mean with `freedom` degrees of freedom.

    The probability of (-t, t) is a finite sum of cosines for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 f.).
    """
    require_int("freedom", freedom, high=100_000)
    low, high = 1.9, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_share(middle, freedom) < CONFIDENCE else (low, middle)
    return (low + high) / 2


def _student_share(t: float, freedom: int) -> float:
    angle = atan(t / sqrt(freedom))
    odd = freedom % 2
    term, total = (cos(angle), 0.0) if odd else (1.0, 0.0)
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cos(angle) ** 2 * (k - 1) / k
    return 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean over replications with its 95 % interval, in the measure's own unit."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Of the values of independent replications, at least two."""
        require_int("replications", len(values), low=2)
        mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
        half = student_t(len(values) - 1) * spread / sqrt(len(values))
        return cls(mean=mean, low=mean - half, high=mean + half)

    @property
    def clear(self) -> bool:
        """Whether 0 lies outside: a difference that more replications are not likely to turn round."""
        return not self.low <= 0.0 <= self.high


def measures(row: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of a run's JSON by name, spreads as `ttft_s.p90`; None where it has none."""
    found: dict[str, float | None] = {}
    for name in MEASURES:
        value = row.get(name)
        if isinstance(value, Mapping):
            found |= {f"{name}.{part}": number for part, number in value.items()}
        else:
            found[name] = value
    return found


def intervals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For each measure that all runs have, {mean, low, high}; spreads as objects of them, as in a run's own JSON."""
    return _nested([measures(row) for row in rows])


def paired(rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Intervals of `others` minus `rows`, replication by replication, for the same arrivals. SpecError for unequal counts."""
    if len(rows) != len(others):
        raise SpecError(f"others={len(others)} runs: must be as many as those they are compared with ({len(rows)})")
    differences: list[dict[str, float | None]] = []
    for one, other in zip(map(measures, rows), map(measures, others), strict=True):
        both = {name: (one[name], other[name]) for name in one if name in other}
        differences.append({name: None if a is None or b is None else b - a for name, (a, b) in both.items()})
    return _nested(differences)


def _nested(rows: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in rows[0]:
        there = [value for row in rows if (value := row.get(name)) is not None]
        if len(there) < len(rows):
            continue
        outer, _, inner = name.partition(".")
        interval: Any = asdict(Interval.of(there)) if len(there) > 1 else there[0]
        if inner:
            found.setdefault(outer, {})[inner] = interval
        else:
            found[outer] = interval
    return found


def seed_of(seed: int, replication: int) -> int:
    """The seed of a replication's draws: the first has the seed as given, the others have ones that nobody counts up to."""
    require_int("seed", seed, low=0, high=2**63 - 1)
    if replication == 0:
        return seed
    return int(np.random.SeedSequence([seed, replication]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def deal(trace: Trace, seed: int, window_s: float = DEAL_S) -> Trace:
    """Another hour like this one: arrivals as recorded; who asks what is dealt anew among the requests of each window, so that
    lengths, clients and prefixes of prompts keep their share of every window. The same seed, the same trace."""
    require_number("window_s", window_s)
    rng = np.random.default_rng(seed)
    window = np.floor((trace.arrival_s - trace.arrival_s[0]) / window_s)
    order = np.lexsort((rng.random(len(trace)), window))
    return replace(trace.rows(order), arrival_s=trace.arrival_s)
