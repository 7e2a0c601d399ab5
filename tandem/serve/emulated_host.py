"""Where emulated workers live: on the event loop itself, as timers. 200 of them need no thread, and cost their bookkeeping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from tandem.serve.emulated import EmulatedEngine
from tandem.serve.hosts import Listener, WorkerDied, describe
from tandem.serve.messages import Accept, Batch, Capacity, Command, Stop
from tandem.serve.worker import Worker

Build = Callable[[], tuple[EmulatedEngine, Capacity]]


class EmulatedHost:
    """A worker around an `EmulatedEngine`. What a step brings is told when the step would have ended.

    A first start takes `start_up_s` seconds, as the worker's process would, and so does each one after a death.
    """

    by_reference = True

    def __init__(
        self, worker_id: str, build: Build, *, start_up_s: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.id = worker_id
        self._build, self._start_up_s, self._clock = build, start_up_s, clock
        self._life: _Life | None = None

    @property
    def alive(self) -> bool:
        """Whether it is up."""
        return self._life is not None

    async def start(self, listener: Listener) -> Capacity:
        """Let the time of a start pass, and make the engine. Raises WorkerDied where that fails."""
        if self._start_up_s > 0.0:
            await asyncio.sleep(self._start_up_s)
        try:
            engine, capacity = self._build()
        except Exception as wrong:
            raise WorkerDied(describe(wrong)) from wrong
        self._life = _Life(engine, capacity, listener, self._clock, self._died)
        return capacity

    def send(self, command: Command) -> None:
        """Hand it a command; it is looked at between two steps."""
        if self._life is not None:
            self._life.send(command)

    async def stop(self, deadline_s: float) -> None:
        """End it; the step that runs brings nothing more."""
        life, self._life = self._life, None
        if life is not None:
            life.end()

    def kill(self, reason: str) -> None:
        """End it, and say that it died."""
        life, self._life = self._life, None
        if life is not None:
            life.end()
            life.listener.on_death(reason)

    def _died(self, life: _Life, reason: str) -> None:
        if self._life is life:
            self.kill(reason)


class _Life:
    """One life: commands that wait, the step that runs, and the timer for its end."""

    def __init__(
        self,
        engine: EmulatedEngine,
        capacity: Capacity,
        listener: Listener,
        clock: Callable[[], float],
        died: Callable[[_Life, str], None],
    ) -> None:
        self.listener = listener
        self._engine, self._clock, self._died = engine, clock, died
        self._worker = Worker(engine, capacity, clock=lambda: engine.now_s)
        self._loop = asyncio.get_running_loop()
        self._commands: list[Command] = []
        self._batch: Batch | None = None
        self._step_s = 0.0
        self._stepping = False
        """Whether the timer is the end of a step: commands wait for that."""
        self._waking = False
        self._over = False
        self._timer: asyncio.Handle | None = None
        engine.now_s = clock()
        self._timer = self._loop.call_soon(self._wake)

    def send(self, command: Command) -> None:
        self._commands.append(command)
        if isinstance(command, Accept):
            self._engine.announce_state(command.handoff.request.id, self._clock())
        if not self._stepping and not self._waking:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_soon(self._wake)

    def end(self) -> None:
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        self._worker.close()

    def _wake(self) -> None:
        self._timer, self._waking = None, True
        try:
            self._go_on()
        except Exception as wrong:
            self._died(self, describe(wrong))
        finally:
            self._waking = False

    def _go_on(self) -> None:
        engine, worker = self._engine, self._worker
        # A host that is late makes up for it by up to a step: steps take their time on average, and a host that has too much to
        # do gets fewer steps.
        late_s = self._step_s if self._stepping else 0.0
        engine.now_s = began_s = max(engine.now_s, self._clock() - late_s)
        batch, self._batch = self._batch, None
        if batch is not None:
            self.listener.on_events(batch)
        if self._over:
            return
        commands, self._commands = self._commands, []
        for command in commands:
            if isinstance(command, Stop):
                return
            worker.handle(command)
        batch = worker.step()
        self._step_s = engine.now_s - began_s
        self._stepping = self._step_s > 0.0
        if self._stepping:
            self._batch = batch
            self._timer = self._loop.call_later(max(0.0, engine.now_s - self._clock()), self._wake)
            return
        if batch is not None:
            self.listener.on_events(batch)
        if self._over:
            return
        due_s = engine.next_state_s
        if self._commands or not worker.idle:
            if due_s is not None and not self._commands:
                self._timer = self._loop.call_later(max(0.0, due_s - self._clock()), self._wake)
            else:
                self._timer = self._loop.call_soon(self._wake)
