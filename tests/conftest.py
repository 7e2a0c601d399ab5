"""What a command sets up for its whole process does not outlast the test that ran it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["TANDEM_DATA"] = str(Path(__file__).parent / "no-data")  # what a user's machine was found to be is not tested

LOGGERS = ("tandem", "uvicorn.error", "asyncio", "py.warnings")


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    """`tandem serve` logs to the stderr that it finds, which pytest closes after the test."""
    before = [(log, log.handlers[:], log.level, log.propagate) for log in map(logging.getLogger, LOGGERS)]
    yield
    for log, handlers, level, propagate in before:
        log.handlers[:] = handlers
        log.setLevel(level)
        log.propagate = propagate
    logging.captureWarnings(False)
