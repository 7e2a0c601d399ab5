"""What a simulation is told: kinds of workers and what they take, who is there at the start, and what goes wrong when."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.sched.batch import BatchLimits
from tandem.sched.route import ROLES, Role, RoutingLimits
from tandem.sim.times import StepTable
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int, require_number


@dataclass(frozen=True, kw_only=True)
class WorkerKind:
    """One way to run an instance: its step times, what it holds, what it costs. Workers of several kinds may serve together."""

    name: str
    times: StepTable
    limits: BatchLimits
    blocks: int
    """Blocks of `limits.block_size` tokens that its memory holds."""
    gpus: int = 1
    price_per_hour_usd: float = 0.0
    """Of the whole instance."""
    start_up_s: float = 60.0
    """From the decision to the first request: a process, weights, warm-up."""
    flip_s: float = 2.0
    """From drained in one role to ready in another."""

    def __post_init__(self) -> None:
        require_int("blocks", self.blocks, high=10**12)
        require_int("gpus", self.gpus)
        for name in ("price_per_hour_usd", "start_up_s", "flip_s"):
            if getattr(self, name) != 0:
                require_number(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """`count` workers of one kind in one role that are there at the start."""

    kind: WorkerKind
    role: Role
    count: int

    def __post_init__(self) -> None:
        require_int("count", self.count)
        if self.role not in ROLES:
            raise SpecError(f"role={self.role!r}: must be {', '.join(ROLES[:-1])} or {ROLES[-1]}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Death:
    """A worker dies: `worker` is its place among those of the start, first group first. Another starts in its stead."""

    at_s: float
    worker: int

    def __post_init__(self) -> None:
        require_number("at_s", self.at_s)
        require_int("worker", self.worker, low=0)


@dataclass(frozen=True, kw_only=True)
class SimConfig:
    """A simulation without its traffic."""

    groups: tuple[Group, ...]
    routing: RoutingLimits = field(default_factory=RoutingLimits)
    workers_per_link: int = 1
    """Workers that share one link for their states, each way: those of a node."""
    kinds: tuple[WorkerKind, ...] = ()
    """What a policy may replace workers by, beside the kinds that are there."""
    deaths: tuple[Death, ...] = ()
    window_s: float = 30.0
    """Time between two observations of a policy, and between two points of the time series."""
    until_s: float | None = None
    """End of the simulation; None: when all requests are done."""
    prefix_cache_tokens: int = 0
    """Tokens of prompts that each worker keeps for later requests with the same beginning, beside its blocks."""

    def __post_init__(self) -> None:
        if not any(group.role != "prefill" for group in self.groups):
            raise SpecError("groups: none of them decodes; give one of role decode or colocated")
        require_int("workers_per_link", self.workers_per_link)
        require_int("prefix_cache_tokens", self.prefix_cache_tokens, low=0, high=10**12)
        require_number("window_s", self.window_s)
        if self.until_s is not None:
            require_number("until_s", self.until_s)
