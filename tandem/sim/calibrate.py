"""What a serving engine adds to the performance model, fitted on measured runs: a few factors, each with a meaning.

Of the kernels' curves nothing is fitted but what a GPU without curves of its own reaches of its neighbour's. The rest is time
of the host. What no calibration run can show, since each ran on one GPU, comes from a table (`AllReduce`).
docs/simulator-validation.md has the results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tandem.perf.backend import BackendFit
from tandem.perf.efficiency import find_fit
from tandem.perf.estimate import perf_model
from tandem.perf.op_tables import extra
from tandem.perf.phases import PerfModel
from tandem.sim.build import kind_of
from tandem.sim.config import Group, SimConfig, WorkerKind
from tandem.sim.measured import MeasuredRun
from tandem.sim.result import SimResult
from tandem.sim.simulate import run as simulate
from tandem.spec.catalog import load_hardware
from tandem.spec.design import Pool
from tandem.spec.hardware import HardwareSpec
from tandem.spec.units import require_number


@dataclass(frozen=True, kw_only=True, slots=True)
class HostFactors:
    """Seconds that an engine spends beside its kernels."""

    step_s: float
    """Each step: scheduling, inputs, outputs."""
    sequence_s: float
    """Each sequence of a step: sampling, and what is done for each token that leaves."""
    chunk_step_s: float
    """Each step that carries prompt tokens: such a step replays no captured graph."""

    def __post_init__(self) -> None:
        for name in ("step_s", "sequence_s", "chunk_step_s"):
            require_number(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuFactors:
    """What a GPU reaches over what its kernels' curves say: of arithmetic, and of memory bandwidth."""

    compute: float = 1.0
    bandwidth: float = 1.0

    def __post_init__(self) -> None:
        for name in ("compute", "bandwidth"):
            require_number(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class AllReduce:
    """What GPUs of one instance reach when they sum their shares, with one version of an engine."""

    each_s: float
    """Each all-reduce, whatever its size."""
    bytes_per_s: float
    """Of what each GPU sends."""


ALL_REDUCE = AllReduce(each_s=20e-6, bytes_per_s=15.3e9)
"""Of two RTX PRO 6000 with vLLM 0.19.0. Source: aiconfigurator-core 0.12.0, systems/data/rtx_pro_6000_server/comm/vllm/0.19.0
(custom_allreduce, captured, 2 GPUs, 64 KiB and more). The curve in tandem.perf is of the fastest and newest engine, which
reaches 28 GB/s."""


@dataclass(frozen=True, kw_only=True)
class ServingFactors:
    """All factors of one version of an engine; a GPU that is not in `gpus` runs as its curves say."""

    host: HostFactors
    gpus: Mapping[str, GpuFactors]
    all_reduce: AllReduce = ALL_REDUCE
    imbalance: float | None = None
    """How much busier than the mean the busiest experts are; None: as in the shipped fit of the backend, since no dense run can
    show it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunErrors:
    """Simulated over measured, less 1."""

    ttft: float
    """Of the mean."""
    tpot: float
    """Of the mean over requests."""
    throughput: float
    """Of output tokens a second from the first arrival to the last token."""


VLLM_0_19 = ServingFactors(
    host=HostFactors(step_s=8.887e-4, sequence_s=1.439e-5, chunk_step_s=8.472e-3),
    gpus={"rtx-4090": GpuFactors(compute=1.4917, bandwidth=1.1885)},
)
"""What `calibrate` finds on the two runs of Llama-3.1-8B (tandem.sim.measured.CALIBRATION)."""


def perf_of(run: MeasuredRun, factors: ServingFactors) -> PerfModel:
    """The performance model of a run: curves with the GPU's factors and link, host times in place of the shipped fit."""
    plain = perf_model(run.model, _hardware(run, factors), "bf16", "vllm")
    host = factors.host
    imbalance = plain.backend_fit.imbalance if factors.imbalance is None else factors.imbalance
    fit = BackendFit(step_s=host.step_s, sequence_s=host.sequence_s, host_s=0.0, imbalance=imbalance)
    return replace(plain, given_fit=fit)


def _hardware(run: MeasuredRun, factors: ServingFactors) -> HardwareSpec:
    gpu, own = load_hardware(run.hardware), factors.gpus.get(run.hardware, GpuFactors())
    link = gpu.scale_up_bytes_per_s
    if run.parallelism.tp > 1:
        link = factors.all_reduce.bytes_per_s / find_fit(gpu, "allreduce", "bf16")[0].bandwidth_efficiency
    return replace(
        gpu,
        peak_flops={dtype: flops * own.compute for dtype, flops in gpu.peak_flops.items()},
        memory_bytes_per_s=gpu.memory_bytes_per_s * own.bandwidth,
        scale_up_bytes_per_s=link,
    )


def kind_of_run(run: MeasuredRun, factors: ServingFactors) -> WorkerKind:
    """The engine of a run as a kind of worker."""
    perf = perf_of(run, factors)
    trace = run.trace
    context = float(np.sum(trace.osl * (trace.isl + trace.osl / 2.0)) / np.sum(trace.osl))
    pool = Pool(parallelism=run.parallelism, batch=run.max_batch, chunk_tokens=run.step_tokens)
    kind = kind_of(perf, pool, name=run.name, context=context, blocks=run.blocks)
    each_s = 0.0
    if run.parallelism.tp > 1:
        counted_s = perf.backend_fit.launch * find_fit(perf.hardware, "allreduce", "bf16")[0].t0_s
        each_s = len(perf.model.layers) * max(factors.all_reduce.each_s - counted_s, 0.0)
    times, chunk_s = kind.times, factors.host.chunk_step_s
    slower = replace(
        times,
        base_s=[times.base_s[0], *(s + each_s for s in times.base_s[1:])],
        chunk_s=[s + each_s + chunk_s for s in times.chunk_s],
        mixed_s=[s + chunk_s for s in times.mixed_s],
    )
    return replace(kind, times=slower)


def replay(run: MeasuredRun, factors: ServingFactors) -> SimResult:
    """The arrivals of a run, simulated."""
    kind = kind_of_run(run, factors)
    return simulate(SimConfig(groups=(Group(kind=kind, role="colocated", count=1),)), run.trace)


def errors(run: MeasuredRun, result: SimResult) -> RunErrors:
    """How far a simulation of a run is from what was measured."""
    simulated = result.requests
    return RunErrors(
        ttft=float(np.mean(simulated.ttft_s) / np.mean(run.ttft_s) - 1.0),
        tpot=float(np.nanmean(simulated.tpot_s) / np.nanmean(run.tpot_s) - 1.0),
        throughput=float(run.duration_s / np.max(simulated.done_s) - 1.0),
    )


UNCROWDED_S = 0.5
"""A measured TTFT below this is that of a prompt that did not queue for a place."""
EARLY = 80
"""Requests of a run among which such prompts are looked for: the batch is not full yet."""


def loss(run: MeasuredRun, result: SimResult) -> float:
    """What `calibrate` makes small: squared relative errors of each request's TPOT, of its TTFT (over the mean one, since most
    of it is queueing, and once more of those that did not queue), and of the duration."""
    simulated = result.requests
    tpot = np.log(simulated.tpot_s / run.tpot_s)
    ttft = (simulated.ttft_s - run.ttft_s) / np.mean(run.ttft_s)
    alone = (run.ttft_s < UNCROWDED_S) & (np.arange(len(run.trace)) < EARLY)
    first = np.clip(np.log(simulated.ttft_s[alone] / run.ttft_s[alone]), -0.5, 0.5)
    duration = np.log(np.max(simulated.done_s) / run.duration_s)
    unqueued = 0.5 * float(np.mean(first**2)) if len(first) else 0.0
    return float(np.nanmean(tpot**2) + np.mean(ttft**2) + unqueued + 4.0 * duration**2)


START = ServingFactors(host=HostFactors(step_s=1e-3, sequence_s=2e-5, chunk_step_s=1e-2), gpus={})


def calibrate(runs: Sequence[MeasuredRun], start: ServingFactors = START, *, evaluations: int = 400) -> ServingFactors:
    """Factors that make the simulator most like these runs: those of the host, and the two of every GPU that has no curves of
    its own. Nelder and Mead's simplex on their logarithms: the same runs, the same factors. Needs SciPy (extra `calibrate`)."""
    optimize = extra("scipy.optimize")
    borrowed = sorted({run.hardware for run in runs if load_hardware(run.hardware).fits_from != run.hardware})

    def factors(point: NDArray[np.float64]) -> ServingFactors:
        values = [float(np.exp(x)) for x in point]
        gpus = {name: GpuFactors(compute=values[3 + 2 * i], bandwidth=values[4 + 2 * i]) for i, name in enumerate(borrowed)}
        host = HostFactors(step_s=values[0], sequence_s=values[1], chunk_step_s=values[2])
        return replace(start, host=host, gpus={**start.gpus, **gpus})

    def objective(point: NDArray[np.float64]) -> float:
        asked = factors(point)
        return float(sum(loss(run, replay(run, asked)) for run in runs))

    host = start.host
    own = [value for name in borrowed for g in (start.gpus.get(name, GpuFactors()),) for value in (g.compute, g.bandwidth)]
    at = np.log([host.step_s, host.sequence_s, host.chunk_step_s, *own])
    steps = np.diag([0.5, 0.5, 0.5, *(0.25 for _ in own)])
    found = optimize.minimize(
        objective, at, method="Nelder-Mead", options={"maxfev": evaluations, "initial_simplex": np.vstack([at, at + steps])}
    )
    return factors(np.asarray(found.x))
