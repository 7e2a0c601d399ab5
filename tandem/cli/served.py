"""A server of this project in a process of its own, for commands that ask one."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tandem.spec.errors import SpecError


@contextmanager
def served(model: str, options: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """`tandem serve MODEL OPTIONS` on a free port, ready: what it says of itself. Stopped at the end."""
    words = [sys.executable, "-m", "tandem.cli", "serve", model, "--port", "0", "--drain", "1", *options]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            line = process.stdout.readline() if process.stdout is not None else ""
            if not line:
                log.seek(0)
                raise SpecError(f"the server did not start: {' '.join(log.read().split())[-300:]}")
            yield json.loads(line)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
