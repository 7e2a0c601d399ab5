"""Finding a text in what comes piece by piece, at constant cost per character."""

from __future__ import annotations

from collections.abc import Sequence


class Pattern:
    """A text or bytes to be found in a stream. How far a match has come is a number: items of the pattern that the stream
    ends with (Knuth, Morris, Pratt 1977), so the caller keeps it and the pattern itself is shared."""

    __slots__ = ("_falls", "items")

    def __init__(self, items: Sequence[object]) -> None:
        self.items = items
        falls = [0] * len(items)
        """For each prefix, the longest shorter one that it ends with."""
        for i in range(1, len(items)):
            state = falls[i - 1]
            while state and items[i] != items[state]:
                state = falls[state - 1]
            falls[i] = state + (items[i] == items[state])
        self._falls = falls

    def find(self, state: int, piece: Sequence[object]) -> tuple[int, int | None]:
        """Read a piece: the state after it and None, or, where the pattern ends in it, 0 and how many items it took."""
        items, falls = self.items, self._falls
        if not state and items[0] not in piece:
            return 0, None
        for n, item in enumerate(piece, 1):
            while state and item != items[state]:
                state = falls[state - 1]
            state += item == items[state]
            if state == len(items):
                return 0, n
        return state, None
