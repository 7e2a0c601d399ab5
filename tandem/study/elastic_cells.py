"""Who serves what in the elastic study: services, traffic, and `run_cell`, one policy on one traffic.

All policies of a cell see the same arrivals, workers and costs: workers are of one kind in both pools, so that roles can
change; the start is the size that the first five minutes need; a start takes `Service.start_up_s` whoever decides it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Any

import numpy as np

from tandem.perf.estimate import perf_model
from tandem.sched.observation import Lengths, ScalingPolicy
from tandem.sched.route import LOCAL_TOKENS, RoutingLimits
from tandem.sched.scale_rates import TableRates
from tandem.sim.build import kind_of
from tandem.sim.config import Group, SimConfig, WorkerKind
from tandem.sim.policies import make_policy, rates_of
from tandem.sim.result import SimResult
from tandem.sim.simulate import run
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.design import Parallelism, Pool, Precision
from tandem.spec.errors import SpecError
from tandem.spec.workload import Slo, Trace
from tandem.study.elastic_traffic import TRAFFIC, Traffic, traffic_trace

WINDOW_S = 300.0
"""Windows in which traffic is sized: the start by the first one, static-by-peak by the busiest ones."""
CHUNK_TOKENS = 8192
"""Token budget of a step, vLLM's default on such GPUs."""
ELASTIC_WINDOW_S = 15.0
"""The joint policy looks this often, as in `tandem.simulate`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """A model on a kind of worker with its objective. Parallelism is fixed and equal in both pools."""

    name: str
    model: str
    hardware: str
    parallelism: Parallelism
    batch: int
    """Most sequences of a worker."""
    slo: Slo
    start_up_s: float
    """Assumption, from the decision to the first request: 60 s where weights load in seconds, more for larger ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One traffic for one service."""

    service: Service
    traffic: Traffic

    @property
    def name(self) -> str:
        """As `run_cell` takes it."""
        return f"{self.traffic.name}/{self.service.name}"


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A cell with everything that policies are made from."""

    cell: Cell
    trace: Trace
    kind: WorkerKind
    rates: TableRates
    first: tuple[int, int]
    """Workers that prefill and decode at the start."""
    peak: tuple[int, int]
    """What the sizing functions give for the busiest windows."""
    context: float
    """Mean tokens of a sequence in a decode batch."""

    @property
    def slo(self) -> Slo:
        """The objective."""
        return self.cell.service.slo

    @property
    def max_workers(self) -> int:
        """Budget of every policy that changes sizes: twice static-by-peak."""
        return 2 * sum(self.peak)

    def config(self, sizes: tuple[int, int], window_s: float) -> SimConfig:
        """The simulation that begins with so many workers of each role."""
        roles = zip(("prefill", "decode"), sizes, strict=True)
        return SimConfig(
            groups=tuple(Group(kind=self.kind, role=role, count=count) for role, count in roles),  # type: ignore[arg-type]
            routing=RoutingLimits(step_tokens=self.kind.limits.step_tokens, max_local_tokens=LOCAL_TOKENS),
            window_s=window_s,
        )


@dataclass(frozen=True, kw_only=True)
class CellRun:
    """What a policy reached. `seconds` is wall-clock time."""

    cell: str
    policy: str
    attainment: float
    goodput: float
    """Requests/s within the objective."""
    gpu_hours: float
    changes: int
    ttft_p90_s: float
    tpot_mean_s: float
    completed: int
    seconds: float
    result: SimResult


SERVICES: dict[str, Service] = {
    s.name: s
    for s in (
        Service(name="nano-9b-v2", model="nemotron-nano-9b-v2", hardware="a100-80gb-sxm", parallelism=Parallelism(), batch=256,
                slo=Slo(ttft_s=4.0, tpot_s=0.03, percentile=95.0), start_up_s=60.0),
        Service(name="qwen3-8b", model="qwen3-8b", hardware="a100-80gb-sxm", parallelism=Parallelism(), batch=256,
                slo=Slo(ttft_s=4.0, tpot_s=0.03, percentile=95.0), start_up_s=60.0),
        Service(name="llama-3.1-70b", model="llama-3.1-70b", hardware="h100-sxm", parallelism=Parallelism(tp=4), batch=256,
                slo=Slo(ttft_s=4.0, tpot_s=0.03, percentile=95.0), start_up_s=120.0),
        Service(name="deepseek-r1", model="deepseek-r1", hardware="h200-sxm", parallelism=Parallelism(dp=8, ep=8), batch=1024,
                slo=Slo(ttft_s=5.0, tpot_s=0.04, percentile=95.0), start_up_s=180.0),
    )
}  # fmt: skip
"""Objectives: TTFT and TPOT that an idle worker meets for the longest prompts of the traffic with room to spare."""


def cells() -> dict[str, Cell]:
    """Every traffic for every service, by name."""
    made = (Cell(service=s, traffic=t) for t in TRAFFIC.values() for s in SERVICES.values())
    return {cell.name: cell for cell in made}


def cell_names() -> tuple[str, ...]:
    """Names that `run_cell` takes."""
    return tuple(cells())


