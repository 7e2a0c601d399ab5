"""The Mamba-2 mixer exactly as Nemotron-H computes it (paper A; docs/decoder.md lists the steps)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from tandem.model import kernels
from tandem.model.linear import Linear
from tandem.model.norm import GatedGroupNorm
from tandem.model.scan import CHUNK
from tandem.model.span import Span
from tandem.model.state import MambaState
from tandem.spec.model import Mamba2


class DepthwiseConv(nn.Module):
    """Weights of the causal convolution, shaped as in checkpoints: [channels, 1, kernel]."""

    def __init__(self, channels: int, kernel: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None


class Mamba2Mixer(nn.Module):
    """in_proj, convolution over x, B and C, selective scan, gated norm, out_proj. Nothing is derived from `expand`."""

    def __init__(self, m: Mamba2, hidden: int, eps: float) -> None:
        super().__init__()
        self.m = m
        self.chunk = CHUNK
        self.in_proj = Linear(hidden, m.in_width, bias=m.proj_bias)
        self.conv1d = DepthwiseConv(m.conv_width, m.conv_kernel, bias=m.conv_bias)
        self.A_log = nn.Parameter(torch.empty(m.num_heads))
        self.D = nn.Parameter(torch.empty(m.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(m.num_heads))
        self.norm = GatedGroupNorm(m.d_inner, m.groups, eps)
        self.out_proj = Linear(m.d_inner, hidden, bias=m.proj_bias)

    def forward(self, x: Float[Tensor, "b t d"], span: Span, state: MambaState | None = None) -> Float[Tensor, "b t d"]:
        """Mixer output; with a `state`, it is continued and holds the state after each row's last token."""
        m = self.m
        projected = self.in_proj(x)
        window = start = None
        if state is not None and span.starts is not None:  # one that has seen nothing is zero
            window, start = state.tensors
            if torch.is_grad_enabled():  # it is written over below, and the backward pass needs what it was
                window, start = window.clone(), start.clone()
        mix = kernels.fused_mixer(projected, m) if span.time > 1 else None
        if mix is not None:
            y, final = self._mix(mix, projected, span, window, start)
            if state is not None:
                inputs = projected[..., m.d_inner : m.d_inner + m.conv_width]
                _remember(state, inputs, final, span)
            return self.out_proj(y)
        z, inputs, dt = projected.split([m.d_inner, m.conv_width, m.num_heads], -1)
        step = self._step_sizes(dt)
        a = -self.A_log.float().exp()
        mixed = functional.silu(self._convolve(inputs, window, span))
        values, b_in, c_out = self._split(mixed)
        if span.time == 1 and start is not None and span.lengths is None:
            one = (values[:, 0].float(), step[:, 0], a, b_in[:, 0].float(), c_out[:, 0].float())
            y, final = kernels.scan_step(start, *one)
            y = y[:, None]
        else:
            if span.valid is not None:
                step = step * span.valid[..., None]
            y, final = kernels.scan(
                values.float(), step, a, b_in.float(), c_out.float(), chunk=self.chunk, state=start, segments=span.segments
            )
        if state is not None:
            _remember(state, inputs, final, span)
        y = (y + values * self.D.float()[:, None]).to(x.dtype)
        return self.out_proj(self.norm(y.flatten(-2), z))

    def _mix(
        self,
        mix: Callable[..., tuple[Tensor, Tensor]],
        projected: Float[Tensor, "b t w"],
        span: Span,
        window: Float[Tensor, "b c k"] | None,
        start: Float[Tensor, "b h p n"] | None,
    ) -> tuple[Float[Tensor, "b t inner"], Float[Tensor, "b h p n"]]:
        """All between the projections as one call, and the SSM state; forward hooks of the norm do not see it."""
        return mix(
            projected,
            self.conv1d.weight[:, 0].float(),
            None if self.conv1d.bias is None else self.conv1d.bias.float(),
            self.dt_bias.float(),
            self.A_log.float(),
            self.D.float(),
            self.norm.weight.float(),
            m=self.m,
            eps=self.norm.eps,
            window=None if window is None else window.float(),
            state=start,
            segments=span.segments,
            lengths=span.lengths,
        )

    def _step_sizes(self, dt: Float[Tensor, "b t h"]) -> Float[Tensor, "b t h"]:
        """softplus(dt + dt_bias), fp32, clamped only where the spec says so."""
        step = functional.softplus(dt.float() + self.dt_bias.float())
        return step.clamp(self.m.dt_min, self.m.dt_max) if self.m.dt_min > 0 or self.m.dt_max is not None else step

    def _convolve(
        self, inputs: Float[Tensor, "b t c"], window: Float[Tensor, "b c w"] | None, span: Span
    ) -> Float[Tensor, "b t c"]:
        return kernels.convolve(inputs, self.conv1d.weight[:, 0], self.conv1d.bias, window=window, segments=span.segments)

    def _split(
        self, mixed: Float[Tensor, "*b c"]
    ) -> tuple[Float[Tensor, "*b h p"], Float[Tensor, "*b g n"], Float[Tensor, "*b g n"]]:
        """x by heads, B and C by groups."""
        m = self.m
        x, b_in, c_out = mixed.split([m.d_inner, m.groups * m.state_dim, m.groups * m.state_dim], -1)
        per_group = (m.groups, m.state_dim)
        return x.unflatten(-1, (m.num_heads, m.head_dim)), b_in.unflatten(-1, per_group), c_out.unflatten(-1, per_group)


def _remember(state: MambaState, inputs: Float[Tensor, "b t c"], final: Float[Tensor, "b h p n"], span: Span) -> None:
    """Put what a row's next token needs into the state, without its gradient."""
    state.conv.copy_(_last_inputs(state.conv, inputs.detach(), span))
    state.ssm.copy_(final.detach())


def _last_inputs(window: Float[Tensor, "b c w"], inputs: Float[Tensor, "b t c"], span: Span) -> Float[Tensor, "b c w"]:
    """The convolution window after each row's last token."""
    width = window.shape[2]
    if span.lengths is None:
        recent = inputs[:, max(0, span.time - width) :].transpose(1, 2).to(window.dtype)
        return torch.cat([window[..., recent.shape[2] :], recent], -1)
    known = torch.cat([window, inputs.transpose(1, 2).to(window.dtype)], -1)
    index = span.lengths.to(window.device)[:, None, None] + torch.arange(width, device=window.device)
    return known.gather(2, index.expand(-1, window.shape[1], -1))
