"""Mamba-2's recurrence: state-space duality in chunks for many tokens, one update for a single token.

    S_t = exp(dt_t * a) * S_(t-1) + dt_t * x_t (outer) B_t        y_t = S_t C_t

Within a chunk that is attention with decaying weights, between chunks a short recurrence of states, so that nearly all
work is matrix products (Mamba-2, arXiv:2405.21060, section 6; semantics: paper A, docs/decoder.md).

Axes: b batch, t time, c chunk, l s positions in a chunk, h heads, g groups, r heads of a group, p head dim, n state dim.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

CHUNK = 64
"""Tokens of a chunk, as in native/scan.h."""
_FORGOTTEN = -200.0
"""Logarithm of a decay that leaves nothing, in fp32 or beside any other: bounds the sums of a chunk."""


def ssd_scan(
    x: Float[Tensor, "b t h p"],
    dt: Float[Tensor, "b t h"],
    a: Float[Tensor, " h"],
    b_in: Float[Tensor, "b t g n"],
    c_out: Float[Tensor, "b t g n"],
    *,
    chunk: int,
    state: Float[Tensor, "b h p n"] | None = None,
    segments: Int[Tensor, "b t"] | None = None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """Outputs of every token and the state after the last, all fp32; any length, any chunk.

    `dt` is the step size after softplus; a token with dt = 0 leaves the state as it is. `a` is negative. Where `segments`
    changes from one token to the next, the state starts from zero; the first segment continues `state`.

    Decays between two tokens are differences of sums, which may be thousands where a token forgets everything. So sums are
    float64, and their whole parts (exact in fp32) make the matrix of decays, their fractions factors of rows and columns:
    no digits are lost, the large matrix is built once, and gradients need not pass through it.
    """
    time, heads, head_dim = x.shape[1:]
    groups, state_dim = b_in.shape[2:]
    if time == 0:
        start = x.new_zeros(x.shape[0], heads, head_dim, state_dim) if state is None else state
        return x, start
    padding = -time % chunk
    if padding:
        x, dt, b_in, c_out = (_pad_time(v, padding) for v in (x, dt, b_in, c_out))
        segments = None if segments is None else functional.pad(segments, (0, padding), mode="replicate")
    cut = (-1, chunk)
    weighted = (x * dt[..., None]).unflatten(1, cut).permute(0, 1, 3, 2, 4)  # b c h l p
    keys = b_in.unflatten(1, cut).permute(0, 1, 3, 2, 4)  # b c g l n
    queries = c_out.unflatten(1, cut).permute(0, 1, 3, 2, 4)  # b c g l n
    steps = (dt * a).double().clamp(min=_FORGOTTEN).unflatten(1, cut).permute(0, 1, 3, 2)
    log_decay = steps.cumsum(-1)  # b c h l
    whole = log_decay.detach().round()
    part = log_decay - whole
    whole = whole.to(x.dtype)
    per_group = (groups, heads // groups)

    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    keep = _Segments(segments.unflatten(1, cut)) if segments is not None else None
    visible = causal if keep is None else causal & keep.same[:, :, None]
    decay = (whole[..., :, None] - whole[..., None, :]).masked_fill_(~visible, -torch.inf).exp_()  # b c h l s
    scores = queries @ keys.transpose(-1, -2)  # b c g l s
    mixed = (decay.unflatten(2, per_group) * scores[:, :, :, None]).flatten(2, 3)
    near = mixed @ (weighted * (-part).exp().to(x.dtype)[..., None])
    y = near * part.exp().to(x.dtype)[..., None]  # b c h l p

    to_end = (log_decay[..., -1:] - log_decay).exp().to(x.dtype)  # b c h l
    if keep is not None:
        to_end = to_end * keep.to_end[:, :, None]
    sent = (weighted * to_end[..., None]).unflatten(2, per_group)  # b c g r l p
    added = (sent.transpose(-1, -2).flatten(3, 4) @ keys).unflatten(3, (-1, head_dim)).flatten(2, 3)  # b c h p n
    survives = log_decay[..., -1].exp().to(x.dtype)  # b c h
    if keep is not None:
        survives = survives * keep.survives[:, :, None]
    entering, final = _pass_states(added, survives, state)

    from_start = log_decay.exp().to(x.dtype)  # b c h l
    if keep is not None:
        from_start = from_start * keep.from_start[:, :, None]
    carried = entering.unflatten(2, per_group).flatten(3, 4)  # b c g (r p) n
    far = (queries @ carried.transpose(-1, -2)).unflatten(-1, (-1, head_dim))  # b c g l r p
    y = y + far.transpose(3, 4).flatten(2, 3) * from_start[..., None]
    return y.permute(0, 1, 3, 2, 4).flatten(1, 2)[:, :time], final


def ssd_step(
    state: Float[Tensor, "b h p n"],
    x: Float[Tensor, "b h p"],
    dt: Float[Tensor, "b h"],
    a: Float[Tensor, " h"],
    b_in: Float[Tensor, "b g n"],
    c_out: Float[Tensor, "b g n"],
) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b h p n"]]:
    """One token: its output and the new state, fp32."""
    ratio = state.shape[1] // b_in.shape[1]
    keys = b_in.repeat_interleave(ratio, 1)
    queries = c_out.repeat_interleave(ratio, 1)
    decayed = state * (dt * a).exp()[..., None, None]
    new = decayed + (x * dt[..., None])[..., None] * keys[:, :, None]
    return (new @ queries[..., None]).squeeze(-1), new


class _Segments:
    """Which positions of a chunk belong together where documents are packed; all as multipliers or masks."""

    def __init__(self, segments: Int[Tensor, "b c l"]) -> None:
        last = segments[..., -1]
        before = torch.cat([segments[:, :1, 0], last[:, :-1]], 1)  # the segment whose state enters the chunk
        self.same: Bool[Tensor, "b c l l"] = segments[..., :, None] == segments[..., None, :]
        self.to_end: Float[Tensor, "b c l"] = (segments == last[..., None]).float()
        self.from_start: Float[Tensor, "b c l"] = (segments == before[..., None]).float()
        self.survives: Float[Tensor, "b c"] = (last == before).float()


def _pass_states(
    added: Float[Tensor, "b c h p n"], survives: Float[Tensor, "b c h"], state: Float[Tensor, "b h p n"] | None
) -> tuple[Float[Tensor, "b c h p n"], Float[Tensor, "b h p n"]]:
    """The state that enters each chunk, and the one that leaves the last."""
    current = torch.zeros_like(added[:, 0]) if state is None else state
    entering = []
    for more, share in zip(added.unbind(1), survives.unbind(1), strict=True):
        entering.append(current)
        current = torch.addcmul(more, current, share[..., None, None])
    return torch.stack(entering, 1), current


def _pad_time(values: Float[Tensor, "b t ..."], padding: int) -> Float[Tensor, "b more ..."]:
    return torch.cat([values, values.new_zeros(values.shape[0], padding, *values.shape[2:])], 1)


def causal_conv(
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None,
    *,
    window: Float[Tensor, "b d w"] | None = None,
    segments: Int[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b t d"]:
    """Depthwise causal convolution over time; `window` holds the k - 1 inputs before x, zero where there is none.

    A token sees inputs of its own segment only; the first segment continues the window.
    """
    time, width = x.shape[1], weight.shape[1]
    before = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if window is None else window.transpose(1, 2).to(x.dtype)
    padded = torch.cat([before, x], 1)
    taps = weight.to(x.dtype).unbind(1)
    out = x * taps[-1] if bias is None else torch.addcmul(bias.to(x.dtype), x, taps[-1])
    known = None if segments is None else torch.cat([segments[:, :1].expand(-1, width - 1), segments], 1)
    for back in range(1, width):
        seen = padded[:, width - 1 - back : width - 1 - back + time]
        if known is not None and segments is not None:
            seen = seen * (known[:, width - 1 - back : width - 1 - back + time] == segments)[..., None]
        out = torch.addcmul(out, seen, taps[-1 - back])
    return out
