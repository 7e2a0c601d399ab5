"""The rounding of fp8.py in C (fp8.c), with the same bits: torch passes over memory ten times for it."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tandem.model.native import tasks
from tandem.model.native.build import FOLDER, load
from tandem.spec.errors import Infeasible

if TYPE_CHECKING:
    from tandem.train.fp8 import Fp8Format

NUMBERS = 16384
"""Numbers whose largest magnitude is found in one piece (fp8.c)."""


@cache
def library() -> ctypes.CDLL | Infeasible:
    """The compiled fp8.c on torch's threads, or why there is none."""
    found = load([Path(__file__).parent / "fp8.c", FOLDER / "tasks.c", FOLDER / "pool.c"])
    if isinstance(found, ctypes.CDLL):
        openmp = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
        if openmp is not None:
            found.tandem_use_openmp(ctypes.cast(openmp, c_void_p))
    return found


def usable(x: Tensor) -> bool:
    """Whether C can round this: an fp32 tensor on the CPU with numbers in it, outside of compilation and transforms."""
    if torch.compiler.is_compiling():
        return False
    return x.numel() > 0 and tasks.usable(x) and isinstance(library(), ctypes.CDLL)


def largest(x: Tensor) -> Tensor:
    """The largest magnitude of a contiguous tensor, shape [1, 1]; NaN where there is one."""
    parts = x.new_empty(-(-x.numel() // NUMBERS))
    _call("tandem_fp8_largest", c_void_p(x.data_ptr()), c_void_p(parts.data_ptr()), c_int64(x.numel()))
    return parts.amax().view(1, 1)


def round_blocks(
    x: Tensor, block: tuple[int, int], form: Fp8Format, *, power_of_two: bool, multiply: bool, given: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """FP8 numbers of a contiguous matrix, times their scales where `multiply`, and the scales; one `given` counts for all."""
    rows, cols = x.shape
    y = torch.empty_like(x)
    scales = x.new_empty(-(-rows // block[0]), -(-cols // block[1])) if given is None else given
    _call(
        "tandem_fp8_round",
        *(c_void_p(tensor.data_ptr()) for tensor in (x, y, scales)),
        *(c_int64(size) for size in (rows, cols, *block)),
        c_float(form.largest),
        c_float(2.0**form.min_exponent),
        c_float(form.shift),
        *(c_int32(flag) for flag in (power_of_two, given is not None, multiply)),
    )
    return y, scales


def _call(name: str, *arguments: object) -> None:
    if getattr(library(), name)(*arguments, c_int32(torch.get_num_threads())):
        raise MemoryError(f"{name}: no memory")
