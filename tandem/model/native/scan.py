"""The Mamba-2 mixer between its projections as one call into C, with its gradients (scan.h has the formulas)."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tandem.model.native.tasks import task_library
from tandem.model.scan import CHUNK
from tandem.spec.model import Mamba2

MAX_KERNEL = 8
"""Widest convolution that the C code has room for."""


class Job(ctypes.Structure):
    """`scan_job` of scan.h."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "time", "heads", "head_dim", "groups", "state_dim", "kernel")),
        *((name, c_float) for name in ("eps", "dt_min", "dt_max")),
        *((name, c_void_p) for name in ("projected", "conv_weight", "conv_bias", "dt_bias", "a_log", "skip", "norm_weight")),
        *((name, c_void_p) for name in ("window", "state", "segments", "lengths")),
        *((name, c_void_p) for name in ("out", "final", "entries", "y")),
        *((name, c_void_p) for name in ("grad_out", "grad_final", "grad_projected", "grad_conv_weight", "grad_conv_bias")),
        *((name, c_void_p) for name in ("grad_dt_bias", "grad_a", "grad_skip", "grad_norm", "grad_window", "grad_state")),
        ("task_groups", c_int64),
    )


@dataclass(frozen=True)
class Shape:
    """What a mixer's call has besides tensors."""

    m: Mamba2
    eps: float


def mix(
    projected: Float[Tensor, "b t w"],
    conv_weight: Float[Tensor, "c k"],
    conv_bias: Float[Tensor, " c"] | None,
    dt_bias: Float[Tensor, " h"],
    a_log: Float[Tensor, " h"],
    skip: Float[Tensor, " h"],
    norm_weight: Float[Tensor, " d"],
    *,
    m: Mamba2,
    eps: float,
    window: Float[Tensor, "b c k_minus_1"] | None = None,
    state: Float[Tensor, "b h p n"] | None = None,
    segments: Int[Tensor, "b t"] | None = None,
    lengths: Int[Tensor, " b"] | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b h p n"]]:
    """Input of out_proj from the output of in_proj (z, x, B, C, dt side by side), and the state after each row's last token.

    All fp32 on the CPU. `window` holds the inputs of the convolution before the first token, `segments` the running number of
    each token's document, `lengths` the tokens of each row that count; the output is 0 at the others. Once differentiable.
    """
    bias = torch.zeros(m.conv_width) if conv_bias is None else conv_bias
    before = None if window is None else window.transpose(1, 2)
    given = (projected, conv_weight.t(), bias, dt_bias, a_log, skip, norm_weight, before, state)
    tensors = tuple(None if tensor is None else tensor.contiguous() for tensor in given)
    shape = Shape(m, eps)
    where = tuple(None if tensor is None else tensor.long().contiguous() for tensor in (segments, lengths))
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        out, final = _Mix.apply(shape, *where, *tensors)
        return out, final
    out, final, _, _ = _forward(shape, where, tensors, keep=False)
    return out, final


_INPUTS = ("projected", "conv_weight", "conv_bias", "dt_bias", "a_log", "skip", "norm_weight", "window", "state")


def _job(shape: Shape, where: tuple[Tensor | None, ...], tensors: tuple[Tensor | None, ...], **more: Tensor | None) -> Job:
    """The job on these tensors, which must outlive it."""
    m, projected = shape.m, tensors[0]
    assert projected is not None
    named = dict(zip(_INPUTS, tensors, strict=True)) | dict(zip(("segments", "lengths"), where, strict=True)) | more
    addresses = {name: None if tensor is None else tensor.data_ptr() for name, tensor in named.items()}
    return Job(
        batch=projected.shape[0],
        time=projected.shape[1],
        heads=m.num_heads,
        head_dim=m.head_dim,
        groups=m.groups,
        state_dim=m.state_dim,
        kernel=m.conv_kernel,
        eps=shape.eps,
        dt_min=m.dt_min,
        dt_max=float("inf") if m.dt_max is None else m.dt_max,
        **addresses,
    )


def _call(name: str, job: Job) -> None:
    if getattr(task_library(), name)(ctypes.byref(job), c_int32(torch.get_num_threads())):
        raise MemoryError("no memory for the scratch of a scan")


def _forward(
    shape: Shape, where: tuple[Tensor | None, ...], tensors: tuple[Tensor | None, ...], *, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output and final state; with `keep`, the states at chunk entry and y before the gate as well."""
    m, projected = shape.m, tensors[0]
    assert projected is not None
    batch, time = projected.shape[:2]
    out = torch.empty(batch, time, m.d_inner)
    final = torch.empty(batch, m.num_heads, m.head_dim, m.state_dim)
    entries = y = None
    if keep:  # states at the entry of each chunk, for the backward pass
        padded = -(-m.head_dim // 16) * 16
        entries = torch.empty(batch, -(-time // CHUNK) + 1, m.num_heads, m.state_dim, padded)
        y = torch.empty(batch, time, m.num_heads, padded)
    _call("tandem_scan", _job(shape, where, tensors, out=out, final=final, entries=entries, y=y))
    return out, final, entries, y


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shape: Shape, segments: Int[Tensor, "b t"] | None, lengths: Int[Tensor, " b"] | None, *tensors: Tensor | None
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b h p n"]]:
        where = (segments, lengths)
        out, final, entries, y = _forward(shape, where, tensors, keep=True)
        *inputs, state = tensors
        ctx.shape, ctx.has_state = shape, state is not None  # its values are among the entries; the caller may overwrite it
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*where, *inputs, entries, y)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Float[Tensor, "b t d"] | None, grad_final: Float[Tensor, "b h p n"] | None
    ) -> tuple[Tensor | None, ...]:
        shape: Shape = ctx.shape
        segments, lengths, *inputs, entries, y = ctx.saved_tensors
        projected, window = inputs[0], inputs[-1]
        m, batch = shape.m, projected.shape[0]
        grad_projected = torch.empty_like(projected) if lengths is None else torch.zeros_like(projected)
        grad_window = None if window is None else torch.zeros_like(window)
        grad_state = projected.new_empty(batch, m.num_heads, m.head_dim, m.state_dim) if ctx.has_state else None
        sums = {  # of each sequence
            "grad_conv_weight": projected.new_zeros(batch, m.conv_kernel, m.conv_width),
            "grad_conv_bias": projected.new_zeros(batch, m.conv_width),
            "grad_dt_bias": projected.new_zeros(batch, m.num_heads),
            "grad_a": projected.new_zeros(batch, m.num_heads),
            "grad_skip": projected.new_zeros(batch, m.num_heads),
            "grad_norm": projected.new_zeros(batch, m.d_inner),
        }
        found = {"grad_projected": grad_projected, "grad_window": grad_window, "grad_state": grad_state, **sums}
        out = projected.new_zeros(*projected.shape[:2], m.d_inner) if grad_out is None else grad_out.contiguous()
        final = None if grad_final is None else grad_final.contiguous()
        job = _job(shape, (segments, lengths), (*inputs, None), entries=entries, y=y, grad_out=out, grad_final=final, **found)
        _call("tandem_scan_backward", job)
        grad_a_log = -sums["grad_a"].sum(0) * inputs[4].exp()
        rest = (sums[f"grad_{name}"].sum(0) for name in ("conv_weight", "conv_bias", "dt_bias", "skip", "norm"))
        weight, bias, dt_bias, skip, norm = rest
        return None, None, None, grad_projected, weight, bias, dt_bias, grad_a_log, skip, norm, grad_window, grad_state
