"""`tandem.simulate`: a deployment under traffic, in one call."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import floor, log10
from typing import Any, get_args

from tandem.perf.backend import ServingFits
from tandem.sched.metrics import RunStats, Spread
from tandem.sched.observation import Decision, ScalingPolicy
from tandem.sim.arrivals import poisson_trace
from tandem.sim.build import config_of, perf_of
from tandem.sim.config import SimConfig
from tandem.sim.policies import PolicyName, make_policy
from tandem.sim.result import SimResult
from tandem.sim.simulate import run
from tandem.spec.design import Deployment
from tandem.spec.errors import SpecError
from tandem.spec.hardware import HardwareSpec
from tandem.spec.model import ModelSpec
from tandem.spec.units import require_int
from tandem.spec.workload import Slo, Trace, Workload

REQUESTS = 1000
"""Requests that are drawn where nobody says how many."""
POLICIES: tuple[str, ...] = get_args(PolicyName)
POINTS = 150
"""Points of a time series, about."""
POLICY_WINDOW_S = 15.0
"""A scaling policy looks this often."""


@dataclass(frozen=True, kw_only=True)
class SimRun:
    """A simulation with what it was of; `stats` by the definitions of `tandem.sched.metrics`."""

    deployment: Deployment
    trace: Trace
    policy: str
    slo: Slo | None
    stats: RunStats
    result: SimResult
    seconds: float
    """Wall-clock time of the simulation itself."""

    @property
    def ttft_s(self) -> Spread | None:
        """Times to first token of completed requests; None if none completed."""
        return self.stats.ttft_s

    @property
    def tpot_s(self) -> Spread | None:
        """Times per output token after the first; None if no answer had two tokens."""
        return self.stats.tpot_s

    @property
    def goodput(self) -> float | None:
        """Requests a second that met the objective; None without one."""
        return self.stats.goodput

    @property
    def attainment(self) -> float | None:
        """Share, from 0 to 1, of requests that met the objective; None without one."""
        return self.stats.attainment

    @property
    def gpu_hours(self) -> float:
        """GPUs times the hours that they were held."""
        return self.result.gpu_hours

    @property
    def price_usd(self) -> float:
        """What those cost at the catalogue's prices."""
        return self.result.price_usd

    @property
    def decisions(self) -> list[tuple[float, Decision]]:
        """Decisions of the policy that changed something, with their times in seconds."""
        return self.result.decisions

    def to_json(self) -> dict[str, Any]:
        """As `tandem simulate --json` prints it, in SI units, without the requests one by one."""
        return {
            **self.stats.to_json(),
            "policy": self.policy,
            "gpus": self.deployment.gpus,
            "gpu_hours": self.gpu_hours,
            "price_usd": self.price_usd,
            "preemptions": int(self.result.requests.preemptions.sum()),
            "simulated_tokens": self.result.simulated_tokens,
            "events": self.result.events,
            "seconds": self.seconds,
            "decisions": [{"at_s": at_s, "targets": dict(d.targets), "reason": d.reason} for at_s, d in self.decisions],
        }


def simulate(
    *,
    deployment: Deployment,
    workload: Workload | Trace,
    policy: PolicyName | ScalingPolicy = "static",
    slo: Slo | None = None,
    rate_rps: float | None = None,
    requests: int | None = None,
    seed: int = 0,
    max_gpus: int | None = None,
    model: ModelSpec | None = None,
    hardware: HardwareSpec | None = None,
    fits: ServingFits | None = None,
) -> SimRun:
    """Serve traffic with a deployment, request by request, and tell what clients felt and what it cost.

    A `Trace` is served as it arrived. Of a `Workload` so many `requests` (1,000) are drawn, with Poisson arrivals at `rate_rps`
    or its own rate. `policy`: `static` leaves the workers as they are; `elastic` changes roles and numbers of workers within
    `max_gpus` (default: the GPUs of the deployment); or any object with `decide(observation)`. `model` and `hardware` stand for
    the deployment's names, where those are not in the catalogue. The same arguments give the same answer.
    Raises SpecError for values that cannot be, or that would change nothing.
    """
    if not isinstance(deployment, Deployment):
        raise SpecError(f"deployment={deployment!r:.80}: must be a Deployment, such as find_plan(...).recommended")
    require_int("seed", seed, low=0, high=2**63 - 1)
    if slo is not None and not isinstance(slo, Slo):
        raise SpecError(f"slo={slo!r:.80}: must be a Slo, such as Slo(ttft_s=2, tpot_s=0.03)")
    trace = _trace(workload, rate_rps, requests, seed)
    name = policy if isinstance(policy, str) else type(policy).__name__
    if isinstance(policy, str) and policy not in POLICIES:
        raise SpecError(f"policy={policy!r}: must be {' or '.join(POLICIES)}")
    if not isinstance(policy, str) and not callable(getattr(policy, "decide", None)):
        raise SpecError(f"policy={policy!r:.80}: must be {' or '.join(POLICIES)}, or have a method decide(observation)")
    if max_gpus is not None:
        require_int("max_gpus", max_gpus, high=10**6)
        if policy != "elastic":
            raise SpecError(f"max_gpus={max_gpus}: changes nothing without policy='elastic'")
        if max_gpus < deployment.gpus:
            raise SpecError(f"max_gpus={max_gpus}: must be at least the {deployment.gpus} GPUs of the deployment")
    perf = perf_of(deployment, model=model, hardware=hardware, fits=fits)
    config = config_of(deployment, trace=trace, perf=perf, window_s=_window_s(trace, policy != "static"))
    chosen = make_policy(policy, config, slo, max_gpus or deployment.gpus) if isinstance(policy, str) else policy
    return simulate_config(config, deployment, trace, chosen, name, slo)


def simulate_config(
    config: SimConfig, deployment: Deployment, trace: Trace, policy: ScalingPolicy | None, name: str, slo: Slo | None
) -> SimRun:
    """Run a simulation that is ready to run, and sum it up."""
    began_s = time.perf_counter()
    result = run(config, trace, policy=policy, slo=slo)
    seconds = time.perf_counter() - began_s
    stats = result.stats(slo)
    return SimRun(deployment=deployment, trace=trace, policy=name, slo=slo, stats=stats, result=result, seconds=seconds)


def _trace(workload: Workload | Trace, rate_rps: float | None, requests: int | None, seed: int) -> Trace:
    if isinstance(workload, Trace):
        for field, value in (("rate_rps", rate_rps), ("requests", requests)):
            if value is not None:
                raise SpecError(f"{field}={value!r}: a trace has its own; leave it out, or give trace.workload()")
        return workload
    if not isinstance(workload, Workload):
        raise SpecError(f"workload={workload!r:.80}: must be a Workload or a Trace, such as Workload.fixed(1024, 256)")
    rate = workload.requests_per_s if rate_rps is None else rate_rps
    if rate is None:
        raise SpecError("rate_rps=None: must be given, for the workload has no rate of its own")
    return poisson_trace(workload, rate, REQUESTS if requests is None else requests, seed)


def _window_s(trace: Trace, scaling: bool) -> float:
    """Time between two points of the series: a policy's own, else 1, 2 or 5 times a power of ten, for about POINTS of them."""
    if scaling:
        return POLICY_WINDOW_S
    each = max(float(trace.arrival_s[-1] - trace.arrival_s[0]) / POINTS, 0.01)
    power = 10.0 ** floor(log10(each))
    return float(next(power * step for step in (1.0, 2.0, 5.0, 10.0) if power * step >= each * 0.999))
