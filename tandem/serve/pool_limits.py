"""Bounds of what pools take on, and who hears what happens in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from tandem.sched.request import Request
from tandem.sched.route import RoutingLimits
from tandem.serve.messages import WorkerStats
from tandem.spec.units import require_int

if TYPE_CHECKING:
    from tandem.serve.members import Member


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolLimits:
    """How much pools take on, and how often they try."""

    max_waiting: int = 4096
    """Requests that wait for a worker; more are refused."""
    queued_tokens: int = 16_384
    """Prompt tokens that wait at one worker: beyond it the rest waits here, where its order can still change."""
    held_states: int | None = None
    """Prompts that may be on their way through prefill workers, from submission until a decode worker has their state: what
    bounds the memory of states that nobody decodes yet. None: 8 for each worker."""
    ahead: int = 1
    """Handed-off requests that wait at a decode worker whose batch is full, so that a free place is filled in the next step."""
    max_retries: int = 3
    """How often a request is tried again after its worker has died."""
    prefix_tokens: int = 256
    """A prefix that may be cached is a multiple of so many tokens: an engine's `pass_tokens`."""
    routing: RoutingLimits = field(default_factory=RoutingLimits)

    def __post_init__(self) -> None:
        for name in ("max_waiting", "queued_tokens", "prefix_tokens"):
            require_int(name, getattr(self, name))
        if self.held_states is not None:
            require_int("held_states", self.held_states)
        for name in ("ahead", "max_retries"):
            require_int(name, getattr(self, name), low=0)

    def states(self, workers: int) -> int:
        """`held_states` of so many workers."""
        return 8 * workers if self.held_states is None else self.held_states


class PoolObserver(Protocol):
    """Hears what happens, for metrics; must be quick and must not raise."""

    def on_finish(self, life: Request) -> None:
        """A request has ended, well or not."""
        ...

    def on_stats(self, member: Member, stats: WorkerStats) -> None:
        """A worker has said how busy it is."""
        ...

    def on_retry(self, life: Request, reason: str) -> None:
        """A request is tried again."""
        ...


class Observers:
    """Several that hear the same; a `PoolObserver` itself."""

    def __init__(self, *observers: PoolObserver) -> None:
        self.all: list[PoolObserver] = list(observers)

    def on_finish(self, life: Request) -> None:
        """A request has ended."""
        for observer in self.all:
            observer.on_finish(life)

    def on_stats(self, member: Member, stats: WorkerStats) -> None:
        """A worker has said how busy it is."""
        for observer in self.all:
            observer.on_stats(member, stats)

    def on_retry(self, life: Request, reason: str) -> None:
        """A request is tried again."""
        for observer in self.all:
            observer.on_retry(life, reason)
