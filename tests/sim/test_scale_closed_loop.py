"""The scaling policy against the simulator: what it says changes what it sees next."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sim_fixtures import FAR, kind, pools, shared

from tandem.sched.observation import Lengths, Observation, PoolCount
from tandem.sched.scale import ScaleLimits, Scaler
from tandem.sched.scale_kinds import Kind, pays
from tandem.sched.scale_rates import TableRates
from tandem.sim.config import Group, SimConfig, WorkerKind
from tandem.sim.policies import make_policy
from tandem.sim.result import SimResult
from tandem.sim.simulate import run
from tandem.spec.errors import SpecError
from tandem.spec.workload import Slo, Trace

WORKER = kind()
RATES = TableRates(times=WORKER.times, blocks=4000, block_size=16, max_batch=32, ttft_s=1.0, tpot_s=0.02)


def phases(*parts: tuple[float, float, int, int], seed: int = 0) -> Trace:
    """Poisson arrivals: seconds, requests/s, mean isl and mean osl of each part."""
    draw = np.random.default_rng(seed)
    at, isl, osl, begin_s = [], [], [], 0.0
    for seconds, rate, prompt, answer in parts:
        n = int(draw.poisson(seconds * rate))
        at.append(begin_s + np.sort(draw.uniform(0, seconds, n)))
        isl.append(draw.integers(prompt // 2, prompt * 3 // 2, n))
        osl.append(draw.integers(answer // 2, answer * 3 // 2, n))
        begin_s += seconds
    return Trace(name="phases", arrival_s=np.concatenate(at), isl=np.concatenate(isl), osl=np.concatenate(osl))


def scaled(trace: Trace, prefill: int, decode: int, *, gpus: int, fixed: bool = False) -> SimResult:
    limits = ScaleLimits(max_gpus=gpus, fixed=fixed, start_up_s=20.0, dwell_s=60.0)
    config = pools(prefill, decode, of=WORKER, window_s=10.0)
    return run(config, trace, policy=Scaler(RATES, limits))


def test_constant_load_brings_no_change_after_settling() -> None:
    result = scaled(phases((3600.0, 20.0, 400, 80)), 2, 2, gpus=8)
    assert not [d for at, d in result.decisions if at > 1200.0]
    assert np.nanpercentile(result.requests.ttft_s, 90) < 1.0


def test_the_queue_of_a_burst_is_drained_within_two_start_ups() -> None:
    trace = phases((600.0, 10.0, 400, 60), (60.0, 25.0, 4000, 20), (600.0, 10.0, 400, 60))
    result = scaled(trace, 1, 1, gpus=12)
    waiting, at_s = result.series["waiting"], result.series["at_s"]
    assert np.max(waiting) > 50
    # The first window that shows the burst ends 10 s into it.
    assert np.max(waiting[at_s > 610.0 + 2 * 20.0]) <= 12
    late = result.requests.arrival_s > 610.0 + 2 * 20.0
    assert np.nanpercentile(result.requests.ttft_s[late], 90) < 1.0


def test_a_mix_flip_turns_the_ratio_in_place() -> None:
    trace = phases((900.0, 10.0, 8000, 100), (900.0, 10.0, 1000, 1600))
    result = scaled(trace, 4, 4, gpus=8, fixed=True)
    at_s, prefill, decode = (result.series[name] for name in ("at_s", "prefill_workers", "decode_workers"))
    first, last = (np.searchsorted(at_s, s) for s in (800.0, 1700.0))
    assert prefill[first] >= 4
    assert decode[last] > prefill[last]
    assert decode[last] > decode[first]


def rates_of(each: WorkerKind) -> TableRates:
    limits = each.limits
    return TableRates(times=each.times, blocks=each.blocks, block_size=16, max_batch=limits.max_batch, ttft_s=1.0, tpot_s=0.02)


def test_longer_contexts_bring_workers_with_more_memory_one_after_another() -> None:
    small, large = kind("small", blocks=400), kind("large", blocks=6000, gpus=2)
    trace = phases((1500.0, 8.0, 300, 200), (3000.0, 2.0, 3000, 400), seed=1)
    limits = ScaleLimits(max_gpus=40, start_up_s=20.0, dwell_s=60.0, down_s=300.0)
    choices = [Kind(name=each.name, gpus=each.gpus, rates=rates_of(each)) for each in (small, large)]
    config = pools(2, 2, of=small, window_s=10.0, kinds=(large,))
    result = run(config, trace, policy=Scaler(choices[0].rates, limits, choices), checked=True)
    replaced = [(at_s, d) for at_s, d in result.decisions if d.kind is not None]
    assert [d.kind for _, d in replaced] == ["large"]
    at_s, decision = replaced[0]
    assert at_s > 1500.0
    assert "large instead of small" in decision.reason
    assert result.requests.completed.all()
    gpus, seen_s = result.series["gpus"], result.series["at_s"]
    alone = run(config, trace, policy=Scaler(choices[0].rates, limits), checked=True)
    assert np.mean(gpus[seen_s > 4000.0]) < 0.8 * np.mean(alone.series["gpus"][alone.series["at_s"] > 4000.0])
    serving = result.series["prefill_workers"], result.series["decode_workers"]
    rolling = (seen_s > at_s) & (seen_s < at_s + 300.0)
    assert min(np.min(count[rolling]) for count in serving) >= 1
    late = result.requests.arrival_s > at_s
    assert np.nanpercentile(result.requests.ttft_s[late], 90) < 1.0


def test_co_located_workers_follow_the_load_up_and_down() -> None:
    trace = phases((400.0, 5.0, 400, 80), (600.0, 60.0, 400, 80), (600.0, 5.0, 400, 80))
    limits = ScaleLimits(max_gpus=12, ttft_s=1.0, tpot_s=0.02, attainment=0.95, start_up_s=20.0, dwell_s=60.0)
    result = run(shared(1, of=WORKER, window_s=10.0), trace, policy=Scaler(RATES, limits), slo=Slo(ttft_s=1.0, tpot_s=0.02))
    at_s, workers = result.series["at_s"], result.series["colocated_workers"]
    busy, quiet = workers[(at_s > 500.0) & (at_s < 1000.0)], workers[at_s > 1200.0]
    assert busy.min() > quiet.max() >= 1
    assert result.requests.completed.all()
    late = result.requests.arrival_s > 450.0
    assert np.mean(result.requests.ttft_s[late] <= 1.0) > 0.95


def test_misses_keep_workers_for_longer() -> None:
    often = [(240.0, 5.0, 400, 80), (20.0, 60.0, 4000, 20)] * 6  # bursts as long as a start
    limits = ScaleLimits(max_gpus=24, ttft_s=1.0, tpot_s=0.02, start_up_s=20.0, dwell_s=60.0)
    hours, met = [], []
    for wanted in (None, 0.95):
        policy = Scaler(RATES, replace(limits, attainment=wanted))
        result = run(pools(1, 1, of=WORKER, window_s=10.0), phases(*often), policy=policy, slo=Slo(ttft_s=1.0, tpot_s=0.02))
        hours.append(result.gpu_hours)
        met.append(np.mean(result.requests.ttft_s <= 1.0))
    assert met[1] > met[0] + 0.05
    assert hours[1] > hours[0]


def test_a_burst_of_long_answers_brings_prefill_workers_while_it_queues_and_not_after() -> None:
    trace = phases((300.0, 4.0, 400, 1500), (15.0, 60.0, 4000, 1500), (600.0, 4.0, 400, 1500))
    limits = ScaleLimits(max_gpus=200, ttft_s=1.0, tpot_s=0.02, start_up_s=20.0, dwell_s=60.0)
    result = run(pools(1, 4, of=WORKER, window_s=10.0), trace, policy=Scaler(RATES, limits))
    at_s, prefill, waiting = (result.series[name] for name in ("at_s", "prefill_workers", "waiting"))
    gone_s = at_s[np.flatnonzero(waiting > 20)[-1]]
    assert prefill.max() <= prefill[at_s <= gone_s + limits.start_up_s + 10.0].max()
    assert prefill[at_s > gone_s + 300.0].max() == 1


def test_a_kind_is_changed_to_within_the_budget() -> None:
    slow, quick = replace(RATES, max_batch=2), replace(RATES, max_batch=4)
    choices = [Kind(name="a", gpus=2, rates=slow), Kind(name="b", gpus=1, rates=quick)]
    limits = ScaleLimits(max_gpus=7, start_up_s=20.0, dwell_s=20.0, warm_s=20.0)
    policy = Scaler(slow, limits, choices)
    length = Lengths(count=300, mean=100, p50=100, p90=100, p99=100)
    for window in range(40):
        there = PoolCount(role="colocated", kind="a", up=3, gpus_per_worker=2)
        seen = Observation(
            at_s=10.0 * (window + 1), window_s=10.0, pools=(there,), arrived=300, isl=length, osl=length, generated=30_000
        )
        decision = policy.decide(seen)
        if decision.kind is not None:
            break
    assert decision.kind == "b"
    assert sum(decision.targets.values()) == 7


def test_each_pools_rates_are_those_of_its_own_workers() -> None:
    slow, fast = kind("slow"), kind("fast", max_batch=8)
    config = SimConfig(
        groups=(Group(kind=slow, role="prefill", count=1), Group(kind=fast, role="decode", count=1)), routing=FAR
    )
    policy = make_policy("elastic", config, Slo(ttft_s=1.0, tpot_s=0.05), 4)
    assert isinstance(policy, Scaler)
    assert policy.perf.decode_batch(100.0) == 8
    wide = SimConfig(groups=(Group(kind=kind(gpus=2), role="prefill", count=1), config.groups[1]), routing=FAR)
    with pytest.raises(SpecError, match="2 to prefill and 1 to decode"):
        make_policy("elastic", wide, Slo(tpot_s=0.05), 4)


def test_a_replacement_must_save_more_than_its_start_up_costs() -> None:
    windows = [(8, 6), (10, 6)]
    assert pays(windows, 0, 1, margin=0.1, start_up_s=60.0, held_s=600.0)
    assert not pays(windows, 0, 1, margin=0.1, start_up_s=600.0, held_s=600.0)  # 4 GPUs for 600 s against 6 for 600 s
    assert not pays(windows, 0, 1, margin=0.5, start_up_s=60.0, held_s=600.0)
    assert not pays(windows, 1, 0, margin=0.1, start_up_s=60.0, held_s=600.0)
