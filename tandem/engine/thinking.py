"""The thinking budget: a block of reasoning is closed at the next newline after the budget, or 500 tokens later.

    before ---<think>---> open ---</think>---> closed

Tags are found in the bytes of the output, so it does not matter whether a tag is one token or several, nor how a model splits
it. From the moment of closing on, tokens are forced until the tag is whole; a tag that the model had begun is finished. A
closed block is never closed again: tokens that would complete a second closing tag are not to be chosen. The rule is that of
paper A, arXiv:2508.14444, section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tandem.engine.match import Pattern
from tandem.engine.spelling import Spelling

OPENING, CLOSING = "<think>", "</think>"
GRACE = 500
"""Tokens past the budget within which a newline is waited for."""

Ids = NDArray[np.intp]


class ClosingTag:
    """How a vocabulary writes the end of thinking. Where a tag has been begun is a number: its bytes that are there already."""

    def __init__(self, spelling: Spelling, vocab_size: int, usual: Sequence[int]) -> None:
        """`usual` are the tokens that the tokenizer makes of the tag."""
        self.text = CLOSING.encode()
        self.pattern = Pattern(self.text)
        self._spelling = spelling
        self._parts: dict[bytes, int] = {}
        """Tokens that are a part of the tag and nothing else; the lowest id of each text."""
        self._ending: list[tuple[int, bytes]] = []
        for token in range(vocab_size):
            piece = spelling(token)
            if piece and piece in self.text:
                self._parts.setdefault(piece, token)
            if self.text[-1:] in piece:
                self._ending.append((token, piece))
        whole = spelling.join(usual) == self.text and all(0 <= token < vocab_size for token in usual)
        self.tokens = tuple(usual) if whole else tuple(self._spell(0) or ())
        """The tag as it is forced; none where the vocabulary cannot write it."""
        self._next: dict[int, int] = {}
        self._completing: dict[int, tuple[Ids, Ids]] = {}

    def next(self, state: int) -> int:
        """The token that goes on with a tag of which `state` bytes are there; a new tag, where what is begun has no end."""
        token = self._next.get(state)
        if token is None:
            token = self._next[state] = (self._usual(state) or self._spell(state) or self.tokens)[0]
        return token

    def completing(self, state: int) -> Ids:
        """Tokens that would complete the tag."""
        return self._completing_at(state)[0]

    def overshooting(self, state: int) -> Ids:
        """Of these, the ones that go on with more than white space."""
        return self._completing_at(state)[1]

    def _completing_at(self, state: int) -> tuple[Ids, Ids]:
        found = self._completing.get(state)
        if found is None:
            begun = self.text[:state]
            ends = [(token, begun + piece) for token, piece in self._ending if self.text in begun + piece]
            beyond = [token for token, text in ends if text.partition(self.text)[2].strip()]
            completing = np.array([token for token, _ in ends], dtype=np.intp)
            found = self._completing[state] = (completing, np.array(beyond, dtype=np.intp))
        return found

    def _usual(self, state: int) -> tuple[int, ...] | None:
        length = 0
        for i, token in enumerate(self.tokens):
            if length == state:
                return self.tokens[i:]
            length += len(self._spelling(token))
        return None

    def _spell(self, state: int) -> list[int] | None:
        """The fewest tokens that write the rest of the tag."""
        text = self.text
        best: dict[int, list[int]] = {len(text): []}
        for begin in range(len(text) - 1, state - 1, -1):
            ways = [
                [self._parts[text[begin:end]], *best[end]]
                for end in range(len(text), begin, -1)
                if end in best and text[begin:end] in self._parts
            ]
            if ways:
                best[begin] = min(ways, key=len)
        return best.get(state)


class Thinking:
    """Where one request stands: not thinking yet, thinking, or done. It follows from the output tokens alone."""

    def __init__(self, tag: ClosingTag, spelling: Spelling, *, budget: int | None, opened: bool) -> None:
        self._tag, self._spelling, self._budget = tag, spelling, budget
        self.opened, self.closed = opened, False
        self.tokens = 0
        """Output tokens of the block, with those of its closing tag."""
        self._closing = opened and budget == 0
        self._state = 0
        self._opening_state = 0

    @property
    def open(self) -> bool:
        """Whether the next token belongs to the block."""
        return self.opened and not self.closed

    @property
    def forced(self) -> int | None:
        """The token that must come next, if one must."""
        return self._tag.next(self._state) if self._closing else None

    @property
    def forbidden(self) -> Ids | None:
        """Tokens that would close the block a second time."""
        if not self.closed or self._budget is None:
            return None
        return self._tag.completing(self._state)

    @property
    def overshooting(self) -> Ids:
        """Tokens that would close the block and begin the answer at once."""
        return self._tag.overshooting(self._state)

    def accept(self, token: int) -> None:
        """Read the next output token."""
        piece = self._spelling(token)
        if not self.opened:
            self._opening_state, begin = _OPENING.find(self._opening_state, piece)
            if begin is not None and self._tag.pattern.find(self._state, piece[:begin])[1] is None:
                self._open(piece[begin:])
                return
        counted = self.open
        self.tokens += counted
        self._read(piece)
        if counted and self.open and self._budget is not None and self.tokens >= self._budget:
            self._closing = self._closing or b"\n" in piece or self.tokens >= self._budget + GRACE

    def _open(self, rest: bytes) -> None:
        self.opened, self._state = True, 0
        self._closing = self._budget == 0
        self._read(rest)

    def _read(self, piece: bytes) -> None:
        """Look for the closing tag. One that was never opened counts: the prompt may have opened it."""
        self._state, end = self._tag.pattern.find(self._state, piece)
        if end is not None:
            self.opened, self.closed, self._closing = True, True, False
            self._state = self._tag.pattern.find(0, piece[end:])[0]


_OPENING = Pattern(OPENING.encode())
