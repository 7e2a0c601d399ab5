"""A decoder as the C step sees it: descriptors of its layers, made once and checked cheaply before every step.

Nothing is copied: the descriptors hold addresses of the module's own parameters, so a training step is seen at once. When
a parameter or module has been replaced (`.to`, loading, quantising) the program is made anew; `parts.py` notices.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tandem.model.attention import AttentionMixer, inverse_frequencies
from tandem.model.ffn import Experts, MLPMixer, MoEMixer, Router, SharedExpert
from tandem.model.hybrid import Backbone, Decoder
from tandem.model.hybrid import Layer as DecoderLayer
from tandem.model.linear import Linear
from tandem.model.mamba2 import DepthwiseConv, Mamba2Mixer
from tandem.model.native.abi import Batch, Layer, Matrix, Model, Rotary, Vector, call_decode_step
from tandem.model.native.build import available
from tandem.model.native.int8 import Int8Linear
from tandem.model.native.parts import Parts
from tandem.model.native.products import GROUP, matrix_of, vector_of
from tandem.model.native.states import StateTable, Table
from tandem.model.norm import GatedGroupNorm, RMSNorm
from tandem.model.state import LayerState, SequenceState
from tandem.spec.errors import Infeasible, SpecError
from tandem.spec.model import MLP, Attention, Mamba2, Mixer, MoE, Rope

_KINDS: tuple[type[Mixer], ...] = (Mamba2, Attention, MLP, MoE)  # in the order of the enumeration in model.h


MAX_LENGTH = 1 << 40
"""Tokens of a sequence whose length nothing else bounds."""


class Program:
    """The descriptors of one decoder. `decode` works on a `SequenceState`, `run` on any paged one, from several threads.

    Valid while it is `current`: it holds no weights, so ask `program_for` before every step. Raises SpecError for a decoder
    that C cannot compute.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.spec = decoder.spec
        self._parts = Parts(decoder)
        self._decoder = ref(decoder)
        hidden, vocabulary = self.spec.hidden_size, self.spec.vocab_size
        backbone = self._parts.child(decoder, "backbone", Backbone)
        embeddings = self._parts.child(backbone, "embeddings", nn.Embedding)
        if embeddings.max_norm is not None:
            raise SpecError(f"embeddings.max_norm={embeddings.max_norm}: the decode step in C does not change embeddings")
        norm = self._parts.child(backbone, "norm_f", RMSNorm)
        ropes = list(dict.fromkeys((m.rope, m.head_dim) for m in self.spec.layers if isinstance(m, Attention) and m.rope))
        self._frequencies = [inverse_frequencies(rope, size) for rope, size in ropes]
        self._rotary = (Rotary * len(ropes))(*(Rotary(f.data_ptr(), len(f)) for f in self._frequencies))
        self._model = Model(
            hidden=hidden,
            num_layers=len(self.spec.layers),
            num_ropes=len(ropes),
            eps=norm.eps,
            final_norm=self._vector(norm, "weight", hidden),
            embedding=matrix_of(self._parts.tensor(embeddings, "weight", (vocabulary, hidden))),
            head=self._matrix(decoder, "lm_head", vocabulary, hidden),
            ropes=self._rotary,
        )
        layers = self._parts.child(backbone, "layers", nn.ModuleList)
        if len(layers) != len(self.spec.layers):
            raise SpecError(f"the decoder has {len(layers)} layers: its spec says {len(self.spec.layers)}")
        described = [
            self._layer(self._parts.child(layers, str(i), DecoderLayer), m, ropes) for i, m in enumerate(self.spec.layers)
        ]
        self._layers = (Layer * len(described))(*described)
        self._model.layers = self._layers
        self._table = StateTable(self.spec)
        self._parts.settle()

    @property
    def current(self) -> bool:
        """Whether every module and weight still is what the descriptors point to, and no hook has been added."""
        return self._parts.current

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
        rows, threads = len(ids), torch.get_num_threads() if threads is None else threads
        if threads < 1:
            raise SpecError(f"threads={threads}: must be 1 or more")
        decoder = self._decoder()  # alive as long as C reads its weights
        if decoder is None:
            raise SpecError("the decoder of this program is gone: keep it while its program is used")
        table = self._table.of(states, block_size)
        self._check(ids, lengths, blocks, block_size, slots, table)
        logits = torch.empty(rows, self.spec.vocab_size)
        if rows == 0:
            return logits
        ids, lengths = ids.to(torch.int64).contiguous(), lengths.to(torch.int64).contiguous()
        blocks, slots = blocks.to(torch.int32).contiguous(), slots.to(torch.int32).contiguous()
        batch = Batch(
            rows=rows,
            threads=threads,
            max_blocks=blocks.shape[1],
            block_size=block_size,
            ids=ids.data_ptr(),
            lengths=lengths.data_ptr(),
            blocks=blocks.data_ptr(),
            slots=slots.data_ptr(),
            states=table.entries,
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
        table: Table,
    ) -> None:
        """Nothing that C would read or write out of bounds."""
        for name, values in (("lengths", lengths), ("blocks", blocks), ("slots", slots)):
            if len(values) != len(ids):
                raise SpecError(f"{name} has {len(values)} rows: ids has {len(ids)}")
        if len(ids) == 0:
            return
        _check_range("ids", ids, self.spec.vocab_size)
        _check_range("lengths", lengths, MAX_LENGTH if table.blocks is None else blocks.shape[1] * block_size)
        if table.slots is not None:
            _check_range("slots", slots, table.slots)
        if table.blocks is not None:
            used = torch.arange(blocks.shape[1]) * block_size <= lengths[:, None]
            _check_range("blocks", blocks[used], table.blocks)

    def _layer(self, of: DecoderLayer, m: Mixer, ropes: list[tuple[Rope, int]]) -> Layer:
        parts, hidden = self._parts, self.spec.hidden_size
        norm = parts.child(of, "norm", RMSNorm)
        out = Layer(kind=_KINDS.index(type(m)), eps=norm.eps, norm=self._vector(norm, "weight", hidden), rope=-1, dt_max=inf)
        match m:
            case Mamba2():
                mixer = parts.child(of, "mixer", Mamba2Mixer)
                _check_same(mixer.m, m)
                out.heads, out.groups, out.head_dim = m.num_heads, m.groups, m.head_dim
                out.state_dim, out.kernel, out.dt_min = m.state_dim, m.conv_kernel, m.dt_min
                out.dt_max = inf if m.dt_max is None else m.dt_max
                out.w[0] = self._matrix(mixer, "in_proj", m.in_width, hidden)
                out.w[1] = self._matrix(mixer, "out_proj", hidden, m.d_inner)
                conv = parts.child(mixer, "conv1d", DepthwiseConv)
                weight, bias = parts.tensor(conv, "weight", (m.conv_width, 1, m.conv_kernel)), parts.bias(conv, m.conv_width)
                if bias is not None and bias.dtype != weight.dtype:
                    raise SpecError(f"conv1d.bias is {bias.dtype}: must be {weight.dtype}, as conv1d.weight")
                out.v[0], out.v[1] = vector_of(weight), vector_of(bias)
                for i, name in enumerate(("A_log", "D", "dt_bias"), 2):
                    out.v[i] = self._vector(mixer, name, m.num_heads)
                out.v[5] = self._scale(mixer, "norm", GatedGroupNorm, m.d_inner, norm.eps)
            case Attention():
                mixer = parts.child(of, "mixer", AttentionMixer)
                _check_same(mixer.m, m)
                out.heads, out.groups, out.head_dim = m.num_heads, m.num_kv_heads, m.head_dim
                out.rope = ropes.index((m.rope, m.head_dim)) if m.rope else -1
                inner, rows = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
                for i, (name, size) in enumerate((("q_proj", inner), ("k_proj", rows), ("v_proj", rows))):
                    out.w[i] = self._matrix(mixer, name, size, hidden)
                out.w[3] = self._matrix(mixer, "o_proj", hidden, inner)
                if m.qk_norm == "head":
                    for i, name in enumerate(("q_norm", "k_norm")):
                        out.v[i] = self._scale(mixer, name, RMSNorm, m.head_dim, norm.eps)
            case MLP():
                mixer = parts.child(of, "mixer", MLPMixer)
                out.w[0] = self._matrix(mixer, "up_proj", m.ffn_size, hidden)
                if m.gated:
                    out.w[1] = self._matrix(mixer, "gate_proj", m.ffn_size, hidden)
                out.w[2] = self._matrix(mixer, "down_proj", hidden, m.ffn_size)
            case MoE():
                self._experts(out, parts.child(of, "mixer", MoEMixer), m)
        return out

    def _experts(self, out: Layer, mixer: MoEMixer, m: MoE) -> None:
        parts, hidden, width = self._parts, self.spec.hidden_size, m.expert_width(self.spec.hidden_size)
        router, experts = parts.child(mixer, "gate", Router), parts.child(mixer, "experts", Experts)
        _check_same(router.m, m)
        out.experts, out.top_k, out.groups, out.top_groups = m.num_experts, m.top_k, m.groups, m.top_groups
        out.normalise, out.score_scale = m.normalise, m.score_scale
        out.v[0] = self._vector(router, "e_score_correction_bias", m.num_experts)
        out.w[0] = matrix_of(parts.tensor(router, "weight", (m.num_experts, hidden)))
        out.w[1] = matrix_of(parts.tensor(experts, "up_proj", (m.num_experts, m.ffn_size, width)).detach()[0])
        out.w[2] = matrix_of(parts.tensor(experts, "down_proj", (m.num_experts, width, m.ffn_size)).detach()[0])
        if m.shared_ffn_size:
            shared = parts.child(mixer, "shared_experts", SharedExpert)
            out.w[3] = self._matrix(shared, "up_proj", m.shared_ffn_size, hidden)
            out.w[4] = self._matrix(shared, "down_proj", hidden, m.shared_ffn_size)
        if m.latent_size:
            out.w[5] = self._matrix(mixer, "fc1_latent_proj", width, hidden)
            out.w[6] = self._matrix(mixer, "fc2_latent_proj", hidden, width)

    def _vector(self, owner: nn.Module, name: str, size: int) -> Vector:
        return vector_of(self._parts.tensor(owner, name, (size,)))

    def _scale(self, mixer: nn.Module, name: str, kind: type[RMSNorm | GatedGroupNorm], size: int, eps: float) -> Vector:
        """The weight of a norm inside a mixer; C knows one eps a layer."""
        norm = self._parts.child(mixer, name, kind)
        if norm.eps != eps:
            raise SpecError(f"{name}.eps={norm.eps}: must be {eps}, as of the norm before the mixer")
        return self._vector(norm, "weight", size)

    def _matrix(self, parent: nn.Module, name: str, rows: int, cols: int) -> Matrix:
        """Weight and bias of a projection, of a size that the spec says: C trusts it."""
        module = self._parts.child(parent, name, Linear, nn.Linear, Int8Linear)
        bias = self._parts.bias(module, rows)
        if not isinstance(module, Int8Linear):
            return matrix_of(self._parts.tensor(module, "weight", (rows, cols)), bias=bias)
        groups = -(-cols // GROUP)
        weight = self._parts.tensor(module, "weight", (rows, groups * GROUP), dtypes=(torch.int8,))
        scale = self._parts.tensor(module, "scale", (rows, groups), dtypes=(torch.float32,))
        return matrix_of(weight, scale=scale, bias=bias, cols=cols)


def _check_same(built: Mixer, m: Mixer) -> None:
    if built != m:
        raise SpecError(f"mixer was built for {built}: the spec of the decoder says {m}")


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
    if program is None or program.spec is not decoder.spec or not program.current:
        try:
            program = _programs[decoder] = Program(decoder)
        except SpecError as refused:
            return Infeasible(str(refused))
    return program
