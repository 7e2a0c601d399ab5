"""What products and a hand-off reach on this machine, each measured as the engine does it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch
from torch import Tensor, nn

from tandem.engine.shared_memory import SharedMemoryPool
from tandem.engine.transfer import StateLayout
from tandem.model import native
from tandem.model.linear import Linear
from tandem.model.native.int8 import Int8Linear
from tandem.model.precision import compute_dtype
from tandem.model.state import SequenceState
from tandem.perf.host import ProductRate
from tandem.spec.errors import Infeasible, SpecError
from tandem.spec.model import ModelSpec

FORMATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "int8"}
"""Formats of linear weights, as the performance model names them."""
ROWS, COLS = 4096, 2048
_BATCHES = (1, 16, 256)
_SHARE_S, _PRODUCT_S = 0.25, 0.08
"""Seconds that a peak's measurement may take, and one product's."""
_STATE_TOKENS, _ROUNDS, _PASS = 512, 12, 256
_POOL_BYTES = 16 << 20
_PATIENCE_S = 30.0


def product(weights: torch.dtype) -> nn.Module:
    """A linear of ROWS x COLS whose weights are stored so."""
    layer = Linear(COLS, ROWS, bias=False)
    with torch.no_grad():
        layer.weight.normal_()
    return Int8Linear(layer) if weights == torch.int8 else layer.to(weights)


def one_row(layer: nn.Module, one: Tensor) -> Tensor:
    """A product as the decode step in C does it, where there is one."""
    if isinstance(layer, Linear) and native.available():
        return native.linear(one, layer.weight)
    found: Tensor = layer(one)
    return found


def peak_rates(weights: torch.dtype) -> tuple[float, float]:
    """Bytes/s that a product with one row reads from memory, and FLOP/s of one with 256 rows, with torch's threads as set."""
    copies = [product(weights) for _ in range(1 + (96 << 20) // (ROWS * COLS * weights.itemsize))]  # more than caches hold
    one, many = _input(1, torch.float32), _input(256, compute_dtype(weights, torch.device("cpu")))
    with torch.no_grad():
        read_s = best_s(lambda: [one_row(layer, one) for layer in copies]) / len(copies)
        compute_s = best_s(lambda: copies[0](many))
    return ROWS * COLS * weights.itemsize / read_s, 2 * 256 * ROWS * COLS / compute_s


def product_rates() -> list[ProductRate]:
    """FLOP/s of products by format and rows, with torch's threads as set."""
    found = []
    for weights, name in FORMATS.items():
        layer, compute = product(weights), compute_dtype(weights, torch.device("cpu"))
        for rows in _BATCHES:
            given = _input(rows, torch.float32 if rows == 1 else compute)
            with torch.no_grad():
                seconds = best_s(lambda: one_row(layer, given) if len(given) == 1 else layer(given), _PRODUCT_S)  # noqa: B023
            found.append(ProductRate(weights=name, rows=rows, flops_per_s=2 * rows * ROWS * COLS / seconds))
    return found


def _input(rows: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, COLS, dtype=dtype)


def best_s(run: Callable[[], object], share_s: float | None = None) -> float:
    """Least seconds of a call, of as many as `share_s` holds and one at least; one before them is not counted."""
    run()
    best, end = float("inf"), time.perf_counter() + (share_s or _SHARE_S)
    while best == float("inf") or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


def handoff_bytes_per_s(spec: ModelSpec) -> float:
    """Bytes/s of a sequence's state from a prefill worker's process into the memory of a decode worker's: from the prompt's
    last pass to the receiver's copy, messages included. Median of some. Raises SpecError where shared memory does not hold it.
    """
    tokens = min(_STATE_TOKENS, spec.max_context)
    state = SequenceState.zeros(spec, 1, capacity=tokens)
    state.lengths[:] = tokens
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_receive, args=(there, spec), daemon=True)
    process.start()
    pool = SharedMemoryPool("tandem-host", 4 * state.nbytes + _POOL_BYTES, background=False)
    seconds = []
    try:
        for _ in range(_ROUNDS + 2):
            sink = pool.sink(StateLayout(spec=spec, tokens=tokens))
            if isinstance(sink, Infeasible):
                raise SpecError(f"hand-off: {sink.reason}")
            last = (tokens - 1) // _PASS * _PASS
            for begin, end in ((0, last), (last, tokens)):
                started = time.perf_counter()
                for number, layer in enumerate(state.layers) if end > begin else ():
                    sink.put(number, layer, begin, end, final=end == tokens)
            here.send(sink.close())
            if not here.poll(_PATIENCE_S):
                raise SpecError("hand-off: the other process does not answer")
            here.recv()
            seconds.append(time.perf_counter() - started)
        here.send(None)
        process.join(10)
    finally:
        pool.close()
        process.kill()
    return state.nbytes / statistics.median(seconds[2:])  # before, pages were new


def _receive(pipe: Connection, spec: ModelSpec) -> None:
    """The other process: copies what it is sent into memory of its own, and says so."""
    torch.set_num_threads(1)
    pool, own = SharedMemoryPool("tandem-host", _POOL_BYTES), None
    while (receipt := pipe.recv()) is not None:
        opened = pool.open(receipt, spec)
        own = own or opened.state.clone()
        for ours, theirs in zip(own.layers, opened.state.layers, strict=True):
            if ours is not None and theirs is not None:
                for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
                    mine.copy_(other)
        opened.release()
        pipe.send(True)
    pool.close()
