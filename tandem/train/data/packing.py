"""Documents put into sequences: whole ones with padding behind them, or cut where a sequence ends."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem.train.data.shards import Shard

IGNORED = -100
"""Label of a position that is not learned, as torch's cross entropy has it."""
_IN_LINE = 32
"""Documents among which one is looked for that fits. With the next one only, padding of nano-hybrid's data is 12 %; so, 3 %."""

Piece = tuple[int, int, int]
"""Number of a document, offset into it, tokens taken from there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Sequences for one forward pass; all three are int64 [rows, sequence_length]."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    """The next token of the same document; `IGNORED` where that is part of a prompt, at the end of a document, in padding."""
    documents: NDArray[np.int64]
    """Number of the document within its row, from 0; padding counts as one of its own."""

    @property
    def learned(self) -> int:
        """Positions with a label."""
        return int((self.labels != IGNORED).sum())

    def rows(self, rank: int, world: int) -> Batch:
        """Rows `rank`, `rank + world`, ...: what one of `world` ranks computes."""
        one = slice(rank, None, world)
        return Batch(input_ids=self.input_ids[one], labels=self.labels[one], documents=self.documents[one])


class Packer:
    """Takes a source's documents in a seeded order, epoch after epoch, and fills sequences with them.

    First-fit over the next few documents: each sequence begins with the one that waits longest, then takes whichever of those
    in line fits, and ends in padding where none does. The line is used up before an epoch's last document is followed by the
    next epoch's first. A document that is longer than a sequence is taken in pieces of a
    sequence's length; what a piece ends in still has its label, the first token of the next piece. With `cut` documents follow
    each other and sequences are filled to the last position. With `once` documents come in the order of the shard and there is
    no second epoch.
    """

    def __init__(self, shard: Shard, *, name: str, length: int, cut: bool, seed: int, once: bool = False) -> None:
        self._shard = shard
        self._length = length
        self._cut = cut
        self._key = (seed, zlib.crc32(name.encode()))
        self._once = once
        self._lengths: list[int] = shard.documents[:, 1].tolist()
        self._epoch = self._cursor = 0
        self._line: list[tuple[int, int]] = []
        self.tokens = 0
        """Tokens taken so far, padding left out."""
        self._order = self._shuffled(0)
        self._fill_line()

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to take."""
        return not self._line

    def next(self) -> list[Piece]:
        """The pieces of the next sequence; none where there is nothing more to take."""
        pieces: list[Piece] = []
        room, i = self._length, 0
        while room and i < len(self._line):
            document, offset = self._line[i]
            left = self._lengths[document] - offset
            take = min(left, room if self._cut else self._length)
            if take > room:
                i += 1
                continue
            pieces.append((document, offset, take))
            room -= take
            if take == left:
                del self._line[i]
                self._fill_line()
            else:
                self._line[i] = (document, offset + take)
        self.tokens += self._length - room
        return pieces

    def state(self) -> dict[str, Any]:
        """What `restore` goes on from, as JSON data."""
        line = [list(entry) for entry in self._line]
        return {"epoch": self._epoch, "cursor": self._cursor, "line": line, "tokens": self.tokens}

    def restore(self, epoch: int, cursor: int, line: Sequence[Sequence[int]], tokens: int) -> None:
        """Go on where `state` was taken."""
        if epoch != self._epoch:
            self._order = self._shuffled(epoch)
        self._epoch, self._cursor, self.tokens = epoch, cursor, tokens
        self._line = [(document, offset) for document, offset in line]

    def fill(self, pieces: Sequence[Piece], batch: Batch, row: int) -> None:
        """Write a sequence into a row of a new batch."""
        input_ids, labels, number = batch.input_ids[row], batch.labels[row], batch.documents[row]
        tokens, table = self._shard.tokens, self._shard.documents
        at = 0
        for i, (document, offset, take) in enumerate(pieces):
            start, length, prompt = table[document].tolist()
            end = at + take
            input_ids[at:end] = tokens[start + offset : start + offset + take]
            skipped = max(0, prompt - 1 - offset)
            last = min(offset + take, length - 1)
            if last > offset + skipped:
                labels[at + skipped : at + last - offset] = tokens[start + offset + skipped + 1 : start + last + 1]
            number[at:end] = i
            at = end
        number[at:] = len(pieces)

    def _fill_line(self) -> None:
        while len(self._line) < (1 if self._cut else _IN_LINE) and self._lengths:
            if self._cursor == len(self._order):
                if self._line or self._once:
                    return
                self._epoch, self._cursor = self._epoch + 1, 0
                self._order = self._shuffled(self._epoch)
            self._line.append((self._order[self._cursor], 0))
            self._cursor += 1

    def _shuffled(self, epoch: int) -> list[int]:
        count = len(self._lengths)
        if self._once:
            return list(range(count))
        order: list[int] = np.random.default_rng((*self._key, epoch)).permutation(count).tolist()
        return order


def new_batch(rows: int, length: int) -> Batch:
    """A batch of padding, to be filled."""
    shape = (rows, length)
    return Batch(
        input_ids=np.zeros(shape, dtype=np.int64),
        labels=np.full(shape, IGNORED, dtype=np.int64),
        documents=np.zeros(shape, dtype=np.int64),
    )