def ready(cell: Cell | str, *, seed: int = 0, trace: Trace | None = None) -> Ready:
    """Tabulate the workers of a cell and size its pools. `trace` stands for the cell's own traffic.

    Raises SpecError for a name that is no cell's, naming those that are.
    """
    if isinstance(cell, str):
        known = cells()
        if cell not in known:
            raise SpecError(f"cell={cell!r}: must be one of {', '.join(known)}")
        cell = known[cell]
    if trace is None:
        trace = traffic_trace(cell.traffic, cell.service.name, seed=seed)
    service = cell.service
    spec, gpu = load_spec(service.model), load_hardware(service.hardware)
    perf = perf_model(spec, gpu, Precision.parse(None, native=spec.native_precision), "vllm", None)
    pool = Pool(parallelism=service.parallelism, batch=service.batch, chunk_tokens=CHUNK_TOKENS)
    context = trace.workload().decode_context
    kind = kind_of(perf, pool, name=service.name, context=context, start_up_s=service.start_up_s)
    rates = rates_of(kind, service.slo)
    needs = window_needs(trace, rates, WINDOW_S)
    peak = tuple(max(1, ceil(max(n[i] for n in needs))) for i in range(2))
    first = tuple(max(1, ceil(n)) for n in needs[0])
    return Ready(
        cell=cell, trace=trace, kind=kind, rates=rates, first=(first[0], first[1]), peak=(peak[0], peak[1]), context=context
    )


def window_needs(trace: Trace, rates: TableRates, window_s: float) -> list[tuple[float, float]]:
    """Workers, not rounded, that prefill and decode what arrives in each window, by the sizing functions of the policy."""
    edges = np.arange(int(trace.arrival_s[-1] // window_s) + 2) * window_s
    at = np.searchsorted(trace.arrival_s, edges)
    needs = []
    for begin, end in pairwise(at.tolist()):
        isl = Lengths.of(trace.isl[begin:end].tolist())
        if isl is None:
            needs.append((0.0, 0.0))
            continue
        rate, osl = (end - begin) / window_s, trace.osl[begin:end].astype(np.float64)
        # Of those that decode at a time, long answers are as many more as they take longer.
        context = float(np.sum(osl * (trace.isl[begin:end] + osl / 2.0)) / np.sum(osl))
        decode = max(rate / rates.decode_rps(context, float(np.mean(osl))), rates.link_load(rate, isl))
        needs.append((rates.prefill_load(rate, isl), decode))
    return needs


def ours(made: Ready) -> ScalingPolicy:
    """The joint policy as `tandem simulate --policy elastic` makes it."""
    config = made.config(made.first, ELASTIC_WINDOW_S)
    policy = make_policy("elastic", config, made.slo, made.max_workers * made.kind.gpus)
    assert policy is not None
    return policy


Make = Callable[[Ready], ScalingPolicy | None]


def run_policy(made: Ready, name: str, policy: ScalingPolicy | None, sizes: tuple[int, int], window_s: float) -> CellRun:
    """Serve the cell's traffic from these sizes on."""
    began_s = time.perf_counter()
    result = run(made.config(sizes, window_s), made.trace, policy=policy, slo=made.slo)
    seconds = time.perf_counter() - began_s
    stats = result.stats(made.slo)
    nan = float("nan")
    return CellRun(
        cell=made.cell.name,
        policy=name,
        attainment=stats.attainment or 0.0,
        goodput=stats.goodput or 0.0,
        gpu_hours=result.gpu_hours,
        changes=len(result.decisions),
        ttft_p90_s=stats.ttft_s.p90 if stats.ttft_s else nan,
        tpot_mean_s=stats.tpot_s.mean if stats.tpot_s else nan,
        completed=stats.completed,
        seconds=seconds,
        result=result,
    )


def run_cell(cell: Cell | str | Ready, policy: str | tuple[int, int] = "elastic", *, seed: int = 0) -> CellRun:
    """One policy on one cell: `elastic`, `peak`, a name of `tandem.study.elastic_rules.RULES`, or constant sizes (P, D)."""
    from tandem.study.elastic_rules import RULES

    made = cell if isinstance(cell, Ready) else ready(cell, seed=seed)
    if isinstance(policy, tuple):
        return run_policy(made, f"{policy[0]}P{policy[1]}D", None, policy, WINDOW_S)
    if policy == "peak":
        return run_policy(made, "peak", None, made.peak, WINDOW_S)
    if policy == "elastic":
        return run_policy(made, policy, ours(made), made.first, ELASTIC_WINDOW_S)
    if policy not in RULES:
        raise SpecError(f"policy={policy!r}: must be elastic, peak or one of {', '.join(RULES)}")
    rule = RULES[policy]
    return run_policy(made, policy, rule.make(made), made.first, rule.window_s)


def as_row(done: CellRun) -> dict[str, Any]:
    """Its numbers, for tables and JSON."""
    names = ("cell", "policy", "attainment", "goodput", "gpu_hours", "changes", "ttft_p90_s", "tpot_mean_s", "completed")
    return {name: getattr(done, name) for name in names} | {"seconds": done.seconds}
