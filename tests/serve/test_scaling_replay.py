"""One policy, two worlds: pools of emulated workers and the simulator, in hours that pass in seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from pool_cases import Log
from virtual_loop import now_s, run_virtually

from tandem.engine.types import EngineRequest, SamplingParams
from tandem.sched.metrics import ttft_s
from tandem.sched.observation import Decision, Observation, ScalingPolicy
from tandem.sched.request import Request
from tandem.sched.route import RoutingLimits
from tandem.sched.scale import ScaleLimits, Scaler
from tandem.serve.controller import Controller
from tandem.serve.emulation import Emulating
from tandem.serve.observe import of_line, to_line
from tandem.serve.options import Emulation, Scaling, ServeOptions, deployment_of
from tandem.serve.pool_limits import PoolLimits
from tandem.serve.pools import Pools
from tandem.serve.scaling import make_controller
from tandem.sim.build import config_of
from tandem.sim.policies import make_policy
from tandem.sim.simulate import run
from tandem.spec.design import Deployment
from tandem.spec.workload import Slo, Trace

SLO = Slo(ttft_s=1.0, tpot_s=0.03)
MOST = 8


def deployment(prefill: int, decode: int) -> Deployment:
    return deployment_of("qwen3-8b", "h100", prefill=prefill, decode=decode, max_batch=32)


def traffic(phases: Sequence[tuple[float, float, int, int]], seed: int = 0) -> Trace:
    """Phases of seconds, requests/s and mean lengths."""
    draw = np.random.default_rng(seed)
    at, arrivals, isl, osl = 0.0, list[float](), list[int](), list[int]()
    begin = 0.0
    for seconds, rate, prompt, answer in phases:
        begin += seconds
        while (at := at + draw.exponential(1.0 / rate)) < begin:
            arrivals.append(at)
            isl.append(int(draw.integers(prompt // 2, prompt * 3 // 2)))
            osl.append(int(draw.integers(answer // 2, answer * 3 // 2)))
        at = begin
    first = arrivals[0]
    return Trace(name="t", arrival_s=np.array(arrivals) - first, isl=np.array(isl), osl=np.array(osl))


@dataclass
class Served:
    lines: list[str] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    lives: list[Request] = field(default_factory=list)
    workers: list[int] = field(default_factory=list)
    limits: ScaleLimits | None = None


def served(trace: Trace, start: Deployment, scaling: Scaling | None, *, by_hand: float | None = None) -> Served:
    """The trace through live pools of emulated workers."""
    out = Served()
    options = ServeOptions(
        model="qwen3-8b",
        name="q",
        prefill=start.pools[0].replicas,
        decode=start.pools[1].replicas,
        scaling=scaling,
        emulation=Emulation(deployment=start, stride_s=0.2 if scaling else 0.0),
    )

    async def main() -> None:
        assert options.emulation is not None
        place = Emulating(options, options.emulation, clock=now_s)
        workers = [(place.worker("prefill"), "prefill") for _ in range(options.prefill)]
        workers += [(place.worker("decode"), "decode") for _ in range(options.decode)]
        log = Log()
        limits = PoolLimits(routing=RoutingLimits(max_local_tokens=0), held_states=64, max_waiting=100_000)
        pools = Pools(workers, times=place.times, limits=limits, clock=now_s, observer=log)  # type: ignore[arg-type]
        await pools.start()
        controller: Controller | None = None
        if scaling is not None:
            controller = make_controller(pools, place, scaling, took_s=0.0, clock=now_s, record=out.lines.append)
            out.limits = controller._policy.limits  # type: ignore[attr-defined]
            controller.run()

        async def one(number: int) -> int:
            asked = EngineRequest(
                id=f"r{number}",
                prompt_ids=tuple(range(number, number + int(trace.isl[number]))),
                sampling=SamplingParams(max_tokens=int(trace.osl[number])),
            )
            return sum([len(output.token_ids) async for output in pools.stream(asked)])

        async def hand() -> None:
            assert by_hand is not None
            await asyncio.sleep(by_hand)
            await pools.drain("decode-1", move=True)

        tasks = [] if by_hand is None else [asyncio.ensure_future(hand())]
        began_s, answers = now_s(), []
        for number, at_s in enumerate(trace.arrival_s):
            await asyncio.sleep(max(0.0, began_s + float(at_s) - now_s()))
            answers.append(asyncio.ensure_future(one(number)))
            if not out.workers or out.workers[-1] != len(pools.workers):
                out.workers.append(len(pools.workers))
        assert await asyncio.gather(*answers) == trace.osl.tolist()
        await asyncio.gather(*tasks)
        if controller is not None:
            await controller.settled()
            out.decisions = [done.decision for done in controller.history]
            out.steps = [step for done in controller.history for step in done.steps]
            await controller.close()
        if by_hand is not None:
            assert pools.workers["decode-1"].draining
        await pools.check_integrity()
        assert pools.retries == 0
        await pools.close()
        out.lives = sorted(log.lives, key=lambda life: life.arrival_s)

    run_virtually(main())
    return out


BURST = [(240.0, 3.0, 1500, 60), (240.0, 14.0, 3000, 60), (240.0, 2.0, 500, 150)]


@pytest.fixture(scope="module")
def scaled() -> Served:
    scaling = Scaling(slo=SLO, mode="elastic", max_workers=MOST)
    return served(traffic(BURST), deployment(1, 2), scaling)


def test_a_live_log_decides_the_same_again_and_in_the_simulator_s_policy(scaled: Served) -> None:
    assert sum(decision.changed for decision in scaled.decisions) >= 2
    assert len(scaled.lines) == len(scaled.decisions) > 20
    start = deployment(1, 2)
    simulated = make_policy("elastic", config_of(start), SLO, MOST)
    assert isinstance(simulated, Scaler)
    assert scaled.limits is not None
    place = Emulating(
        ServeOptions(model="qwen3-8b", name="q", prefill=1, decode=2), Emulation(deployment=start), clock=lambda: 0.0
    )
    capacity = place._build(place._kind("decode"))[1]
    again = Scaler(place.rates(SLO, capacity), scaled.limits)
    for policy in (again, simulated):
        assert [policy.decide(of_line(line)) for line in scaled.lines] == scaled.decisions
    assert again.state == simulated.state


def test_a_simulated_log_decides_the_same_as_lines() -> None:
    start, trace = deployment(1, 2), traffic(BURST)

    class Written:
        def __init__(self, policy: ScalingPolicy) -> None:
            self.policy, self.lines, self.decisions = policy, list[str](), list[Decision]()

        def decide(self, observation: Observation) -> Decision:
            self.lines.append(to_line(observation))
            self.decisions.append(self.policy.decide(observation))
            return self.decisions[-1]

    first, second = (make_policy("elastic", config_of(start), SLO, MOST) for _ in range(2))
    assert first is not None
    assert second is not None
    written = Written(first)
    run(config_of(start), trace, policy=written, slo=SLO)
    assert any(decision.changed for decision in written.decisions)
    assert [second.decide(of_line(line)) for line in written.lines] == written.decisions


def test_a_burst_brings_workers_and_nothing_is_lost(scaled: Served) -> None:
    assert any(": started as prefill" in step for step in scaled.steps), scaled.steps
    assert min(scaled.workers) < max(scaled.workers) <= MOST
    assert all(life.finish_reason == "length" for life in scaled.lives)
    names = [step.partition(":")[0] for step in scaled.steps if "started as" in step]
    assert len(set(names)) == len(names)


def test_several_workers_start_at_once_and_are_not_taken_for_a_persons() -> None:
    phases = [(120.0, 2.0, 1000, 60), (240.0, 40.0, 4000, 30), (60.0, 2.0, 500, 60)]
    found = served(traffic(phases), deployment(1, 1), Scaling(slo=SLO, mode="elastic", max_workers=16))
    assert not [decision.reason for decision in found.decisions if "by hand" in decision.reason]
    assert found.limits is not None
    begun_s = found.lives[0].arrival_s
    burst = [life for life in found.lives if 120.0 <= life.arrival_s - begun_s < 360.0]
    settled = [life for life in burst if life.arrival_s - begun_s > 120.0 + 15.0 + 2 * found.limits.start_up_s]
    assert sum((ttft_s(life) or 9.0) <= 1.0 for life in settled) > 0.9 * len(settled) > 1000
    assert max(found.workers) >= 5


def test_the_same_traffic_is_served_the_same_way_again(scaled: Served) -> None:
    again = served(traffic(BURST), deployment(1, 2), Scaling(slo=SLO, mode="elastic", max_workers=MOST))
    assert again.lines == scaled.lines
    assert again.decisions == scaled.decisions


def test_fixed_workers_only_change_roles() -> None:
    phases = [(200.0, 2.0, 300, 250), (500.0, 9.0, 4000, 40)]
    found = served(traffic(phases), deployment(1, 4), Scaling(slo=SLO, mode="fixed"))
    assert any("decode -> prefill" in step for step in found.steps), found.steps
    assert set(found.workers) == {5}


def test_what_a_person_drained_stays_drained() -> None:
    found = served(traffic(BURST), deployment(1, 2), Scaling(slo=SLO, mode="elastic", max_workers=MOST), by_hand=65.0)
    assert any("by hand" in decision.reason for decision in found.decisions)
    assert not any(step.startswith("decode-1:") for step in found.steps)


def test_live_pools_serve_as_the_simulator_says() -> None:
    start, trace = deployment(2, 2), traffic([(120.0, 12.0, 2000, 100)])
    live = served(trace, start, None)
    config = replace(config_of(start), routing=RoutingLimits(max_local_tokens=0))
    simulated = run(config, trace).requests
    first_s = np.array([ttft_s(life) or 0.0 for life in live.lives])
    own_s = simulated.ttft_s - config.groups[0].kind.times.first_token_s  # the backend's own server is not emulated
    assert np.mean(first_s) == pytest.approx(np.mean(own_s), rel=0.02)
    assert np.mean([life.done_s - life.arrival_s for life in live.lives if life.done_s]) == pytest.approx(
        np.mean(simulated.done_s - simulated.arrival_s), rel=0.02
    )
