"""The state of each layer as the C step reads it, once it is known to be a state of this model."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from tandem.model.native.abi import TYPES, StateOfLayer
from tandem.model.native.parts import FLOATS
from tandem.model.state import AttentionState, LayerState, MambaState
from tandem.spec.errors import SpecError
from tandem.spec.model import Attention, Mamba2, ModelSpec


@dataclass(frozen=True, slots=True)
class Table:
    """Addresses of one step's states, and how many blocks and slots there are; None without layers that have them."""

    entries: ctypes.Array[StateOfLayer]
    blocks: int | None
    slots: int | None


class StateTable:
    """Makes the table of a step; holds nothing of it, so that steps of several threads do not meet."""

    def __init__(self, spec: ModelSpec) -> None:
        self._kinds = [_kind(m) for m in spec.layers]
        self._layers = [(i, m) for i, m in enumerate(spec.layers) if isinstance(m, Attention | Mamba2)]
        self._entries = StateOfLayer * len(spec.layers)

    def of(self, states: Sequence[LayerState], block_size: int) -> Table:
        """Raises SpecError for states of another model: kind, shapes and dtypes of every layer are compared.

        Keys, values and windows have one dtype, SSM states are fp32; layers of one kind have as many blocks or slots.
        """
        if len(states) != len(self._kinds):
            raise SpecError(f"state has {len(states)} layers: this model has {len(self._kinds)}")
        self._same(range(len(states)), "is", [*map(type, states)], self._kinds)
        tensors = [t for state in states if state is not None for t in state.tensors]
        blocks, slots = (next((len(s.tensors[0]) for s in states if type(s) is kind), None) for kind in _STATES)
        room = next((s.keys.shape[2:3] for s in states if isinstance(s, AttentionState)), None)
        if room is not None and room != (block_size,):
            raise SpecError(f"state has blocks of {room[0]} tokens: block_size is {block_size}")
        shapes: list[tuple[int, ...]] = []
        dtypes: list[torch.dtype] = []
        kept = tensors[0].dtype if tensors and tensors[0].dtype in FLOATS else torch.float32
        for _, m in self._layers:
            if isinstance(m, Attention):
                shapes += [(blocks or 0, m.num_kv_heads, block_size, m.head_dim)] * 2
                dtypes += kept, kept
            else:
                shapes += (slots or 0, m.conv_width, m.conv_kernel - 1), (slots or 0, m.num_heads, m.head_dim, m.state_dim)
                dtypes += kept, torch.float32
        owners = [i for i, _ in self._layers for _ in range(2)]
        self._same(owners, "has shape", [*map(_shape, tensors)], shapes)
        self._same(owners, "is of", [*map(_dtype, tensors)], dtypes)
        if not (all(map(Tensor.is_contiguous, tensors)) and all(map(_is_cpu, tensors))):
            raise SpecError("state: its tensors must be contiguous and on the CPU")
        entries, code = self._entries(), TYPES[kept]
        addresses = [*map(Tensor.data_ptr, tensors)]
        for (i, _), first, second in zip(self._layers, addresses[::2], addresses[1::2], strict=True):
            entry = entries[i]
            entry.first, entry.second, entry.type = first, second, code
        return Table(entries, blocks, slots)

    def _same(self, layers: Sequence[int], verb: str, found: Sequence[object], wanted: Sequence[object]) -> None:
        if found == wanted:
            return
        layer, ours, theirs = next(three for three in zip(layers, found, wanted, strict=True) if three[1] != three[2])
        raise SpecError(f"state of layer {layer} {verb} {_text(ours)}: this model needs {_text(theirs)}")


_STATES = (AttentionState, MambaState)
_shape, _dtype, _is_cpu = attrgetter("shape"), attrgetter("dtype"), attrgetter("is_cpu")


def _kind(m: object) -> type:
    return AttentionState if isinstance(m, Attention) else MambaState if isinstance(m, Mamba2) else type(None)


def _text(value: object) -> str:
    """As a message names it."""
    if isinstance(value, type):
        return value.__name__.removesuffix("Type")
    return str(tuple(value) if isinstance(value, tuple) else value)
