"""RMS norm and squared ReLU in C, with gradients: torch's operators pass over memory several times (norms.c)."""

from __future__ import annotations

from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from tandem.model.native.tasks import task_library

BLOCK_ROWS = 64
"""Rows whose gradients of the weight are summed first (norms.c)."""


def rms_norm(x: Float[Tensor, "*b size"], weight: Float[Tensor, " size"], eps: float) -> Float[Tensor, "*b size"]:
    """x / rms(x) * weight over the last axis; fp32 on the CPU, once differentiable."""
    y: Tensor = _RmsNorm.apply(x, weight, eps)
    return y


def squared_relu(x: Float[Tensor, "*b f"]) -> Float[Tensor, "*b f"]:
    """relu(x)^2; fp32 on the CPU, once differentiable. Keeps its result only, which the product after it keeps as well."""
    y: Tensor = _SquaredRelu.apply(x)
    return y


def _call(name: str, tensors: tuple[Tensor | None, ...], *more: Any) -> None:
    addresses = (c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors)
    if getattr(task_library(), name)(*addresses, *more, c_int32(torch.get_num_threads())):
        raise MemoryError(f"{name}: no memory")


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "*b size"], weight: Float[Tensor, " size"], eps: float) -> Float[Tensor, "*b size"]:
        x, weight = x.contiguous(), weight.contiguous()
        y = torch.empty_like(x)
        size = weight.numel()
        _call("tandem_rms_norm", (x, weight, y), c_int64(x.numel() // size), c_int64(size), c_float(eps))
        ctx.eps = eps
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Float[Tensor, "*b size"]) -> tuple[Float[Tensor, "*b size"], Float[Tensor, " size"], None]:
        x, weight = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        grad_x, size = torch.empty_like(x), weight.numel()
        rows = x.numel() // size
        sums = x.new_empty(-(-rows // BLOCK_ROWS), size)
        tensors = (x, weight, grad_y, grad_x, sums)
        _call("tandem_rms_norm_backward", tensors, c_int64(rows), c_int64(size), c_float(ctx.eps))
        return grad_x, sums.sum(0), None


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "*b f"]) -> Float[Tensor, "*b f"]:
        x = x.contiguous()
        y = torch.empty_like(x)
        _call("tandem_squared_relu", (x, None, y), c_int64(x.numel()))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Float[Tensor, "*b f"]) -> Float[Tensor, "*b f"]:
        (y,) = ctx.saved_tensors
        grad_x = torch.empty_like(y)
        _call("tandem_squared_relu", (y, grad_y.contiguous(), grad_x), c_int64(y.numel()))
        return grad_x
