from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_fixtures import table

from tandem.sched.observation import Decision, Lengths, Observation, PoolCount
from tandem.sched.scale import ScaleLimits, Scaler, ScaleState, decide
from tandem.sched.scale_rates import TableRates
from tandem.spec.errors import SpecError

RATES = TableRates(times=table(), blocks=4000, block_size=16, max_batch=32, ttft_s=1.0, tpot_s=0.02)
LIMITS = ScaleLimits(max_gpus=16)


def flat(tokens: float, count: int = 100) -> Lengths:
    return Lengths(count=count, mean=tokens, p50=tokens, p90=tokens, p99=tokens)


def seen(at_s: float, prefill: int, decode: int, rate: float = 1.0, isl: float = 400, osl: float = 80) -> Observation:
    return Observation(
        at_s=at_s,
        window_s=30.0,
        pools=(PoolCount(role="prefill", up=prefill), PoolCount(role="decode", up=decode)),
        arrived=round(30 * rate),
        isl=flat(isl) if rate else None,
        osl=flat(osl) if rate else None,
    )


def follow(scaler: Scaler, rates: Iterable[float], start: tuple[int, int] = (1, 1), **lengths: float) -> list[Decision]:
    """Observations in which all that was asked for is there at once."""
    counts, found = {"prefill": start[0], "decode": start[1]}, []
    begin_s = scaler.state.rate.at * 30.0
    for i, rate in enumerate(rates):
        decision = scaler.decide(seen(begin_s + 30.0 * (i + 1), counts["prefill"], counts["decode"], rate, **lengths))
        counts = {str(role): n for role, n in decision.targets.items()}
        found.append(decision)
    return found


def test_prefill_load_covers_the_work_and_shrinks_with_the_bound() -> None:
    loads = [replace(RATES, ttft_s=bound).prefill_load(20.0, flat(400)) for bound in (0.1, 0.3, 1.0, None)]
    assert loads == sorted(loads, reverse=True)
    assert loads[0] > loads[-1]
    assert loads[-1] == pytest.approx(20.0 * RATES.times.prefill_s(400, 0) / 0.85)


@given(st.floats(1, 5000), st.floats(0.009, 0.05))
def test_decode_batch_is_the_largest_that_keeps_the_bound(context: float, tpot_s: float) -> None:
    rates = replace(RATES, tpot_s=tpot_s)
    fits = [
        b for b in range(1, 33) if b * (context / 16 + 0.5) <= 4000 and rates.times.decode_s(b, round(b * context)) <= tpot_s
    ]
    assert rates.decode_batch(context) == max(fits, default=1)


def test_cold_start_samples_change_nothing() -> None:
    assert not any(d.changed for d in follow(Scaler(RATES, LIMITS), [50.0, 80.0]))


def test_needs_are_met_and_explained() -> None:
    found = follow(Scaler(RATES, LIMITS), [100.0] * 10)
    first = next(d for d in found if d.changed)
    assert "prefill needs" in first.reason
    assert "\n" not in first.reason
    isl = flat(400)
    assert found[-1].targets["prefill"] >= 100.0 * RATES.prompt_s(400, isl)
    assert found[-1].targets["decode"] >= ceil(100.0 / (RATES.decode_rps(440, 80) / 0.85))


