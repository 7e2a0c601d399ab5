"""Where workers live: what pools need of any such place, and a thread of the server's own process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Protocol

from tandem.serve.inbox import Inbox, run_worker
from tandem.serve.messages import Batch, Capacity, Command, Stop
from tandem.serve.worker import Worker
from tandem.spec.errors import TandemError


class WorkerDied(TandemError):
    """A worker ended by itself; the message says why."""


class Listener(Protocol):
    """Who hears of a worker, always on the event loop."""

    def on_events(self, batch: Batch) -> None:
        """Events of one step, in order."""
        ...

    def on_death(self, reason: str) -> None:
        """It died, or was killed; called once, and nothing comes after it. A worker that was told to stop does not die."""
        ...


class WorkerHandle(Protocol):
    """One worker as pools see it, in whatever place. It can be started again after it has died or stopped."""

    @property
    def id(self) -> str:
        """Its name among the pools' workers; the same after a restart."""
        ...

    @property
    def by_reference(self) -> bool:
        """Whether it shares memory with the pools, so that states come and go as objects."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it is up: started, not stopped and not dead."""
        ...

    async def start(self, listener: Listener) -> Capacity:
        """Bring it up. Raises WorkerDied if it does not come up; the listener hears nothing of that."""
        ...

    def send(self, command: Command) -> None:
        """Hand it a command, in order, without waiting. What is sent to a worker that is not alive is dropped."""
        ...

    async def stop(self, deadline_s: float) -> None:
        """End it after the step that runs, or by force after `deadline_s` seconds; the listener hears nothing of that."""
        ...

    def kill(self, reason: str) -> None:
        """Give it up at once; the listener hears of its death."""
        ...


class ThreadHost:
    """A worker in a thread of this process: states go by reference, and engines may share one model's weights."""

    by_reference = True

    def __init__(self, worker_id: str, build: Callable[[], Worker]) -> None:
        self.id = worker_id
        self._build = build
        self._run: _ThreadRun | None = None

    @property
    def alive(self) -> bool:
        """Whether it is up."""
        return self._run is not None and self._run.up

    async def start(self, listener: Listener) -> Capacity:
        """Build the engine in its thread and wait until it is there."""
        self._run = _ThreadRun(self.id, self._build, listener)
        return await self._run.capacity

    def send(self, command: Command) -> None:
        """Hand it a command."""
        if self._run is not None and self._run.up:
            self._run.inbox.put(command)

    async def stop(self, deadline_s: float) -> None:
        """End it; a thread that hangs in a step is left behind, as threads cannot be killed."""
        run, self._run = self._run, None
        if run is None:
            return
        run.listener = None
        run.inbox.put(Stop())
        try:
            await asyncio.wait_for(asyncio.shield(run.ended), deadline_s)
        except TimeoutError:
            run.inbox.close()
        else:  # what the thread still frees must be gone before the interpreter is: torch would abort it
            await asyncio.to_thread(run.thread.join, deadline_s)

    def kill(self, reason: str) -> None:
        """Forget it: its thread ends after the step that runs, and what that step gives is dropped."""
        run, self._run = self._run, None
        if run is not None:
            run.inbox.close()
            run.over(reason)


class _ThreadRun:
    """One life of the thread: nothing of it can be taken for that of a later one."""

    def __init__(self, worker_id: str, build: Callable[[], Worker], listener: Listener) -> None:
        self.loop = asyncio.get_running_loop()
        self.listener: Listener | None = listener
        self.inbox = Inbox()
        self.up = False
        self.capacity: asyncio.Future[Capacity] = self.loop.create_future()
        self.ended: asyncio.Future[None] = self.loop.create_future()
        self.thread = threading.Thread(target=self._main, args=(build,), name=f"tandem-{worker_id}", daemon=True)
        self.thread.start()

    def over(self, reason: str) -> None:
        """On the event loop: this life has ended."""
        self.up = False
        if not self.capacity.done():
            self.capacity.set_exception(WorkerDied(reason))
            return
        listener, self.listener = self.listener, None
        if listener is not None:
            listener.on_death(reason)

    def _main(self, build: Callable[[], Worker]) -> None:
        worker: Worker | None = None
        reason = "its thread ended"
        try:
            worker = build()
            self._call(self._began, worker.capacity)
            run_worker(worker, self.inbox, lambda batch: self._call(self._heard, batch))
        except Exception as wrong:
            reason = describe(wrong)
        finally:
            if worker is not None:
                worker.close()
            self._call(self._left, reason)

    def _call(self, what: Callable[..., None], *args: object) -> None:
        try:
            self.loop.call_soon_threadsafe(what, *args)
        except RuntimeError:  # the loop is closed: nobody listens
            self.inbox.close()

    def _began(self, capacity: Capacity) -> None:
        if not self.capacity.done():
            self.up = True
            self.capacity.set_result(capacity)

    def _heard(self, batch: Batch) -> None:
        if self.up and self.listener is not None:
            self.listener.on_events(batch)

    def _left(self, reason: str) -> None:
        self.over(reason)
        if not self.ended.done():
            self.ended.set_result(None)


def describe(wrong: BaseException) -> str:
    """An exception in one line."""
    return f"{type(wrong).__name__}: {' '.join(str(wrong).split()) or 'no message'}"
