"""`Pools`: prefill and decode workers behind one front, with requests moving between them and workers coming and going.

Read `traffic.py` for what happens to a request, `worker.py` for what a worker does, `supervise.py` for how one is kept up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from types import MappingProxyType

from tandem.engine.types import EngineRequest, TokenOutput
from tandem.sched.route import ROLES, Role, StepTimes
from tandem.serve.hosts import WorkerHandle
from tandem.serve.members import Member, Roster
from tandem.serve.messages import Batch, Export, Inspect, Inspected
from tandem.serve.pool_limits import Observers, PoolLimits, PoolObserver
from tandem.serve.records import Record
from tandem.serve.supervise import Supervised, Supervision
from tandem.serve.traffic import Traffic
from tandem.spec.errors import SpecError

STOP_S = 10.0
"""A worker that was told to stop has so long to end its step."""
_ABLE: dict[str, tuple[Role, ...]] = {"prefill": ("prefill", "colocated"), "decode": ("decode", "colocated")}


class Pools:
    """A `Frontend` over workers. All methods are called on the event loop on which `start` ran.

    `workers` are pairs of a handle and its role. Where some are for prefill, requests are handed off; all workers must share
    one way of handing states over (by reference, or all by receipts).
    """

    def __init__(
        self,
        workers: Sequence[tuple[WorkerHandle, Role]],
        *,
        times: StepTimes,
        limits: PoolLimits | None = None,
        supervision: Supervision | None = None,
        clock: Callable[[], float] = time.monotonic,
        observer: PoolObserver | None = None,
    ) -> None:
        _check_workers(workers)
        self._members = Roster(Member(handle, role) for handle, role in workers)
        self._needed = [able for able in _ABLE if able == "decode" or any(m.role in _ABLE[able] for m in self._all)]
        self._observers = Observers() if observer is None else Observers(observer)
        self._traffic = Traffic(
            self._members,
            times=times,
            limits=limits or PoolLimits(),
            clock=clock,
            observer=self._observers,
            changed=self._changed,
        )
        self._clock, self._rules = clock, supervision or Supervision()
        self._supervised = {m.id: self._supervise(m) for m in self._all}
        self._max_context: int | None = None
        self._closing = False
        self._pinging: asyncio.Task[None] | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._inspections: dict[int, asyncio.Future[str | None]] = {}
        self._inspected = 0

    # Frontend.

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and output together, on the smallest worker."""
        if self._max_context is None:
            raise SpecError("max_context: is known once the workers are up; await start() first")
        return self._max_context

    @property
    def ready(self) -> bool:
        """Whether there is a worker for every needed role that takes new work, and none drains but for a controller."""
        return (
            not self._closing
            and not any(m.draining and not m.scaling for m in self._members.values())
            and all(any(m.role in _ABLE[able] and m.accepting for m in self._members.values()) for able in self._needed)
        )

    @property
    def in_flight(self) -> int:
        """Requests that were accepted and have not finished."""
        return self._traffic.in_flight

    async def stream(self, request: EngineRequest) -> AsyncIterator[TokenOutput]:
        """Outputs until one with a finish_reason; see `Frontend.stream`.

        Raises SpecError for an id that is being served, when too many requests wait, and once the pools are closing.
        """
        if self._closing:
            raise SpecError("the server is shutting down; ask another, or later")
        record = self._traffic.admit(request)
        if self._hopeless:
            self._traffic.fail(record, "no worker is left")
        try:
            while True:
                output = await record.channel.next()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self._traffic.leave(record)

    # Life.

    async def start(self) -> None:
        """Bring all workers up. Raises WorkerDied, with nothing left running, if one does not come up."""
        starts = await asyncio.gather(*(s.start() for s in self._supervised.values()), return_exceptions=True)
        failed = next((wrong for wrong in starts if wrong is not None), None)
        if failed is not None:
            await self._stop()
            raise failed
        self._pinging = asyncio.get_running_loop().create_task(self._ping())

    async def close(self, drain_s: float = 0.0) -> None:
        """Take nothing new, give what runs up to `drain_s` seconds, end the rest with an error, and stop all workers."""
        self._closing = True
        await self._until(lambda: not self.in_flight, drain_s)
        self._traffic.fail_all("the server is shutting down")
        if self._pinging is not None:
            self._pinging.cancel()
        await self._stop()

    # Workers.

    @property
    def workers(self) -> Mapping[str, Member]:
        """All workers by name."""
        return MappingProxyType(self._members)

    @property
    def retries(self) -> int:
        """How often requests were tried again after their worker had died."""
        return self._traffic.retries

    @property
    def waiting(self) -> int:
        """Requests that no worker has yet."""
        return self._traffic.waiting

    @property
    def held_states(self) -> int:
        """States between two workers."""
        return self._traffic.held_states

    @property
    def records(self) -> Collection[Record]:
        """Requests that have not finished."""
        return self._traffic.records

    def watch(self, observer: PoolObserver) -> None:
        """Let another hear what happens from now on."""
        self._observers.all.append(observer)

    async def add(self, handle: WorkerHandle, role: Role) -> None:
        """Bring one more worker up while others serve. Raises SpecError for one that does not go with them, WorkerDied if it
        does not come up; it is not among them then."""
        if self._closing:
            raise SpecError(f"worker={handle.id!r}: cannot be added; the server is shutting down")
        there = [(m.handle, m.role) for m in self._all]
        _check_workers([*there, (handle, role)])
        member = Member(handle, role)
        self._members.add(member)
        self._supervised[handle.id] = self._supervise(member)
        try:
            await self._supervised[handle.id].start()
        except BaseException:
            self._supervised.pop(handle.id, None)
            self._members.remove(handle.id)
            raise

    async def remove(self, worker_id: str) -> None:
        """End a drained worker and forget it. Raises SpecError if it is not drained."""
        member = self._member(worker_id)
        if not member.draining or not self._drained(member):
            raise SpecError(f"worker={worker_id!r}: is not drained; await drain() first")
        await self._supervised[worker_id].stop(STOP_S)
        del self._supervised[worker_id]
        self._members.remove(worker_id)
        self._traffic.on_death(member, "was removed")
        self._changed()

    async def drain(
        self, worker_id: str, *, move: bool = False, deadline_s: float | None = None, scaling: bool = False
    ) -> bool:
        """Send nothing new to a worker and wait until it has nothing left; whether that came about before the deadline.

        With `move` what it decodes goes on elsewhere at once, and so do prompts that it has not begun; with `scaling` the
        server stays ready meanwhile. Raises SpecError if nobody could do its work meanwhile.
        """
        member = self._member(worker_id)
        missing = self._missing(lambda m: m is not member and m.accepting)
        if missing and member.accepting:
            raise SpecError(f"drain={worker_id!r}: no other worker for {missing[0]} takes requests; start one first")
        member.draining, member.scaling = True, scaling
        member.changed()
        if move:
            for key in list(member.records):
                member.send(Export(key))
            self._traffic.recall(member)
        return await self._until(lambda: self._drained(member), deadline_s)

    def resume(self, worker_id: str) -> None:
        """Let a drained or draining worker take new work again."""
        member = self._member(worker_id)
        member.draining = member.scaling = False
        member.changed()
        self._traffic.spread(member)

    def set_role(self, worker_id: str, role: Role) -> None:
        """Give a drained worker another role, and let it take work. Raises SpecError if it is not drained, or if nobody would
        be left for a role that is needed."""
        member = self._member(worker_id)
        if role not in ROLES:
            raise SpecError(f"role={role!r}: must be {', '.join(ROLES[:-1])} or {ROLES[-1]}")
        if not member.draining or not self._drained(member):
            raise SpecError(f"role={role!r}: worker {worker_id!r} is not drained; await drain() first")
        left = [m.role for m in self._all if m is not member and m.accepting] + [role]
        missing = next((able for able in self._needed if not any(r in _ABLE[able] for r in left)), None)
        if missing is not None:
            raise SpecError(f"role={role!r}: without {worker_id!r} no worker would be left for {missing}")
        member.role = role
        self.resume(worker_id)

    async def check_integrity(self, deadline_s: float = 60.0) -> None:
        """Have every worker that is up check what it holds. Raises RuntimeError with what is wrong."""
        asked = []
        for member in self._all:
            if member.up:
                self._inspected += 1
                answer = asyncio.get_running_loop().create_future()
                self._inspections[self._inspected] = answer
                asked.append((member, answer))
                member.send(Inspect(self._inspected))
        try:
            async with asyncio.timeout(deadline_s):
                found = [(member.id, await answer) for member, answer in asked]
        finally:
            self._inspections.clear()
        wrong = [f"{name}: {what}" for name, what in found if what is not None]
        if wrong:
            raise RuntimeError("; ".join(wrong))

    # What happens.

    @property
    def _all(self) -> list[Member]:
        return list(self._members.values())

    def _supervise(self, member: Member) -> Supervised:
        return Supervised(member, self._rules, clock=self._clock, on_events=self._heard, on_up=self._up, on_down=self._down)

    def _member(self, worker_id: str) -> Member:
        try:
            return self._members[worker_id]
        except KeyError:
            raise SpecError(f"worker={worker_id!r}: unknown; there are {', '.join(self._members)}") from None

    def _missing(self, counts: Callable[[Member], bool]) -> list[str]:
        """Needed abilities that none of the members that count has."""
        there = [m.role for m in self._all if counts(m)]
        return [able for able in self._needed if not any(role in _ABLE[able] for role in there)]

    def _drained(self, member: Member) -> bool:
        return not member.records and not self._traffic.states_of(member)

    def _heard(self, member: Member, batch: Batch) -> None:
        for event in batch.events:
            if isinstance(event, Inspected):
                answer = self._inspections.pop(event.number, None)
                if answer is not None and not answer.done():
                    answer.set_result(event.error)
        self._traffic.on_events(member, batch)

    def _up(self, member: Member) -> None:
        known = [m.capacity.max_context for m in self._all if m.capacity is not None]
        self._max_context = min(known)
        self._traffic.spread(member)

    def _down(self, member: Member, reason: str) -> None:
        self._traffic.on_death(member, reason)
        if self._hopeless:
            self._traffic.fail_waiting(f"no worker is left; {member.id}: {reason}")

    @property
    def _hopeless(self) -> bool:
        return all(m.hopeless for m in self._members.values() if m.role in _ABLE["decode"])

    def _changed(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _until(self, what: Callable[[], bool], deadline_s: float | None) -> bool:
        """Wait until something holds; whether it did before the deadline."""
        try:
            async with asyncio.timeout(deadline_s):
                while not what():
                    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    self._waiters.append(waiter)
                    await waiter
        except TimeoutError:
            return False
        return True

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(self._rules.ping_s)
            for supervised in self._supervised.values():
                supervised.check()

    async def _stop(self) -> None:
        await asyncio.gather(*(s.stop(STOP_S) for s in self._supervised.values()))


def _check_workers(workers: Sequence[tuple[WorkerHandle, Role]]) -> None:
    if len({handle.id for handle, _ in workers}) != len(workers):
        raise SpecError(f"workers: {[h.id for h, _ in workers]} must have names of their own")
    unknown = next((role for _, role in workers if role not in ROLES), None)
    if unknown is not None:
        raise SpecError(f"role={unknown!r}: must be {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    if not any(role in _ABLE["decode"] for _, role in workers):
        raise SpecError("workers: none of them decodes; give one of role decode or colocated")
    if len({handle.by_reference for handle, _ in workers}) > 1:
        raise SpecError("workers: some live in this process and some do not; their states cannot be handed over")
