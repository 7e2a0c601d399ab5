"""A worker as an actor of a Ray cluster, on this machine or another: the third kind of host, beside threads and processes.

Commands go as numbered calls, for Ray does not promise their order; events come as the answer to a call that waits for them.
Ray does not restart the actor: whoever supervises the workers does.
"""

from __future__ import annotations

import asyncio
import os
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import ray
from ray.exceptions import RayError

from tandem.serve.hosts import Listener, WorkerDied, describe
from tandem.serve.inbox import Inbox, run_worker
from tandem.serve.messages import Batch, Capacity, Command, Stop
from tandem.serve.ray_cluster import placement
from tandem.serve.worker import Worker
from tandem.spec.errors import SpecError

START_S = 300.0
"""An actor that has no place in the cluster within this time, or has not built its engine, does not come up."""

_GONE = (RayError, ConnectionError)
"""What a call raises whose actor is dead, or whose cluster."""


class RayHost:
    """Starts `build` (which must pickle) in an actor with `threads` threads and `num_gpus` GPUs.

    `node` is where it should live, None for wherever the fewest workers are; see `RayCluster.nodes`. `tensor_transport` is for
    workers whose states go from GPU to GPU (`RayTensorStates`). `environment` is added to the actor's.
    """

    by_reference = False

    def __init__(
        self,
        worker_id: str,
        build: Callable[[], Worker],
        *,
        threads: int | None = None,
        num_gpus: float = 0,
        node: str | None = None,
        tensor_transport: bool = False,
        environment: Mapping[str, str] | None = None,
        start_s: float = START_S,
    ) -> None:
        self.id = worker_id
        self._build, self._start_s = build, start_s
        self._options: dict[str, Any] = {
            "num_cpus": 0,  # the engine takes the cores that `threads` says, also where there are fewer than workers
            "num_gpus": num_gpus,
            "max_restarts": 0,
            "scheduling_strategy": placement(node),
        }
        variables = dict(environment or {})
        if threads is not None:
            variables |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        if variables:
            self._options["runtime_env"] = {"env_vars": variables}
        if tensor_transport:
            self._options["enable_tensor_transport"] = True
        self._run: _RayRun | None = None

    @property
    def alive(self) -> bool:
        """Whether it is up."""
        return self._run is not None and self._run.up

    async def start(self, listener: Listener) -> Capacity:
        """Have Ray start the actor, and wait until its engine is there."""
        run = _RayRun(_ACTOR.options(**self._options).remote(), listener)
        self._run = run
        try:
            capacity = await asyncio.wait_for(run.actor.start.remote(self._build), self._start_s)
        except TimeoutError:
            run.end()
            raise WorkerDied(
                f"was not up within {self._start_s:g} s: the cluster has no place for it, or it loads too long"
            ) from None
        except _GONE as wrong:
            run.end()
            raise WorkerDied(_ending(wrong)) from None
        except BaseException:
            run.end()
            raise
        if isinstance(capacity, str):
            run.end()
            raise WorkerDied(capacity)
        run.began()
        return cast("Capacity", capacity)

    def send(self, command: Command) -> None:
        """Hand it a command; those of one turn of the event loop go together."""
        if self._run is not None and self._run.up:
            self._run.send(command)

    async def stop(self, deadline_s: float) -> None:
        """End it after the step that runs, by force after the deadline."""
        run, self._run = self._run, None
        if run is None:
            return
        run.listener = None
        if run.up and run.listening is not None:
            run.send(Stop())
            await asyncio.wait([run.listening], timeout=deadline_s)
        run.end()

    def kill(self, reason: str) -> None:
        """Kill the actor."""
        if self._run is not None:
            self._run.reason = reason
            self._run.kill()


