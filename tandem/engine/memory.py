"""All that an engine remembers: blocks and slots with their numbers, and the prefixes kept in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tandem.engine.cache import BlockPool, PagedState, Tables
from tandem.engine.config import CacheSize, EngineConfig
from tandem.engine.prefix import Match, PrefixCache, restore_snapshot
from tandem.model.state import SequenceState
from tandem.spec.model import ModelSpec

_NO_LIMIT = 10**9


class Memory:
    """Places sequences: each has a slot, and as many blocks as its tokens fill. A model without attention needs no blocks."""

    def __init__(
        self,
        spec: ModelSpec,
        size: CacheSize,
        config: EngineConfig,
        *,
        max_context: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.size = size
        self._block_size = config.block_size
        self._cell = config.pass_tokens
        self._pool = BlockPool(size.num_blocks if size.block_bytes else 0)
        self._tables = Tables(size.num_slots, -(-max_context // config.block_size))
        self.paged = PagedState(spec, size, config.block_size, dtype, device)
        self.prefixes = PrefixCache(self._pool, size, blocks_per_cell=config.pass_tokens // config.block_size)

    @property
    def num_blocks(self) -> int:
        """Blocks that there are."""
        return self._pool.num_blocks

    @property
    def free_blocks(self) -> int:
        """Blocks that can be had, those that only kept prefixes hold among them."""
        return self._pool.free + self._pool.only_kept if self.size.block_bytes else _NO_LIMIT

    @property
    def free_slots(self) -> int:
        """Slots that nobody holds."""
        return self._tables.free

    def take_slot(self) -> int:
        """A slot of one's own, without blocks."""
        return self._tables.take()

    def reach(self, slot: int, tokens: int) -> None:
        """Give a slot's sequence blocks for its first `tokens` tokens, beside those that it has."""
        missing = -(-tokens // self._block_size) - len(self._tables.held(slot))
        if self.size.block_bytes and missing > 0:
            self.prefixes.give_back(missing)
            self._tables.extend(slot, self._pool.take(missing))

    def frees(self, slot: int) -> int:
        """Blocks that could be had if a slot gave its own back: others may share some."""
        return sum(self._pool.comes_free(block) for block in self._tables.held(slot))

    def drop(self, slot: int) -> None:
        """Give a slot and its blocks back."""
        self._pool.drop(self._tables.drop(slot))

    def write(self, slot: int, state: SequenceState, begin: int, end: int) -> None:
        """Keys and values of tokens begin..end of a one-row state into the blocks of a slot, which must reach that far."""
        self.paged.write_tokens(state, self._tables.held(slot), begin, end)

    def read(self, slot: int, state: SequenceState, tokens: int) -> None:
        """All that a slot's sequence remembers of its first `tokens` tokens, into a one-row state that has room for it."""
        self.paged.read_tokens(state, self._tables.held(slot), tokens)
        self.paged.read_slot(state, slot)
        state.lengths[0] = tokens

    def reuse(self, slot: int, state: SequenceState, match: Match) -> int:
        """Begin a slot's sequence with a kept prefix, sharing its blocks; tokens that it has then."""
        tokens = match.usable * self._cell
        self._pool.hold(match.blocks)
        self._tables.extend(slot, match.blocks)
        self.paged.read_tokens(state, match.blocks, tokens)
        restore_snapshot(state, match.snapshot or ())
        state.lengths[0] = tokens
        return tokens

    def keep(self, slot: int, hashes: Sequence[int], cell: int, state: SequenceState | None) -> None:
        """Keep cell number `cell` (from 1) of a slot's prompt for later ones, with a snapshot of `state` unless it is None."""
        self.prefixes.put(hashes, cell, self._tables.held(slot), state)

    def rows(self, slots: Sequence[int]) -> np.ndarray:
        """Blocks of several slots, [rows, width]."""
        rows: np.ndarray = self._tables.blocks[np.array(slots)]
        return rows

    def check(self, slots: Sequence[int]) -> None:
        """Raise RuntimeError unless exactly these slots are held, and every block by them or by kept prefixes, or free."""
        self._tables.check()
        if len(set(slots)) != len(slots) or len(slots) + self._tables.free != self.size.num_slots:
            raise RuntimeError(f"{len(slots)} slots are held and {self._tables.free} free, of {self.size.num_slots}")
        self._pool.check([self._tables.held(slot) for slot in slots], self.prefixes.blocks())
