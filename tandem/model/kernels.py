"""Which code runs Mamba-2, norms and activations: C on CPUs (all between a mixer's projections is one call); on GPUs the scan
and the convolution are the CUDA kernels of `mamba_ssm` and `causal_conv1d` where they are installed. Everywhere else, our own
torch code, which torch.compile fuses on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from tandem.model.scan import causal_conv, ssd_scan, ssd_step
from tandem.spec.model import Mamba2


def fused_mixer(projected: Float[Tensor, "b t w"], m: Mamba2) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """`native.scan.mix`, all between a Mamba-2 mixer's projections, for fp32 on CPUs with a C compiler; else None."""
    from tandem.model.native import scan, tasks  # not above: that package imports the decoder

    return scan.mix if m.conv_kernel <= scan.MAX_KERNEL and tasks.usable(projected) else None


def rms_norm(x: Float[Tensor, "*b size"], weight: Float[Tensor, " size"], eps: float) -> Float[Tensor, "*b size"]:
    """x / rms(x) * weight over the last axis, in C where it can be."""
    from tandem.model.native import norms, tasks

    if tasks.usable(x, weight):
        return norms.rms_norm(x, weight, eps)
    return functional.rms_norm(x, weight.shape, weight, eps)


def squared_relu(x: Float[Tensor, "*b f"]) -> Float[Tensor, "*b f"]:
    """relu(x)^2, the activation of Nemotron-H's feed-forward layers, in C where it can be."""
    from tandem.model.native import norms, tasks

    return norms.squared_relu(x) if tasks.usable(x) else functional.relu(x).square()


@cache
def _installed(module: str, name: str) -> Callable[..., Any] | None:
    """The function of that name, None where its package is missing or does not import (its CUDA library, say)."""
    try:
        found: Callable[..., Any] = getattr(import_module(module), name)
    except (ImportError, OSError, AttributeError):
        return None
    return found


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def scan(
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
    """`scan.ssd_scan` by the best code for the device."""
    if x.device.type != "cuda":
        return ssd_scan(x, dt, a, b_in, c_out, chunk=chunk, state=state, segments=segments)
    fused = _installed("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    if fused is None:
        y, final = _compiled(ssd_scan)(x, dt, a, b_in, c_out, chunk=chunk, state=state, segments=segments)
        return y, final
    index = None if segments is None else segments.int()
    y, final = fused(x, dt, a, b_in, c_out, chunk, initial_states=state, seq_idx=index, return_final_states=True)
    return y, final


def scan_step(
    state: Float[Tensor, "b h p n"],
    x: Float[Tensor, "b h p"],
    dt: Float[Tensor, "b h"],
    a: Float[Tensor, " h"],
    b_in: Float[Tensor, "b g n"],
    c_out: Float[Tensor, "b g n"],
) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b h p n"]]:
    """`scan.ssd_step` by the best code for the device."""
    if x.device.type != "cuda":
        return ssd_step(state, x, dt, a, b_in, c_out)
    fused = _installed("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
    if fused is None:
        y, new = _compiled(ssd_step)(state, x, dt, a, b_in, c_out)
        return y, new
    new = state.clone()
    rates = a[:, None, None].expand(state.shape[1:])
    none = a.new_zeros(len(a), 1).expand(x.shape[1:])  # where heads share a rate, it reads the strides of a bias as well
    y = fused(new, x, dt[..., None].expand_as(x), rates, b_in, c_out, dt_bias=none)
    return y, new


def convolve(
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None,
    *,
    window: Float[Tensor, "b d w"] | None = None,
    segments: Int[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b t d"]:
    """`scan.causal_conv` by the best code for the device; a window or segments, not both."""
    takes = x.device.type == "cuda" and 2 <= weight.shape[1] <= 4 and len(weight) % 8 == 0
    fused = _installed("causal_conv1d", "causal_conv1d_fn") if takes else None
    if fused is None:
        if x.device.type == "cuda":
            y: Tensor = _compiled(causal_conv)(x, weight, bias, window=window, segments=segments)
            return y
        return causal_conv(x, weight, bias, window=window, segments=segments)
    index = None if segments is None else segments.int()
    before = None if window is None else window.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    bias = None if bias is None else bias.to(x.dtype)
    if x.stride(0) % 8 or x.stride(1) % 8:  # a slice of rows of odd width
        x = x.contiguous()
    out: Tensor = fused(x.transpose(1, 2), weight.to(x.dtype), bias, seq_idx=index, initial_states=before)
    return out.transpose(1, 2)
