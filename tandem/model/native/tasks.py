"""The library with its tasks running on torch's own OpenMP threads, and where it may be used."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from tandem.model.native.abi import Matrix, loaded
from tandem.model.native.build import available


@cache
def task_library() -> ctypes.CDLL:
    """The library, or a SpecError with the reason why there is none."""
    library = loaded()
    try:
        openmp = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:  # another OpenMP than GNU's: our own threads serve
        return library
    library.tandem_use_openmp(ctypes.cast(openmp, ctypes.c_void_p))
    return library


def usable(*tensors: Tensor | None) -> bool:
    """Whether C can compute with these: real fp32 tensors on the CPU, outside of compilation and of functional transforms."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != "cpu" or tensor.dtype != torch.float32:
            return False
    return available() is True


def call_linear(matrix: Matrix, x: Tensor, y: Tensor, threads: int) -> None:
    """y = x W^T + bias; x and y are contiguous float32 matrices."""
    arguments = (ctypes.byref(matrix), c_void_p(x.data_ptr()), c_void_p(y.data_ptr()), c_int64(x.shape[0]), c_int32(threads))
    if task_library().tandem_linear(*arguments):
        raise MemoryError(f"no memory for the scratch of a product of {x.shape[0]} rows")
