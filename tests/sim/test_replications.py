from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tandem.sim.replicate import Interval, deal, intervals, paired, seed_of, student_t
from tandem.spec.errors import SpecError
from tandem.spec.workload import Trace


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 29, 30, 99, 999])
def test_the_quantile_is_students(freedom: int) -> None:
    assert student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-8)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_an_interval_lies_around_its_mean(values: list[float]) -> None:
    found = Interval.of(values)
    assert found.low <= found.mean <= found.high


def test_one_run_has_no_interval() -> None:
    with pytest.raises(SpecError, match="replications=1"):
        Interval.of([1.0])


def test_intervals_of_normal_draws_hold_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    found = [Interval.of(rng.normal(3.0, 2.0, 4).tolist()) for _ in range(2000)]
    assert 0.935 < float(np.mean([i.low <= 3.0 <= i.high for i in found])) < 0.965


def test_a_constant_difference_is_found_whatever_the_arrivals_do() -> None:
    rows = [{"ttft_s": {"mean": x}, "goodput": None} for x in (1.0, 5.0, 9.0)]
    others = [{"ttft_s": {"mean": x + 0.25}, "goodput": None} for x in (1.0, 5.0, 9.0)]
    assert paired(rows, others) == {"ttft_s": {"mean": {"mean": 0.25, "low": 0.25, "high": 0.25}}}
    assert intervals(rows)["ttft_s"]["mean"]["mean"] == pytest.approx(5.0)


def test_dealing_keeps_each_window_s_requests_with_their_clients_and_prefixes() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 4, 200)
    end = np.cumsum(counts)
    isl = np.arange(1, 201)
    hashes = np.repeat(isl, counts)
    trace = Trace(
        name="t", arrival_s=np.sort(rng.uniform(0, 300, 200)), isl=isl, osl=isl + 1000, client=isl.astype(np.int32),
        prefix_hash=hashes, prefix_end=end,
    )  # fmt: skip
    dealt = deal(trace, 7)
    assert dealt.prefix_end is not None
    assert dealt.prefix_hash is not None
    assert dealt.isl.tolist() != trace.isl.tolist()
    assert dealt.isl.tolist() == deal(trace, 7).isl.tolist()
    assert (dealt.osl - dealt.isl == 1000).all()
    assert (dealt.client == dealt.isl).all()
    window = np.floor((trace.arrival_s - trace.arrival_s[0]) / 60)
    for k in np.unique(window):
        assert sorted(dealt.isl[window == k]) == sorted(trace.isl[window == k])
    for row, part in enumerate(np.split(dealt.prefix_hash, dealt.prefix_end[:-1])):
        assert part.tolist() == [dealt.isl[row]] * counts[dealt.isl[row] - 1]


def test_replications_have_seeds_of_their_own() -> None:
    assert seed_of(5, 0) == 5
    assert len({seed_of(s, k) for s in range(20) for k in range(20)}) == 400
