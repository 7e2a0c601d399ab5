"""`Controller`: asks a scaling policy after each window, and has live pools do what it says."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tandem.sched.observation import Decision, ScalingPolicy
from tandem.sched.route import ROLES, Role
from tandem.serve.hosts import WorkerHandle
from tandem.serve.members import Member
from tandem.serve.observe import Observer, to_line
from tandem.serve.pools import Pools
from tandem.spec.errors import SpecError, TandemError
from tandem.spec.units import require_int, require_number
from tandem.spec.workload import Slo

log = logging.getLogger("tandem.serve")
KEPT = 256
"""Decisions that are remembered."""


@dataclass(slots=True)
class Done:
    """One decision and what came of it."""

    at_s: float
    decision: Decision
    steps: list[str] = field(default_factory=list)
    """What was done, or would have been in a dry run, in order."""


def workers_of(pools: Pools) -> list[dict[str, Any]]:
    """Workers as people and programs are told of them."""
    return [
        {
            "id": m.id,
            "role": m.role,
            "up": m.up,
            "draining": m.draining,
            "running": m.view.running,
            "waiting": 0 if m.stats is None else m.stats.engine.waiting + m.stats.deferred + m.stats.arriving,
            "queued_tokens": m.view.queued_tokens,
            "context_tokens": m.view.context_tokens,
            "free_tokens": m.view.free_tokens,
            "max_batch": m.view.max_batch,
        }
        for m in pools.workers.values()
    ]


class Controller:
    """Carries out what `policy` decides. `start` makes a worker for a role that is not yet up; without it workers change roles
    only. Workers that a person has drained are neither counted as there nor touched.

    `record` gets each observation as a line of JSON before the policy does: replayed, a policy decides the same.
    """

    def __init__(
        self,
        pools: Pools,
        policy: ScalingPolicy,
        *,
        clock: Callable[[], float],
        window_s: float = 15.0,
        start: Callable[[Role], Awaitable[WorkerHandle]] | None = None,
        max_workers: int | None = None,
        drain_s: float = 600.0,
        dry_run: bool = False,
        slo: Slo | None = None,
        record: Callable[[str], None] = lambda line: None,
    ) -> None:
        require_number("window_s", window_s, high=86_400.0)
        require_number("drain_s", drain_s, high=86_400.0)
        if max_workers is not None:
            require_int("max_workers", max_workers)
        self._pools, self._policy, self._clock, self._start = pools, policy, clock, start
        self._window_s, self._drain_s, self._max_workers = window_s, drain_s, max_workers
        self._record = record
        self._observer = Observer(pools, clock=clock, slo=slo)
        self.dry_run = dry_run
        self.paused = False
        self.history: deque[Done] = deque(maxlen=KEPT)
        if getattr(policy, "kinds", ()):
            raise SpecError("policy: chooses between kinds of workers, and live pools start one; leave its kinds out")
        self._changes: set[asyncio.Task[None]] = set()
        self._coming: Counter[Role] = Counter()
        """Workers that are on their way to a role: they are made, and not yet in the pools, or change their role."""
        self._unborn = 0
        """Those that are made."""
        self._loop: asyncio.Task[None] | None = None

    @property
    def changing(self) -> bool:
        """Whether changes are being carried out."""
        return bool(self._changes)

    def pause(self) -> None:
        """Change nothing more, and ask the policy no more; changes under way are finished."""
        self.paused = True

    def resume(self) -> None:
        """Go on."""
        self.paused = False

    def run(self) -> None:
        """Begin, on the event loop that runs."""
        self._loop = asyncio.get_running_loop().create_task(self._windows())

    async def close(self) -> None:
        """End; what was being changed is left as it is, and workers that drain for it take work again."""
        tasks = [*self._changes, *([] if self._loop is None else [self._loop])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def tick(self) -> Decision | None:
        """End a window: ask the policy, and begin to carry out what it says, beside what is under way. None while paused."""
        observation = self._observer.observe()
        if self.paused:
            return None
        self._record(to_line(observation))
        decision = self._policy.decide(observation)
        done = Done(observation.at_s, decision)
        self.history.append(done)
        if self.dry_run:
            done.steps = [f"would {step}" for step in self._plan(decision)]
            for step in done.steps:
                log.info("scaling: %s (%s)", step, decision.reason)
        else:
            self._carry_out(done)
        return decision

    async def settled(self) -> None:
        """Wait until changes under way are carried out."""
        if self._changes:
            await asyncio.wait(self._changes)

    def state(self) -> dict[str, Any]:
        """For people and programs: what was decided last."""
        decisions = [
            {"at_s": d.at_s, "targets": dict(d.decision.targets), "reason": d.decision.reason, "steps": list(d.steps)}
            for d in list(self.history)[-16:]
        ]
        mode = "dry-run" if self.dry_run else "paused" if self.paused else "running"
        return {"mode": mode, "changing": self.changing, "decisions": decisions}

    async def _windows(self) -> None:
        while True:
            await asyncio.sleep(self._window_s)
            try:
                self.tick()
            except Exception:  # a policy that fails must not end scaling for good
                log.exception("scaling: the policy failed")

    def _ours(self, role: Role) -> list[Member]:
        """Workers of a role that may be changed: the least busy first."""
        members = [m for m in self._pools.workers.values() if m.role == role and not m.draining]
        return sorted(members, key=lambda m: (m.up, m.view.running, m.view.queued_tokens, m.id))

    def _moves(self, decision: Decision) -> tuple[list[tuple[Role, Role]], list[Role], list[Role]]:
        """Which roles change into which, which are started, and which removed; one entry for each worker."""
        off = {r: decision.targets[r] - len(self._ours(r)) - self._coming[r] for r in ROLES if r in decision.targets}
        missing: list[Role] = [role for role, n in off.items() for _ in range(n)]
        spare: list[Role] = [role for role, n in off.items() for _ in range(-n)]
        flips = list(zip(spare, missing, strict=False))
        starts, removals = missing[len(flips) :], spare[len(flips) :]
        if self._start is None:
            return flips, [], []
        if self._max_workers is not None:
            starts = starts[: max(0, self._max_workers - len(self._pools.workers) - self._unborn)]
        return flips, starts, removals

    def _plan(self, decision: Decision) -> list[str]:
        flips, starts, removals = self._moves(decision)
        steps = [f"turn a {a} worker into {b}" for a, b in flips]
        return steps + [f"start a {role} worker" for role in starts] + [f"remove a {role} worker" for role in removals]

    def _carry_out(self, done: Done) -> None:
        """All at once: a start does not wait for a drain, nor the second start for the first."""
        flips, starts, removals = self._moves(done.decision)
        steps: list[Callable[[], Awaitable[str]]] = [partial(self._flip, source, target) for source, target in flips]
        steps += [partial(self._add, role) for role in starts]
        steps += [partial(self._remove, role) for role in removals]
        self._unborn += len(starts)
        for role in (*(target for _, target in flips), *starts):
            self._coming[role] += 1
        for step in steps:
            task = asyncio.get_running_loop().create_task(self._step(done, step))
            self._changes.add(task)
            task.add_done_callback(self._changes.discard)

    async def _step(self, done: Done, change: Callable[[], Awaitable[str]]) -> None:
        try:
            text = await change()
        except TandemError as wrong:
            text = f"not done: {' '.join(str(wrong).split())}"
        done.steps.append(text)
        log.info("scaling: %s (%s)", text, done.decision.reason)

    async def _drained(self, role: Role) -> Member:
        """A worker of `role` that is empty. Raises SpecError where there is none to be had."""
        members = [m for m in self._ours(role) if m.up]
        if not members:
            raise SpecError(f"role={role!r}: has no worker that could change")
        member = members[0]
        try:
            empty = await self._pools.drain(member.id, move=True, deadline_s=self._drain_s, scaling=True)
        except asyncio.CancelledError:
            self._back(member)
            raise
        if not empty:
            self._back(member)
            raise SpecError(f"worker={member.id!r}: was not empty after {self._drain_s:g} s; it goes on")
        if not member.scaling:
            raise SpecError(f"worker={member.id!r}: was changed by hand meanwhile; it is left alone")
        return member

    def _back(self, member: Member) -> None:
        if member.scaling:
            with suppress(SpecError):
                self._pools.resume(member.id)

    async def _flip(self, source: Role, target: Role) -> str:
        try:
            member = await self._drained(source)
            try:
                self._pools.set_role(member.id, target)
            except SpecError:
                self._back(member)
                raise
        finally:
            self._coming[target] -= 1
        return f"{member.id}: {source} -> {target}"

    async def _add(self, role: Role) -> str:
        assert self._start is not None
        try:
            handle = await self._start(role)
        finally:
            self._coming[role] -= 1
            self._unborn -= 1
        await self._pools.add(handle, role)
        return f"{handle.id}: started as {role}"

    async def _remove(self, role: Role) -> str:
        member = await self._drained(role)
        await self._pools.remove(member.id)
        return f"{member.id}: removed from {role}"
