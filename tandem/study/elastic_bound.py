"""What a clairvoyant would need: arrivals, prompt and answer lengths known in advance, sizes changed at no cost.

Three answers, from loosest to closest, all in GPU hours of the time until the last request is answered:

    work    seconds of steps that the traffic takes, each at the best batch within TPOT, split over workers as finely as one
            likes: no policy in which every request meets its objective takes less
    whole   the same work in windows of a minute, in whole workers, those that prefill apart from those that decode, at least
            one of each: less is only possible by moving work between windows or flipping a worker within one
    sized   whole workers at the utilisation, and with the room for the TTFT's 90th percentile, of the sizing functions that
            static-by-peak and the joint policy use: their perfect forecast
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tandem.sched.observation import Decision, Lengths, Observation
from tandem.study.elastic_cells import Ready

BOUND_WINDOW_S = 60.0
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """GPU hours of the three answers, and the sizes of the last by window."""

    work: float
    whole: float
    sized: float
    window_s: float
    prefill: Floats
    """Workers, whole, of each window, as sized."""
    decode: Floats


def spread_over(begin_s: Floats, end_s: Floats, weight: Floats, window_s: float, windows: int) -> Floats:
    """Mean of the weights that are active in each window: each counts from its begin to its end."""
    edges = np.arange(windows + 1) * window_s
    total = np.zeros(windows + 1)
    for times, sign in ((begin_s, 1.0), (end_s, -1.0)):
        # The integral of a step at `times` up to each edge.
        order = np.argsort(times, kind="stable")
        at, w = times[order], weight[order]
        upto = np.searchsorted(at, edges, side="right")
        sums = np.concatenate(([0.0], np.cumsum(w)))[upto]
        moments = np.concatenate(([0.0], np.cumsum(w * at)))[upto]
        total += sign * (edges * sums - moments)
    return np.diff(total) / window_s


def prompt_seconds(made: Ready) -> Floats:
    """Least seconds of a worker for each prompt: tokens at the rate of the step that is best for them, and its pairs."""
    times, isl = made.kind.times, made.trace.isl.astype(np.float64)
    nodes = np.asarray(times.chunk_tokens)
    groups = times.groups
    best = float(np.min((np.asarray(times.chunk_s) + times.spread_s * (groups - 1) * nodes) / (groups * nodes)))
    return isl * best + times.per_pair_s * isl * (isl + 1.0) / 2.0 / groups


def clairvoyant(made: Ready, window_s: float = BOUND_WINDOW_S, utilisation: float | None = None) -> Bound:
    """Bounds for a cell's traffic on its workers; `utilisation` stands for that of the sizing functions in `sized`."""
    trace, times = made.trace, made.kind.times
    rates = made.rates if utilisation is None else replace(made.rates, utilisation=utilisation)
    batch = rates.decode_batch(made.context)
    step_s = times.decode_s(batch, batch * made.context)
    prompts = prompt_seconds(made)
    alone = np.array([times.prefill_s(int(n), 0) for n in np.unique(trace.isl)])
    begin_s = trace.arrival_s + alone[np.searchsorted(np.unique(trace.isl), trace.isl)] + times.first_token_s
    context = trace.isl + trace.osl / 2.0
    each_s = times.base_s[batch] / batch + times.per_token_s[batch] * context
    tokens = np.maximum(trace.osl - 1.0, 0.0)
    work_s = float(np.sum(prompts) + np.sum(tokens * each_s))
    # A request holds its share of a batch for as long as its answer takes at the planned step.
    end_s = begin_s + tokens * step_s
    windows = max(1, int(np.ceil(float(end_s.max()) / window_s)))
    workers = spread_over(begin_s, end_s, each_s / step_s, window_s, windows)
    edges = np.arange(windows + 1) * window_s
    at = np.searchsorted(trace.arrival_s, edges)
    at[-1] = len(trace)
    cumulative = np.concatenate(([0.0], np.cumsum(prompts)))
    busy = np.diff(cumulative[at]) / window_s
    needed, links = np.zeros(windows), np.zeros(windows)
    for i in range(windows):
        lengths = Lengths.of(trace.isl[at[i] : at[i + 1]].tolist())
        if lengths is not None:
            rate = (at[i + 1] - at[i]) / window_s
            needed[i], links[i] = rates.prefill_load(rate, lengths), rates.link_load(rate, lengths)
    whole = _whole(busy) + _whole(workers)
    prefill, decode = _whole(needed), _whole(np.maximum(workers / rates.utilisation, links))
    gpus = made.kind.gpus
    hours = gpus * window_s / 3600.0
    return Bound(
        work=work_s * gpus / 3600.0,
        whole=float(np.sum(whole)) * hours,
        sized=float(np.sum(prefill + decode)) * hours,
        window_s=window_s,
        prefill=prefill,
        decode=decode,
    )


def _whole(needs: Floats) -> Floats:
    return np.maximum(1.0, np.ceil(needs - 1e-9))


class Foreseen:
    """A policy that knows the sizes of the future: after each window the largest of those until a start could help."""

    def __init__(self, bound: Bound, start_up_s: float) -> None:
        self._bound, self._start_up_s = bound, start_up_s

    def decide(self, observation: Observation) -> Decision:
        """What to aim at after this window."""
        bound, at_s = self._bound, observation.at_s
        first = min(int(at_s / bound.window_s), len(bound.prefill) - 1)
        last = int((at_s + self._start_up_s + observation.window_s) / bound.window_s) + 1
        prefill, decode = (int(sizes[first:last].max()) for sizes in (bound.prefill, bound.decode))
        there = {role: sum(p.up + p.starting for p in observation.pools if p.role == role) for role in ("prefill", "decode")}
        changed = there != {"prefill": prefill, "decode": decode}
        return Decision(targets={"prefill": prefill, "decode": decode}, reason="known in advance", changed=changed)
