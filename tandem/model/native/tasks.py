"""The library with its tasks running on torch's own OpenMP threads, and where it may be used."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from tandem.model.native.abi import loaded
from tandem.model.native.build import available


@cache
def training_library() -> ctypes.CDLL:
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
