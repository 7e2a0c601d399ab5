"""What all generated conversations are drawn by: seeds, streams of random numbers, shares, and what is held out."""

from __future__ import annotations

import hashlib
from random import Random

from tandem.spec.errors import SpecError

HELD_OUT = 400
"""Problems of each procedural task, the first of its evaluation problems, that are never trained on."""


def number_of(text: str) -> int:
    """A whole number below 2^64 that follows from a text, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def stream_rng(purpose: str, seed: int) -> Random:
    """Random numbers of one purpose and seed."""
    return Random(number_of(f"{purpose}:draws:{seed}"))


def require_share(field: str, value: float) -> None:
    """Raises SpecError unless 0 <= value <= 1."""
    if not 0 <= value <= 1:
        raise SpecError(f"{field}={value!r}: must be a share, 0 to 1")
