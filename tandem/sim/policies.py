"""Scaling policies by name, made for a simulation's workers."""

from __future__ import annotations

from typing import Literal

from tandem.sched.observation import ScalingPolicy
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
    raise SpecError(f"policy={name!r}: not built yet (max_gpus={max_gpus}, {len(config.groups)} groups)")