@pytest.mark.parametrize("rate", [5.0, 17.0, 40.0, 90.0])
@pytest.mark.parametrize("seed", range(3))
def test_constant_load_with_noise_settles(rate: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    found = follow(Scaler(RATES, LIMITS), draw.poisson(rate * 30, 180) / 30)
    assert not any(d.changed for d in found[60:])


def test_the_floor_is_reached_when_traffic_ends() -> None:
    for least in (0, 1):
        scaler = Scaler(RATES, replace(LIMITS, min_workers=least))
        follow(scaler, [100.0] * 10)
        end = follow(scaler, [0.0] * 150, tuple(scaler.state.targets and [n for _, n in scaler.state.targets][::-1]))[-1]
        assert set(end.targets.values()) == {least}


def test_a_mix_flip_turns_the_ratio_within_a_fixed_budget() -> None:
    scaler = Scaler(RATES, replace(LIMITS, max_gpus=8, fixed=True))
    prompts = follow(scaler, [30.0] * 20, (4, 4), isl=4000, osl=40)[-1].targets
    answers = follow(scaler, [30.0] * 40, (prompts["prefill"], prompts["decode"]), isl=400, osl=600)[-1].targets
    assert sum(prompts.values()) == sum(answers.values()) == 8
    assert prompts["prefill"] > 4 > answers["prefill"]


def test_two_pools_that_want_the_same_gpus_share_by_need() -> None:
    end = follow(Scaler(RATES, replace(LIMITS, max_gpus=4)), [300.0] * 20)[-1]
    assert sum(end.targets.values()) == 4
    assert min(end.targets.values()) >= 1


def test_a_budget_of_one_holds() -> None:
    scaler = Scaler(RATES, replace(LIMITS, max_gpus=1))
    for i in range(20):
        one = replace(seen(30.0 * (i + 1), 0, 0, 100.0), pools=(PoolCount(role="colocated", up=1),))
        assert scaler.decide(one).targets == {"colocated": 1}


def test_missing_data_holds_and_says_so() -> None:
    scaler = Scaler(RATES, LIMITS)
    before = follow(scaler, [100.0] * 10)[-1].targets
    blind = replace(seen(330.0, before["prefill"], before["decode"]), arrived=None, isl=None, osl=None)
    for i in range(50):
        decision = scaler.decide(replace(blind, at_s=330.0 + 30 * i))
        assert not decision.changed
        assert decision.targets == before
        assert "not measured" in decision.reason


def test_changes_by_hand_are_respected_for_a_dwell() -> None:
    scaler = Scaler(RATES, LIMITS)
    follow(scaler, [20.0] * 10)
    at_s = 330.0
    for i in range(4):
        decision = scaler.decide(seen(at_s + 30 * i, 7, 5, 20.0))
        assert decision.targets == {"prefill": 7, "decode": 5}
        assert "by hand" in decision.reason


def test_those_that_start_or_drain_are_not_by_hand() -> None:
    scaler = Scaler(RATES, LIMITS)
    asked = follow(scaler, [100.0] * 10)[-1].targets
    on_the_way = (
        PoolCount(role="prefill", up=1, starting=asked["prefill"] - 2, draining=0),
        PoolCount(role="decode", up=asked["decode"], draining=1),
    )
    assert "by hand" not in scaler.decide(replace(seen(330.0, 0, 0, 100.0), pools=on_the_way)).reason


def test_a_queue_brings_workers_that_drain_it() -> None:
    scaler = Scaler(RATES, LIMITS)
    follow(scaler, [5.0] * 10)
    decision = scaler.decide(replace(seen(330.0, 1, 1, 5.0), waiting=3000, waiting_tokens=3000 * 400))
    rate_s = 60.0 * decision.targets["prefill"]
    assert decision.targets["prefill"] < 16
    assert rate_s > RATES.prompt_s(3000 * 400, flat(400)) * 0.95


def test_a_burst_in_a_shared_queue_is_gone_two_start_ups_after_it() -> None:
    scaler, arrived_at = Scaler(RATES, replace(LIMITS, start_up_s=60.0, max_gpus=40)), [30.0 * (i + 1) for i in range(40)]
    waits, starting, up, at_end = 0.0, [], 1, {}
    for at_s in arrived_at:
        up += sum(n for ready_s, n in starting if ready_s <= at_s)
        starting = [(ready_s, n) for ready_s, n in starting if ready_s > at_s]
        rate = 150.0 if 600 < at_s <= 660 else 10.0
        waits = max(0.0, waits + 30.0 * (rate - up / RATES.prompt_s(400, flat(400))))
        pools = (PoolCount(role="prefill", up=up, starting=sum(n for _, n in starting)), PoolCount(role="decode", up=12))
        now = replace(seen(at_s, 0, 0, rate), pools=pools, waiting=round(waits), waiting_tokens=round(waits) * 400)
        wanted = scaler.decide(now).targets["prefill"] - up - sum(n for _, n in starting)
        starting += [(at_s + 60.0, wanted)] if wanted > 0 else []
        up += min(0, wanted)
        at_end[at_s] = waits
    assert max(at_end.values()) > 1000
    assert all(n == 0 for at_s, n in at_end.items() if at_s >= 660.0 + 2 * 60.0)


def test_nothing_to_scale_is_told() -> None:
    with pytest.raises(SpecError, match="pools="):
        decide(replace(seen(30.0, 1, 1), pools=()), ScaleState(), RATES, LIMITS)


observations = st.lists(
    st.builds(
        lambda rate, isl, wait, known: replace(
            seen(0.0, 2, 2, rate, isl), waiting=wait, waiting_tokens=wait * 100, arrived=round(rate * 30) if known else None
        ),
        st.floats(0, 200),
        st.floats(1, 8000),
        st.integers(0, 1000),
        st.booleans(),
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=40)
@given(observations, st.booleans(), st.integers(4, 20))
def test_same_log_same_decisions_within_the_budget_and_pure(log: list[Observation], fixed: bool, gpus: int) -> None:
    limits = replace(LIMITS, max_gpus=gpus, fixed=fixed)
    first, second = Scaler(RATES, limits), Scaler(RATES, limits)
    counts = (2, 2)
    for i, each in enumerate(log):
        pools = (PoolCount(role="prefill", up=counts[0]), PoolCount(role="decode", up=counts[1]))
        now = replace(each, at_s=30.0 * (i + 1), pools=pools)
        state, observed = copy.deepcopy(first.state), copy.deepcopy(now)
        decision = first.decide(now)
        assert decision == second.decide(now) == decide(now, state, RATES, limits)[0]
        assert now == observed
        assert sum(decision.targets.values()) <= gpus
        assert min(decision.targets.values()) >= 1
        assert not fixed or sum(decision.targets.values()) == 4
        counts = (decision.targets["prefill"], decision.targets["decode"])
