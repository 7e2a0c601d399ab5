"""Rate matching against exhaustive search, and the direction of paper B's Figure 9."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import tandem
from tandem.plan.planner import Plan
from tandem.plan.rates import TOLERANCE, Match, fill_budget, match_rates
from tandem.spec.errors import Infeasible, SpecError

rates = st.floats(0.01, 100.0)
gpus_of_one = st.integers(1, 8)
budgets = st.integers(1, 60)
CLOSE = 1e-9
"""Comparisons closer than this to the tolerance are left to rounding."""


def off(prefill: float, decode: float) -> float:
    return max(prefill, decode) / min(prefill, decode) - 1


def all_pairs(budget: int, prefill_gpus: int, decode_gpus: int) -> list[tuple[int, int]]:
    """Every (prefill, decode) count within the budget."""
    most = range(1, budget + 1)
    return [(p, d) for p, d in itertools.product(most, most) if p * prefill_gpus + d * decode_gpus <= budget]


@settings(deadline=None, max_examples=300)
@given(rates, rates, gpus_of_one, gpus_of_one, budgets)
@example(1.0, 40.0, 1, 1, 60)
@example(40.0, 1.0, 1, 1, 60)
@example(1.0, 1000.0, 1, 1, 10)
def test_a_match_is_balanced_affordable_and_the_smallest_of_all_pairs(
    prefill_rate: float, decode_rate: float, prefill_gpus: int, decode_gpus: int, budget: int
) -> None:
    pairs = all_pairs(budget, prefill_gpus, decode_gpus)
    offs = {pair: off(pair[0] * prefill_rate, pair[1] * decode_rate) for pair in pairs}
    assume(all(abs(o - TOLERANCE) > CLOSE for o in offs.values()))
    size = {(p, d): p * prefill_gpus + d * decode_gpus for p, d in pairs}
    balanced = [pair for pair in pairs if offs[pair] <= TOLERANCE]
    found = match_rates(prefill_rate, decode_rate, prefill_gpus=prefill_gpus, decode_gpus=decode_gpus, budget=budget)
    if not balanced:
        assert isinstance(found, Infeasible)
        assert str(budget) in found.reason
        closest = f"{min(offs.values()):.1%}" if offs else f"need {prefill_gpus + decode_gpus} GPUs"
        assert closest in found.reason
        return
    assert isinstance(found, Match)
    pair = (found.num_prefill, found.num_decode)
    assert size[pair] <= budget
    assert found.imbalance == pytest.approx(offs[pair], abs=CLOSE)
    assert found.imbalance <= TOLERANCE
    assert found.requests_per_s == pytest.approx(min(pair[0] * prefill_rate, pair[1] * decode_rate))
    smallest = min(size[b] for b in balanced)
    assert size[pair] == smallest
    assert offs[pair] <= min(offs[b] for b in balanced if size[b] == smallest) + CLOSE


@settings(deadline=None)
@given(rates, rates, gpus_of_one, gpus_of_one, budgets)
def test_swapping_the_roles_swaps_the_pools(
    prefill_rate: float, decode_rate: float, prefill_gpus: int, decode_gpus: int, budget: int
) -> None:
    one = match_rates(prefill_rate, decode_rate, prefill_gpus=prefill_gpus, decode_gpus=decode_gpus, budget=budget)
    two = match_rates(decode_rate, prefill_rate, prefill_gpus=decode_gpus, decode_gpus=prefill_gpus, budget=budget)
    assert bool(one) == bool(two)
    if isinstance(one, Match) and isinstance(two, Match):
        sizes = [m[0] * a + m[1] * b for m, a, b in ((one, prefill_gpus, decode_gpus), (two, decode_gpus, prefill_gpus))]
        assert sizes[0] == sizes[1]
        assert one.imbalance == pytest.approx(two.imbalance, abs=CLOSE)


@pytest.mark.parametrize("ratio", [0.031, 0.2, np.pi / 4, 1.0, np.e, 17.3])
def test_a_large_budget_and_a_small_tolerance_approach_the_continuous_ratio(ratio: float) -> None:
    for tolerance in (0.03, 0.003, 0.0003):
        found = match_rates(1.0, ratio, budget=40_000, tolerance=tolerance)
        assert isinstance(found, Match)
        assert found.num_prefill / found.num_decode == pytest.approx(ratio, rel=tolerance * 1.001)


@settings(deadline=None)
@given(rates, st.lists(rates, min_size=2, max_size=2, unique=True))
def test_a_slower_decode_instance_never_takes_a_larger_prefill_share(prefill_rate: float, two_rates: list[float]) -> None:
    slow, fast = sorted(two_rates)
    one, two = (match_rates(prefill_rate, rate, budget=400) for rate in (slow, fast))
    assume(isinstance(one, Match) and isinstance(two, Match))
    assert isinstance(one, Match)
    assert isinstance(two, Match)
    band = (1 + TOLERANCE) ** 2
    assert one.num_prefill / one.num_decode <= two.num_prefill / two.num_decode * band


@pytest.mark.parametrize("field", ["prefill_rate", "decode_rate"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_cannot_be_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(SpecError, match=f"^{field}={value!r}: "):
        match_rates(**{"prefill_rate": 1.0, "decode_rate": 1.0, field: value}, budget=8)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["prefill_gpus", "decode_gpus", "budget"])
@pytest.mark.parametrize("value", [0, -4, 1.5, True])
def test_a_count_that_cannot_be_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(SpecError, match=f"^{field}={value!r}: "):
        match_rates(1.0, 1.0, **{"budget": 8, field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-0.01, 1.0, float("nan")])
def test_a_tolerance_that_cannot_be_is_refused(value: float) -> None:
    with pytest.raises(SpecError, match=r"^tolerance="):
        match_rates(1.0, 1.0, budget=8, tolerance=value)


@settings(deadline=None, max_examples=300)
@given(rates, rates, gpus_of_one, gpus_of_one, budgets, st.sampled_from([TOLERANCE, 0.2, None]))
@example(1.0, 40.5, 1, 1, 41, TOLERANCE)
@example(40.0, 1.0, 1, 1, 60, TOLERANCE)
def test_a_filled_budget_serves_what_the_best_of_all_pairs_serves(
    prefill_rate: float, decode_rate: float, prefill_gpus: int, decode_gpus: int, budget: int, tolerance: float | None
) -> None:
    pairs = all_pairs(budget, prefill_gpus, decode_gpus)
    offs = {pair: off(pair[0] * prefill_rate, pair[1] * decode_rate) for pair in pairs}
    limit = np.inf if tolerance is None else tolerance
    assume(all(abs(o - limit) > CLOSE for o in offs.values()))
    served = {pair: min(pair[0] * prefill_rate, pair[1] * decode_rate) for pair in pairs if offs[pair] <= limit}
    best = max(served.values(), default=0.0)
    arrays = (np.array([float(x)]) for x in (prefill_rate, decode_rate, prefill_gpus, decode_gpus))
    found = fill_budget(*arrays, budget=budget, tolerance=tolerance)
    pair = (int(found.num_prefill[0]), int(found.num_decode[0]))
    assert found.requests_per_s[0] == pytest.approx(best)
    if not served:
        assert pair == (0, 0)
        return
    size = pair[0] * prefill_gpus + pair[1] * decode_gpus
    assert size <= budget
    assert found.requests_per_s[0] == pytest.approx(served[pair])
    assert found.imbalance[0] == pytest.approx(offs[pair], abs=CLOSE)
    ties = [p * prefill_gpus + d * decode_gpus for (p, d), rate in served.items() if rate >= best * (1 - 1e-12)]
    assert size <= min(ties)


def test_a_filled_budget_finds_a_balance_wherever_match_rates_does() -> None:
    assert match_rates(100.0, 1.0, budget=200)
    found = fill_budget(*(np.array([x]) for x in (100.0, 1.0, 1.0, 1.0)), budget=200)
    assert found.requests_per_s[0] > 0


def test_a_filled_budget_broadcasts_like_one_pair_at_a_time() -> None:
    prefill, decode = np.array([0.7, 2.0, 9.0])[:, None], np.array([0.3, 1.0, 5.5, 40.0])[None, :]
    p_gpus, d_gpus = np.array([1.0, 2.0, 8.0])[:, None], np.array([1.0, 2.0, 4.0, 8.0])[None, :]
    many = fill_budget(prefill, decode, p_gpus, d_gpus, budget=48)
    for i, j in itertools.product(range(3), range(4)):
        one = fill_budget(prefill[i], decode[:, j], p_gpus[i], d_gpus[:, j], budget=48)
        assert [a[i, j] for a in many] == [a[0] for a in one]


# --- paper B, Figure 9: the prefill share of the GPUs falls as interactivity rises ---


@cache
def split_plan(model: str, hardware: str, gpus: int) -> Plan:
    return tandem.find_plan(model=model, hardware=hardware, gpus=gpus, workload=tandem.Workload.fixed(16384, 2048))


def ratios_by_rising_interactivity(plan: Plan) -> list[float]:
    """GPUs for prefill over GPUs for decode along the disaggregated frontier."""
    pools = [
        (o.tokens_per_s_per_user.value, o.deployment.prefill.gpus / o.deployment.decode.gpus)
        for o in plan.frontier
        if o.deployment.prefill is not None and o.deployment.decode is not None
    ]
    return [ratio for _, ratio in sorted(pools)]


@pytest.mark.parametrize(("hardware", "gpus"), [("h200-sxm", 64), ("gb200", 64), ("gb200", 256)])
def test_the_prefill_share_of_deepseek_r1_falls_along_the_frontier_by_ten_times_or_more(hardware: str, gpus: int) -> None:
    ratios = ratios_by_rising_interactivity(split_plan("deepseek-ai/DeepSeek-R1", hardware, gpus))
    assert len(ratios) >= 8
    # Whole instances of a 3 % balance: a step up by the tolerance is not a turn.
    assert all(later <= earlier * (1 + TOLERANCE) ** 2 for earlier, later in itertools.pairwise(ratios)), ratios
    assert ratios[0] >= 10 * ratios[-1], ratios


@pytest.mark.parametrize(
    "model", ["meta-llama/Meta-Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-70B", "meta-llama/Meta-Llama-3.1-405B"]
)
def test_the_prefill_share_falls_for_dense_models_too(model: str) -> None:
    ratios = ratios_by_rising_interactivity(split_plan(model, "gb200", 64))
    assert ratios[0] > ratios[-1]
    assert np.corrcoef(np.arange(len(ratios)), ratios)[0, 1] < -0.8
