"""The structures of gemm.h and model.h as ctypes, field by field, and the calls into the library."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p

import torch

from tandem.model.native.build import library
from tandem.spec.errors import SpecError

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
"""Number formats by their code in vec.h."""


class Matrix(ctypes.Structure):
    """`matrix` of gemm.h; without data it is not there."""

    _fields_ = (
        ("data", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("type", c_int32),
        ("bias_type", c_int32),
    )


class Vector(ctypes.Structure):
    """`vector` of model.h."""

    _fields_ = (("data", c_void_p), ("type", c_int32))


class Layer(ctypes.Structure):
    """`layer` of model.h."""

    _fields_ = (
        ("kind", c_int32),
        ("eps", c_float),
        ("norm", Vector),
        ("w", Matrix * 7),
        ("v", Vector * 6),
        ("heads", c_int32),
        ("groups", c_int32),
        ("head_dim", c_int32),
        ("state_dim", c_int32),
        ("kernel", c_int32),
        ("rope", c_int32),
        ("experts", c_int32),
        ("top_k", c_int32),
        ("top_groups", c_int32),
        ("normalise", c_int32),
        ("dt_min", c_float),
        ("dt_max", c_float),
        ("score_scale", c_float),
    )


class Rotary(ctypes.Structure):
    """`rotary` of model.h."""

    _fields_ = (("frequencies", c_void_p), ("pairs", c_int32))


class Model(ctypes.Structure):
    """`model` of model.h."""

    _fields_ = (
        ("hidden", c_int32),
        ("num_layers", c_int32),
        ("num_ropes", c_int32),
        ("eps", c_float),
        ("final_norm", Vector),
        ("embedding", Matrix),
        ("head", Matrix),
        ("layers", POINTER(Layer)),
        ("ropes", POINTER(Rotary)),
    )


class StateOfLayer(ctypes.Structure):
    """`layer_state` of model.h."""

    _fields_ = (("first", c_void_p), ("second", c_void_p), ("type", c_int32))


class Batch(ctypes.Structure):
    """`batch` of model.h."""

    _fields_ = (
        ("rows", c_int32),
        ("threads", c_int32),
        ("max_blocks", c_int32),
        ("block_size", c_int32),
        ("ids", c_void_p),
        ("lengths", c_void_p),
        ("blocks", c_void_p),
        ("slots", c_void_p),
        ("states", POINTER(StateOfLayer)),
        ("logits", c_void_p),
    )


def loaded() -> ctypes.CDLL:
    """The library, or a SpecError with the reason why there is none."""
    found = library()
    if not isinstance(found, ctypes.CDLL):
        raise SpecError(f"native decode path: {found.reason}")
    return found


def call_decode_step(model: Model, batch: Batch) -> None:
    """One step: reads ids, changes states, writes logits."""
    if loaded().tandem_decode_step(ctypes.byref(model), ctypes.byref(batch)):
        raise MemoryError(f"no memory for the scratch of a decode step of {batch.rows} rows")
