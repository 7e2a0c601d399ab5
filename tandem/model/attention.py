"""Grouped-query attention with optional rotary embedding and query-key norm, over a `SequenceState`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tandem.model.linear import Linear
from tandem.model.norm import RMSNorm
from tandem.model.span import Span
from tandem.model.state import AttentionState
from tandem.spec.model import Attention, Rope


class AttentionMixer(nn.Module):
    """Projections, rotation, cache and attention of one layer; weights are named as on the hub."""

    def __init__(self, m: Attention, hidden: int, eps: float) -> None:
        super().__init__()
        self.m = m
        self.q_proj = Linear(hidden, m.q_width, bias=m.qkv_bias)
        self.k_proj = Linear(hidden, m.num_kv_heads * m.head_dim, bias=m.qkv_bias)
        self.v_proj = Linear(hidden, m.num_kv_heads * m.head_dim, bias=m.qkv_bias)
        self.o_proj = Linear(m.num_heads * m.head_dim, hidden, bias=m.out_bias)
        self.q_norm = RMSNorm(m.head_dim, eps) if m.qk_norm == "head" else None
        self.k_norm = RMSNorm(m.head_dim, eps) if m.qk_norm == "head" else None

    def forward(self, x: Float[Tensor, "b t d"], span: Span, state: AttentionState | None = None) -> Float[Tensor, "b t d"]:
        """Attention output; with a `state`, keys and values are written to it and earlier ones are seen."""
        q = self.q_proj(x).unflatten(-1, (-1, self.m.head_dim)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (-1, self.m.head_dim)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (-1, self.m.head_dim)).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.m.rope is not None:
            cos, sin = rotation(self.m.rope, self.m.head_dim, span.positions)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if state is not None:
            for slots, new in zip(state.tensors, (k, v), strict=True):
                _write(slots, new.detach(), span)
        y = _attend(q, k, v, span, state)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def _write(slots: Float[Tensor, "b g s p"], new: Float[Tensor, "b g t p"], span: Span) -> None:
    """Put keys or values behind those of each row. Padding lands beyond the row's length, where it is overwritten."""
    if span.start is not None:
        slots[:, :, span.start : span.start + span.time] = new.to(slots.dtype)
    elif span.starts is not None:
        for row, start in enumerate(span.starts.tolist()):
            slots[row, :, start : start + span.time] = new[row].to(slots.dtype)


def _written(slots: Float[Tensor, "b g s p"], new: Float[Tensor, "b g t p"], span: Span) -> Float[Tensor, "b g filled p"]:
    """What `slots` hold after `_write`, in the dtype of `new`; with gradients a copy, as a state has none."""
    filled = span.time if span.starts is None else span.time + int(span.starts.max())
    known = slots[:, :, :filled].to(new.dtype)
    if new.requires_grad:
        known = known.clone()
        _write(known, new, span)
    return known


def _attend(
    q: Float[Tensor, "b h t p"],
    k: Float[Tensor, "b g t p"],
    v: Float[Tensor, "b g t p"],
    span: Span,
    state: AttentionState | None,
) -> Float[Tensor, "b h t p"]:
    if state is None or span.start == 0:
        if span.segments is None:
            return attend(q, k, v, causal=True)
        if q.device.type == "cuda":
            return attend_documents(q, k, v, span.segments, compiled=True)
        lengths = document_lengths(span.segments)
        if len(lengths) * WORTH_A_CALL <= span.segments.numel():
            return attend_each(q, k, v, lengths)
        return attend(q, k, v, mask=span.mask(span.time))
    if span.start is None:
        keys, values = (_written(slots, new, span) for slots, new in zip(state.tensors, (k, v), strict=True))
        return attend(q, keys, values, mask=span.mask(keys.shape[2]))
    earlier = (state.keys[:, :, : span.start].to(q.dtype), state.values[:, :, : span.start].to(q.dtype))
    if span.time == 1 or q.device.type != "cpu" or q.requires_grad:  # the log-sums below have no gradient
        both = (torch.cat([old, new], 2) for old, new in zip(earlier, (k, v), strict=True))
        return attend(q, *both, mask=None if span.time == 1 else span.mask(span.start + span.time))
    return _attend_in_two_parts(q, k, v, earlier)


WORTH_A_CALL = 24
"""Mean tokens of a document from which on a call of its own is faster than a mask over all of the row, on CPUs."""


def attend(
    q: Float[Tensor, "b h t p"],
    k: Float[Tensor, "b g s p"],
    v: Float[Tensor, "b g s p"],
    *,
    mask: Bool[Tensor, "rows 1 t s"] | None = None,
    causal: bool = False,
) -> Float[Tensor, "b h t p"]:
    """Scaled dot-product attention; query head i reads key head i // (h / g)."""
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1]
    )


