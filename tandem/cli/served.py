"""A server of this project in a process of its own, for commands that ask one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tandem.spec.errors import SpecError


@contextmanager
def served(model: str, options: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """`tandem serve MODEL OPTIONS` on a free port, ready: what it says of itself. Stopped at the end, and with this process."""
    words = [sys.executable, "-m", "tandem.cli", "serve", model, "--port", "0", "--drain", "1", *options]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, encoding="utf-8", errors="replace") as process,
        _ends_with_this(process),
    ):
        said: list[str] = []
        for line in process.stdout or ():
            ready = _ready(line)
            if ready is not None:
                yield ready
                return
            said.append(line)
        log.seek(0)
        raise SpecError(f"the server did not start: {_last(log.read()) or _first(' '.join(said))}")


def _ready(line: str) -> dict[str, Any] | None:
    """The object with which a server says that it is ready; None for any other line."""
    try:
        told = json.loads(line)
    except ValueError:
        return None
    return told if isinstance(told, dict) and isinstance(told.get("url"), str) else None


def _last(text: str) -> str:
    words = " ".join(text.split()).removeprefix("error: ")
    return words if len(words) <= 300 else f"... {words[-300:]}"


def _first(text: str) -> str:
    words = " ".join(text.split())
    return f"it ended after {words[:200]!r}" if words else "it ended without a word"


@contextmanager
def _ends_with_this(process: subprocess.Popen[str]) -> Iterator[None]:
    """Stops a process at the end, and where this one is told to end (SIGTERM)."""
    before = signal.getsignal(signal.SIGTERM)

    def end(number: int, frame: object) -> None:
        process.terminate()
        signal.signal(signal.SIGTERM, before)
        os.kill(os.getpid(), number)

    heard = threading.current_thread() is threading.main_thread() and before is not None
    if heard:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if heard:
            signal.signal(signal.SIGTERM, before)
        process.terminate()
        try:
            process.wait(20)
        except BaseException as waited:  # a second interrupt too leaves nothing behind
            process.kill()
            if not isinstance(waited, subprocess.TimeoutExpired):
                raise
