"""The loop that a worker lives in, wherever it is hosted: commands in, one step, events out, sleep while there is nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tandem.serve.messages import Batch, Command, Stop
from tandem.serve.worker import Worker


class Inbox:
    """Commands from another thread to the loop, in order."""

    def __init__(self) -> None:
        self._ready = threading.Condition()
        self._commands: list[Command] = []
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether nobody will send anything again."""
        return self._closed

    def put(self, command: Command) -> None:
        """Add one command; from any thread."""
        with self._ready:
            self._commands.append(command)
            self._ready.notify()

    def close(self) -> None:
        """End the loop after the step that runs; from any thread."""
        with self._ready:
            self._closed = True
            self._ready.notify()

    def take(self, *, wait: bool) -> list[Command]:
        """All commands so far; with `wait`, sleeps until there is one or the inbox is closed."""
        with self._ready:
            while wait and not self._commands and not self._closed:
                self._ready.wait()
            taken, self._commands = self._commands, []
            return taken


def run_worker(worker: Worker, inbox: Inbox, send: Callable[[Batch], None]) -> None:
    """Serve until `Stop` or until the inbox is closed. What the worker raises ends the loop and is raised here."""
    while not inbox.closed:
        for command in inbox.take(wait=worker.idle):
            if isinstance(command, Stop):
                return
            worker.handle(command)
        batch = worker.step()
        if batch is not None:
            send(batch)
