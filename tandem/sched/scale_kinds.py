"""Which kind of worker, such as a parallelism, serves the traffic with the fewest GPUs, and whether changing to it pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.sched.scale_rates import PoolRates
from tandem.spec.units import require_int


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One way to run all workers."""

    name: str
    gpus: int
    """Of a worker."""
    rates: PoolRates

    def __post_init__(self) -> None:
        require_int("gpus", self.gpus)


def pays(gpus: Sequence[Sequence[int]], now: int, other: int, *, margin: float, start_up_s: float, held_s: float) -> bool:
    """Whether to replace kind `now` by `other`. `gpus`: what each kind would have taken, one row a window of the last `held_s`.

    It does when the other takes fewer by `margin` in the worst window, and what it saves in as long a time as was looked at is
    more than its start-up costs, for which both kinds are paid.
    """
    worst_now, worst_other = (max(row[kind] for row in gpus) for kind in (now, other))
    saved = (worst_now - worst_other) * held_s
    return worst_other <= (1.0 - margin) * worst_now and saved > worst_other * start_up_s
