"""What one engine step does on one GPU: the operations of every layer kind, phase and parallelism.

A step is described by a `StepLoad`: some sequences decode one token each, some prompts are prefilled, or both at once
(piggybacking). `step_items` lists the operations of one pass through all layers; `step` turns them into seconds.

Rules that others get wrong, and this module is tested for: KV only on attention layers; recurrent decode reads AND
writes the state; recurrent heads are cut by tp; KV heads are copied once tp exceeds them; decode reads only the experts
that the batch touches; attention under data parallelism holds 1/dp of the sequences but all of its weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from tandem.perf import ops
from tandem.perf.ops import OUT, Array, OpClass, Work
from tandem.spec.design import Parallelism, Precision
from tandem.spec.model import MLA, MLP, Attention, GatedDeltaNet, Mamba2, Mixer, ModelSpec, MoE
from tandem.spec.units import itemsize


class Layout(NamedTuple):
    """Parallelism of many design points: float64 arrays (or floats) that broadcast with the load."""

    tp: Array
    pp: Array
    ep: Array
    dp: Array
    cpp: Array

    @classmethod
    def of(cls, p: Parallelism) -> Layout:
        """One design point."""
        return cls(float(p.tp), float(p.pp), float(p.ep), float(p.dp), float(p.cpp))

    @property
    def gpus(self) -> Array:
        """GPUs of one instance."""
        return self.tp * self.pp * self.dp * self.cpp

    @property
    def moe_tp(self) -> Array:
        """Slices of each expert."""
        return self.tp * self.dp / self.ep


class StepLoad(NamedTuple):
    """What one attention-data-parallel group of one pipeline stage set processes in one step.

    decode_seqs sequences advance by one token at mean context `context`; prefill_seqs prompts of `isl` tokens are in
    work, each cut in `chunks` equal chunks of which this step does one, so prior tokens average (isl - isl/chunks) / 2.
    `cached_up` says that MLA keeps its up-projected keys and values between chunks instead of recomputing them.
    """

    decode_seqs: Array = 0.0
    context: Array = 0.0
    prefill_seqs: Array = 0.0
    isl: Array = 0.0
    chunks: Array = 1.0
    cached_up: bool = False
    draft: Array = 0.0
    """Tokens that a decoding sequence proposes and verifies beside its next one (multi-token prediction)."""
    busy_groups: Array = 1.0
    """Share of the attention groups that have such a load in this step; the rest is idle, and experts see less."""
    decode_window_context: dict[int, Array] | None = None
    """Mean of min(context, window) for each window of the model, where `context` alone would misstate it."""

    @property
    def new(self) -> Array:
        """Prompt tokens of one prompt in this step."""
        return self.isl / self.chunks

    @property
    def prior(self) -> Array:
        """Mean number of its tokens that earlier chunks have cached."""
        return (self.isl - self.new) / 2

    @property
    def tokens(self) -> Array:
        """Rows of the dense matmuls."""
        return self.decode_tokens + self.prefill_seqs * self.new

    @property
    def decode_tokens(self) -> Array:
        """Tokens of the decoding sequences in this step."""
        return self.decode_seqs * (1.0 + self.draft)

    def attended(self, window: int | None) -> Array:
        """Mean cached tokens that a decoding sequence reads in a layer with this window."""
        if window is None:
            return self.context
        known = self.decode_window_context or {}
        return known.get(window, np.minimum(self.context, float(window)))

    @property
    def decodes(self) -> bool:
        """Whether any design point decodes in this step."""
        return bool(np.any(np.asarray(self.decode_seqs) > 0))

    @property
    def prefills(self) -> bool:
        """Whether any design point prefills in this step."""
        return bool(np.any(np.asarray(self.prefill_seqs) > 0))


@dataclass(frozen=True, slots=True)
class Item:
    """One operation: class, number format, work of one GPU, times it occurs in a pass, GPUs of its collective."""

    op: OpClass
    dtype: str
    work: Work
    count: Array
    gpus: Array | None = None


@dataclass(frozen=True)
class LayerCosts:
    """Operation lists of one model at one precision."""

    model: ModelSpec
    precision: Precision

    @property
    def dense_weights(self) -> str:
        """Format of attention and dense matmuls: 4-bit formats leave them in bf16 where the model has experts."""
        w = self.precision.weights
        has_experts = any(isinstance(m, MoE) for m, _ in self.model.mixers)
        return "bf16" if has_experts and w in ("fp4", "mxfp4", "int4") else w

    def step_items(self, layout: Layout, load: StepLoad) -> Iterator[Item]:
        """Operations of one pass of `load` through all layers, the head included, as one GPU sees them."""
        for mixer, count in self.model.mixers:
            yield from self._mixer_items(mixer, float(count), layout, load)
        h, t = self.model.hidden_size, load.tokens
        yield Item("memory", "bf16", ops.memory(5.0 * OUT * h * t), float(len(self.model.layers)))
        yield from self._head(load.decode_tokens + load.prefill_seqs / load.chunks, 1.0, layout)
        if np.any(np.asarray(load.draft) > 0):
            yield from self._draft(layout, load)
        stages = layout.pp * layout.cpp
        if np.any(np.asarray(stages) > 1):
            yield Item("send", "bf16", ops.send(OUT * h * t), stages - 1.0, layout.gpus)

    def _head(self, sampled: Array, count: Array, layout: Layout) -> Iterator[Item]:
        vocab = self.model.vocab_size / layout.tp
        yield Item("gemm", "bf16", ops.gemm(sampled, vocab, self.model.hidden_size, OUT, OUT), count)
        yield Item("memory", "bf16", ops.memory(8.0 * sampled * vocab), count)

    def _draft(self, layout: Layout, load: StepLoad) -> Iterator[Item]:
        """Passes through the multi-token prediction layer, one for each drafted token: as the model's last attention and
        feed-forward layers, a projection of two hidden states into one, and the head."""
        alone = StepLoad(decode_seqs=load.decode_seqs, context=load.context, busy_groups=load.busy_groups)
        kinds = [[m for m, _ in self.model.mixers if isinstance(m, kind)] for kind in ((Attention, MLA), (MLP, MoE))]
        for mixer in (found[-1] for found in kinds if found):
            for item in self._mixer_items(mixer, 1.0, layout, alone):
                yield replace(item, count=item.count * load.draft)
        h = self.model.hidden_size
        yield replace(self._gemm(load.decode_seqs, h, 2 * h, 1.0), count=load.draft)
        yield from self._head(load.decode_seqs, load.draft, layout)

    def _mixer_items(self, mixer: Mixer, count: float, layout: Layout, load: StepLoad) -> Iterator[Item]:
        if isinstance(mixer, Attention):
            yield from self._attention(mixer, count, layout, load)
        elif isinstance(mixer, MLA):
            yield from self._mla(mixer, count, layout, load)
        elif isinstance(mixer, (Mamba2, GatedDeltaNet)):
            yield from self._recurrent(mixer, count, layout, load)
        elif isinstance(mixer, MLP):
            yield from self._dense(mixer.ffn_size, mixer.up_width, count, layout, load.tokens)
        else:
            yield from self._moe(mixer, count, layout, load)
            return
        yield from self._allreduce(count, layout, load.tokens)

    def _gemm(self, rows: Array, n: Array, k: Array, count: float) -> Item:
        w = self.dense_weights
        a = self.precision.activations if w not in ("bf16", "int4", "mxfp4") else "bf16"
        return Item("gemm", w, ops.gemm(rows, n, k, itemsize(w), itemsize(a)), count)

    def _allreduce(self, count: float, layout: Layout, tokens: Array) -> Iterator[Item]:
        if np.any(np.asarray(layout.tp) > 1):
            message = OUT * self.model.hidden_size * tokens
            yield Item("allreduce", "bf16", ops.allreduce(message, layout.tp), count * (np.asarray(layout.tp) > 1), layout.tp)

    def _attention(self, m: Attention, count: float, layout: Layout, load: StepLoad) -> Iterator[Item]:
        h, kv = self.model.hidden_size, itemsize(self.precision.kv)
        heads, kv_heads = m.num_heads / layout.tp, np.maximum(m.num_kv_heads / layout.tp, 1.0)
        q_width = m.q_width / layout.tp
        yield self._gemm(load.tokens, q_width + 2.0 * kv_heads * m.head_dim, h, count)
        if load.decodes:
            reach, queries = load.attended(m.window), 1.0 + load.draft
            work = ops.attention_decode(load.decode_seqs, reach, heads, kv_heads, m.head_dim, kv, queries)
            yield Item("attention_decode", self.precision.kv, work, count * (np.asarray(load.decode_seqs) > 0))
        if load.prefills:
            pairs = ops.attended_pairs(load.isl, 0.0, m.window) / load.chunks
            keys = load.new + (load.prior if m.window is None else np.minimum(load.prior, m.window))
            work = ops.attention_over(load.prefill_seqs, pairs, load.new, keys, heads, kv_heads, m.head_dim, kv)
            yield Item("attention_prefill", self.precision.kv, work, count * (np.asarray(load.prefill_seqs) > 0))
        rotated = OUT * load.tokens * (q_width + kv_heads * m.head_dim)
        yield Item("memory", "bf16", ops.memory(2.0 * rotated), count)
        yield self._gemm(load.tokens, h, heads * m.head_dim, count)

    def _mla(self, m: MLA, count: float, layout: Layout, load: StepLoad) -> Iterator[Item]:
        h, t, heads = self.model.hidden_size, load.tokens, m.num_heads / layout.tp
        query_rank = m.q_lora_rank or h
        down = m.kv_lora_rank + m.qk_rope_head_dim + (m.q_lora_rank or 0)
        yield self._gemm(t, down, h, count)
        yield self._gemm(t, heads * m.qk_head_dim, query_rank, count)
        if m.index is not None:
            i = m.index
            yield self._gemm(t, i.num_heads * i.head_dim, query_rank, count)
            yield self._gemm(t, i.head_dim + i.num_heads, h, count)
        if load.decodes:
            yield from self._mla_decode(m, count, heads, load)
        if load.prefills:
            yield from self._mla_prefill(m, count, heads, load)
        yield Item("memory", "bf16", ops.memory(2.0 * OUT * t * (down + heads * m.qk_head_dim)), count)
        yield self._gemm(t, h, heads * m.v_head_dim, count)

    def _mla_decode(self, m: MLA, count: float, heads: Array, load: StepLoad) -> Iterator[Item]:
        b, kv, queries = load.decode_seqs, itemsize(self.precision.kv), 1.0 + load.draft
        occurs = count * (np.asarray(b) > 0)
        # Absorbed projections: queries into the latent space, outputs out of it (both halves of kv_b, once a head).
        yield Item("gemm", "bf16", ops.gemm(b * queries, heads * m.kv_lora_rank, m.qk_nope_head_dim, OUT, OUT), occurs)
        yield Item("gemm", "bf16", ops.gemm(b * queries, heads * m.v_head_dim, m.kv_lora_rank, OUT, OUT), occurs)
        context = load.context
        if m.index is not None:
            i = m.index
            scored = ops.attention_decode(b, context / 2, i.num_heads, 1.0, i.head_dim, 1.0, queries)
            yield Item("attention_decode", "fp8", scored, occurs)
            context = load.attended(m.index.top_k)
        work = ops.mla_decode(b, context, heads, m.kv_lora_rank, m.qk_rope_head_dim, kv, queries)
        yield Item("mla_decode", self.precision.kv, work, occurs)

    def _mla_prefill(self, m: MLA, count: float, heads: Array, load: StepLoad) -> Iterator[Item]:
        s = load.prefill_seqs
        occurs = count * (np.asarray(s) > 0)
        # Earlier chunks' latents are projected up again in every chunk unless the result is kept (paper B, F3).
        up_rows = s * (load.new + (0.0 if load.cached_up else load.prior))
        up = self._gemm(up_rows, heads * (m.qk_nope_head_dim + m.v_head_dim), m.kv_lora_rank, count)
        yield replace(up, count=occurs)
        top_k = m.index.top_k if m.index is not None else None
        pairs = ops.attended_pairs(load.isl, 0.0, top_k) / load.chunks
        flops = 2.0 * s * heads * (m.qk_head_dim + m.v_head_dim) * pairs
        moved = s * heads * OUT * (m.qk_head_dim + m.v_head_dim) * (2.0 * load.new + load.prior)
        yield Item("mla_prefill", self.precision.kv, Work(flops, moved), occurs)
        if m.index is not None:
            i = m.index
            scored = ops.attended_pairs(load.isl, 0.0) / load.chunks
            score = Work(2.0 * s * i.num_heads * i.head_dim * scored, s * i.head_dim * (load.new * i.num_heads + load.prior))
            yield Item("attention_prefill", "fp8", score, occurs)

    def _recurrent(self, m: Mamba2 | GatedDeltaNet, count: float, layout: Layout, load: StepLoad) -> Iterator[Item]:
        h, t = self.model.hidden_size, load.tokens
        if isinstance(m, Mamba2):
            inner, heads, head_dim, state_dim = m.d_inner, m.num_heads / layout.tp, m.head_dim, m.state_dim
            groups: Array = np.maximum(m.groups / layout.tp, 1.0)
        else:
            inner, heads, head_dim, state_dim = m.value_width, m.num_value_heads / layout.tp, m.value_head_dim, m.key_head_dim
            groups = m.num_key_heads / layout.tp
        channels = m.conv_width / layout.tp
        state = itemsize(self.precision.state)
        yield self._gemm(t, m.in_width / layout.tp, h, count)
        if load.decodes:
            b, tokens = load.decode_seqs, 1.0 + load.draft
            occurs = count * (np.asarray(b) > 0)
            work = ops.scan_decode(b, heads, head_dim, state_dim, groups, state, tokens)
            yield Item("conv_decode", "bf16", ops.conv_update(b * tokens, channels, m.conv_kernel), occurs)
            yield Item("scan_decode", "bf16", work, occurs)
        if load.prefills:
            p = load.prefill_seqs
            occurs = count * (np.asarray(p) > 0)
            work = ops.scan_prefill(p * load.new, p, heads, head_dim, state_dim, groups)
            yield Item("conv_prefill", "bf16", ops.conv(p * load.new, channels, m.conv_kernel), occurs)
            yield Item("scan_prefill", "bf16", work, occurs)
        yield Item("memory", "bf16", ops.memory(3.0 * OUT * t * inner / layout.tp), count)
        yield self._gemm(t, h, inner / layout.tp, count)

    def _dense(self, ffn: int, up: int, count: float, layout: Layout, tokens: Array) -> Iterator[Item]:
        h = self.model.hidden_size
        yield self._gemm(tokens, up / layout.tp, h, count)
        yield Item("memory", "bf16", ops.memory(OUT * tokens * (up + ffn) / layout.tp), count)
        yield self._gemm(tokens, h, ffn / layout.tp, count)

    @property
    def _expert_input_bytes(self) -> float:
        """Bytes of one number that enters an expert: weight-only formats compute in bf16."""
        w = self.precision.weights
        return itemsize(self.precision.activations if w not in ("bf16", "int4", "mxfp4") else "bf16")

    def _moe(self, m: MoE, count: float, layout: Layout, load: StepLoad) -> Iterator[Item]:
        h, t = self.model.hidden_size, load.tokens
        width, w = m.expert_width(h), self.precision.weights
        yield Item("gemm", "bf16", ops.gemm(t, m.num_experts, h, OUT, OUT), count)
        if m.latent_size:
            yield self._gemm(t, m.latent_size, h, count)
            yield self._gemm(t, h, m.latent_size, count)
        if m.shared_ffn_size:
            yield from self._dense(m.shared_ffn_size, m.shared_ffn_size * (2 if m.gated else 1), count, layout, t)
        ffn = m.ffn_size / layout.moe_tp
        a = self._expert_input_bytes
        tokens = t * layout.dp * load.busy_groups
        work = ops.moe(tokens, width, ffn, m.top_k, m.num_experts, layout.ep, itemsize(w), a, gated=m.gated)
        yield Item("moe", w, work, count)
        yield from self._moe_traffic(m, width, count, layout, t)

    def _moe_traffic(self, m: MoE, width: int, count: float, layout: Layout, t: Array) -> Iterator[Item]:
        """Without attention data parallelism one all-reduce joins the shares; with it, tokens travel to experts and back."""
        single, group = np.asarray(layout.dp) <= 1, layout.tp * layout.dp
        for item in self._allreduce(count, layout, t):
            yield replace(item, count=item.count * single)
        if np.any(~single):
            spread = (~single) & (np.asarray(layout.ep) > 1)
            # A token goes to each expert group that it picked, there to every slice of the expert: in the format of the
            # experts' inputs; their outputs come back in bf16.
            copies = ops.distinct_groups(float(m.top_k), layout.ep) * layout.moe_tp
            for number_bytes in (self._expert_input_bytes, OUT):
                message = number_bytes * t / layout.tp * copies * width
                yield Item("alltoall", "bf16", ops.alltoall(message, group), count * spread, group)
            joined = OUT * t * layout.dp * width
            yield Item("allreduce", "bf16", ops.allreduce(joined, group), count * (~single & ~spread), group)
