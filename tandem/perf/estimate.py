"""One deployment, one traffic: TTFT, TPOT and throughput with intervals. The planner prices the same way, by the thousand."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem.perf.backend import ServingFits
from tandem.perf.closed_loop import Loop, engine_loop, pools_loop
from tandem.perf.costs import Layout, StepLoad
from tandem.perf.divide import refuse_parallelism
from tandem.perf.efficiency import ROOFLINE
from tandem.perf.host import ENGINE, load_host
from tandem.perf.memory import MemoryUse
from tandem.perf.open_loop import OpenLoop, open_loop, open_loop_pools
from tandem.perf.phases import ACCEPTANCE, Basis, PerfModel, ServeTime
from tandem.perf.pools import DecodePool, PrefillPool, SplitTime, pools_basis, split_times
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.design import BACKENDS, Estimate, Parallelism, Precision
from tandem.spec.errors import Infeasible, SpecError
from tandem.spec.hardware import HardwareSpec
from tandem.spec.model import ModelSpec
from tandem.spec.units import require_int, require_number
from tandem.spec.workload import Workload

PIGGYBACK_TOKENS = 2048
"""Step budget assumed when prompt chunks ride along with decode (vLLM's max_num_batched_tokens)."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Multi-token prediction: tokens proposed in each decode step, and the probability that one holds if those before did."""

    tokens: int = 0
    acceptance: float = ACCEPTANCE


NO_DRAFT = Draft()


@dataclass(frozen=True, kw_only=True)
class EstimateResult:
    """What a deployment is predicted to do. `max_batch` is what one instance's memory holds at the final length."""

    ttft_s: Estimate
    tpot_s: Estimate
    tokens_per_s_per_gpu: Estimate
    tokens_per_s_per_user: Estimate
    max_batch: int
    memory: dict[str, float]
    evidence: str
    batch: int
    """Requests in flight in one instance, as predicted for: what was asked, or less where memory holds no more."""
    waiting: int
    """Requests of the asked concurrency that find no place in memory and wait; TTFT includes their wait."""

    def to_json(self) -> dict[str, Any]:
        """The object that `tandem estimate --json` prints."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Instances:
    """`replicas` equal instances with `batch` requests in flight in each."""

    parallelism: Parallelism
    batch: int
    replicas: int = 1

    def __post_init__(self) -> None:
        require_int("batch", self.batch)
        require_int("replicas", self.replicas, high=16384)

    @property
    def layout(self) -> Layout:
        """Its parallelism as arrays of one design point."""
        return Layout.of(self.parallelism)


def perf_model(
    model: str | ModelSpec,
    hardware: str | HardwareSpec,
    precision: str | Precision | None,
    backend: str | None,
    fits: ServingFits | None = None,
) -> PerfModel:
    """The performance model for names or specs. Precision defaults to the model's native format, fits to the shipped ones, the
    backend to vLLM; on a machine that `tandem calibrate host` measured to the format and the engine that it measured.

    Raises SpecError for a backend that is none, and for another than the measured engine on such a machine.
    """
    spec = load_spec(model) if isinstance(model, str) else model
    gpu = load_hardware(hardware) if isinstance(hardware, str) else hardware
    measured = gpu.fits_from == ROOFLINE
    if backend is None:
        backend = ENGINE if measured else "vllm"
    if backend not in BACKENDS:
        raise SpecError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
    if measured and backend != ENGINE:
        raise SpecError(f"backend={backend!r}: {gpu.name} was measured with Tandem's engine; must be {ENGINE}")
    if precision is None and measured:
        precision = None if (host := load_host(gpu.name)) is None else host.precision(spec)
    if not isinstance(precision, Precision):
        precision = Precision.parse(precision, native=spec.native_precision)
    return PerfModel(spec, gpu, precision, backend, fits=fits)


def check_workers(perf: PerfModel, gpus: int) -> None:
    """Refuse more workers than a measured machine has room for."""
    name, most = perf.hardware.name, perf.hardware.scale_up_gpus
    if perf.hardware.fits_from == ROOFLINE and gpus > most:
        fit = "1 worker fits" if most == 1 else f"{most} workers fit"
        raise SpecError(f"gpus={gpus}: {name} is one machine, where {fit}; use {most}")


def estimate(
    *,
    model: str | ModelSpec,
    hardware: str | HardwareSpec,
    isl: int,
    osl: int,
    concurrency: int | None = None,
    batch: int | None = None,
    parallelism: Parallelism | None = None,
    requests_per_s: float | None = None,
    precision: str | Precision | None = None,
    backend: str | None = None,
    mode: str = "colocated",
    gpus: int | None = None,
    draft: Draft = NO_DRAFT,
    fits: ServingFits | None = None,
) -> EstimateResult:
    """Predict a co-located deployment at a fixed number of requests in flight, or at a rate of Poisson arrivals.

    `concurrency` counts the requests of the whole deployment, `batch` those of one instance, `requests_per_s` arrivals at the
    whole deployment; give one. `gpus` beyond one instance means replicas. A concurrency above what memory holds is served at
    the largest batch; the rest waits, and TTFT includes that wait. A rate above what the deployment sustains is refused.
    Raises SpecError on impossible values, naming the field.
    """
    perf = perf_model(model, hardware, precision, backend, fits)
    perf = replace(perf, draft_tokens=draft.tokens, acceptance=draft.acceptance)
    p = parallelism or Parallelism()
    check_fits(perf, p)
    if p.cpp > 1:
        raise SpecError(f"cpp={p.cpp}: chunked pipeline parallelism is for prefill pools; use pp here")
    replicas = _replicas(p, gpus)
    check_workers(perf, replicas * p.gpus)
    given = {"concurrency": concurrency, "batch": batch, "requests_per_s": requests_per_s}
    if sum(value is not None for value in given.values()) != 1:
        raise SpecError(
            f"{', '.join(f'{k}={v}' for k, v in given.items())}: give exactly one of --concurrency, --batch and --rate"
        )
    if mode not in ("colocated", "piggybacked"):
        raise SpecError(
            f"mode={mode!r}: must be colocated or piggybacked; a disaggregated case names both pools, in a --cases file"
        )
    if requests_per_s is not None:
        return _at_rate(perf, p, replicas, _fixed(isl, osl), mode, require_number("requests_per_s", requests_per_s))
    wanted = require_int("batch" if concurrency is None else "concurrency", batch if concurrency is None else concurrency)
    per_instance = wanted if concurrency is None else -(-wanted // replicas)
    workload = _fixed(isl, osl)
    memory, max_batch = _memory(perf, p, workload, per_instance)
    instances = Instances(parallelism=p, batch=min(per_instance, max_batch), replicas=replicas)
    found = _colocated(perf, instances, workload, mode, memory, max_batch, per_instance - instances.batch)
    return replace(
        found,
        waiting=max(0, wanted - instances.batch * replicas) if concurrency is not None else per_instance - instances.batch,
    )


def _fixed(isl: int, osl: int) -> Workload:
    workload = Workload.fixed(isl, osl)
    if osl < 2:
        raise SpecError(f"osl={osl}: must be at least 2, or there is no time per output token to predict")
    return workload


def _replicas(p: Parallelism, gpus: int | None) -> int:
    if gpus is None:
        return 1
    require_int("gpus", gpus, high=16384)
    if gpus % p.gpus:
        raise SpecError(f"gpus={gpus}: must be a multiple of the {p.gpus} GPUs of one instance ({p})")
    return gpus // p.gpus


def check_fits(perf: PerfModel, p: Parallelism) -> None:
    """Refuse a parallelism that does not divide the model."""
    refusal = refuse_parallelism(perf.model, p)
    if isinstance(refusal, Infeasible):
        raise SpecError(refusal.reason)


def _memory(perf: PerfModel, p: Parallelism, workload: Workload, batch: int) -> tuple[dict[str, float], int]:
    layout = Instances(parallelism=p, batch=1).layout
    use = perf.memory.use(layout, workload.final_context, min(2048.0, workload.mean_isl))
    max_batch = int(use.max_batch(layout))
    if max_batch < 1:
        needed = float(use.weight_bytes + use.workspace_bytes + use.sequence_bytes)
        raise SpecError(
            f"tp={p.tp}: {perf.model.name} with one sequence of {workload.final_context:,.0f} tokens needs {needed:,.0f} B "
            f"a GPU, {perf.hardware.name} offers {use.usable_bytes:,.0f} B; "
            "use more GPUs an instance, fewer bits or shorter sequences"
        )
    return memory_json(perf, layout, use, min(batch, max_batch)), max_batch


def _colocated(
    perf: PerfModel, it: Instances, workload: Workload, mode: str, memory: dict[str, float], max_batch: int, waiting: int
) -> EstimateResult:
    batch = np.array([float(it.batch)])
    if mode == "colocated" and perf.on_host and not waiting:
        loop = Loop.of(perf, round(workload.mean_isl), round(workload.mean_osl), it.batch)
        ttft_s, tpot_s, rate = (np.array([value]) for value in engine_loop(loop))
        served = ServeTime(ttft_s, tpot_s, rate, np.array([True]))
    elif mode == "piggybacked":
        served = perf.piggybacked(it.layout, batch, workload, np.array([float(max(PIGGYBACK_TOKENS, 2 * it.batch))]))
    else:
        served = perf.colocated(it.layout, batch, workload, closed_loop=True, waiting=float(waiting))
    load = perf.decode_load(it.layout, batch, workload)
    per_gpu = float(served.requests_per_s[0]) / it.parallelism.gpus * workload.mean_osl
    basis = perf.basis(it.layout, load, as_measured=mode == "colocated")
    return _result(perf, it.layout, load, served.ttft_s, served.tpot_s, per_gpu, max_batch, memory, it.batch, basis)


def _at_rate(perf: PerfModel, p: Parallelism, replicas: int, workload: Workload, mode: str, rate: float) -> EstimateResult:
    layout, chunk = Layout.of(p), float(PIGGYBACK_TOKENS) if mode == "piggybacked" else None
    _, max_batch = _memory(perf, p, workload, 1)
    served = open_loop(perf, layout, np.array([rate / replicas]), workload, np.array([float(max_batch)]), chunk_tokens=chunk)
    memory, _ = _memory(perf, p, workload, _requests(served, rate))
    load = perf.decode_load(layout, served.batch + 1.0, workload)
    per_gpu = rate * workload.mean_osl / (replicas * p.gpus)
    basis, batch = perf.basis(layout, load, as_measured=False), _requests(served, rate)
    found = _result(perf, layout, load, served.ttft_s, served.tpot_s, per_gpu, max_batch, memory, batch, basis)
    return replace(found, tokens_per_s_per_gpu=_exactly(found.tokens_per_s_per_gpu))


def _exactly(arriving: Estimate) -> Estimate:
    """What arrives is served, no more and no less, as long as it is sustained."""
    return replace(arriving, low=arriving.value, high=arriving.value)


def _requests(served: OpenLoop, rate: float) -> int:
    """Requests that decode in an instance at a rate that it sustains; SpecError at one that it does not."""
    if not np.isfinite(served.ttft_s[0]):
        raise SpecError(
            f"requests_per_s={rate:g}: more than this deployment sustains, requests would wait without bound; "
            "use more GPUs or a lower rate"
        )
    return max(1, round(float(served.batch[0])))


def estimate_disaggregated(
    *,
    model: str | ModelSpec,
    hardware: str | HardwareSpec,
    isl: int,
    osl: int,
    prefill: Instances,
    decode: Instances,
    concurrency: int | None = None,
    requests_per_s: float | None = None,
    precision: str | Precision | None = None,
    backend: str | None = None,
    draft: Draft = NO_DRAFT,
    fits: ServingFits | None = None,
) -> EstimateResult:
    """Predict a prefill pool and a decode pool at a fixed number of requests in flight (perf.pools), or at a rate of Poisson
    arrivals (perf.open_loop).

    `decode.batch` is the largest batch of a decode instance. `concurrency` counts the requests of the whole deployment and
    defaults to all decode slots; those that are being prefilled, or wait for it, do not decode, and those beyond the slots wait
    for one, which TTFT includes.
    """
    perf = replace(
        perf_model(model, hardware, precision, backend, fits),
        split=True,
        draft_tokens=draft.tokens,
        acceptance=draft.acceptance,
    )
    for pool in (prefill, decode):
        check_fits(perf, pool.parallelism)
        if pool.parallelism.cpp > 1:
            raise SpecError(f"cpp={pool.parallelism.cpp}: prompts in chunks are priced by find_plan only; use pp here")
    if concurrency is not None and requests_per_s is not None:
        raise SpecError(f"concurrency={concurrency}, requests_per_s={requests_per_s}: give one of them")
    workload = _fixed(isl, osl)
    slots = decode.batch * decode.replicas
    asked = slots if concurrency is None else require_int("concurrency", concurrency)
    _, most_prompts = _memory(perf, prefill.parallelism, Workload.fixed(isl, 1), prefill.batch)
    memory, max_batch = _memory(perf, decode.parallelism, workload, decode.batch)
    prompts = PrefillPool(
        prefill.layout, np.array([float(min(prefill.batch, most_prompts))]), np.array([float(prefill.replicas)])
    )
    limit = min(decode.batch, max_batch)
    decoding = DecodePool(decode.layout, np.array([float(limit)]), np.array([float(decode.replicas)]))
    gpus = prefill.replicas * prefill.parallelism.gpus + decode.replicas * decode.parallelism.gpus
    check_workers(perf, gpus)
    served: OpenLoop | SplitTime
    if requests_per_s is not None:
        rate = require_number("requests_per_s", requests_per_s)
        served = open_loop_pools(perf, prompts, decoding, np.array([rate]), workload)
        batch, waiting = _requests(served, rate), 0
    else:
        if perf.on_host:
            loop = pools_loop(
                Loop.of(perf, isl, osl, asked), prefill=prefill.replicas, decode=decode.replicas, batch_limit=limit
            )
            decoded = loop.requests_per_s * loop.tpot_s * (osl - 1.0) / decode.replicas
            served = SplitTime(*(np.array([value]) for value in (*loop, decoded)))
        else:
            served = split_times(perf, prompts, decoding, workload, np.array([float(asked)]))
        rate, batch = float(served.requests_per_s[0]), max(1, round(float(served.batch[0])))
        waiting = max(0, asked - limit * decode.replicas)
    basis = pools_basis(perf, prompts, decode.layout, served.batch, workload, as_measured=requests_per_s is None)
    load = perf.decode_load(decode.layout, served.batch, workload)
    times, per_gpu = (served.ttft_s, served.tpot_s), rate * osl / gpus
    found = replace(_result(perf, decode.layout, load, *times, per_gpu, max_batch, memory, batch, basis), waiting=waiting)
    if requests_per_s is not None:
        found = replace(found, tokens_per_s_per_gpu=_exactly(found.tokens_per_s_per_gpu))
    return found


def _result(
    perf: PerfModel,
    layout: Layout,
    load: StepLoad,
    ttft_s: NDArray[np.float64],
    tpot_s: NDArray[np.float64],
    per_gpu: float,
    max_batch: int,
    memory: dict[str, float],
    batch: int,
    basis: Basis,
) -> EstimateResult:
    times = {"ttft_s": float(ttft_s[0]), "tpot_s": float(tpot_s[0]), "tokens_per_s_per_gpu": per_gpu}
    found = intervals(perf, layout, load, **times, basis=basis)
    return EstimateResult(**found, max_batch=max_batch, memory=memory, evidence=basis.evidence, batch=batch, waiting=0)


def intervals(
    perf: PerfModel,
    layout: Layout,
    load: StepLoad,
    *,
    ttft_s: float,
    tpot_s: float,
    tokens_per_s_per_gpu: float,
    margin: float = 1.0,
    basis: Basis | None = None,
) -> dict[str, Estimate]:
    """The four predictions with the intervals that the residuals of their basis (by default the load's) give; `margin` widens
    throughput downwards."""
    evidence, backend = basis or perf.basis(layout, load)
    fit = perf.fit_for(backend)
    tpot_low, tpot_high = min(fit.tpot_p10, 1.0), max(fit.tpot_p90, 1.0)
    ttft_low, ttft_high = min(fit.ttft_p10, 1.0), max(fit.ttft_p90, 1.0)
    tpot = Estimate(value=tpot_s, low=tpot_s * tpot_low, high=tpot_s * tpot_high, evidence=evidence)
    per_gpu = tokens_per_s_per_gpu
    return {
        "ttft_s": Estimate(value=ttft_s, low=ttft_s * ttft_low, high=ttft_s * ttft_high, evidence=evidence),
        "tpot_s": tpot,
        "tokens_per_s_per_gpu": Estimate(
            value=per_gpu, low=margin * per_gpu / tpot_high, high=per_gpu / tpot_low, evidence=evidence
        ),
        "tokens_per_s_per_user": tpot.inverse(),
    }


def memory_json(perf: PerfModel, layout: Layout, use: MemoryUse, batch: float) -> dict[str, float]:
    """Bytes on the fullest GPU of an instance with `batch` requests in flight, by what they are for."""
    seqs = float(np.ceil(batch / layout.dp))
    state = float(perf.memory.sequence_bytes(layout, 0.0))
    weights, sequence, workspace = (float(np.max(x)) for x in use[:3])
    return {
        "weight_bytes": weights,
        "kv_bytes": seqs * (sequence - state),
        "state_bytes": seqs * state,
        "workspace_bytes": workspace,
        "usable_bytes": use.usable_bytes,
    }
