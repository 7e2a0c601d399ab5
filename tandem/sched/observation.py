"""What a scaling policy sees and what it answers: the same in the simulator and against live pools. Data only.

An observation is of one window, made from what workers and finished requests said; a policy never sees how long an answer will
be, only how long those were that have ended and how far the others are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tandem.sched.route import Role


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolCount:
    """Workers of one role (and kind, where several serve)."""

    role: Role
    kind: str = ""
    up: int = 0
    """Accept requests now."""
    starting: int = 0
    draining: int = 0
    gpus_per_worker: int = 1
    running: int = 0
    """Sequences that decode there, or wait there with their state."""
    queued_tokens: int = 0
    """Prompt tokens sent there and not yet prefilled."""
    busy: float | None = None
    """Share of the window in which its workers that were up had work; None: not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Token counts seen in a window: how many, mean, and quantiles."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[int]) -> Lengths | None:
        """Of these counts; None of none."""
        if not values:
            return None
        p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)))
        return cls(count=len(values), mean=float(np.mean(values)), p50=p50, p90=p90, p99=p99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """One window. None stands for what nobody measured, which is not the same as 0."""

    at_s: float
    """Its end, seconds on the caller's clock."""
    window_s: float
    pools: tuple[PoolCount, ...]
    arrived: int | None
    """Requests that came in the window."""
    isl: Lengths | None
    """Of those that came."""
    osl: Lengths | None
    """Of those that ended in the window."""
    waiting: int = 0
    """Requests whose prefill has not begun, wherever they wait."""
    waiting_tokens: int = 0
    """Prompt tokens of theirs and what remains of prefills under way."""
    oldest_wait_s: float = 0.0
    waiting_decode: int = 0
    """Sequences that are prefilled and that no decode worker has room for."""
    decoding: int = 0
    decoding_tokens: int = 0
    """Context of those that decode."""
    decoded: Lengths | None = None
    """Output tokens so far of those that decode: what they will reach is at least this."""
    generated: int | None = None
    """Output tokens that came in the window, of whomever."""
    first_tokens: int = 0
    """Answers that began in the window."""
    ttft_s: float | None = None
    """90th percentile of first tokens in the window."""
    tpot_s: float | None = None
    """Mean of those that ended in the window."""
    attainment: float | None = None
    """Share of those that ended in the window which met the objective."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Workers that each role should have, counting those that start, and why in one line. Whoever carries it out flips workers
    between roles first (drained ones only), then starts and removes."""

    targets: Mapping[Role, int]
    reason: str
    changed: bool = False
    """Whether the targets differ from what is there or on its way."""
    kind: str | None = None
    """The kind that all workers are to be from now on; those of another are replaced one after another, and `targets` count
    workers of this kind. None: as they are."""


class ScalingPolicy(Protocol):
    """A policy with its memory: `tandem.sched.scale.Scaler` wraps the pure `decide`; the study has others."""

    def decide(self, observation: Observation) -> Decision:
        """What to aim at after this window."""
        ...
