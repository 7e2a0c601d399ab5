"""Hand 64 MiB of state from one process to another through shared memory, beside a plain copy of as many bytes.

    python benchmarks/handoff.py [ROUNDS]

Prints medians. `sender` copies and sums in passes of 256 tokens, `check` is the receiver's sum over what it maps, `take` its
copy into memory of its own, as an engine copies into its blocks; `way` is from the last pass to the receiver's copy, messages
included, and is what a request waits where the sender's copies hide behind its prefill.
"""

from __future__ import annotations

import statistics
import sys
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection

import numpy as np
import torch

from tandem.engine.shared_memory import SharedMemoryPool
from tandem.engine.transfer import StateLayout
from tandem.model.state import SequenceState
from tandem.spec.mixers import Attention, Mamba2
from tandem.spec.model import ModelSpec

MAMBA = Mamba2(num_heads=32, head_dim=64, state_dim=128, groups=8, conv_kernel=4, conv_bias=True, proj_bias=False)
ATTENTION = Attention(num_heads=4, num_kv_heads=4, head_dim=64)
SPEC = ModelSpec(name="64 MiB", vocab_size=9, hidden_size=8, layers=(MAMBA, ATTENTION) * 4, max_context=1 << 16)
TOKENS, PASS = 7656, 256


def copy(target: SequenceState, source: SequenceState) -> None:
    for ours, theirs in zip(target.layers, source.layers, strict=True):
        for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
            np.copyto(mine.numpy(), other.numpy())


def receive(pipe: Connection) -> None:
    torch.set_num_threads(1)
    pool, own = SharedMemoryPool("tandem-benchmark", 80 << 20), SequenceState.zeros(SPEC, 1, capacity=TOKENS)
    copy(own, own.clone())  # its pages are there
    while (receipt := pipe.recv()) is not None:
        opened = pool.open(receipt, SPEC)
        started_s = time.perf_counter()
        copy(own, opened.state)
        opened.release()
        pipe.send((opened.seconds, time.perf_counter() - started_s))


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    state = SequenceState.zeros(SPEC, 1, capacity=TOKENS)
    state.lengths[:] = TOKENS
    for layer in state.layers:
        for tensor in layer.tensors:
            tensor.normal_()
    plain, other = np.ones(state.nbytes, np.uint8), np.zeros(state.nbytes, np.uint8)
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=receive, args=(there,))
    process.start()
    pool = SharedMemoryPool("tandem-benchmark", 80 << 20, background=False)
    pool.warm(80 << 20)
    seconds: dict[str, list[float]] = {name: [] for name in ("memcpy", "sender", "check", "take", "way")}
    for number in range(rounds + 2):
        sink = pool.sink(StateLayout(spec=SPEC, tokens=TOKENS))
        for begin in range(0, TOKENS, PASS):
            end = min(TOKENS, begin + PASS)
            for i, layer in enumerate(state.layers):
                sink.put(i, layer, begin, end, final=end == TOKENS)
        done_s = time.perf_counter()
        receipt = sink.close()
        here.send(receipt)
        check, take = here.recv()
        way = time.perf_counter() - done_s
        started_s = time.perf_counter()
        np.copyto(other, plain)
        if number >= 2:  # before, pages were new
            for name, value in zip(seconds, (time.perf_counter() - started_s, receipt.seconds, check, take, way), strict=True):
                seconds[name].append(value)
    here.send(None)
    process.join()
    pool.close()
    memcpy = statistics.median(seconds["memcpy"])
    print(f"{state.nbytes / 2**20:.1f} MiB, {rounds} rounds")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:>7} {median * 1e3:6.1f} ms  {median / memcpy:4.2f} of a memcpy")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
