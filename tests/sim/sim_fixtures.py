"""Small kinds of workers, traces and scripted policies for tests of the simulator."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tandem.sched.batch import BatchLimits
from tandem.sched.observation import Decision, Observation
from tandem.sched.route import Role, RoutingLimits
from tandem.sim.config import Group, SimConfig, WorkerKind
from tandem.sim.times import StepTable
from tandem.spec.workload import Trace

FAR = RoutingLimits(max_local_tokens=16)


def table(max_batch: int = 32, **changes: float) -> StepTable:
    return StepTable(
        base_s=[0.0, *(0.008 + 2e-5 * b for b in range(1, max_batch + 1))],
        per_token_s=[0.0, *[2e-8] * max_batch],
        chunk_tokens=[1, 64, 512, 4096],
        chunk_s=[0.008, 0.01, 0.02, 0.15],
        mixed_s=[0.0005, 0.002, 0.015, 0.14],
        per_pair_s=1e-9,
        state_bytes=1e6,
        state_bytes_per_token=1e5,
        link_bytes_per_s=1e10,
        first_token_s=0.003,
        last_layer=0.1,
        **changes,  # type: ignore[arg-type]
    )


def kind(
    name: str = "k", *, max_batch: int = 32, step_tokens: int = 512, blocks: int = 4000, pass_tokens: int = 1, gpus: int = 1
) -> WorkerKind:
    limits = BatchLimits(max_batch=max_batch, step_tokens=step_tokens, pass_tokens=pass_tokens, block_size=16)
    times = table(max_batch)
    return WorkerKind(
        name=name,
        times=times,
        limits=limits,
        blocks=blocks,
        gpus=gpus,
        price_per_hour_usd=2.0 * gpus,
        start_up_s=20.0,
        flip_s=1.0,
    )


def pools(prefill: int = 1, decode: int = 1, *, of: WorkerKind | None = None, **options: object) -> SimConfig:
    each = of or kind()
    groups = (Group(kind=each, role="prefill", count=prefill), Group(kind=each, role="decode", count=decode))
    return SimConfig(groups=groups, routing=FAR, **options)  # type: ignore[arg-type]


def shared(count: int = 1, *, of: WorkerKind | None = None, **options: object) -> SimConfig:
    return SimConfig(groups=(Group(kind=of or kind(), role="colocated", count=count),), **options)  # type: ignore[arg-type]


def traffic(
    requests: int, rate_rps: float, *, seed: int = 0, isl: int = 400, osl: int = 80, clients: int | None = None
) -> Trace:
    draw = np.random.default_rng(seed)
    return Trace(
        name="test",
        arrival_s=np.cumsum(draw.exponential(1.0 / rate_rps, requests)),
        isl=draw.integers(1, 2 * isl, requests),
        osl=draw.integers(1, 2 * osl, requests),
        client=None if clients is None else draw.integers(0, clients, requests).astype(np.int32),
    )


class Script:
    """Says given targets, and kinds, at given windows, and remembers what it was shown."""

    def __init__(self, *steps: tuple[float, Mapping[Role, int]], kinds: Mapping[float, str] | None = None) -> None:
        self.steps, self.kinds = list(steps), kinds or {}
        self.seen: list[Observation] = []

    def decide(self, observation: Observation) -> Decision:
        self.seen.append(observation)
        due = [step for step in self.steps if step[0] <= observation.at_s + 1e-9]
        self.steps = [step for step in self.steps if step[0] > observation.at_s + 1e-9]
        if not due:
            return Decision(targets={}, reason="as written")
        return Decision(targets=due[-1][1], reason="as written", changed=True, kind=self.kinds.get(due[-1][0]))
