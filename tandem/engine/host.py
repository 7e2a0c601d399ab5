"""This machine as the performance model sees a GPU: what its cores and memory reach in the engine's own products.

A quick look of about a second, for a first prediction of what the server will do here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tandem.engine.config import free_memory_bytes
from tandem.model import native
from tandem.model.linear import Linear
from tandem.model.native.int8 import Int8Linear
from tandem.model.precision import compute_dtype
from tandem.perf.efficiency import find_fit
from tandem.spec.design import Precision
from tandem.spec.hardware import HardwareSpec

_FORMATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "int8"}
_ROWS, _COLS = 4096, 2048
_SHARE_S = 0.25
"""Seconds that each of the measurements may take."""


def host_precision(weights: torch.dtype) -> Precision:
    """Formats of a model whose linear weights are stored so: windows, keys and values are kept as activations are here."""
    activations = _FORMATS[compute_dtype(weights, torch.device("cpu"))]
    return Precision(weights=_FORMATS[weights], activations="bf16", kv=activations)


def measure_host(weights: torch.dtype = torch.float32) -> HardwareSpec:
    """Bytes/s that a product with one row reads and FLOP/s of one with 256 rows, with torch's threads as they are set.

    The peak is written so that the reference GPU's efficiency, which an unmeasured system borrows, brings it back to what
    was measured: predictions made with it are `transferred`.
    """
    copies = [_product(weights) for _ in range(1 + (96 << 20) // (_ROWS * _COLS * weights.itemsize))]  # more than caches hold
    dtype = compute_dtype(weights, torch.device("cpu"))
    one, many = torch.randn(1, _COLS), torch.randn(256, _COLS, dtype=dtype)
    with torch.no_grad():
        read_s = _best_s(lambda: [_row(layer, one) for layer in copies]) / len(copies)
        compute_s = _best_s(lambda: copies[0](many))
    nbytes, flops = _ROWS * _COLS * weights.itemsize, 2 * 256 * _ROWS * _COLS
    efficiency = find_fit(_spec(1.0, 1.0), "gemm", "bf16")[0].compute_efficiency
    return _spec(nbytes / read_s, flops / compute_s / efficiency)


def _product(weights: torch.dtype) -> nn.Module:
    layer = Linear(_COLS, _ROWS, bias=False)
    with torch.no_grad():
        layer.weight.normal_()
    return Int8Linear(layer) if weights == torch.int8 else layer.to(weights)


def _row(layer: nn.Module, one: Tensor) -> Tensor:
    """A product as the decode step in C does it, where there is one."""
    if isinstance(layer, Linear) and native.available():
        return native.linear(one, layer.weight)
    product: Tensor = layer(one)
    return product


def _best_s(run: Callable[[], object]) -> float:
    run()
    best, end = float("inf"), time.perf_counter() + _SHARE_S
    while time.perf_counter() < end:
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


def _spec(bytes_per_s: float, flops: float) -> HardwareSpec:
    memory = free_memory_bytes(torch.device("cpu"))
    measured = f"measured on this machine with {torch.get_num_threads()} threads (tandem.engine.host)"
    return HardwareSpec(
        name="host",
        title=f"this machine, {os.cpu_count()} cores",
        vendor="this machine",
        generation="cpu",
        memory_bytes=memory,
        memory_bytes_per_s=bytes_per_s,
        usable_memory_fraction=0.9,
        peak_flops={"bf16": flops, "fp32": flops},
        scale_up_gpus=1,
        scale_up_bytes_per_s=bytes_per_s,
        scale_out_bytes_per_s=bytes_per_s,
        price_per_hour_usd=1e-3,
        fits_from="host",
        bandwidth_efficiency=1.0,
        sources={
            "memory_bytes": "free when the server started",
            "memory_bytes_per_s": measured,
            "usable_memory_fraction": "a tenth is left to the system",
            "peak_flops": measured,
            "scale_up_gpus": "one machine",
            "scale_up_bytes_per_s": "as memory: workers share it",
            "scale_out_bytes_per_s": "as memory: workers share it",
            "price_per_hour_usd": "none is known; a token price, as a specification needs one",
            "bandwidth_efficiency": "the bandwidth is a measured one",
        },
    )
