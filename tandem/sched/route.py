"""Which worker gets a prompt, and which one a sequence whose state is there. Pure: what is known comes in, a choice comes out.

A prompt costs what all lose by it: seconds until its first token and its state is where it decodes, and seconds for which the
requests that decode beside it pause. So a long prompt goes through a prefill worker, a short one may stay where it decodes, and
a prefix that a worker has cached draws the prompt there, all by one rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Literal, Protocol

from tandem.spec.errors import Infeasible, SpecError
from tandem.spec.units import require_int

Role = Literal["prefill", "decode", "colocated"]
ROLES: tuple[Role, ...] = ("prefill", "decode", "colocated")
NO_ROOM = "; none has room, so it waits"
_NEARLY = 1.0 - 1e-12
"""Rounding alone makes nobody dearer."""


class StepTimes(Protocol):
    """How long things take on a worker; all in seconds, all growing with every argument."""

    def prefill_s(self, tokens: int, context: int) -> float:
        """Prefilling `tokens` tokens of a prompt after `context` others whose state is there; 0 for none."""
        ...

    def decode_s(self, batch: int, context_tokens: int) -> float:
        """One decode step of `batch` sequences that are `context_tokens` long in all; 0 for none."""
        ...

    def transfer_s(self, tokens: int) -> float:
        """Moving the state of `tokens` tokens to another worker, as far as it is not hidden behind their prefill."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerView:
    """What the router knows of a worker, with what it has sent there since."""

    id: str
    role: Role
    accepting: bool = True
    """False while it starts, drains or is gone."""
    queued_tokens: int = 0
    """Prompt tokens that it has still to prefill."""
    running: int = 0
    """Sequences that decode there, or wait there with their state."""
    context_tokens: int = 0
    """Tokens of those sequences."""
    max_batch: int = 1
    free_tokens: int = 0
    """Tokens whose state it has room for."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise SpecError(f"role={self.role!r}: must be {', '.join(ROLES[:-1])} or {ROLES[-1]}")
        for name in ("queued_tokens", "running", "context_tokens", "free_tokens"):
            require_int(name, getattr(self, name), low=0, high=10**12)
        require_int("max_batch", self.max_batch)


LOCAL_TOKENS = 128
"""Longest uncached prompt that decode workers prefill themselves where there are prefill workers, in Tandem's server and in
simulations of it. A longer one would hold up whoever comes to decode meanwhile, whom no prediction knows yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingLimits:
    """How the router weighs and what it never does."""

    step_tokens: int = 512
    """Tokens of an engine's step: a prompt beside decoding requests waits for a decode step every so many."""
    pause_weight: float = 1.0
    """What a second costs for which a decoding request pauses, against one until a first token; 0 ignores those who decode."""
    max_local_tokens: int | None = None
    """Most uncached tokens that a decode worker prefills itself while a prefill worker is there; None: as the times have it."""

    def __post_init__(self) -> None:
        require_int("step_tokens", self.step_tokens)
        if isinstance(self.pause_weight, bool) or not 0.0 <= self.pause_weight <= 1e6:
            raise SpecError(f"pause_weight={self.pause_weight!r}: must be from 0 to 1,000,000")
        if self.max_local_tokens is not None:
            require_int("max_local_tokens", self.max_local_tokens, low=0)


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes, and why, in one line."""

    worker_id: str
    hand_off: bool
    """Prefilled there only: its state is to move on after the first token."""
    explain: Callable[[], str] = field(compare=False, repr=False)
    """Puts the reason into words, which takes longer than the choice."""

    @property
    def reason(self) -> str:
        """Why, in one line."""
        return self.explain()


@dataclass(frozen=True, slots=True)
class PromptCost:
    """What a prompt would cost at one worker, in seconds."""

    queued_s: float
    """Prefill of what waits there."""
    own_s: float
    """Prefill of its own uncached tokens."""
    steps_s: float
    """Decode steps that run in between."""
    transfer_s: float
    """Moving its state to where it decodes."""
    pauses_s: float
    """Pauses of those who decode there, summed over them and weighted."""

    @property
    def total_s(self) -> float:
        """The sum, by which workers are compared."""
        return self.queued_s + self.own_s + self.steps_s + self.transfer_s + self.pauses_s


def prompt_cost(isl: int, cached: int, worker: WorkerView, times: StepTimes, limits: RoutingLimits) -> PromptCost:
    """Cost of a prompt of `isl` tokens at `worker`, which holds the state of its first `cached` ones."""
    known = min(max(cached, 0), isl - 1)  # the first output token needs one prompt token at least
    own_s = times.prefill_s(isl - known, known)
    steps = -(-(worker.queued_tokens + isl - known) // limits.step_tokens) if worker.running else 0
    return PromptCost(
        queued_s=times.prefill_s(worker.queued_tokens, 0) if worker.queued_tokens else 0.0,
        own_s=own_s,
        steps_s=steps * times.decode_s(worker.running, worker.context_tokens) if steps else 0.0,
        transfer_s=times.transfer_s(isl) if worker.role == "prefill" else 0.0,
        pauses_s=limits.pause_weight * worker.running * own_s,
    )


def route_prompt(
    isl: int, cached: Mapping[str, int], workers: Sequence[WorkerView], times: StepTimes, limits: RoutingLimits
) -> Route | Infeasible:
    """The worker at which a prompt of `isl` tokens costs least; `cached` has the prompt tokens that each has in its cache.

    On a prefill worker the request is handed off, elsewhere it stays. Workers with no room for the prompt are taken only when
    all are so; equal costs go to the first id. Infeasible, with the reason, where nobody accepts or nobody would decode.
    """
    require_int("isl", isl)
    prefillers: list[WorkerView] = []
    decoders: list[WorkerView] = []
    for worker in workers:
        if worker.accepting:
            (prefillers if worker.role == "prefill" else decoders).append(worker)
    if not decoders:
        return _nobody(workers)
    most = limits.max_local_tokens
    if prefillers and most is not None:
        decoders = [w for w in decoders if w.role == "colocated" or isl - cached.get(w.id, 0) <= most]
    own_s = times.prefill_s(isl, 0)
    best: WorkerView | None = None
    least = (True, inf, "")
    for worker in _shortest_queue(prefillers, cached) + decoders:
        known = cached.get(worker.id, 0)
        no_room = not _has_room(worker, isl)
        if known > 0 or worker.role == "prefill":
            key = (no_room, prompt_cost(isl, known, worker, times, limits).total_s, worker.id)
        else:
            floor_s = own_s + limits.pause_weight * worker.running * own_s
            if (no_room, floor_s * _NEARLY) > least[:2]:
                continue
            key = (no_room, _local_cost(isl, own_s, worker, times, limits), worker.id)
        if best is None or key < least:
            best, least = worker, key
    assert best is not None
    chosen, full = best, least[0]

    def explain() -> str:
        costs = {w.id: prompt_cost(isl, cached.get(w.id, 0), w, times, limits) for w in prefillers + decoders}
        return _explain_prompt(chosen, costs, cached.get(chosen.id, 0), full)

    return Route(chosen.id, chosen.role == "prefill", explain)


def route_decode(context_tokens: int, workers: Sequence[WorkerView], times: StepTimes) -> Route | Infeasible:
    """The worker whose decode step is shortest once a sequence of `context_tokens` tokens is part of it.

    Those with room go first, then those where it must wait; equal times go to the first id. Infeasible, with the reason, where
    nobody accepts.
    """
    require_int("context_tokens", context_tokens, high=10**12)
    candidates = [worker for worker in workers if worker.accepting and worker.role != "prefill"]
    if not candidates:
        return _nobody(workers)
    best, least = candidates[0], (True, inf, "")
    for worker in candidates:
        step_s = times.decode_s(worker.running + 1, worker.context_tokens + context_tokens)
        key = (not _has_room(worker, context_tokens), step_s, worker.id)
        if key < least:
            best, least = worker, key
    chosen, (full, seconds, _) = best, least

    def explain() -> str:
        reason = f"{chosen.id}: step of {seconds:.3g} s with {chosen.running + 1} sequences, least of {len(candidates)}"
        return reason + (NO_ROOM if full else "")

    return Route(chosen.id, False, explain)


def _shortest_queue(prefillers: list[WorkerView], cached: Mapping[str, int]) -> list[WorkerView]:
    """Those that can cost least: of the ones that decode nothing and have nothing of the prompt cached, the one with the least
    to prefill, since all else is the same for them and times grow with what waits."""
    others, first = [], None
    for worker in prefillers:
        if worker.running or cached.get(worker.id, 0) > 0:
            others.append(worker)
        elif first is None or (worker.queued_tokens, worker.id) < (first.queued_tokens, first.id):
            first = worker
    return others if first is None else [first, *others]


def _local_cost(isl: int, own_s: float, worker: WorkerView, times: StepTimes, limits: RoutingLimits) -> float:
    """`prompt_cost` in total for a worker that decodes and has nothing of the prompt cached, summed in the same order."""
    queued, running = worker.queued_tokens, worker.running
    total_s = (times.prefill_s(queued, 0) if queued else 0.0) + own_s
    if running:
        total_s += -(-(queued + isl) // limits.step_tokens) * times.decode_s(running, worker.context_tokens)
    return total_s + limits.pause_weight * running * own_s


def _has_room(worker: WorkerView, tokens: int) -> bool:
    """Whether a sequence can stay there. Prompts leave a prefill worker, so there it is a matter of the queue alone."""
    return worker.role == "prefill" or (worker.running < worker.max_batch and worker.free_tokens > tokens)


def _nobody(workers: Sequence[WorkerView]) -> Infeasible:
    able = [worker for worker in workers if worker.role != "prefill"]
    if not able:
        return Infeasible(f"none of {len(workers)} workers decodes; start one of role decode or colocated")
    return Infeasible(f"none of the {len(able)} workers that could accepts: {', '.join(sorted(w.id for w in able))}")


def _explain_prompt(best: WorkerView, costs: Mapping[str, PromptCost], cached: int, full: bool) -> str:
    cost = costs[best.id]
    parts = [
        f"{seconds:.3g} s {name}"
        for name, seconds in (
            ("queued", cost.queued_s),
            ("prefill" + (f" ({cached} tokens cached)" if cached else ""), cost.own_s),
            ("decode steps between", cost.steps_s),
            ("transfer", cost.transfer_s),
            ("pauses of others", cost.pauses_s),
        )
        if seconds
    ]
    others = [(other.total_s, name) for name, other in costs.items() if name != best.id]
    next_best = ""
    if others:
        seconds, name = min(others)
        next_best = f"; {name} would cost {seconds:.3g} s"
    return f"{best.id}: {' + '.join(parts) or '0 s'}{next_best}{NO_ROOM if full else ''}"
