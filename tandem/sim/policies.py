"""Scaling policies by name, made for a simulation's workers."""

from __future__ import annotations

from typing import Literal

from tandem.sched.observation import ScalingPolicy
from tandem.sched.scale import ScaleLimits, Scaler
from tandem.sched.scale_rates import TableRates
from tandem.sim.config import SimConfig
from tandem.spec.errors import SpecError
from tandem.spec.workload import Slo

PolicyName = Literal["static", "elastic"]


def make_policy(name: PolicyName, config: SimConfig, slo: Slo | None, max_gpus: int) -> ScalingPolicy | None:
    """None for `static`; for `elastic` the joint prefill:decode policy with the rates of the configuration's own workers,
    within `max_gpus`. SpecError where it has no objective to scale for."""
    if name == "static":
        return None
    if slo is None or (slo.ttft_s is None and slo.tpot_s is None):
        raise SpecError(f"policy={name!r}: needs an objective to scale for; give a bound of TTFT or TPOT")
    kind = config.groups[0].kind
    if any(group.kind.gpus != kind.gpus for group in config.groups):
        raise SpecError(f"policy={name!r}: needs workers of as many GPUs in every pool, so that they can change their roles")
    rates = TableRates(
        times=kind.times,
        blocks=kind.blocks,
        block_size=kind.limits.block_size,
        max_batch=max(group.kind.limits.max_batch for group in config.groups if group.role != "prefill"),
        ttft_s=slo.ttft_s,
        tpot_s=slo.tpot_s,
    )
    limits = ScaleLimits(max_gpus=max_gpus, gpus_per_worker=kind.gpus, start_up_s=kind.start_up_s, flip_s=kind.flip_s)
    return Scaler(rates, limits)
