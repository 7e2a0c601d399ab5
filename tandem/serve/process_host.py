"""A worker in a process of its own on this machine: commands and events go through a socket pair, states through shared memory.

Its death is seen at once, as the socket closes; when the server dies, the worker sees the same and ends.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import cast

from tandem.serve.frames import Unpacker, packed
from tandem.serve.hosts import Listener, WorkerDied
from tandem.serve.messages import Batch, Capacity, Command, Stop
from tandem.serve.worker import Worker

_STDERR = 2


class ProcessHost:
    """Starts `build` (which must pickle) in a fresh Python process with `threads` threads for its arithmetic.

    `sweep` is called after each death, to free what the process can no longer free itself.
    """

    by_reference = False

    def __init__(
        self,
        worker_id: str,
        build: Callable[[], Worker],
        *,
        threads: int | None = None,
        sweep: Callable[[], None] | None = None,
    ) -> None:
        self.id = worker_id
        self._build, self._threads, self._sweep = build, threads, sweep
        self._run: _ProcessRun | None = None

    @property
    def alive(self) -> bool:
        """Whether it is up."""
        return self._run is not None and self._run.up

    @property
    def pid(self) -> int | None:
        """Of its process, while it is up."""
        return self._run.process.pid if self._run is not None and self._run.up else None

    async def start(self, listener: Listener) -> Capacity:
        """Start the process and wait until its engine is there."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = self._spawn(theirs)
        run = _ProcessRun(process, listener, self._sweep)
        self._run = run
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: run, ours)
        run.write(self._build)
        try:
            return await run.capacity
        except BaseException:
            run.end()
            raise

    def send(self, command: Command) -> None:
        """Hand it a command; the event loop writes it when the process reads."""
        if self._run is not None and self._run.up:
            self._run.write(command)

    async def stop(self, deadline_s: float) -> None:
        """End it after the step that runs, by force after the deadline."""
        run, self._run = self._run, None
        if run is None:
            return
        run.listener = None
        run.write(Stop())
        try:
            await asyncio.wait_for(asyncio.shield(run.gone), deadline_s)
        except TimeoutError:
            run.process.kill()
            await run.gone

    def kill(self, reason: str) -> None:
        """Kill the process."""
        if self._run is not None:
            self._run.reason = reason
            self._run.process.kill()

    def _spawn(self, channel: socket.socket) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        if self._threads is not None:
            environment |= {"OMP_NUM_THREADS": str(self._threads), "MKL_NUM_THREADS": str(self._threads)}
        words = [sys.executable, "-P", "-m", "tandem.serve.process_worker", str(channel.fileno())]
        # What a library prints must not mix with the one JSON line that the server prints: stdout goes where errors go.
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=_STDERR, env=environment, pass_fds=(channel.fileno(),))


class _ProcessRun(asyncio.Protocol):
    """One life of the process, and the server's end of its socket."""

    def __init__(self, process: subprocess.Popen[bytes], listener: Listener, sweep: Callable[[], None] | None) -> None:
        loop = asyncio.get_running_loop()
        self.process = process
        self.listener: Listener | None = listener
        self.reason: str | None = None
        self.up = False
        self.capacity: asyncio.Future[Capacity] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        self._sweep = sweep
        self._unpacker = Unpacker()
        self._transport: asyncio.WriteTransport | None = None
        self._reaping: asyncio.Task[None] | None = None

    def write(self, message: object) -> None:
        """Send one message; into a closed socket it is lost."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(packed(message))

    def end(self) -> None:
        """Nobody wants it any more."""
        self.listener = None
        self.capacity.cancel()
        self.process.kill()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio's: the socket is ours."""
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is one, and no subclass

    def data_received(self, data: bytes) -> None:
        """Asyncio's: some bytes have come."""
        for message in self._unpacker.feed(data):
            match message:
                case Batch() if self.listener is not None:
                    self.listener.on_events(message)
                case Capacity() if not self.capacity.done():
                    self.up = True
                    self.capacity.set_result(message)
                case str():
                    self.reason = self.reason or message

    def connection_lost(self, wrong: Exception | None) -> None:
        """Asyncio's: the process has closed its end, most likely by dying."""
        self.up = False
        self._reaping = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        self.process.kill()  # a process without its socket can do nothing; one that is dead already is not touched
        await asyncio.get_running_loop().run_in_executor(None, self.process.wait)
        if self._sweep is not None:
            self._sweep()
        listener, self.listener = self.listener, None
        reason = self.reason or _ending(self.process.returncode)
        if not self.capacity.done():
            self.capacity.set_exception(WorkerDied(reason))
        elif listener is not None:
            listener.on_death(reason)
        if not self.gone.done():
            self.gone.set_result(None)


def _ending(code: int) -> str:
    return f"its process was ended by signal {-code}" if code < 0 else f"its process ended with status {code}"
