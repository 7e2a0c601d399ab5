"""Prefill and decode in pools of their own, at a fixed number of requests in flight: TTFT, TPOT, rate and decode batch.

Requests circulate: N = rate * (TTFT + TPOT * (OSL - 1)), the decode pool holds those that are decoding, and where prompts are
done more slowly than decoding would take them, the rest waits for the prefill pool; where decode slots are too few, for one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tandem.perf.costs import Layout, StepLoad
from tandem.perf.ops import Array
from tandem.perf.phases import Basis, PerfModel
from tandem.spec.model import MLA, Attention, GatedDeltaNet, Mamba2
from tandem.spec.workload import Workload

Result = NDArray[np.float64]
ROUNDS = 40
"""Rounds of the damped fixed point between decode batch and times; the batch then stands still to a thousandth at worst."""


class PrefillPool(NamedTuple):
    """A prefill pool as arrays of design points: `batch` prompts together in each of `replicas` instances."""

    layout: Layout
    batch: Array
    replicas: Array


class DecodePool(NamedTuple):
    """A decode pool as arrays of design points; `batch_limit` is what an instance's memory (or its operator) admits."""

    layout: Layout
    batch_limit: Array
    replicas: Array


class PromptTimes(NamedTuple):
    """Seconds: of a batch of prompts in an instance that is otherwise idle and in one whose other groups are as busy, of the
    burst when all requests in flight start at once (their mean wait is its share `burst`), and of one round of all requests
    through the prefill pool."""

    alone_s: Result
    crowded_s: Result
    burst_s: Result
    cycle_s: Result

    def prompt_s(self, request_s: Array) -> Result:
        """Seconds of a prompt where requests take `request_s` in all: the pool is busy for cycle_s of that."""
        busy = np.minimum(self.cycle_s / request_s, 1.0)
        return np.asarray(self.alone_s + busy * (self.crowded_s - self.alone_s))


def exposed_transfer_s(perf: PerfModel, layout: Layout, workload: Workload, prompt_s: Array) -> Result:
    """Seconds of state transfer that stick out of a prefill of `prompt_s`: a layer's state leaves while later layers compute.

    What cannot hide is the last layer's share, or whatever the link is too slow to move during the prefill (paper B, section
    3.2). The state of one prompt is s0 + k * isl bytes, cut over the GPUs that hold it uniquely.
    """
    seconds = perf.memory.sequence_bytes(layout, workload.mean_isl) / perf.hardware.scale_out_bytes_per_s
    last = 1.0 / sum(count for mixer, count in perf.model.mixers if isinstance(mixer, (Attention, MLA, Mamba2, GatedDeltaNet)))
    return np.asarray(np.maximum(seconds * last, seconds - prompt_s * (1.0 - last)))


class SplitTime(NamedTuple):
    """TTFT and TPOT in seconds, requests/s of the deployment, and requests decoding in an instance."""

    ttft_s: Result
    tpot_s: Result
    requests_per_s: Result
    batch: Result


def prompt_times(perf: PerfModel, pool: PrefillPool, workload: Workload, concurrency: Array) -> PromptTimes:
    """What prompts take in a prefill pool that `concurrency` requests go through; no more come together than there are."""
    groups = pool.layout.dp * pool.layout.pp
    pool = pool._replace(batch=np.minimum(pool.batch, np.ceil(concurrency / pool.replicas)))
    together = np.ceil(pool.batch / groups)
    alone, crowded = (
        perf.prefill_kernels_s(pool.layout, together, workload.mean_isl, 1.0, busy_groups=share)
        for share in (1.0 / pool.layout.dp, 1.0)
    )
    rate = pool.replicas * perf.prefill(pool.layout, pool.batch, workload).requests_per_s
    return PromptTimes(alone, crowded, crowded / together * concurrency / (pool.replicas * groups), concurrency / rate)


def pools_basis(
    perf: PerfModel, prefill: PrefillPool, decode: Layout, batch: Array, workload: Workload, *, as_measured: bool = True
) -> Basis:
    """What a prediction of two pools rests on: the weaker of its prompts and its decode steps."""
    together = np.ceil(prefill.batch / (prefill.layout.dp * prefill.layout.pp))
    prompts = StepLoad(prefill_seqs=together, isl=workload.mean_isl)
    loads = (prefill.layout, prompts), (decode, perf.decode_load(decode, batch, workload))
    return Basis.weakest([perf.basis(layout, load, as_measured=as_measured) for layout, load in loads])


def split_times(perf: PerfModel, prefill: PrefillPool, decode: DecodePool, workload: Workload, concurrency: Array) -> SplitTime:
    """The closed loop of `concurrency` requests between two pools (`perf.split` chooses the coefficients)."""
    fit, steps = perf.backend_fit, max(workload.mean_osl - 1.0, 1.0)
    times = prompt_times(perf, prefill, workload, concurrency)
    share = np.asarray(concurrency / decode.replicas, dtype=np.float64)
    batch, prompt = np.minimum(share, decode.batch_limit), times.alone_s
    for _ in range(ROUNDS):
        tpot = perf.decode_tpot_s(decode.layout, np.maximum(batch, 1.0), workload)
        prompt = times.prompt_s(prompt + tpot * steps)
        prompt = prompt + exposed_transfer_s(perf, prefill.layout, workload, prompt)
        queue = np.maximum(times.cycle_s - prompt - tpot * steps, 0.0)
        ttft = fit.host_s + fit.prompt * prompt + fit.burst * times.burst_s + fit.queue * queue + fit.pause * tpot
        # Nothing decodes faster than all decode slots: what they cannot take waits for one.
        ttft = np.maximum(ttft, (share / decode.batch_limit - 1.0) * tpot * steps)
        decoding = share * tpot * steps / (ttft + tpot * steps)
        batch = (batch + np.clip(decoding, 1.0, decode.batch_limit)) / 2.0
    return SplitTime(*np.broadcast_arrays(ttft, tpot, concurrency / (ttft + tpot * steps), batch))
