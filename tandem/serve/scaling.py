"""The controller of a server: the joint policy with the rates of its own workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from tandem.sched.observation import Decision, Observation
from tandem.sched.route import Role
from tandem.sched.scale import ScaleLimits, Scaler
from tandem.serve.controller import Controller
from tandem.serve.hosts import WorkerHandle
from tandem.serve.options import Scaling
from tandem.serve.pools import Pools
from tandem.serve.workplaces import Workplace


class Proposer(Scaler):
    """Decides for a dry run, in which nothing comes of what it said before."""

    def decide(self, observation: Observation) -> Decision:
        """What it would aim at after this window."""
        decision = super().decide(observation)
        self.state = replace(self.state, targets=None)
        return decision


def make_controller(
    pools: Pools,
    place: Workplace,
    scaling: Scaling,
    *,
    took_s: float,
    clock: Callable[[], float] = time.monotonic,
    record: Callable[[str], None] = lambda line: None,
) -> Controller:
    """The joint policy over pools that are up, with the rates of their own workers; `took_s` is what their start took.

    `clock` is that of the pools; `record` gets each observation as a line, see `Controller`.
    """
    capacity = next(m.capacity for m in pools.workers.values() if m.capacity is not None)
    limits = ScaleLimits(
        max_gpus=scaling.max_workers or len(pools.workers),
        fixed=scaling.mode == "fixed",
        ttft_s=scaling.slo.ttft_s,
        tpot_s=scaling.slo.tpot_s,
        attainment=scaling.slo.percentile / 100.0,
        start_up_s=place.start_up_s(took_s),
    )

    async def start(role: Role) -> WorkerHandle:
        return place.worker(role, late=True)

    return Controller(
        pools,
        (Proposer if scaling.dry_run else Scaler)(place.rates(scaling.slo, capacity), limits),
        clock=clock,
        window_s=scaling.window_s,
        start=None if scaling.mode == "fixed" else start,
        max_workers=limits.max_gpus,
        dry_run=scaling.dry_run,
        slo=scaling.slo,
        record=record,
    )