class _RayRun:
    """One life of the actor, seen from the server."""

    def __init__(self, actor: Any, listener: Listener) -> None:
        self.actor = actor
        self.listener: Listener | None = listener
        self.reason: str | None = None
        self.up = False
        self.listening: asyncio.Task[None] | None = None
        self._commands: list[Command] = []
        self._sent = 0

    def began(self) -> None:
        """Its engine is there."""
        self.up = True
        self.listening = asyncio.get_running_loop().create_task(self._listen())

    def send(self, command: Command) -> None:
        """Send a command with the others of this turn of the event loop."""
        if not self._commands:
            asyncio.get_running_loop().call_soon(self._flush)
        self._commands.append(command)

    def kill(self) -> None:
        """End the actor at once; without a connection to the cluster there is none any more."""
        with suppress(*_GONE, ValueError):
            ray.kill(self.actor)

    def end(self) -> None:
        """Nobody wants it any more."""
        self.listener, self.up = None, False
        if self.listening is not None:
            self.listening.cancel()
        self.kill()

    def _flush(self) -> None:
        commands, self._commands = self._commands, []
        if self.up and commands:
            self.actor.handle.remote(self._sent, commands)
            self._sent += 1

    async def _listen(self) -> None:
        """Hand on what the actor says until it says no more."""
        try:
            while (said := await self.actor.poll.remote()) is not None:
                if isinstance(said, str):
                    self._died(said)
                    return
                for batch in said:
                    if self.listener is not None:
                        self.listener.on_events(batch)
            self._died("its loop ended")
        except _GONE as wrong:
            self._died(_ending(wrong))

    def _died(self, reason: str) -> None:
        self.up = False
        listener, self.listener = self.listener, None
        self.kill()
        if listener is not None:
            listener.on_death(self.reason or reason)


class _Outbox:
    """Events from the worker's loop to the call that waits for them."""

    def __init__(self) -> None:
        self._ready = threading.Condition()
        self._batches: list[Batch] = []
        self._end: str | None = None
        self._closed = False

    def put(self, batch: Batch) -> None:
        """Add the events of one step."""
        with self._ready:
            self._batches.append(batch)
            self._ready.notify()

    def close(self, reason: str | None) -> None:
        """Nothing more will come; a reason where that is not by order."""
        with self._ready:
            self._end, self._closed = reason, True
            self._ready.notify()

    def take(self) -> list[Batch] | str | None:
        """All since the last call, waiting for the first; at the end the reason, or None."""
        with self._ready:
            while not self._batches and not self._closed:
                self._ready.wait()
            taken, self._batches = self._batches, []
            return taken or self._end


class _Actor:
    """The actor: the worker's loop in a thread of its own, and a thread each for commands and for events."""

    def __init__(self) -> None:
        self._inbox, self._outbox = Inbox(), _Outbox()
        self._up: Future[Capacity | str] = Future()
        self._early: dict[int, list[Command]] = {}
        self._next = 0

    @ray.method(concurrency_group="commands")
    def start(self, build: Callable[[], Worker]) -> Capacity | str:
        """Build the engine in the thread that will use it. What it can hold, or in one line why it is not there."""
        threading.Thread(target=self._serve, args=(build,), daemon=True, name="tandem-worker").start()
        return self._up.result()

    @ray.method(concurrency_group="commands")
    def handle(self, number: int, commands: list[Command]) -> None:
        """Commands for the next step; what comes too early waits for what was sent before."""
        self._early[number] = commands
        while self._next in self._early:
            for command in self._early.pop(self._next):
                self._inbox.put(command)
            self._next += 1

    @ray.method(concurrency_group="events")
    def poll(self) -> list[Batch] | str | None:
        """See `_Outbox.take`."""
        return self._outbox.take()

    def _serve(self, build: Callable[[], Worker]) -> None:
        worker: Worker | None = None
        reason: str | None = None
        try:
            worker = build()
            self._up.set_result(replace(worker.capacity, pid=os.getpid()))
            run_worker(worker, self._inbox, self._outbox.put)
        except Exception as wrong:
            if not isinstance(wrong, SpecError):  # which says all in its one line
                traceback.print_exc()
            reason = describe(wrong)
        finally:
            if worker is not None:
                worker.close()
            if not self._up.done():
                self._up.set_result(reason or "its loop ended")
            self._outbox.close(reason)


_ACTOR: Any = ray.remote(concurrency_groups={"commands": 1, "events": 1})(_Actor)  # type: ignore[call-overload]


def _ending(wrong: Exception) -> str:
    """Why an actor died, in one line."""
    lines = [line.strip() for line in str(wrong).splitlines() if line.strip()]
    return f"its actor is gone ({type(wrong).__name__}: {lines[-1][:200] if lines else 'no reason given'})"
