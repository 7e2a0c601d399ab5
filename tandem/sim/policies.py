"""Scaling policies by name, made for a simulation's workers."""

from __future__ import annotations

from typing import Literal

from tandem.sched.observation import ScalingPolicy
from tandem.sched.scale import ScaleLimits, Scaler
from tandem.sched.scale_rates import PoolRates, TableRates
from tandem.sim.config import SimConfig, WorkerKind
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
    kinds = {group.role: group.kind for group in config.groups}
    decode = kinds.get("decode") or kinds["colocated"]
    prefill = kinds.get("prefill", decode)
    if prefill.gpus != decode.gpus:
        raise SpecError(
            f"policy={name!r}: needs workers of as many GPUs in either pool, so that they can change their roles; "
            f"the deployment has {prefill.gpus} to prefill and {decode.gpus} to decode; "
            "plan with other GPUs or bounds until both are alike, or leave the policy static"
        )
    limits = ScaleLimits(
        max_gpus=max_gpus,
        gpus_per_worker=decode.gpus,
        ttft_s=slo.ttft_s,
        tpot_s=slo.tpot_s,
        attainment=slo.percentile / 100.0,
        start_up_s=max(kind.start_up_s for kind in kinds.values()),
    )
    return Scaler(PairRates(rates_of(prefill, slo), rates_of(decode, slo)), limits)


def rates_of(kind: WorkerKind, slo: Slo) -> TableRates:
    """What a simulated kind of worker achieves within an objective; workers have a link each."""
    times = kind.times
    return TableRates(
        times=times,
        blocks=kind.blocks,
        block_size=kind.limits.block_size,
        max_batch=kind.limits.max_batch,
        ttft_s=slo.ttft_s,
        tpot_s=slo.tpot_s,
        groups=times.groups,
        spread_s=times.spread_s,
        link_s=times.state_bytes / times.link_bytes_per_s,
        link_s_per_token=times.state_bytes_per_token / times.link_bytes_per_s,
    )


class PairRates:
    """`PoolRates` of workers whose prefill pool was planned otherwise than their decode pool."""

    def __init__(self, prefill: PoolRates, decode: PoolRates) -> None:
        self.prefill_load, self.prompt_s = prefill.prefill_load, prefill.prompt_s
        self.link_load = decode.link_load
        self.decode_batch, self.decode_rps, self.colocated_rps = decode.decode_batch, decode.decode_rps, decode.colocated_rps
