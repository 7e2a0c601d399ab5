"""Requests that arrive at a rate, whether or not earlier ones are done: how many decode at once, how long prompts wait.

Arrivals are Poisson, of `together` requests at a time. Decoding is a queue with as many servers as requests (M/G/inf): a
request meets, on average, the b requests that are decoding, so its own steps are those of a batch of b + 1, and Little's law
gives b. Prompts are one queue for each attention group: M/G/1 with vacations, which are the decode steps that run when no
prompt waits (the decomposition of Fuhrmann and Cooper, 1985), so the mean wait of requests at rate r, prompts of S seconds, is

    W = (r E[S^2] + (together - 1) E[S]) / (2 (1 - r E[S])) + pause * step

and decoding, which stands still while prompts run, takes 1 / (1 - r E[S]) times its steps and the prompts that came during
the request's own wait and prefill. A request that memory does not
hold would wait without bound in a system loaded for ever: such a rate is refused, and so is one at which prompts alone take
all of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tandem.perf.costs import Layout
from tandem.perf.ops import Array
from tandem.perf.phases import PerfModel, by_isl
from tandem.perf.pools import DecodePool, PrefillPool, exposed_transfer_s, prompt_times
from tandem.spec.workload import Workload

Result = NDArray[np.float64]
FULL = 1.0 - 1e-9
"""The largest load that is priced; from here on a queue grows without bound."""
HALVINGS = 60
"""Halvings of the interval in which the decode batch is sought: to machine precision."""


class OpenLoop(NamedTuple):
    """Mean TTFT and TPOT in seconds, requests decoding in an instance, and the busier pool's load as a share of what it can
    serve: 1 or more means that the queue grows without bound, and TTFT and TPOT are infinite."""

    ttft_s: Result
    tpot_s: Result
    batch: Result
    load: Result


def open_loop(
    perf: PerfModel,
    layout: Layout,
    requests_per_s: Array,
    workload: Workload,
    max_batch: Array,
    *,
    chunk_tokens: float | None = None,
    together: int = 1,
) -> OpenLoop:
    """A co-located instance that gets `requests_per_s`; with `chunk_tokens` prompts ride along with decode steps in chunks."""
    fit, groups = perf.backend_fit, layout.dp * layout.pp
    rate = requests_per_s / groups
    if chunk_tokens is None:
        mean_s, square_s2, own_s = _prompts(perf, layout, workload)
        busy = np.minimum(rate * mean_s, FULL)
        left_s = busy * (mean_s + _wait_s(rate, mean_s, square_s2, busy, together)) / max(workload.mean_osl - 1.0, 1.0)
        batch = _decode_batch(perf, layout, requests_per_s, workload, max_batch, lambda step: (step + left_s) / (1.0 - busy))
        tpot = (_step_s(perf, layout, batch, workload) + left_s) / (1.0 - busy)
    else:
        batch = _decode_batch(perf, layout, requests_per_s, workload, max_batch, lambda step: step)
        for _ in range(8):
            step, extra_s, chunks = perf.chunk_step_s(layout, batch + 1.0, workload, chunk_tokens)
            mean_s = chunks * (step + extra_s)
            busy = np.minimum(rate * mean_s, FULL)
            carrying = busy * step / (step + extra_s * (1.0 - busy))
            tpot = (step + carrying * extra_s) / perf.tokens_per_step
            batch = np.minimum(requests_per_s * tpot * max(workload.mean_osl - 1.0, 0.0), max_batch)
        square_s2, own_s = mean_s**2, mean_s
    waits = _wait_s(rate, mean_s, square_s2, busy, together)
    decoding = -np.expm1(-batch / groups)
    ttft = fit.host_s + own_s + waits + fit.pause * decoding * tpot
    load = np.maximum(busy, (batch + 1.0) / max_batch)
    return _bounded(ttft, tpot, batch, load)


def open_loop_pools(
    perf: PerfModel,
    prefill: PrefillPool,
    decode: DecodePool,
    requests_per_s: Array,
    workload: Workload,
) -> OpenLoop:
    """A prefill pool and a decode pool that get `requests_per_s`; each request goes to a random instance, and a prompt that
    arrives is not held back to fill a batch: `prefill.batch` plays no part."""
    fit, groups = perf.backend_fit, prefill.layout.dp * prefill.layout.pp
    times = prompt_times(perf, prefill._replace(batch=groups), workload, 1.0)
    mean_s = groups / perf.prefill(prefill.layout, groups, workload).requests_per_s
    rate = requests_per_s / (groups * prefill.replicas)
    busy = np.minimum(rate * mean_s, FULL)
    own_s = times.alone_s + busy * (times.crowded_s - times.alone_s)
    waits = _wait_s(rate, mean_s, mean_s**2, busy, 1)
    share = requests_per_s / decode.replicas
    batch = _decode_batch(perf, decode.layout, share, workload, decode.batch_limit, lambda step: step)
    tpot = _step_s(perf, decode.layout, batch, workload)
    prompt_s = fit.prompt * own_s
    ttft = fit.host_s + prompt_s + waits + exposed_transfer_s(perf, prefill.layout, workload, prompt_s) + fit.pause * tpot
    return _bounded(ttft, tpot, batch, np.maximum(busy, (batch + 1.0) / decode.batch_limit))


def _bounded(ttft: Array, tpot: Array, batch: Array, load: Array) -> OpenLoop:
    stable = np.asarray(load) < FULL
    found = OpenLoop(*np.broadcast_arrays(ttft, tpot, batch, load))
    return found._replace(ttft_s=np.where(stable, found.ttft_s, np.inf), tpot_s=np.where(stable, found.tpot_s, np.inf))


def _wait_s(rate: Array, mean_s: Array, square_s2: Array, busy: Array, together: Array) -> Result:
    """Mean wait of a prompt for those before it."""
    return np.asarray((rate * square_s2 + (together - 1) * mean_s) / (2.0 * (1.0 - busy)))


def _step_s(perf: PerfModel, layout: Layout, others: Array, workload: Workload) -> Result:
    """Seconds a token of a request that decodes beside `others`, a mean, so between the whole numbers around it."""
    groups = layout.dp * layout.pp
    below = np.floor(others / groups)
    low, high = (perf.decode_tpot_s(layout, (below + 1.0 + more) * groups, workload) for more in (0.0, 1.0))
    return np.asarray(low + (others / groups - below) * (high - low))


def _prompts(perf: PerfModel, layout: Layout, workload: Workload) -> tuple[Array, Array, Array]:
    """Mean and mean square of the GPU seconds of a prompt, and the seconds after which its first token is out."""
    mean_s, square_s2, own_s = (np.zeros(()) for _ in range(3))
    for isl, weight in by_isl(workload):
        kernels_s = perf.prefill_kernels_s(layout, 1.0, isl, 1.0)
        busy_s = perf.prompt_cost * kernels_s
        mean_s, square_s2 = mean_s + weight * busy_s, square_s2 + weight * busy_s**2
        own_s = own_s + weight * perf.backend_fit.prompt * kernels_s
    return mean_s, square_s2, own_s


def _decode_batch(
    perf: PerfModel,
    layout: Layout,
    requests_per_s: Array,
    workload: Workload,
    limit: Array,
    slowed: Callable[[Result], Result],
) -> Result:
    """Requests that decode at once, by Little's law: the smallest b with b >= rate * time(b + 1), or the limit."""
    low, high = np.zeros_like(np.asarray(limit, dtype=np.float64)), np.asarray(limit, dtype=np.float64)
    steps = max(workload.mean_osl - 1.0, 0.0)
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        enough = middle >= requests_per_s * steps * slowed(_step_s(perf, layout, middle, workload))
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return high
