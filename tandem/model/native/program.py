"""A decoder as the C step sees it: descriptors of its layers, made once and checked cheaply before every step.

Nothing is copied: the descriptors hold addresses of the module's own parameters, so a training step is seen at once. When
a parameter or module has been replaced (`.to`, loading, quantising) the program is made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tandem.model.attention import inverse_frequencies
from tandem.model.hybrid import Decoder
from tandem.model.native.abi import TYPES, Batch, Layer, Matrix, Model, Rotary, StateOfLayer, Vector, call_decode_step
from tandem.model.native.build import available
from tandem.model.native.int8 import Int8Linear
from tandem.model.native.products import matrix_of
from tandem.model.state import LayerState, SequenceState
from tandem.spec.errors import Infeasible, SpecError
from tandem.spec.model import MLP, Attention, Mamba2, Mixer, MoE, Rope

_MATRICES = {
    Mamba2: ("in_proj", "out_proj"),
    Attention: ("q_proj", "k_proj", "v_proj", "o_proj"),
    MLP: ("up_proj", "gate_proj", "down_proj"),
}
_VECTORS = {
    Mamba2: ("conv1d.weight", "conv1d.bias", "A_log", "D", "dt_bias", "norm.weight"),
    Attention: ("q_norm.weight", "k_norm.weight"),
    MLP: (),
    MoE: ("gate.e_score_correction_bias",),
}
_KINDS: tuple[type[Mixer], ...] = (Mamba2, Attention, MLP, MoE)  # in the order of the enumeration in model.h


class Program:
    """The descriptors of one decoder. `decode` works on a `SequenceState`, `run` on any paged one."""

    def __init__(self, decoder: Decoder) -> None:
        self._watched: list[tuple[dict[str, Any], str, Any, int, Any]] = []
        self.spec = decoder.spec
        backbone = decoder.backbone
        turning = [m for m in self.spec.layers if isinstance(m, Attention)]
        ropes = list(dict.fromkeys((m.rope, m.head_dim) for m in turning if m.rope is not None))
        self._frequencies = [inverse_frequencies(rope, size) for rope, size in ropes]
        self._rotary = (Rotary * len(ropes))(*(Rotary(f.data_ptr(), len(f)) for f in self._frequencies))
        layers = [self._layer(i, m, backbone, ropes) for i, m in enumerate(self.spec.layers)]
        self._layers = (Layer * len(layers))(*layers)
        self._model = Model(
            hidden=self.spec.hidden_size,
            num_layers=len(layers),
            num_ropes=len(ropes),
            eps=backbone.norm_f.eps,
            final_norm=self._vector(backbone, "norm_f.weight"),
            embedding=matrix_of(self._tensor(backbone, "embeddings.weight")),
            head=self._matrix(decoder, "lm_head"),
            layers=self._layers,
            ropes=self._rotary,
        )
        self._states = (StateOfLayer * len(layers))()

    @property
    def current(self) -> bool:
        """Whether every module and parameter still is what the descriptors point to."""
        for table, name, known, address, dtype in self._watched:
            if table.get(name) is not known:
                return False
            if known is not None and address and (known.data_ptr() != address or known.dtype != dtype):
                return False
        return True

    def decode(
        self, next_ids: Int[Tensor, " batch"], state: SequenceState, *, threads: int | None = None
    ) -> Float[Tensor, "batch vocab"]:
        """Logits of one more token of each sequence; the state is changed in place, its lengths included."""
        rows = len(next_ids)
        state.reserve(int(state.lengths.max()) + 1 if rows else 0)
        numbers = torch.arange(rows, dtype=torch.int32)
        room = state.capacity or 1
        logits = self.run(
            next_ids, state.lengths, state.layers, blocks=numbers[:, None], block_size=room, slots=numbers, threads=threads
        )
        state.lengths += 1
        return logits

    def run(
        self,
        ids: Int[Tensor, " batch"],
        lengths: Int[Tensor, " batch"],
        states: Sequence[LayerState],
        *,
        blocks: Int[Tensor, "batch max_blocks"],
        block_size: int,
        slots: Int[Tensor, " batch"],
        threads: int | None = None,
    ) -> Float[Tensor, "batch vocab"]:
        """One step over paged state: token t of row i is written to and read from block `blocks[i, t // block_size]`.

        Keys and values are [blocks, kv_heads, block_size, head_dim]; windows and SSM states are read at `slots`. `lengths`
        are the tokens before this one and stay as they are. Raises SpecError for ids, blocks or slots out of range.
        """
        rows = len(ids)
        self._check(ids, lengths, blocks, block_size, slots, states)
        logits = torch.empty(rows, self.spec.vocab_size)
        if rows == 0:
            return logits
        ids, lengths = ids.to(torch.int64).contiguous(), lengths.to(torch.int64).contiguous()
        blocks, slots = blocks.to(torch.int32).contiguous(), slots.to(torch.int32).contiguous()
        batch = Batch(
            rows=rows,
            threads=threads or torch.get_num_threads(),
            max_blocks=blocks.shape[1],
            block_size=block_size,
            ids=ids.data_ptr(),
            lengths=lengths.data_ptr(),
            blocks=blocks.data_ptr(),
            slots=slots.data_ptr(),
            states=self._states,
            logits=logits.data_ptr(),
        )
        call_decode_step(self._model, batch)
        return logits

    def _check(
        self,
        ids: Int[Tensor, " batch"],
        lengths: Int[Tensor, " batch"],
        blocks: Int[Tensor, "batch max_blocks"],
        block_size: int,
        slots: Int[Tensor, " batch"],
        states: Sequence[LayerState],
    ) -> None:
        """Nothing that C would read or write out of bounds; fills the table of states."""
        available_slots = available_blocks = None
        for i, state in enumerate(states):
            if state is None:
                continue
            first, second = state.tensors
            if not (first.is_contiguous() and second.is_contiguous() and first.device.type == "cpu"):
                raise SpecError(f"state of layer {i}: must be contiguous and on the CPU")
            self._states[i].first, self._states[i].second = first.data_ptr(), second.data_ptr()
            self._states[i].type = TYPES[first.dtype]
            if isinstance(self.spec.layers[i], Attention):
                available_blocks = min(available_blocks or len(first), len(first))
                if first.shape[2] != block_size:
                    raise SpecError(f"state of layer {i} has blocks of {first.shape[2]} tokens: block_size is {block_size}")
            else:
                available_slots = min(available_slots or len(second), len(second))
        if len(ids) == 0:
            return
        _check_range("ids", ids, self.spec.vocab_size)
        if available_slots is not None:
            _check_range("slots", slots, available_slots)
        if available_blocks is not None:
            _check_range("lengths", lengths, blocks.shape[1] * block_size)
            used = torch.arange(blocks.shape[1]) * block_size <= lengths[:, None]
            _check_range("blocks", blocks[used], available_blocks)

    def _layer(self, index: int, m: Mixer, backbone: nn.Module, ropes: list[tuple[Rope, int]]) -> Layer:
        at = f"layers.{index}"
        norm, mixer = self._child(backbone, f"{at}.norm"), self._child(backbone, f"{at}.mixer")
        out = Layer(kind=_KINDS.index(type(m)), eps=norm.eps, norm=self._vector(norm, "weight"), rope=-1, dt_max=inf)
        for i, name in enumerate(_VECTORS[type(m)]):
            out.v[i] = self._vector(mixer, name)
        for i, name in enumerate(_MATRICES.get(type(m), ())):
            out.w[i] = self._matrix(mixer, name)
        match m:
            case Mamba2():
                out.heads, out.groups, out.head_dim = m.num_heads, m.groups, m.head_dim
                out.state_dim, out.kernel, out.dt_min = m.state_dim, m.conv_kernel, m.dt_min
                out.dt_max = inf if m.dt_max is None else m.dt_max
            case Attention():
                out.heads, out.groups, out.head_dim = m.num_heads, m.num_kv_heads, m.head_dim
                out.rope = ropes.index((m.rope, m.head_dim)) if m.rope else -1
            case MoE():
                stacked = [self._tensor(mixer, f"experts.{name}") for name in ("up_proj", "down_proj")]
                tables = [matrix_of(self._tensor(mixer, "gate.weight")), *(matrix_of(t.detach()[0]) for t in stacked)]
                names = ("shared_experts.up_proj", "shared_experts.down_proj", "fc1_latent_proj", "fc2_latent_proj")
                for i, matrix in enumerate((*tables, *(self._matrix(mixer, name) for name in names))):
                    out.w[i] = matrix
                out.experts, out.top_k, out.groups, out.top_groups = m.num_experts, m.top_k, m.groups, m.top_groups
                out.normalise, out.score_scale = m.normalise, m.score_scale
        return out

    def _child(self, parent: nn.Module, name: str) -> Any:
        """A sub-module or None, watched."""
        for part in name.split("."):
            child = parent._modules.get(part)
            self._watched.append((parent._modules, part, child, 0, None))
            if child is None:
                return None
            parent = child
        return parent

    def _tensor(self, parent: nn.Module, name: str) -> Any:
        """A parameter or buffer or None, watched."""
        path, _, last = name.rpartition(".")
        owner = self._child(parent, path) if path else parent
        if owner is None:
            return None
        table = owner._parameters if last in owner._parameters else owner._buffers
        tensor = table.get(last)
        if tensor is not None:
            if tensor.device.type != "cpu" or tensor.dtype not in TYPES or not tensor.is_contiguous():
                raise SpecError(f"{name} of {tensor.dtype} on {tensor.device}: must be contiguous, floating and on the CPU")
            self._watched.append((table, last, tensor, tensor.data_ptr(), tensor.dtype))
        return tensor

    def _vector(self, parent: nn.Module, name: str) -> Vector:
        tensor = self._tensor(parent, name)
        return Vector() if tensor is None else Vector(tensor.data_ptr(), TYPES[tensor.dtype])

    def _matrix(self, parent: nn.Module, name: str) -> Matrix:
        module = self._child(parent, name)
        if module is None:
            return Matrix()
        if isinstance(module, Int8Linear):
            return matrix_of(
                self._tensor(module, "weight"),
                scale=self._tensor(module, "scale"),
                bias=self._tensor(module, "bias"),
                cols=module.in_features,
            )
        if not isinstance(module, nn.Linear) or "weight" not in module._parameters:
            raise SpecError(f"{name} is a {type(module).__name__}: must be a plain Linear or an Int8Linear")
        return matrix_of(self._tensor(module, "weight"), bias=self._tensor(module, "bias"))


def _check_range(name: str, values: Int[Tensor, "*shape"], end: int) -> None:
    low, high = (int(v) for v in values.aminmax())
    if low < 0 or high >= end:
        raise SpecError(f"{name} holds {low if low < 0 else high}: must be from 0 to {end - 1}")


_programs: WeakKeyDictionary[Decoder, Program] = WeakKeyDictionary()


def program_for(decoder: Decoder) -> Program | Infeasible:
    """The decoder's program, made anew when weights were replaced; falsy, with the reason, where there can be none."""
    found = available()
    if isinstance(found, Infeasible):
        return found
    program = _programs.get(decoder)
    if program is None or not program.current:
        try:
            program = _programs[decoder] = Program(decoder)
        except SpecError as refused:
            return Infeasible(str(refused))
    return program
