"""Prefixes of earlier prompts, for hybrids as for Transformers: blocks of keys and values, and snapshots of recurrent state.

A prefix is a chain of cells of `pass_tokens` tokens. A cell's blocks are shared with the requests that use them; a recurrent
layer's state, which no block holds, is kept as a snapshot at the end of some cells. Snapshots may be far larger than a cell's
keys and values, so they are taken where they are likely to be used: at a prompt's last full cell and where a second prompt
left the first one's path (the rule of Marconi, Pan et al., arXiv:2411.19379), and everywhere if they are the smaller part.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.engine.cache import BlockPool
from tandem.engine.config import CacheSize
from tandem.model.state import MambaState, SequenceState

_ENTRY_BYTES = 512
"""What a cell without blocks counts, as of models without attention: most have no snapshot either, and cost something."""


@dataclass(slots=True)
class Cell:
    """One cell of a kept prefix."""

    blocks: tuple[int, ...]
    snapshot: list[Tensor] | None
    nbytes: int


@dataclass(frozen=True, slots=True)
class Match:
    """What is known of a prompt: `cells` of its chain are kept, of which the first `usable` can be gone on from."""

    cells: int
    usable: int
    blocks: tuple[int, ...]
    snapshot: list[Tensor] | None


class PrefixCache:
    """Kept cells by the hash of all tokens up to their end, the least recently used given up first."""

    def __init__(self, pool: BlockPool, size: CacheSize, *, blocks_per_cell: int) -> None:
        self._pool = pool
        self._max_bytes = size.prefix_bytes
        self._block_bytes = size.block_bytes
        self._per_cell = blocks_per_cell if size.block_bytes else 0
        self._recurrent = size.slot_bytes > 0
        self._cheap = size.slot_bytes <= self._per_cell * size.block_bytes
        self._cells: OrderedDict[int, Cell] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._cells)

    def match(self, hashes: Sequence[int]) -> Match:
        """The longest kept prefix of a prompt with these chained hashes."""
        found = 0
        while found < len(hashes) and hashes[found] in self._cells:
            found += 1
        usable = found
        while self._recurrent and usable and self._cells[hashes[usable - 1]].snapshot is None:
            usable -= 1
        self._touch(hashes[:found])
        cells = [self._cells[h] for h in hashes[:usable]]
        blocks = tuple(block for cell in cells for block in cell.blocks)
        return Match(found, usable, blocks, cells[-1].snapshot if cells else None)

    def wants_snapshot(self, cell: int, last: int, branch: int) -> bool:
        """Whether the state at the end of cell number `cell` (from 1) is worth keeping: the prompt has `last` full cells,
        `branch` of them known before."""
        return self._recurrent and self._max_bytes > 0 and (self._cheap or cell in (last, branch))

    def put(self, hashes: Sequence[int], cell: int, blocks: Sequence[int], state: SequenceState | None) -> None:
        """Keep cell number `cell` (from 1) of a prompt, whose blocks are all of `blocks`, with a snapshot of `state` unless it
        is None. Nothing is kept where an earlier cell of the chain is gone."""
        if any(h not in self._cells for h in hashes[: cell - 1]):
            return
        snapshot = None if state is None else [t.clone() for s in state.layers if isinstance(s, MambaState) for t in s.tensors]
        known = self._cells.get(hashes[cell - 1])
        if known is not None:
            if known.snapshot is None and snapshot is not None:
                known.snapshot = snapshot
                self._grow(known, _nbytes(snapshot))
        else:
            own = tuple(blocks[(cell - 1) * self._per_cell : cell * self._per_cell])
            self._pool.keep(own)
            known = self._cells[hashes[cell - 1]] = Cell(own, snapshot, 0)
            self._grow(known, (len(own) * self._block_bytes or _ENTRY_BYTES) + _nbytes(snapshot))
        self._touch(hashes[:cell])
        while self.nbytes > self._max_bytes and self._cells:
            self._evict(next(iter(self._cells)))

    def give_back(self, wanted: int) -> None:
        """Free blocks that nobody but this cache holds, least recently used first, until `wanted` are free."""
        if self._pool.free >= wanted:
            return
        missing, given = wanted - self._pool.free, []
        for key, cell in self._cells.items():
            if missing <= 0:
                break
            if cell.blocks and self._alone(key):
                given.append(key)
                missing -= len(cell.blocks)
        for key in given:
            self._evict(key)

    def blocks(self) -> list[tuple[int, ...]]:
        """Blocks of each cell."""
        return [cell.blocks for cell in self._cells.values()]

    def clear(self) -> None:
        """Forget everything."""
        for key in list(self._cells):
            self._evict(key)

    def _alone(self, key: int) -> bool:
        return all(self._pool.holders(block) == 1 for block in self._cells[key].blocks)

    def _touch(self, hashes: Sequence[int]) -> None:
        # From the end to the beginning, so that a chain is given up from its end.
        for h in reversed(hashes):
            self._cells.move_to_end(h)

    def _grow(self, cell: Cell, nbytes: int) -> None:
        cell.nbytes += nbytes
        self.nbytes += nbytes

    def _evict(self, key: int) -> None:
        cell = self._cells.pop(key)
        self._pool.forget(cell.blocks)
        self.nbytes -= cell.nbytes


def restore_snapshot(state: SequenceState, snapshot: Sequence[Tensor]) -> None:
    """Put a snapshot's windows and SSM states into a one-row state."""
    tensors = [t for s in state.layers if isinstance(s, MambaState) for t in s.tensors]
    with torch.no_grad():
        for own, kept in zip(tensors, snapshot, strict=True):
            own.copy_(kept)


def _nbytes(tensors: Sequence[Tensor] | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors or ())
