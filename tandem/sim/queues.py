"""What a simulated worker keeps beside its batch: the order of new prompts, and beginnings of prompts for later ones."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from tandem.sim.decoding import SimRequest


class Fifo:
    """New prompts of one client, or of nobody known, in order of arrival: a `tandem.sched.batch.NewPrompts`."""

    __slots__ = ("_at", "_queue")

    def __init__(self, queue: deque[SimRequest]) -> None:
        self._queue, self._at = queue, 0

    def pop(self) -> SimRequest | None:
        """The next one; None when there is none. The queue itself stays as it is."""
        if self._at >= len(self._queue):
            return None
        self._at += 1
        return self._queue[self._at - 1]

    def charge(self, client: str, tokens: float) -> None:
        """Nobody to compare with."""


class PrefixCache:
    """Hashes of the prompt blocks that a worker holds; the block used longest ago goes first."""

    def __init__(self, tokens: int, block: int) -> None:
        self._room, self._block = tokens // block, block
        self._held: OrderedDict[int, None] = OrderedDict()

    def match(self, hashes: Sequence[int]) -> int:
        """Tokens of a prompt with these blocks whose state is held, from its beginning on."""
        found = 0
        for known in hashes:
            if known not in self._held:
                break
            self._held.move_to_end(known)
            found += 1
        return found * self._block

    def add(self, hashes: Sequence[int]) -> None:
        """A prompt with these blocks was prefilled."""
        for known in reversed(hashes):  # so that a chain loses its end before its beginning
            self._held[known] = None
            self._held.move_to_end(known)
        while len(self._held) > self._room:
            self._held.popitem(last=False)

    def clear(self) -> None:
        """All is lost."""
        self._held.clear()
