"""Differences between two variants of a run, paired by seed, with Student's interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt

from tandem.study.pretraining_runs import TrainingRun

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles of Student's distribution for 1, 2, ... 10 degrees of freedom."""
_NORMAL_95 = 1.960
Measure = Callable[[TrainingRun], float | None]


@dataclass(frozen=True, kw_only=True)
class Paired:
    """What `b` has over `a` at each seed that both have."""

    seeds: tuple[int, ...]
    a: tuple[float, ...]
    b: tuple[float, ...]
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the differences."""
        return sum(self.differences) / len(self.differences)

    @property
    def half(self) -> float:
        """Half of the 95 % interval around the mean; infinite for one seed."""
        return half_interval(self.differences)

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half

    def to_json(self) -> dict[str, object]:
        """Plain numbers; None for a half that is infinite."""
        half = None if self.half == inf else self.half
        return {
            "seeds": list(self.seeds),
            "a": list(self.a),
            "b": list(self.b),
            "differences": list(self.differences),
            "mean": self.mean,
            "half": half,
        }


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean (Student): t s / sqrt(n), infinite for one value.

    Beyond eleven values the quantile of the normal distribution stands for Student's, at most 12 % less.
    """
    n = len(values)
    if n < 2:
        return inf
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    t = T_95[n - 2] if n - 2 < len(T_95) else _NORMAL_95
    return t * sqrt(variance / n)


def paired(
    a: Mapping[int, TrainingRun], b: Mapping[int, TrainingRun], measure: Measure, *, relative: bool = False
) -> Paired | None:
    """`measure` of b over that of a, seed by seed; `relative` as a share of a's. None where no seed has both."""
    rows = []
    for seed in sorted(set(a) & set(b)):
        left, right = measure(a[seed]), measure(b[seed])
        if left is not None and right is not None:
            rows.append((seed, left, right, (right - left) / (left if relative else 1.0)))
    if not rows:
        return None
    seeds, lefts, rights, differences = zip(*rows, strict=True)
    return Paired(seeds=seeds, a=lefts, b=rights, differences=differences)
