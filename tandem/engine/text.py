"""Text from tokens as they come: whole characters only, cut at the first stop text.

    pieces + flush == decode(all tokens) before the stop text that ends first

Nothing is given out that a later token could take back: an unfinished character and what may be the start of a stop text wait.
"""

from __future__ import annotations

import codecs
from typing import NamedTuple

from tandem.engine.match import Pattern
from tandem.engine.spelling import Spelling
from tandem.model.tokenizer import Tokenizer

_WINDOW = 64
"""Tokens after which a text that still ends in an unfinished character is given out as it is."""


class Piece(NamedTuple):
    """Text that has become certain, and whether a stop text has ended the output (it is not part of the text)."""

    text: str
    stopped: bool


class TextStream:
    """The text of one output. Its state follows from the tokens alone: pushing the same again gives the same pieces."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
        *,
        spelling: Spelling | None = None,
    ) -> None:
        spelling = spelling or Spelling(tokenizer)
        self._decoder = _Bytes(spelling) if spelling.byte_level else _Window(tokenizer)
        self._skipped = spelling.special if skip_special_tokens else frozenset()
        self._patterns = [Pattern(text) for text in stop]
        self._states = [0] * len(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> Piece:
        """What one more token makes certain. Nothing follows a stop text."""
        if self.stopped or token in self._skipped:
            return Piece("", self.stopped)
        return self._give(self._decoder.push(token))

    def flush(self) -> str:
        """The rest, where no more tokens come."""
        if self.stopped:
            return ""
        text, stopped = self._give(self._decoder.flush())
        if not stopped:
            text, self._held = text + self._held, ""
        return text

    def _give(self, new: str) -> Piece:
        if not self._patterns or not new:
            return Piece(new, False)
        text, ends = self._held + new, []
        for i, pattern in enumerate(self._patterns):
            self._states[i], end = pattern.find(self._states[i], new)
            if end is not None:
                ends.append((end, -len(pattern.items), i))
        if ends:
            end, length, _ = min(ends)
            self.stopped, self._held = True, ""
            return Piece(text[: len(text) - len(new) + end + length], True)
        certain = len(text) - max(self._states)
        self._held = text[certain:]
        return Piece(text[:certain], False)


class _Bytes:
    """Byte-level tokens: their bytes one after the other, read as UTF-8."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._spelling(token))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Window:
    """Other tokens, whose text depends on their neighbours: the newest are decoded together with the piece before them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._before, self._read = 0, 0
        self._given = 0

    def push(self, token: int) -> str:
        ids = self._ids
        ids.append(token)
        known = self._decode(ids[self._before : self._read])
        text = self._decode(ids[self._before :])
        if len(text) <= len(known) or (text.endswith("\ufffd") and len(ids) - self._read < _WINDOW):
            return ""
        self._before, self._read = self._read, len(ids)
        self._given += len(text) - len(known)
        return text[len(known) :]

    def flush(self) -> str:
        return self._decode(self._ids)[self._given :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)
