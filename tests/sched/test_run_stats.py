"""Measures of requests: each against its definition by hand, and laws of their summary."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.sched import metrics
from tandem.sched.metrics import CHAIN, Spread, check_causality, meets, summarise
from tandem.sched.request import Request
from tandem.spec.errors import SpecError
from tandem.spec.workload import Slo

LIFE = Request(
    id="r",
    isl=100,
    max_tokens=9,
    arrival_s=1.0,
    osl=5,
    finish_reason="stop",
    prefill_start_s=3.0,
    prefill_end_s=6.0,
    first_token_s=6.5,
    transfer_start_s=7.0,
    transfer_end_s=11.0,
    decode_start_s=12.0,
    done_s=18.5,
)
TIMES = [f"{part}_s" for part in CHAIN]


def test_each_measure_is_the_difference_that_its_name_says() -> None:
    found = {name: getattr(metrics, name)(LIFE) for name in ("ttft_s", "tpot_s", "e2e_s", "queue_s", "prefill_s", "transfer_s")}
    assert found == {"ttft_s": 5.5, "tpot_s": 3.0, "e2e_s": 17.5, "queue_s": 2.0, "prefill_s": 3.0, "transfer_s": 4.0}


@pytest.mark.parametrize("name", ["ttft_s", "tpot_s", "e2e_s", "queue_s", "prefill_s", "transfer_s"])
def test_what_has_not_happened_is_none(name: str) -> None:
    assert getattr(metrics, name)(Request(id="r", isl=1, max_tokens=1, arrival_s=0.0)) is None


def test_one_token_has_no_gap() -> None:
    assert metrics.tpot_s(replace(LIFE, osl=1)) is None


@pytest.mark.parametrize(
    ("ttft", "tpot", "met"),
    [(5.5, 3.0, True), (5.4, 3.0, False), (5.5, 2.9, False), (None, 3.0, True), (5.5, None, True), (None, None, True)],
)
def test_both_bounds_must_hold_and_may_be_reached(ttft: float | None, tpot: float | None, met: bool) -> None:
    assert meets(LIFE, Slo(ttft_s=ttft, tpot_s=tpot)) is met
    assert not meets(replace(LIFE, finish_reason="error"), Slo(ttft_s=ttft, tpot_s=tpot))
    assert not meets(replace(LIFE, finish_reason="cancelled"), Slo(ttft_s=ttft, tpot_s=tpot))
    assert not meets(replace(LIFE, finish_reason=None, done_s=None), Slo(ttft_s=ttft, tpot_s=tpot))


def test_an_answer_of_one_token_meets_any_tpot() -> None:
    assert meets(replace(LIFE, osl=1), Slo(tpot_s=1e-9))


# --- causality ---


def test_a_life_in_order_passes_with_any_optional_part_missing() -> None:
    check_causality(LIFE)
    check_causality(replace(LIFE, transfer_start_s=None, transfer_end_s=None))
    check_causality(Request(id="r", isl=1, max_tokens=1, arrival_s=5.0))
    check_causality(Request(id="r", isl=1, max_tokens=1, arrival_s=5.0, finish_reason="cancelled", done_s=5.0))


@given(a=st.sampled_from(TIMES), b=st.sampled_from(TIMES))
def test_any_two_times_exchanged_are_noticed(a: str, b: str) -> None:
    swapped = replace(LIFE, **{a: getattr(LIFE, b), b: getattr(LIFE, a)})
    if a == b:
        check_causality(swapped)
        return
    with pytest.raises(SpecError, match=r"_s=[\d.]+: must not be before \w+_s=[\d.]+ \(request 'r'\)$"):
        check_causality(swapped)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_token_s": 5.0}, r"^first_token_s=5.0: must not be before prefill_end_s=6.0"),
        ({"first_token_s": 19.0}, r"^done_s=18.5: must not be before first_token_s=19.0"),
        ({"prefill_start_s": None}, r"^prefill_end_s=6.0: needs a prefill_start_s"),
        ({"transfer_start_s": None}, r"^transfer_end_s=11.0: needs a transfer_start_s"),
        ({"finish_reason": None}, r"^done_s=18.5: must be there exactly if finish_reason=None is"),
        ({"done_s": None}, r"^done_s=None: must be there exactly if finish_reason='stop' is"),
        ({"first_token_s": None}, r"^first_token_s=None: must be there for a completed request"),
        ({"osl": 0}, r"^osl=0: must be at least 1"),
    ],
)
def test_what_cannot_be_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check_causality(replace(LIFE, **change))


# --- summaries ---

lives = st.lists(
    st.builds(
        lambda wait, osl, gap, reason: Request(
            id="x",
            isl=7,
            max_tokens=99,
            arrival_s=2.0,
            osl=osl,
            finish_reason=reason,
            first_token_s=2.0 + wait,
            done_s=None if reason is None else 2.0 + wait + gap * osl,
        ),
        st.floats(0, 10),
        st.integers(1, 20),
        st.floats(0, 1),
        st.sampled_from(["stop", "length", "cancelled", "error", None]),
    ),
    max_size=30,
)


@given(requests=lives, duration_s=st.floats(0.1, 100), slo=st.builds(Slo, ttft_s=st.floats(1, 9), tpot_s=st.floats(0.1, 1)))
def test_laws_of_a_summary(requests: list[Request], duration_s: float, slo: Slo) -> None:
    stats = summarise(requests, duration_s, slo)
    assert stats.arrived == stats.completed + stats.cancelled + stats.failed + stats.unfinished == len(requests)
    whole = [one for one in requests if one.finish_reason in ("stop", "length")]
    assert stats.completed == len(whole)
    assert stats.output_tokens == sum(one.osl for one in whole)
    assert stats.tokens_per_s * duration_s == pytest.approx(stats.output_tokens)
    assert stats.goodput is not None
    assert stats.goodput <= stats.requests_per_s
    if stats.ttft_s is not None:
        assert stats.ttft_s.p50 <= stats.ttft_s.p90 <= stats.ttft_s.p99 <= max(metrics.ttft_s(one) or 0.0 for one in whole)
    for tighter in (replace(slo, ttft_s=slo.ttft_s / 2), replace(slo, tpot_s=slo.tpot_s / 2)):
        assert (summarise(requests, duration_s, tighter).goodput or 0.0) <= stats.goodput
    json.dumps(stats.to_json(), allow_nan=False)


def test_the_json_has_the_keys_of_the_contract() -> None:
    rows = summarise([LIFE, replace(LIFE, finish_reason="error")], 10.0, Slo(ttft_s=6.0, percentile=50.0)).to_json()
    assert rows["requests"] == {"arrived": 2, "completed": 1, "cancelled": 0, "failed": 1, "unfinished": 0}
    assert rows["ttft_s"] == {"mean": 5.5, "p50": 5.5, "p90": 5.5, "p99": 5.5}
    assert rows["tpot_s"]["p99"] == 3.0
    assert (rows["goodput"], rows["requests_per_s"], rows["tokens_per_s"]) == (0.1, 0.1, 0.5)
    assert (rows["attainment"], rows["slo_met"]) == (0.5, True)


def test_an_empty_run_is_summed_up_too() -> None:
    stats = summarise([], 1.0)
    assert (stats.ttft_s, stats.goodput, stats.slo_met, stats.requests_per_s) == (None, None, None, 0.0)
    assert summarise([], 1.0, Slo(ttft_s=1.0)).goodput == 0.0
    with pytest.raises(SpecError, match=r"^duration_s=0: must be"):
        summarise([], 0)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_a_spread_does_not_depend_on_order_and_stays_in_range(values: list[float]) -> None:
    spread, turned = Spread.of(values), Spread.of([None, *reversed(values)])
    assert spread is not None
    assert turned is not None
    assert (spread.p50, spread.p90, spread.p99) == (turned.p50, turned.p90, turned.p99)
    assert math.isclose(spread.mean, turned.mean, rel_tol=1e-12)
    assert min(values) <= spread.p50 <= spread.p90 <= spread.p99 <= max(values)
