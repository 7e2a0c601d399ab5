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

    def __init__(self, m: Mamba2, hidden: int, eps: float, chunk: int) -> None:
        super().__init__()
        self.m = m
        self.chunk = chunk
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
        # A state that has seen nothing is zero; leaving it out keeps gradients of a first pass that also fills a state.
        earlier = None if span.starts is None else state
        window = None if earlier is None else earlier.conv
        mix = kernels.fused_mixer(projected, m) if span.time > 1 else None
        if mix is not None:
            return self.out_proj(self._mix(mix, projected, span, earlier, state))
        z, inputs, dt = projected.split([m.d_inner, m.conv_width, m.num_heads], -1)
        step = self._step_sizes(dt)
        a = -self.A_log.float().exp()
        if span.time == 1 and earlier is not None and span.lengths is None:
            mixed = functional.silu(self._convolve(inputs, window, span))
            values, b_in, c_out = self._split(mixed[:, 0])
            y, new = kernels.scan_step(earlier.ssm, values.float(), step[:, 0], a, b_in.float(), c_out.float())
            earlier.conv.copy_(torch.cat([earlier.conv[..., 1:], inputs.transpose(1, 2).to(earlier.conv.dtype)], -1))
            earlier.ssm.copy_(new)
            y, values = y[:, None], values[:, None]
        else:
            if span.valid is not None:
                step = step * span.valid[..., None]
            mixed = functional.silu(self._convolve(inputs, window, span))
            values, b_in, c_out = self._split(mixed)
            start = None if earlier is None else earlier.ssm
            y, final = kernels.scan(
                values.float(), step, a, b_in.float(), c_out.float(), chunk=self.chunk, state=start, segments=span.segments
            )
            if state is not None:
                state.conv.copy_(_last_inputs(state.conv, inputs, span))
                state.ssm.copy_(final)
        y = (y + values * self.D.float()[:, None]).to(x.dtype)
        return self.out_proj(self.norm(y.flatten(-2), z))

    def _mix(
        self,
        mix: Callable[..., tuple[Tensor, Tensor]],
        projected: Float[Tensor, "b t w"],
        span: Span,
        earlier: MambaState | None,
        state: MambaState | None,
    ) -> Float[Tensor, "b t d"]:
        """All between the projections as one call; forward hooks of the norm do not see it."""
        y, final = mix(
            projected,
            self.conv1d.weight[:, 0].float(),
            None if self.conv1d.bias is None else self.conv1d.bias.float(),
            self.dt_bias.float(),
            self.A_log.float(),
            self.D.float(),
            self.norm.weight.float(),
            m=self.m,
            eps=self.norm.eps,
            window=None if earlier is None else earlier.conv.float(),
            state=None if earlier is None else earlier.ssm,
            segments=span.segments,
            lengths=span.lengths,
        )
        if state is not None:
            inputs = projected[..., self.m.d_inner : self.m.d_inner + self.m.conv_width]
            state.conv.copy_(_last_inputs(state.conv, inputs, span))
            state.ssm.copy_(final)
        return y

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


def _last_inputs(window: Float[Tensor, "b c w"], inputs: Float[Tensor, "b t c"], span: Span) -> Float[Tensor, "b c w"]:
    """The convolution window after each row's last token."""
    width = window.shape[2]
    if span.segments is not None:
        inputs = inputs * (span.segments == span.segments[:, -1:])[..., None]
        window = window * (span.segments[:, -1] == 0)[:, None, None]
    if span.lengths is None:
        recent = inputs[:, max(0, span.time - width) :].transpose(1, 2).to(window.dtype)
        return torch.cat([window[..., recent.shape[2] :], recent], -1)
    known = torch.cat([window, inputs.transpose(1, 2).to(window.dtype)], -1)
    index = span.lengths.to(window.device)[:, None, None] + torch.arange(width, device=window.device)
    return known.gather(2, index.expand(-1, window.shape[1], -1))
