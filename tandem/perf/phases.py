"""Prefill, decode and their mixtures: TTFT, TPOT and request rate of one instance, for arrays of design points.

A request finds its instance busy with exactly its batch, in steady state; waiting for a free place in the batch is not
part of these times.
`batch` always counts the requests of one whole instance, over its attention groups and pipeline stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tandem.perf.backend import KERNELS_ONLY, PASS_TOKENS, PHYSICS, BackendFit, ServingFits, load_serving_fits
from tandem.perf.costs import Layout, StepLoad
from tandem.perf.efficiency import ROOFLINE
from tandem.perf.host import load_host
from tandem.perf.memory import MemoryModel
from tandem.perf.ops import Array, attended_pairs
from tandem.perf.step import KernelTime, StepPricer, weakest
from tandem.spec.design import Evidence, Precision
from tandem.spec.errors import SpecError
from tandem.spec.hardware import HardwareSpec
from tandem.spec.model import MLA, Attention, ModelSpec
from tandem.spec.workload import Workload

Result = NDArray[np.float64]
ACCEPTANCE = 0.7
"""Default probability that a drafted token holds: of 0.6, 0.65 ... 0.9 the best on the 62 calibration rows that drafted three
tokens (DeepSeek-R1; perf/silicon.py says how they are known)."""


class PrefillTime(NamedTuple):
    """TTFT in seconds and requests/s of one prefill instance."""

    ttft_s: Result
    requests_per_s: Result


class ServeTime(NamedTuple):
    """TTFT and TPOT in seconds and requests/s of one co-located instance; `feasible` is False where prefill starves decode."""

    ttft_s: Result
    tpot_s: Result
    requests_per_s: Result
    feasible: NDArray[np.bool_]


class Basis(NamedTuple):
    """What a prediction rests on in all, and how well its backend is known: whose residuals give its interval. A setting that
    was measured end to end on borrowed kernel curves is `transferred`, with the residuals of what was measured."""

    evidence: Evidence
    backend: Evidence

    @classmethod
    def weakest(cls, parts: Sequence[Basis]) -> Basis:
        """That of a whole: of each the weakest of its parts."""
        return cls(weakest([p.evidence for p in parts]), weakest([p.backend for p in parts]))


def prompt_wait_s(prompt_s: Array, requests_per_s: Array, others: Array) -> Result:
    """Mean wait of a prompt for those before it: M/D/1, and never more than half of all `others` of its group.

    With service S and load r = rate * S it is r * S / (2 * (1 - r)) (Pollaczek-Khinchine, no variance of service).
    """
    busy = np.minimum(np.asarray(requests_per_s) * prompt_s, 1.0 - 1e-9)
    return np.asarray(prompt_s * np.minimum(busy / (2.0 * (1.0 - busy)), others / 2.0))


def mean_attended(isl: Array, osl: Array, window: int) -> Array:
    """Mean of min(context, window) over the osl - 1 decode steps, whose contexts are isl + 1 to isl + osl - 1."""
    steps = np.maximum(osl - 1.0, 1.0)
    return attended_pairs(steps, isl, window) / steps


@dataclass(frozen=True)
class PerfModel:
    """The performance model of one model, GPU, precision and backend; everything else asks this object."""

    model: ModelSpec
    hardware: HardwareSpec
    precision: Precision
    backend: str = "vllm"
    given_fit: BackendFit | None = None
    """A backend fit to use instead of the shipped one: while calibrating, or for a user's own measurements."""
    split: bool = False
    """Prefill and decode in pools of their own: the fit of deployments measured that way."""
    draft_tokens: int = 0
    """Tokens that multi-token prediction proposes in each decode step, beside the one that is certain."""
    acceptance: float = ACCEPTANCE
    """Probability that a proposed token holds, given that those before it did."""
    fits: ServingFits | None = None
    """All backends' fits to use instead of the shipped ones: a user's own (`tandem calibrate serving --rows`)."""

    def __post_init__(self) -> None:
        if not 0 <= self.draft_tokens <= 16:
            raise SpecError(f"draft_tokens={self.draft_tokens}: must be from 0 to 16")
        if not 0.0 <= self.acceptance < 1.0:
            raise SpecError(f"acceptance={self.acceptance}: must be at least 0 and below 1")
        if self.draft_tokens and "multi-token prediction" not in self.model.omitted:
            raise SpecError(f"draft_tokens={self.draft_tokens}: {self.model.name} was published without multi-token prediction")

    @property
    def tokens_per_step(self) -> float:
        """Expected tokens that a decode step yields a sequence: 1 + a + a^2 + ... over the draft."""
        return float(sum(self.acceptance**i for i in range(self.draft_tokens + 1)))

    @cached_property
    def pricer(self) -> StepPricer:
        """Times the kernels of a step."""
        return StepPricer(self.model, self.hardware, self.precision)

    @cached_property
    def memory(self) -> MemoryModel:
        """Sizes what a GPU must hold."""
        return MemoryModel(self.model, self.precision, self.hardware)

    @property
    def on_host(self) -> bool:
        """Whether this is Tandem's engine on this machine: coefficients are those of `tandem calibrate host`."""
        return self.fits is None and self.backend == "tandem" and self.hardware.fits_from == ROOFLINE

    @cached_property
    def _found(self) -> tuple[BackendFit, Evidence]:
        if self.on_host:
            host = load_host(self.hardware.name)
            return (KERNELS_ONLY, "roofline") if host is None else host.find(self.model, self.precision.weights, self.split)
        fits = self.fits or load_serving_fits()
        return fits.find(self.backend, self.hardware, self.model, self.precision.weights, self.split)

    @cached_property
    def backend_fit(self) -> BackendFit:
        """What the serving backend makes of the kernels."""
        return self.given_fit or self._found[0]

    def evidence(self, layout: Layout, load: StepLoad, *, as_measured: bool = True) -> Evidence:
        """What a prediction of this load rests on."""
        return self.basis(layout, load, as_measured=as_measured).evidence

    def basis(self, layout: Layout, load: StepLoad, *, as_measured: bool = True) -> Basis:
        """What a prediction of this load rests on; of several points the weakest."""
        return Basis.weakest(self.bases(layout, load, as_measured=as_measured))

    def bases(self, layout: Layout, load: StepLoad, *, as_measured: bool = True) -> list[Basis]:
        """Of each point the weaker of kernels and backend, the latter within twice the batch, length and GPUs of its rows, no
        more pipeline stages and drafts than theirs, and served `as_measured`: at a fixed number of requests in flight, prompts
        whole between decode steps or in pools of their own."""
        fit, backend = self._found
        kernels = self.pricer.evidence(layout, load)
        tokens = np.asarray(load.context) + np.asarray(load.isl)
        beyond = np.asarray(load.decode_seqs) > 2 * fit.sequences_max
        beyond = beyond | (tokens > 2 * fit.isl_max) | (np.asarray(layout.gpus) > 2 * fit.gpus_max)
        beyond = beyond | (np.asarray(layout.pp * layout.cpp) > fit.pp_max) | (self.draft_tokens > fit.drafts_max)
        lost = np.broadcast_to(beyond, len(kernels)) if backend == "calibrated" and as_measured else [True] * len(kernels)
        known: list[Evidence] = ["transferred" if backend == "calibrated" and gone else backend for gone in lost]
        return [Basis(weakest([kernel, label]), label) for kernel, label in zip(kernels, known, strict=True)]

    def fit_for(self, label: Evidence) -> BackendFit:
        """The backend's fit with the percentiles of predictions whose backend is known so well."""
        if self.given_fit is not None or label == self._found[1] or self._found[1] == "roofline" or self.on_host:
            return self.backend_fit
        if label not in self._labelled:
            fits = self.fits or load_serving_fits()
            setting = self.backend, self.hardware, self.model, self.precision.weights, self.split
            self._labelled[label] = fits.find(*setting, label)[0]
        return self._labelled[label]

    @cached_property
    def _labelled(self) -> dict[Evidence, BackendFit]:
        return {}

    def _host_s(self, seqs: Array) -> Array:
        fit = self.backend_fit
        return fit.step_s + fit.sequence_s * seqs

    def decode_load(self, layout: Layout, batch: Array, workload: Workload) -> StepLoad:
        """One decode step of a pipeline stage's micro-batch, at the mean context of the workload."""
        micro = np.ceil(batch / layout.pp)
        return StepLoad(
            decode_seqs=np.ceil(micro / layout.dp),
            context=workload.decode_context,
            decode_window_context=self._windows(workload),
            draft=float(self.draft_tokens),
        )

    def _windows(self, workload: Workload) -> dict[int, Array]:
        windows = {m.window for m, _ in self.model.mixers if isinstance(m, Attention) and m.window}
        windows |= {m.index.top_k for m, _ in self.model.mixers if isinstance(m, MLA) and m.index}
        w, i, o = (np.asarray(x) for x in (workload.weight, workload.isl, workload.osl))
        share = w * o / np.sum(w * o)
        return {size: float(np.sum(share * mean_attended(i, o, size))) for size in windows}

    def _step_s(self, layout: Layout, load: StepLoad) -> Result:
        """What a backend shows of a decode step's kernels."""
        kernels = self.pricer.kernels(layout, load, self.backend_fit)
        return np.asarray(self.backend_fit.launch * kernels.launch_s + kernels.work_s)

    def decode_tpot_s(self, layout: Layout, batch: Array, workload: Workload) -> Result:
        """TPOT of a decode instance that does nothing else: one pass of its micro-batch through every stage, over the tokens
        that the pass yields."""
        load = self.decode_load(layout, batch, workload)
        return np.asarray((self._host_s(load.decode_seqs) + self._step_s(layout, load)) / self.tokens_per_step)

    def prefill_kernels_s(
        self, layout: Layout, seqs: Array, isl: Array, chunks: Array, *, cached_up: bool = False, busy_groups: Array = 1.0
    ) -> Result:
        """Kernel seconds of prefilling `seqs` prompts of `isl` tokens together in each busy attention group, in chunks, and
        what each pass of a prompt takes beside them."""
        load = StepLoad(prefill_seqs=seqs, isl=isl, chunks=chunks, cached_up=cached_up, busy_groups=busy_groups)
        passes = np.ceil(isl / PASS_TOKENS)
        return np.asarray(
            chunks * self._prompt_s(self.pricer.kernels(layout, load)) + seqs * passes * self.backend_fit.prompt_s
        )

    @cached_property
    def prompt_cost(self) -> float:
        """GPU time of a prompt over its kernels' time. A backend may show less than all of it in TPOT, since newcomers wait
        for one another; the GPUs do all of the work."""
        return max(self.backend_fit.prefill, PHYSICS.prefill)

    def _prompt_s(self, kernels: KernelTime) -> Result:
        """Prompt seconds of prefill kernels: all of their work, and the share of launches that physics expects to show."""
        return np.asarray(PHYSICS.launch * kernels.launch_s + kernels.work_s)

    def prefill(
        self, layout: Layout, batch: Array, workload: Workload, chunk_tokens: Array = np.inf, *, percentile: float = 50.0
    ) -> PrefillTime:
        """TTFT (at `percentile` of the prompt lengths) and rate of a prefill instance that batches `batch` prompts.

        With chunked pipeline parallelism the chunks of a prompt follow one another through the stages, so TTFT shrinks
        towards 1/cpp of the work plus the fill of the pipeline by the last, costliest chunk (paper B, Figure 5).
        """
        fit = self.backend_fit
        seqs = np.ceil(batch / (layout.dp * layout.pp))
        host = self._host_s(seqs)
        mean_busy: Array = 0.0
        ttfts = []
        piped = np.any(np.asarray(layout.cpp) > 1)
        for isl, weight in by_isl(workload):
            chunks = np.maximum(np.ceil(seqs * isl / chunk_tokens), 1.0)
            kernels = self.prefill_kernels_s(layout, seqs, isl, chunks)
            ttft = fit.prompt * kernels + host * chunks
            if piped:
                last = fit.prompt * self._last_chunk_s(layout, seqs, isl, chunks) + host
                ttft = ttft / layout.cpp + (layout.cpp - 1.0) / layout.cpp * last
            ttfts.append(np.asarray(fit.host_s + ttft))
            mean_busy = mean_busy + weight * (self.prompt_cost * kernels + host * chunks) / layout.cpp
        index = _percentile_index([w for _, w in by_isl(workload)], percentile)
        return PrefillTime(*np.broadcast_arrays(ttfts[index], batch / mean_busy))

    def _last_chunk_s(self, layout: Layout, seqs: Array, isl: Array, chunks: Array) -> Result:
        """Kernel seconds of the last chunk: as many new tokens as the mean chunk, but all earlier ones to attend to."""
        new = isl / chunks
        mean = self._prompt_s(self.pricer.kernels(layout, StepLoad(prefill_seqs=seqs, isl=isl, chunks=chunks)))
        first = self._prompt_s(self.pricer.kernels(layout, StepLoad(prefill_seqs=seqs, isl=new, chunks=1.0)))
        return np.asarray(np.where(np.asarray(chunks) > 1, 2.0 * mean - first, mean))

    def colocated(
        self,
        layout: Layout,
        batch: Array,
        workload: Workload,
        *,
        percentile: float = 50.0,
        closed_loop: bool = False,
        waiting: Array = 0.0,
    ) -> ServeTime:
        """In-flight batching: prompts are prefilled between decode steps, which the others of their attention group wait for.

        While a request decodes its OSL - 1 further tokens, each of the g - 1 other sequences of its group is replaced
        once, so a step waits for (g - 1) / (OSL - 1) prefills on average. In steady traffic (what a plan assumes) newcomers
        wait for one another as in an M/D/1 queue of prompts. A benchmark at fixed concurrency (`closed_loop`) starts its
        requests together: TTFT averages that first burst over the waves of requests that follow it, and `waiting` requests
        an instance find no place in memory and wait for one (backend.py has the formulas); the rate follows from Little's law.
        """
        fit = self.backend_fit
        load = self.decode_load(layout, batch, workload)
        decode_s = self.decode_tpot_s(layout, batch, workload)
        points = [(isl, weight, self.prefill_kernels_s(layout, 1.0, isl, 1.0)) for isl, weight in by_isl(workload)]
        prompt_s = np.asarray(sum(weight * seconds for _, weight, seconds in points))
        asked_s = points[_percentile_index([w for _, w, _ in points], percentile)][2]
        steps = workload.mean_osl - 1.0
        others = np.maximum(load.decode_seqs - 1.0, 0.0)
        shown = 0.0 if steps <= 0 else (fit.prefill if closed_loop else self.prompt_cost)
        tpot = decode_s + shown * prompt_s * others / max(steps, 1.0)
        busy_s = load.decode_seqs * (self.prompt_cost * prompt_s + self._host_s(1.0)) + steps * decode_s
        request_s = np.maximum(self.prompt_cost * prompt_s + decode_s + tpot * steps, busy_s)
        rate = batch / request_s
        ttft = fit.host_s + fit.prompt * asked_s + fit.pause * tpot
        if closed_loop:
            served_s = prompt_s + tpot * steps
            ttft = ttft + fit.burst * load.decode_seqs * prompt_s + fit.queue * waiting / batch * served_s
            rate = np.minimum(rate, (batch + waiting) / (ttft + tpot * steps))
        else:
            ttft = ttft + prompt_wait_s(self.prompt_cost * prompt_s, load.decode_seqs / request_s, others)
        return ServeTime(*np.broadcast_arrays(ttft, tpot, rate, True))

    def chunk_step_s(
        self, layout: Layout, batch: Array, workload: Workload, chunk_tokens: Array, *, cached_up: bool = False
    ) -> tuple[Result, Result, Result]:
        """Seconds of a decode step, what a chunk of a prompt adds to it, and the chunks of a mean prompt: `chunk_tokens`
        less the decoding sequences' tokens in each."""
        load = self.decode_load(layout, batch, workload)
        chunks = self._chunks(load.decode_seqs, workload, chunk_tokens)
        mixed = load._replace(prefill_seqs=np.ones_like(chunks), isl=workload.mean_isl, chunks=chunks, cached_up=cached_up)
        pure_s = self._host_s(load.decode_seqs) + self._step_s(layout, load)
        alone, together = self.pricer.kernels(layout, load), self.pricer.kernels(layout, mixed)
        extra_s = self.prompt_cost * np.maximum(self._prompt_s(together) - self._prompt_s(alone), 0.0)
        return pure_s, extra_s, chunks

    def keeps_up(
        self, layout: Layout, batch: Array, workload: Workload, chunk_tokens: Array
    ) -> tuple[Result, NDArray[np.bool_]]:
        """The share of steps that would have to carry a chunk, and whether chunks take prompts in as fast as they come."""
        seqs = self.decode_load(layout, batch, workload).decode_seqs
        chunks = self._chunks(seqs, workload, chunk_tokens)
        carrying = np.asarray(seqs / max((workload.mean_osl - 1.0) / self.tokens_per_step, 1.0) * chunks)
        return carrying, (carrying <= 1.0) & (chunk_tokens > seqs)

    def _chunks(self, decode_seqs: Array, workload: Workload, chunk_tokens: Array) -> Result:
        """Chunks of a mean prompt where the decoding sequences' tokens leave room for it in each step."""
        return np.maximum(workload.mean_isl / np.maximum(chunk_tokens - decode_seqs, 1.0), 1.0)

    def piggybacked(
        self,
        layout: Layout,
        batch: Array,
        workload: Workload,
        chunk_tokens: Array,
        *,
        percentile: float = 50.0,
        cached_up: bool = False,
    ) -> ServeTime:
        """Chunked piggybacking: decode steps carry prompt chunks of `chunk_tokens` minus the decoding sequences' tokens.

        A share f = (b / (OSL - 1)) * (ISL / room) of the steps carries a chunk; where f exceeds 1 prompts arrive faster than
        chunks can take them in and the batch cannot be kept up: not feasible, and prefill alone sets the rate.
        """
        load = self.decode_load(layout, batch, workload)
        osl, fit = workload.mean_osl, self.backend_fit
        carrying, feasible = self.keeps_up(layout, batch, workload, chunk_tokens)
        room = np.maximum(chunk_tokens - load.decode_seqs, 1.0)
        pure_s, extra_s, chunks = self.chunk_step_s(layout, batch, workload, chunk_tokens, cached_up=cached_up)
        tpot = (pure_s + np.minimum(carrying, 1.0) * extra_s) / self.tokens_per_step
        points = by_isl(workload)
        isl_at = points[_percentile_index([w for _, w in points], percentile)][0]
        ttft = fit.host_s + np.maximum(np.ceil(isl_at / room), 1.0) * (pure_s + extra_s)
        prompt_s = chunks * (pure_s + extra_s)
        rate = np.minimum(batch / (prompt_s + tpot * (osl - 1.0)), layout.dp * layout.pp / prompt_s)
        return ServeTime(*np.broadcast_arrays(ttft, tpot, rate, feasible))


def by_isl(workload: Workload) -> list[tuple[float, float]]:
    """Distinct prompt lengths of a workload with their weights, shortest first; groups of a trace share one mean length."""
    groups: dict[float, float] = {}
    for isl, weight in zip(workload.isl, workload.weight, strict=True):
        groups[isl] = groups.get(isl, 0.0) + weight
    points = sorted(groups.items())
    size = max(1, len(points) // 16)
    merged = []
    for start in range(0, len(points), size):
        cell = points[start : start + size]
        total = sum(w for _, w in cell)
        merged.append((sum(i * w for i, w in cell) / total, total))
    return merged


def _percentile_index(weights: list[float], percentile: float) -> int:
    """Index of the first point at which the cumulated weight reaches the percentile."""
    first = int(np.searchsorted(np.cumsum(weights), percentile / 100 - 1e-9))
    return min(first, len(weights) - 1)
