"""Memory that the C library keeps for itself after a tensor is freed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Of glibc's malloc.h."""


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim, None where the C library has none."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return found


def return_freed_memory() -> None:
    """Give freed pages back to the system. glibc keeps them, and a long prompt's tensors of several sizes leave holes that
    grow to more than the tensors (hidden 512, 16k tokens in pieces of 2,048: 121 MiB beside the state without, 84 with)."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the rest of the process. A training step frees and takes the same large tensors over
    and over, and by default each time as fresh pages of the system (docs/training.md has what that costs)."""
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for option, value in ((_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, (1 << 31) - 1), (_TOP_PAD, 1 << 28)):
        set_option(option, value)
