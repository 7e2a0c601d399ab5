"""The paged memory of an engine: blocks of keys and values, slots of convolution windows and SSM states.

`BlockPool` counts who holds which block; `PagedState` holds the numbers. Token t of a sequence lies in its block t // size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from tandem.engine.config import CacheSize
from tandem.model.state import AttentionState, LayerState, MambaState, SequenceState
from tandem.spec.model import Attention, Mamba2, ModelSpec


class BlockPool:
    """Numbers of blocks, each free or held by one or more holders (requests, and the prefix cache)."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks
        self._kept = bytearray(num_blocks)  # by the prefix cache
        self._only_kept = 0

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def only_kept(self) -> int:
        """Blocks that the prefix cache alone holds, so that they can be had."""
        return self._only_kept

    def holders(self, block: int) -> int:
        """How many hold a block."""
        return self._holders[block]

    def comes_free(self, block: int) -> bool:
        """Whether a block can be had once one of its holders, not the prefix cache, lets go."""
        return self._holders[block] == 1 + self._kept[block]

    def take(self, count: int) -> list[int]:
        """Blocks of which the caller is the only holder. Ask for no more than are `free`."""
        if count > len(self._free):
            raise RuntimeError(f"{count} blocks wanted, {len(self._free)} are free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def hold(self, blocks: Iterable[int]) -> None:
        """One more holder of blocks that have one."""
        for block in blocks:
            if self._holders[block] < 1:
                raise RuntimeError(f"block {block} has no holder to share it with")
            self._only_kept -= self._holders[block] == 1 and self._kept[block]
            self._holders[block] += 1

    def drop(self, blocks: Iterable[int]) -> None:
        """One holder less."""
        for block in blocks:
            if self._holders[block] < 1:
                raise RuntimeError(f"block {block} is dropped and nobody holds it")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free.append(block)
            elif self._holders[block] == 1 and self._kept[block]:
                self._only_kept += 1

    def keep(self, blocks: Iterable[int]) -> None:
        """The prefix cache becomes a holder."""
        for block in blocks:
            self.hold((block,))
            self._kept[block] = 1

    def forget(self, blocks: Iterable[int]) -> None:
        """The prefix cache holds them no more."""
        for block in blocks:
            self._only_kept -= self._holders[block] == 1
            self._kept[block] = 0
            self.drop((block,))

    def check(self, held: Iterable[Sequence[int]], kept: Iterable[Sequence[int]]) -> None:
        """Raise RuntimeError unless the blocks of these requests and of the prefix cache are exactly those not free."""
        wanted = [0] * self.num_blocks
        marks = bytearray(self.num_blocks)
        for blocks in held:
            for block in blocks:
                wanted[block] += 1
        for blocks in kept:
            for block in blocks:
                wanted[block] += 1
                marks[block] = 1
        wrong = [b for b in range(self.num_blocks) if wanted[b] != self._holders[b] or marks[b] != self._kept[b]]
        free = {b for b in range(self.num_blocks) if wanted[b] == 0}
        if wrong or len(self._free) != len(free) or set(self._free) != free:
            raise RuntimeError(f"blocks {wrong[:8]} have other holders than those known; {len(free)} should be free")


class PagedState:
    """State of many sequences: `layers` as the decode step in C reads them, and copies between them and a sequence's own."""

    def __init__(self, spec: ModelSpec, size: CacheSize, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        layers: list[LayerState] = []
        for m in spec.layers:
            if isinstance(m, Attention):
                shape = (size.num_blocks, m.num_kv_heads, block_size, m.head_dim)
                layers.append(AttentionState(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))))
            elif isinstance(m, Mamba2):
                conv = torch.zeros(size.num_slots, m.conv_width, m.conv_kernel - 1, dtype=dtype, device=device)
                ssm = torch.zeros(size.num_slots, m.num_heads, m.head_dim, m.state_dim, device=device)
                layers.append(MambaState(conv, ssm))
            else:
                layers.append(None)
        self.layers = tuple(layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks and slots."""
        return sum(t.numel() * t.element_size() for s in self.layers if s is not None for t in s.tensors)

    def write_tokens(self, state: SequenceState, blocks: Sequence[int], begin: int, end: int) -> None:
        """Keys and values of tokens begin..end of a one-row state into its blocks; `begin` is the first of a block."""
        size = self.block_size
        whole = (end - begin) // size
        rest = end - begin - whole * size
        full = torch.tensor(blocks[begin // size : begin // size + whole], device=self.device)
        for paged, own in zip(self.layers, state.layers, strict=True):
            if not isinstance(paged, AttentionState) or not isinstance(own, AttentionState):
                continue
            for pages, tokens in zip(paged.tensors, own.tensors, strict=True):
                if whole:
                    chunk = tokens[0, :, begin : begin + whole * size]
                    pages[full] = chunk.unflatten(1, (whole, size)).transpose(0, 1).to(pages)
                if rest:
                    pages[blocks[end // size], :, :rest] = tokens[0, :, end - rest : end].to(pages)

    def read_tokens(self, state: SequenceState, blocks: Sequence[int], end: int) -> None:
        """Keys and values of the first `end` tokens out of their blocks into a one-row state that has room for them."""
        used = torch.tensor(blocks[: -(-end // self.block_size)], device=self.device)
        for paged, own in zip(self.layers, state.layers, strict=True):
            if isinstance(paged, AttentionState) and isinstance(own, AttentionState):
                for pages, tokens in zip(paged.tensors, own.tensors, strict=True):
                    tokens[0, :, :end] = pages[used].transpose(0, 1).flatten(1, 2)[:, :end]

    def write_slot(self, state: SequenceState, slot: int) -> None:
        """Windows and SSM states of a one-row state into a slot."""
        for paged, own in zip(self.layers, state.layers, strict=True):
            if isinstance(paged, MambaState) and isinstance(own, MambaState):
                for pages, tensor in zip(paged.tensors, own.tensors, strict=True):
                    pages[slot] = tensor[0].to(pages)

    def read_slot(self, state: SequenceState, slot: int) -> None:
        """Windows and SSM states of a slot into a one-row state."""
        for paged, own in zip(self.layers, state.layers, strict=True):
            if isinstance(paged, MambaState) and isinstance(own, MambaState):
                for pages, tensor in zip(paged.tensors, own.tensors, strict=True):
                    tensor[0] = pages[slot]


class Tables:
    """Blocks and lengths of the sequences in each slot, as arrays that a decode step reads without a loop."""

    def __init__(self, num_slots: int, width: int) -> None:
        self.blocks = np.zeros((num_slots, width), dtype=np.int32)
        self._held: list[list[int]] = [[] for _ in range(num_slots)]
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """A free slot, without blocks."""
        return self._free.pop()

    def drop(self, slot: int) -> list[int]:
        """Give a slot back; the blocks that it held."""
        blocks, self._held[slot] = self._held[slot], []
        self._free.append(slot)
        return blocks

    def held(self, slot: int) -> list[int]:
        """Blocks of the sequence in a slot, in order."""
        return self._held[slot]

    def extend(self, slot: int, blocks: Sequence[int]) -> None:
        """Further blocks of a slot's sequence."""
        known = self._held[slot]
        self.blocks[slot, len(known) : len(known) + len(blocks)] = blocks
        known.extend(blocks)

    def check(self) -> None:
        """Raise RuntimeError where a free slot holds blocks or is free twice."""
        if len(set(self._free)) != len(self._free) or any(self._held[slot] for slot in self._free):
            raise RuntimeError("a free slot holds blocks, or is free twice")
