"""Products with weights in any format as they lie in memory, for any number of rows."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from tandem.model.native.abi import TYPES, Matrix, Vector
from tandem.model.native.tasks import call_linear
from tandem.spec.errors import SpecError

GROUP = 64
"""Columns that share one scale of int8 weights (gemm.h)."""


def matrix_of(
    weight: Float[Tensor, "rows cols"] | Int8[Tensor, "rows padded"],
    *,
    scale: Float[Tensor, "rows groups"] | None = None,
    bias: Float[Tensor, " rows"] | None = None,
    cols: int | None = None,
) -> Matrix:
    """Description of a weight by its address; valid while the tensors live. Raises SpecError for what C cannot read."""
    for tensor in (weight, bias, scale):
        if tensor is None:
            continue
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.dtype not in TYPES:
            raise SpecError(
                f"weight of {tensor.dtype} on {tensor.device}: must be contiguous fp32, fp16, bf16 or int8 on the CPU"
            )
    if (weight.dtype == torch.int8) != (scale is not None) or (scale is not None and scale.dtype != torch.float32):
        raise SpecError(f"weight of {weight.dtype}: int8 weights need fp32 scales, others have none")
    width, groups = cols or weight.shape[1], -(-weight.shape[1] // GROUP)
    if bias is not None and bias.dtype == torch.int8:
        raise SpecError("bias of torch.int8: must be floating")
    if weight.shape[1] != (width if scale is None else -(-width // GROUP) * GROUP):
        raise SpecError(f"weight of shape {tuple(weight.shape)}: does not fit inputs of width {width}")
    if (scale is not None and scale.shape != (len(weight), groups)) or (bias is not None and bias.shape != weight.shape[:1]):
        raise SpecError(f"scale or bias: does not fit a weight of shape {tuple(weight.shape)}")
    return Matrix(
        data=weight.data_ptr(),
        scale=None if scale is None else scale.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        rows=weight.shape[0],
        cols=width,
        type=TYPES[weight.dtype],
        bias_type=0 if bias is None else TYPES[bias.dtype],
    )


def vector_of(values: Float[Tensor, "*shape"] | None) -> Vector:
    """Description of a norm's weight or the like by its address, None as none; valid while the tensor lives."""
    return Vector() if values is None else Vector(values.data_ptr(), TYPES[values.dtype])


def linear(
    x: Float[Tensor, "*batch cols"],
    weight: Float[Tensor, "rows cols"] | Int8[Tensor, "rows padded"],
    bias: Float[Tensor, " rows"] | None = None,
    *,
    scale: Float[Tensor, "rows groups"] | None = None,
    threads: int | None = None,
) -> Float[Tensor, "*batch rows"]:
    """x W^T + bias in fp32, without gradients; a row's result does not depend on the other rows or on the threads.

    int8 weights are padded to whole groups of 64 columns and come with a `scale` per row and group (`quantise`); inputs are
    then rounded to 16 bits with a scale per row and up to 1024 columns. `threads` defaults to torch's.
    """
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise SpecError(f"threads={threads}: must be 1 or more")
    matrix = matrix_of(weight, scale=scale, bias=bias, cols=x.shape[-1])
    flat = x.detach().reshape(-1, x.shape[-1]).contiguous().float()
    y = torch.empty(flat.shape[0], weight.shape[0])
    if y.numel():
        call_linear(matrix, flat, y, threads)
    return y.view(*x.shape[:-1], weight.shape[0])
