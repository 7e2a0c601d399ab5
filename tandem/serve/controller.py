"""`Controller`: asks a scaling policy after each window, and has live pools do what it says, one set of changes at a time."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
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
        {"id": m.id, "role": m.role, "up": m.up, "draining": m.draining, "running": m.view.running}
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
        window_s: float = 30.0,
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
        self._change: asyncio.Task[None] | None = None
        self._loop: asyncio.Task[None] | None = None

    @property
    def changing(self) -> bool:
        """Whether a set of changes is being carried out."""
        return self._change is not None and not self._change.done()

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
        tasks = [task for task in (self._loop, self._change) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def tick(self) -> Decision | None:
        """End a window: ask the policy, and begin to carry out what it says unless changes are under way. None while paused."""
        observation = self._observer.observe()
        if self.paused:
            return None
        self._record(to_line(observation))
        decision = self._policy.decide(observation)
        done = Done(observation.at_s, decision)
        self.history.append(done)
        if decision.kind is not None:
            done.steps = [f"nothing: these pools start no workers of another kind ({decision.kind})"]
        elif self.dry_run:
            done.steps = [f"would {step}" for step in self._plan(decision)]
        elif self.changing:
            done.steps = ["nothing: earlier changes are under way"]
        elif self._plan(decision):
            self._change = asyncio.get_running_loop().create_task(self._carry_out(done))
        for step in done.steps:
            log.info("scaling: %s (%s)", step, decision.reason)
        return decision

    async def settled(self) -> None:
        """Wait until changes under way are carried out."""
        if self._change is not None:
            await asyncio.wait([self._change])

    def state(self) -> dict[str, Any]:
        """For people and programs: workers, and what was decided last."""
        decisions = [
            {"at_s": d.at_s, "targets": dict(d.decision.targets), "reason": d.decision.reason, "steps": list(d.steps)}
            for d in list(self.history)[-16:]
        ]
        mode = "dry-run" if self.dry_run else "paused" if self.paused else "running"
        return {"mode": mode, "changing": self.changing, "workers": workers_of(self._pools), "decisions": decisions}

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
        off = {role: decision.targets[role] - len(self._ours(role)) for role in ROLES if role in decision.targets}
        missing: list[Role] = [role for role, n in off.items() for _ in range(n)]
        spare: list[Role] = [role for role, n in off.items() for _ in range(-n)]
        flips = list(zip(spare, missing, strict=False))
        starts, removals = missing[len(flips) :], spare[len(flips) :]
        if self._start is None:
            return flips, [], []
        if self._max_workers is not None:
            starts = starts[: max(0, self._max_workers - len(self._pools.workers))]
        return flips, starts, removals

    def _plan(self, decision: Decision) -> list[str]:
        flips, starts, removals = self._moves(decision)
        steps = [f"turn a {a} worker into {b}" for a, b in flips]
        return steps + [f"start a {role} worker" for role in starts] + [f"remove a {role} worker" for role in removals]

    async def _carry_out(self, done: Done) -> None:
        flips, starts, removals = self._moves(done.decision)
        for source, target in flips:
            await self._step(done, self._flip(source, target))
        for role in starts:
            await self._step(done, self._add(role))
        for role in removals:
            await self._step(done, self._remove(role))

    async def _step(self, done: Done, change: Awaitable[str]) -> None:
        try:
            text = await change
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
        member = await self._drained(source)
        try:
            self._pools.set_role(member.id, target)
        except SpecError:
            self._back(member)
            raise
        return f"{member.id}: {source} -> {target}"

    async def _add(self, role: Role) -> str:
        assert self._start is not None
        handle = await self._start(role)
        await self._pools.add(handle, role)
        return f"{handle.id}: started as {role}"

    async def _remove(self, role: Role) -> str:
        member = await self._drained(role)
        await self._pools.remove(member.id)
        return f"{member.id}: removed from {role}"
