"""Controllers that were published, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tandem.sched.batch import BatchLimits
from tandem.sched.observation import Lengths, Observation, PoolCount
from tandem.sim.config import WorkerKind
from tandem.sim.times import StepTable
from tandem.study.elastic_rules import (
    Apart,
    DynamoBoth,
    DynamoLoad,
    DynamoSla,
    RayServe,
    decode_tokens_per_s,
    forecast,
    present,
    prompt_tokens_per_s,
)

KIND = WorkerKind(
    name="by hand",
    times=StepTable(
        base_s=[0.0, *(0.010 + 0.0001 * b for b in range(1, 65))],
        per_token_s=[0.0] * 65,
        chunk_tokens=[1, 8192],
        chunk_s=[1e-4, 0.8192],  # 10,000 tokens/s
        mixed_s=[0.0, 0.8192],
    ),
    limits=BatchLimits(max_batch=64, step_tokens=8192, pass_tokens=1, block_size=16),
    blocks=6250,  # 100,000 tokens
)


def lengths(mean: float, count: int = 10) -> Lengths:
    return Lengths(count=count, mean=mean, p50=mean, p90=mean, p99=mean)


def seen(at_s: float, prefill: int = 2, decode: int = 2, *, isl: float | None = 1000.0, osl: float | None = 100.0, **more):
    extra = {name: more.pop(name) for name in ("starting", "draining", "queued_tokens") if name in more}
    pools = (
        PoolCount(role="prefill", up=prefill, queued_tokens=extra.get("queued_tokens", 0)),
        PoolCount(role="decode", up=decode, starting=extra.get("starting", 0), draining=extra.get("draining", 0)),
    )
    values = {"arrived": 0, "ttft_s": 0.1, "tpot_s": 0.011} | more
    return Observation(
        at_s=at_s,
        window_s=10.0,
        pools=pools,
        isl=None if isl is None else lengths(isl),
        osl=None if osl is None else lengths(osl),
        **values,
    )


def last(rule, windows: int = 18, begin: int = 1, **more):
    """What a rule says at the end of an interval of equal windows; nothing before."""
    said = [rule.sizes(o, present(o)) for o in (seen(10.0 * i, **more) for i in range(begin, begin + windows))]
    assert all(s is None for s in said[:-1])
    return said[-1]


class TestDynamoLoad:
    def test_takes_one_worker_of_idle_pools(self) -> None:
        assert last(DynamoLoad(KIND, 8), waiting=0, decoding=0) == {"prefill": 1, "decode": 1}

    def test_adds_where_queue_and_cache_are_full(self) -> None:
        # 190,000 of 200,000 tokens: 0.95; queue 6 and level.
        assert last(DynamoLoad(KIND, 8), waiting=6, decoding_tokens=190_000) == {"prefill": 3, "decode": 3}

    def test_a_queue_that_will_have_drained_adds_nobody(self) -> None:
        rule = DynamoLoad(KIND, 8)
        for i in range(1, 19):  # 20 down to 3: mean above 5, 3 + 3 * (3 - 20) below
            o = seen(10.0 * i, waiting=21 - i, decoding_tokens=140_000)
            said = rule.sizes(o, present(o))
        assert said == {"prefill": 2, "decode": 2}

    def test_leaves_the_budget_alone(self) -> None:
        assert last(DynamoLoad(KIND, 4), waiting=6, decoding_tokens=190_000) == {"prefill": 2, "decode": 2}

    def test_waits_when_workers_changed(self) -> None:
        rule = DynamoLoad(KIND, 8)
        o = seen(10.0, prefill=1, waiting=9)
        rule.sizes(o, present(o))
        assert last(rule, windows=17, begin=2, waiting=9) is None

    def test_new_decode_worker_stays_for_three_intervals(self) -> None:
        rule = DynamoLoad(KIND, 8)
        assert last(rule, waiting=1, decoding_tokens=190_000) == {"prefill": 2, "decode": 3}
        for begin, decode in ((19, 3), (37, 3), (55, 2)):
            said = last(rule, begin=begin, decode=3, waiting=1, decoding_tokens=0)
            assert said == {"prefill": 2, "decode": decode}

    def test_a_waiting_state_counts_for_a_fiftieth_of_a_cache(self) -> None:
        # 0.8 of the cache and 12 waiting at 2 workers: 0.8 + 0.02 * 6 = 0.92.
        assert last(DynamoLoad(KIND, 8), waiting=1, decoding_tokens=160_000, waiting_decode=12)["decode"] == 3


class TestDynamoSla:
    def test_worked_example(self) -> None:
        # 17,500 requests of 1,000/100 in 180 s: 97,222 prompt tokens/s at 10,000 a worker, so 10; 9,722 output tokens/s. Steps
        # within 11.25 ms hold 12 sequences, 13/99 of the cache's 95: 12 / 11.2 ms = 1,071 tokens/s a worker, so 10.
        assert DynamoSla(KIND, 0.01125, 100).replicas(17_500, 1000, 100, 1.2, 1.0) == {"prefill": 10, "decode": 10}

    def test_fast_prompts_lower_the_prefill_pool_and_slow_ones_never_raise_it(self) -> None:
        rule = DynamoSla(KIND, 0.01125, 100)
        assert [rule.replicas(17_500, 1000, 100, f, 1.0)["prefill"] for f in (0.5, 1.0, 7.0)] == [5, 10, 10]

    def test_slow_steps_raise_the_decode_pool(self) -> None:
        rule = DynamoSla(KIND, 0.012, 1000)
        assert rule.replicas(18_000, 1000, 100, 1.0, 1.1)["decode"] > rule.replicas(18_000, 1000, 100, 1.0, 1.0)["decode"]

    def test_budget_is_shared_by_size(self) -> None:
        assert DynamoSla(KIND, 0.01125, 12).replicas(17_500, 1000, 100, 1.0, 1.0) == {"prefill": 6, "decode": 6}

    def test_interval_of_observations(self) -> None:
        # 972 requests a window, so 17,496 an interval; ITL as expected of 10 sequences a worker: 11 ms; TTFT slower.
        said = last(DynamoSla(KIND, 0.01125, 100), arrived=972, decoding=20, ttft_s=0.5)
        assert said == {"prefill": 10, "decode": 10}

    def test_an_interval_without_traffic_changes_nothing(self) -> None:
        assert last(DynamoSla(KIND, 0.011, 100), isl=None, osl=None) is None


def test_forecast_is_the_last_value_at_first_then_an_autoregression() -> None:
    assert forecast([]) == 0.0
    assert forecast([3.0, 9.0]) == 9.0
    assert forecast([5.0] * 8) == 5.0
    # y' = 2 + 0.5 y exactly.
    y = [0.0]
    for _ in range(7):
        y.append(2.0 + 0.5 * y[-1])
    assert forecast(y) == pytest.approx(2.0 + 0.5 * y[-1])


def test_decode_rate_is_of_the_fullest_cache_within_the_bound() -> None:
    assert decode_tokens_per_s(KIND, 0.01125, 1050.0) == pytest.approx(12 / 0.0112)
    assert decode_tokens_per_s(KIND, 1.0, 1050.0) == pytest.approx(64 / 0.0164)
    assert decode_tokens_per_s(KIND, 0.001, 1050.0) == pytest.approx(1 / 0.0101)  # none is that fast


class TestDynamoBoth:
    def both(self) -> DynamoBoth:
        return DynamoBoth(KIND, 0.5, 0.011, 20)

    def test_adds_one_where_the_estimate_is_over(self) -> None:
        # 5,000 tokens wait at each of 2 workers: 0.5 s and the next prompt 0.1 s.
        o = seen(10.0, queued_tokens=10_000, decoding=30)
        assert self.both().sizes(o, present(o)) == {"prefill": 3, "decode": 3}  # 15 a worker: 11.5 ms

    def test_holds_while_a_worker_is_on_its_way(self) -> None:
        o = seen(10.0, queued_tokens=8_000, decoding=30, starting=1)
        assert self.both().sizes(o, present(o))["decode"] == 3

    def test_takes_one_only_if_the_rest_stays_under_four_fifths(self) -> None:
        # Of 2 to 1: 9,000 tokens would be 0.9 + 0.1 s of 0.5; 1,000 would be 0.2 s, under 0.4.
        for queued, prefill in ((9_000 - 3_000, 2), (1_000, 1)):
            o = seen(10.0, queued_tokens=queued, decoding=20)
            assert self.both().sizes(o, present(o))["prefill"] == prefill

    def test_stays_above_the_floor(self) -> None:
        rule = self.both()
        for i in range(1, 19):
            o = seen(10.0 * i, prefill=4, arrived=490, isl=1000.0, decode=10, decoding=20)
            said = rule.sizes(o, present(o))
        assert said == {"prefill": 5, "decode": 10}  # 49,000 prompt tokens/s at 10,000 a worker


class TestRayServe:
    def test_grows_after_the_delay_to_ongoing_over_target(self) -> None:
        rule = RayServe(8.0, 100)
        said = []
        for i in range(1, 6):
            o = seen(10.0 * i, decoding=40, waiting=8, waiting_tokens=4000)
            said.append(rule.sizes(o, present(o)))
        # 40 / 8 = 5 and 8 / 2 = 4, in the fourth window: more than three in a row.
        assert said[:3] == [{"prefill": 2, "decode": 2}] * 3
        assert said[3] == {"prefill": 4, "decode": 5}

    def test_shrinks_only_after_ten_minutes(self) -> None:
        rule = RayServe(8.0, 100)
        said = [rule.sizes(o, present(o)) for o in (seen(10.0 * i) for i in range(1, 63))]
        assert all(s == {"prefill": 2, "decode": 2} for s in said[:60])
        assert said[60] == {"prefill": 1, "decode": 1}

    def test_a_quiet_window_starts_the_delay_anew(self) -> None:
        rule = RayServe(8.0, 100)
        for i, batch in enumerate((40, 40, 0, 0, 40, 40, 40), start=1):
            o = seen(10.0 * i, decoding=batch)
            assert rule.sizes(o, present(o))["decode"] == 2, i


class TestApart:
    class Says:
        def __init__(self, *answers) -> None:
            self.answers = list(answers)

        def sizes(self, _seen, _there):
            return self.answers.pop(0)

    def test_a_removal_waits_for_a_window_so_that_nobody_flips(self) -> None:
        policy = Apart(self.Says({"prefill": 3, "decode": 1}, None, None), 10)
        first = policy.decide(seen(10.0))
        assert first.changed
        assert dict(first.targets) == {"prefill": 3}
        second = policy.decide(seen(20.0, prefill=3))
        assert second.changed
        assert dict(second.targets) == {"decode": 1}
        assert not policy.decide(seen(30.0, prefill=3, decode=1)).changed

    def test_additions_end_at_the_budget_and_nobody_is_taken_for_it(self) -> None:
        policy = Apart(self.Says({"prefill": 4, "decode": 9}), 6)
        assert dict(policy.decide(seen(10.0)).targets) == {"prefill": 4}

    def test_one_worker_of_each_stays(self) -> None:
        policy = Apart(self.Says({"prefill": 0, "decode": 0}), 6)
        assert dict(policy.decide(seen(10.0)).targets) == {"prefill": 1, "decode": 1}


def test_a_worker_of_several_groups_prefills_prompts_side_by_side() -> None:
    assert prompt_tokens_per_s(KIND, 1000.0) == pytest.approx(10_000)
    wide = replace(KIND, times=replace(KIND.times, groups=4, spread_s=1e-5))
    # 4 prompts in 0.1 s and 10 us for each of 3,000 tokens elsewhere: 0.13 s. A step of 8,192 tokens takes 2 of 4,000.
    assert prompt_tokens_per_s(wide, 1000.0) == pytest.approx(4000 / 0.13)
    assert prompt_tokens_per_s(wide, 4000.0) == pytest.approx(8000 / 0.44)
