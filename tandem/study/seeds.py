"""Runs of variants at several seeds: found in folders, compared seed by seed with Student's interval, judged as claims."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from pathlib import Path
from typing import Any, TypeVar

from tandem.spec.errors import SpecError
from tandem.study.result import Claim

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles of Student's distribution for 1, 2, ... 10 degrees of freedom."""
_NORMAL_95 = 1.960
BACKEND = "runs"
"""What judges the claims of a study of runs."""
_SEED = re.compile(r"seed-(\d+)")
Run = TypeVar("Run")


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


def differences(a: Mapping[int, float | None], b: Mapping[int, float | None], *, relative: bool = False) -> Paired | None:
    """The values of b over those of a, seed by seed; `relative` as a share of a's, without seeds where that is 0.

    None where no seed has both.
    """
    rows = []
    for seed in sorted(set(a) & set(b)):
        left, right = a[seed], b[seed]
        if left is not None and right is not None and (left or not relative):
            rows.append((seed, left, right, (right - left) / (left if relative else 1.0)))
    if not rows:
        return None
    seeds, lefts, rights, found = zip(*rows, strict=True)
    return Paired(seeds=seeds, a=lefts, b=rights, differences=found)


def paired(
    a: Mapping[int, Run], b: Mapping[int, Run], measure: Callable[[Run], float | None], *, relative: bool = False
) -> Paired | None:
    """`differences` of what `measure` finds in the runs of two variants."""
    return differences(
        {seed: measure(run) for seed, run in a.items()}, {seed: measure(run) for seed, run in b.items()}, relative=relative
    )


def told(found: Paired, unit: str = "%", digits: int = 2, *, times: float = 100.0) -> str:
    """`+0.21 +- 0.10 % (3 seeds)`, numbers times 100 or as `times` says."""
    half = "unknown" if found.half == inf else f"{times * found.half:.{digits}f}"
    seeds = f"{len(found.seeds)} seed{'s' if len(found.seeds) > 1 else ''}"
    return f"{times * found.mean:+.{digits}f} +- {half}{unit and ' ' + unit} ({seeds})"


def claim_of_runs(
    id: str, title: str, printed: str | None, ours: str, holds: bool | None, why: str, source: str, **values: Any
) -> Claim:
    """A claim that finished runs judge; `values` are the numbers behind it."""
    plain = {name: value.to_json() if isinstance(value, Paired) else value for name, value in values.items()}
    return Claim(
        id=id, title=title, printed=printed, ours=ours, holds=holds, holds_engine=None, why=why, source=source,
        ours_by={BACKEND: ours}, values=plain,
    )  # fmt: skip


def runs_in(folder: Path, read: Callable[[Path, str, int], Run | None], *, made_by: str) -> dict[str, dict[int, Run]]:
    """All finished runs by variant and seed: what `read` makes of each `FOLDER/<variant>/seed-<k>`, None left out.

    Raises SpecError where there is none.
    """
    found: dict[str, dict[int, Run]] = {}
    for place in sorted(folder.glob("*/seed-*")):
        match = _SEED.fullmatch(place.name)
        variant = place.parent.name
        run = read(place, variant, int(match[1])) if match else None
        if match and run is not None:
            found.setdefault(variant, {})[int(match[1])] = run
    if not found:
        raise SpecError(f"runs={str(folder)!r}: holds no finished run; {made_by} makes them")
    return {variant: dict(sorted(runs.items())) for variant, runs in found.items()}


def lacking(runs: Mapping[str, Mapping[int, Run]], wanted: Sequence[str], seeds: int) -> dict[str, int]:
    """How many seeds each wanted variant lacks."""
    counts = {name: seeds - len(runs.get(name, {})) for name in wanted}
    return {name: count for name, count in counts.items() if count > 0}
