"""Keeps workers up: starts them again after they have died, later each time, and gives up those that do not answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from tandem.serve.hosts import WorkerDied, describe
from tandem.serve.members import Member
from tandem.serve.messages import Batch, Capacity, Ping, Pong
from tandem.spec.units import require_int, require_number

log = logging.getLogger("tandem.serve")


@dataclass(frozen=True, kw_only=True, slots=True)
class Supervision:
    """When a worker counts as dead, and how it is brought back."""

    ping_s: float = 5.0
    """Between two questions to a worker whether it is there."""
    deadline_s: float = 120.0
    """Without an answer for so long it is killed; must be longer than any step takes."""
    first_delay_s: float = 0.5
    """Before the first restart; doubled each time that it dies again before it was healthy."""
    longest_delay_s: float = 30.0
    healthy_s: float = 60.0
    """Once up for so long, what was before is forgotten."""
    patient_starts: int = 8
    """After so many deaths in a row nobody waits for the worker any more, though it is still tried."""

    def __post_init__(self) -> None:
        for name in ("ping_s", "deadline_s", "first_delay_s", "longest_delay_s", "healthy_s"):
            require_number(name, getattr(self, name), high=86_400.0)
        require_int("patient_starts", self.patient_starts)

    def delay_s(self, failures: int) -> float:
        """Before the restart that follows `failures` deaths in a row."""
        return min(self.longest_delay_s, self.first_delay_s * 2.0 ** min(failures - 1, 30))


class Supervised:
    """One member with its host's listener, its restarts and its pings. Created and used on the event loop."""

    def __init__(
        self,
        member: Member,
        rules: Supervision,
        *,
        clock: Callable[[], float],
        on_events: Callable[[Member, Batch], None],
        on_up: Callable[[Member], None],
        on_down: Callable[[Member, str], None],
    ) -> None:
        self.member = member
        self._rules, self._clock = rules, clock
        self._events, self._went_up, self._went_down = on_events, on_up, on_down
        self._failures = 0
        self._up_since_s = 0.0
        self._asked = 0
        self._checked_s = 0.0
        self._silent_s = 0.0
        self._restart: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self) -> None:
        """First start; raises WorkerDied if it does not come up."""
        self._began(await self.member.handle.start(self))

    async def stop(self, deadline_s: float) -> None:
        """End the worker and whatever would start it again."""
        self._stopping = True
        if self._restart is not None:
            self._restart.cancel()
            await asyncio.wait([self._restart])
        await self.member.handle.stop(deadline_s)
        self.member.ended()

    def check(self) -> None:
        """Ask whether it is there, and kill it if it has been silent for too long.

        Only time in which this server itself came to ask counts: a machine that stood still says nothing about a worker.
        """
        if not self.member.up:
            return
        now, before_s = self._clock(), self._checked_s
        self._checked_s = now
        self._silent_s += min(now - before_s, 2.0 * self._rules.ping_s)
        if self._silent_s > self._rules.deadline_s:
            self.member.handle.kill(f"did not answer for {self._rules.deadline_s:g} s")
            return
        self._asked += 1
        self.member.send(Ping(self._asked))

    def on_events(self, batch: Batch) -> None:
        """The host's: a step was made."""
        if any(isinstance(event, Pong) for event in batch.events):
            self._silent_s = 0.0
        self._events(self.member, batch)

    def on_death(self, reason: str) -> None:
        """The host's: the worker is gone."""
        if self._clock() - self._up_since_s >= self._rules.healthy_s:
            self._failures = 0
        log.warning("worker %s: %s", self.member.id, reason)
        self._failed(reason)

    def _began(self, capacity: Capacity) -> None:
        self._up_since_s = self._checked_s = self._clock()
        self._silent_s = 0.0
        self.member.hopeless = False
        self.member.began(capacity)
        self._went_up(self.member)

    def _failed(self, reason: str) -> None:
        self._failures += 1
        self.member.ended()
        self.member.hopeless = self._failures >= self._rules.patient_starts
        if not self._stopping:
            self._restart = asyncio.get_running_loop().create_task(self._again())
        self._went_down(self.member, reason)

    async def _again(self) -> None:
        await asyncio.sleep(self._rules.delay_s(self._failures))
        try:
            self._began(await self.member.handle.start(self))
        except Exception as wrong:  # whatever it is, the next try may do: a worker that is not tried again is lost
            reason = str(wrong) if isinstance(wrong, WorkerDied) else describe(wrong)
            log.warning("worker %s does not come up: %s", self.member.id, reason)
            self._failed(reason)