def document_lengths(segments: Int[Tensor, "b t"]) -> list[int]:
    """Tokens of every document, row after row."""
    new = torch.ones_like(segments, dtype=torch.bool)
    new[:, 1:] = segments[:, 1:] != segments[:, :-1]
    begins = new.flatten().nonzero()[:, 0]
    return begins.diff(append=begins.new_tensor([segments.numel()])).tolist()


def attend_each(
    q: Float[Tensor, "b h t p"], k: Float[Tensor, "b g t p"], v: Float[Tensor, "b g t p"], lengths: list[int]
) -> Float[Tensor, "b h t p"]:
    """Causal attention within each document, one after the other: nothing is computed that a mask would hide."""
    parts = (values.transpose(1, 2).flatten(0, 1).split(lengths) for values in (q, k, v))
    each = (
        attend(*(part.transpose(0, 1)[None] for part in document), causal=True)[0].transpose(0, 1)
        for document in zip(*parts, strict=True)
    )
    return torch.cat(list(each)).unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


def attend_documents(
    q: Float[Tensor, "b h t p"],
    k: Float[Tensor, "b g t p"],
    v: Float[Tensor, "b g t p"],
    segments: Int[Tensor, "b t"],
    *,
    compiled: bool,
) -> Float[Tensor, "b h t p"]:
    """Causal attention within each segment by FlexAttention, which skips blocks between documents and builds no mask."""
    time = q.shape[2]
    blocks = create_block_mask(
        lambda b, _, query, key: (query >= key) & (segments[b, query] == segments[b, key]),
        q.shape[0],
        None,
        time,
        time,
        device=q.device,
    )
    run: Any = _compiled_flex() if compiled else flex_attention
    y: Tensor = run(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])
    return y


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _attend_in_two_parts(
    q: Float[Tensor, "b h t p"],
    k: Float[Tensor, "b g t p"],
    v: Float[Tensor, "b g t p"],
    earlier: tuple[Float[Tensor, "b g s p"], Float[Tensor, "b g s p"]],
) -> Float[Tensor, "b h t p"]:
    """Earlier tokens without a mask and new ones causally, joined by their log-sums: no mask of t x (s + t) is built.

    The query heads of a group become further rows of one head, so earlier keys and values are read in place.
    """
    groups = k.shape[1]
    rows = q.unflatten(1, (groups, -1)).flatten(2, 3)  # b g (h/g t) p
    far, far_log = _flash(rows, *earlier, causal=False)
    far, far_log = (value.unflatten(2, (-1, q.shape[2])).flatten(1, 2) for value in (far, far_log[..., None]))
    repeat = q.shape[1] // groups
    near, near_log = _flash(q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), causal=True)
    share = torch.sigmoid(near_log[..., None] - far_log)  # fp32 whatever q is
    return torch.lerp(far.float(), near.float(), share).to(q.dtype)


def _flash(
    q: Float[Tensor, "b h t p"], k: Float[Tensor, "b h s p"], v: Float[Tensor, "b h s p"], *, causal: bool
) -> tuple[Float[Tensor, "b h t p"], Float[Tensor, "b h t"]]:
    """Attention and the logarithm of each row's sum of exponentials."""
    y, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return y, log_sum


def inverse_frequencies(rope: Rope, head_dim: int) -> Float[Tensor, " half"]:
    """Radians a token of each rotated pair, fp32; `llama3` slows the low ones down (transformers' rope_utils)."""
    rotated = int(head_dim * rope.fraction)
    frequencies = 1.0 / rope.theta ** (torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated)
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling != "llama3" or rope.original_max_context is None:
        return frequencies
    waves = 2 * math.pi / frequencies
    turns = rope.original_max_context / waves
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    slow, fast = turns < rope.low_freq_factor, turns > rope.high_freq_factor
    return torch.where(slow, frequencies / rope.factor, torch.where(fast, frequencies, blended))


def rotation(
    rope: Rope, head_dim: int, positions: Int[Tensor, "rows t"]
) -> tuple[Float[Tensor, "rows 1 t half"], Float[Tensor, "rows 1 t half"]]:
    """Cosine and sine of each position and pair, fp32."""
    angles = positions[:, None, :, None].float() * inverse_frequencies(rope, head_dim).to(positions.device)
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "b h t p"], cos: Float[Tensor, "rows 1 t half"], sin: Float[Tensor, "rows 1 t half"]
) -> Float[Tensor, "b h t p"]:
    """x with its first 2 * half numbers a head turned in pairs (i, i + half), the rest as they are."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * c - second * s, second * c + first * s, rest], -1)
