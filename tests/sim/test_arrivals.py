from __future__ import annotations

from collections.abc import Callable
from math import exp, gamma, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.sim.arrivals import (
    ArrivalProcess,
    Bursts,
    Diurnal,
    Fixed,
    Gamma,
    Poisson,
    Weibull,
    make_trace,
    parse_arrivals,
    poisson_trace,
    renewal_times,
    weibull_shape,
)
from tandem.spec.errors import SpecError
from tandem.spec.workload import Workload

EACH: list[ArrivalProcess] = [
    Fixed(rate_rps=4.0),
    Poisson(rate_rps=4.0),
    Gamma(rate_rps=4.0, cv=0.3),
    Gamma(rate_rps=4.0, cv=4.0),
    Weibull(rate_rps=4.0, cv=0.5),
    Weibull(rate_rps=4.0, cv=3.0),
    Bursts(rate_rps=4.0, factor=8.0, on_s=3.0, off_s=12.0),
    Diurnal(rate_rps=4.0, peak=5.0, period_s=10.0),
]
each = pytest.mark.parametrize("process", EACH, ids=str)
LENGTHS = Workload.from_lengths("w", [10, 20, 30, 40], [1, 2, 3, 4])


def counts(process: ArrivalProcess, duration_s: float, runs: int) -> np.ndarray:
    return np.array([len(process.until(np.random.default_rng(seed), duration_s)) for seed in range(runs)])


@each
def test_the_mean_count_is_the_rate_times_the_time_from_any_beginning(process: ArrivalProcess) -> None:
    found = counts(process, 10.0, 4000)
    error = found.std() / sqrt(len(found))
    assert found.mean() == pytest.approx(40.0, abs=4 * error + 1e-9)
    assert error < 1.0


def test_a_renewal_process_that_began_with_a_whole_gap_would_fail_that() -> None:
    rng = np.random.default_rng(0)
    late = [np.searchsorted(np.cumsum(rng.gamma(1 / 16, 4.0, 2000)), 10.0) for _ in range(4000)]
    assert abs(np.mean(late) - 40.0) > 4 * np.std(late) / sqrt(len(late))


@each
def test_the_long_run_rate_of_the_first_arrivals(process: ArrivalProcess) -> None:
    at_s = process.first(np.random.default_rng(3), 200_000)
    assert len(at_s) == 200_000
    assert 200_000 / at_s[-1] == pytest.approx(process.rate_rps, rel=0.03)


@pytest.mark.parametrize("process", [Poisson(rate_rps=2.0), *EACH[2:6]], ids=str)
def test_gaps_have_the_coefficient_of_variation_that_was_asked_for(process: ArrivalProcess) -> None:
    gaps = np.diff(process.first(np.random.default_rng(1), 400_000))
    assert gaps.std() / gaps.mean() == pytest.approx(getattr(process, "cv", 1.0), rel=0.05)


@given(st.floats(0.02, 20.0))
def test_the_shape_of_a_weibull_gives_back_its_coefficient_of_variation(cv: float) -> None:
    shape = weibull_shape(cv)
    assert gamma(1 + 2 / shape) / gamma(1 + 1 / shape) ** 2 - 1 == pytest.approx(cv**2, rel=1e-6)


def test_a_gamma_and_a_weibull_of_cv_1_are_poisson() -> None:
    for process in (Gamma(rate_rps=3.0, cv=1.0), Weibull(rate_rps=3.0, cv=1.0)):
        found = counts(process, 5.0, 4000)
        assert found.var() == pytest.approx(15.0, rel=0.1)
        assert process.shape == pytest.approx(1.0)


def test_a_renewal_process_is_the_same_whether_found_after_a_while_or_drawn_so() -> None:
    rng = np.random.default_rng(0)
    drawn = [renewal_times(np.random.default_rng(s), "weibull", 0.6, 1.0, 3.0) for s in range(6000)]
    gaps_s = rng.weibull(0.6, (6000, 800)) / gamma(1 + 1 / 0.6)
    at_s = np.cumsum(gaps_s, axis=1) - 300.0
    later = [row[(row >= 0) & (row < 3.0)] for row in at_s]
    for quantity in (len, lambda x: x[0] if len(x) else 3.0):
        a, b = (np.array([quantity(x) for x in side], dtype=float) for side in (drawn, later))
        assert a.mean() == pytest.approx(b.mean(), abs=4 * sqrt((a.var() + b.var()) / 6000))
        assert a.std() == pytest.approx(b.std(), rel=0.1)


def test_bursts_spread_counts_as_the_theory_of_switched_poisson_processes_says() -> None:
    process, t = Bursts(rate_rps=6.0, factor=8.0, on_s=3.0, off_s=12.0), 20.0
    calm = 6.0 * 15 / (8 * 3 + 12)
    leave, enter = 1 / 3.0, 1 / 12.0
    both = leave + enter
    more = 2 * leave * enter * (7 * calm) ** 2 / (both**2 * (8 * calm * enter + calm * leave))
    dispersion = 1 + more * (1 - (1 - exp(-both * t)) / (both * t))
    found = counts(process, t, 8000)
    assert found.var() / found.mean() == pytest.approx(dispersion, rel=0.06)


def test_thinning_follows_the_curve_of_the_day() -> None:
    process = Diurnal(rate_rps=500.0, peak=4.0, period_s=100.0)
    at_s = process.until(np.random.default_rng(5), 100.0)
    found, edges = np.histogram(at_s, bins=20, range=(0, 100))
    fine = np.linspace(0, 100, 20_001)
    due = np.histogram(fine, bins=edges, weights=process.rate_at(fine))[0] * (100 / 20_001)
    assert ((found - due) ** 2 / due).sum() < 45
    rates = process.rate_at(fine)
    assert rates.max() / rates.min() == pytest.approx(4.0, rel=1e-6)
    assert rates.mean() == pytest.approx(500.0, rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(EACH), st.integers(0, 2**63 - 1), st.integers(1, 300))
def test_the_same_seed_gives_the_same_bytes_in_order_from_0(process: ArrivalProcess, seed: int, count: int) -> None:
    one, other = (make_trace(process, LENGTHS, count=count, seed=seed) for _ in range(2))
    for column in ("arrival_s", "isl", "osl"):
        assert getattr(one, column).tobytes() == getattr(other, column).tobytes()
    assert len(one) == count
    assert one.arrival_s[0] == 0.0
    assert (np.diff(one.arrival_s) >= 0).all()
    assert set(one.isl.tolist()) <= {10, 20, 30, 40}
    assert (one.isl == 10 * one.osl).all()


def test_another_seed_gives_other_arrivals() -> None:
    for process in EACH[1:]:
        one, other = (make_trace(process, (5, 5), count=20, seed=seed) for seed in (1, 2))
        assert not np.array_equal(one.arrival_s, other.arrival_s)


def test_poisson_traces_are_those_of_the_plain_recipe() -> None:
    rng = np.random.default_rng(11)
    at_s = np.cumsum(rng.exponential(1 / 3.0, 50))
    points = rng.choice(4, size=50, p=np.asarray(LENGTHS.weight))
    trace = poisson_trace(LENGTHS, 3.0, 50, 11)
    assert trace.arrival_s.tolist() == (at_s - at_s[0]).tolist()
    assert trace.isl.tolist() == [round(LENGTHS.isl[point]) for point in points]
    assert trace.note == "Poisson arrivals at 3 requests/s, seed 11"


def test_a_time_ends_before_it_is_over_and_lengths_may_be_those_of_a_trace() -> None:
    source = make_trace(Fixed(rate_rps=1.0), LENGTHS, count=100, seed=1)
    trace = make_trace(Poisson(rate_rps=50.0), source, duration_s=20.0, seed=1)
    assert 800 < len(trace) < 1200
    assert trace.arrival_s[-1] < 20.0
    pairs = set(zip(source.isl.tolist(), source.osl.tolist(), strict=True))
    assert set(zip(trace.isl.tolist(), trace.osl.tolist(), strict=True)) == pairs


@pytest.mark.parametrize(
    ("text", "process"),
    [
        ("fixed:5", Fixed(rate_rps=5.0)),
        ("poisson:0.5", Poisson(rate_rps=0.5)),
        ("gamma:5:cv=4", Gamma(rate_rps=5.0, cv=4.0)),
        ("weibull:5:cv=2", Weibull(rate_rps=5.0, cv=2.0)),
        ("bursts:5", Bursts(rate_rps=5.0)),
        ("bursts:5:off_s=60,factor=3", Bursts(rate_rps=5.0, factor=3.0, off_s=60.0)),
        ("diurnal:5:peak=3,period_s=600", Diurnal(rate_rps=5.0, peak=3.0, period_s=600.0)),
    ],
)
def test_text_names_a_process(text: str, process: ArrivalProcess) -> None:
    assert parse_arrivals(text) == process


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must be fixed, poisson, gamma"),
        ("uniform:5", "must be fixed, poisson, gamma"),
        ("poisson", "rate='': must be a number"),
        ("poisson:fast", "rate='fast': must be a number"),
        ("poisson:0", "rate_rps=0.0: must be a number above 0"),
        ("poisson:nan", "rate_rps=nan"),
        ("poisson:5:cv=2", "poisson takes nothing after its rate"),
        ("gamma:5", "needs cv, as in gamma:5:cv=4"),
        ("gamma:5:cv=x", "cv='x': must be a number"),
        ("gamma:5:cv=2,cv=3", "gamma takes each of cv once"),
        ("gamma:5:cv=100", "cv=100.0"),
        ("bursts:5:on=3", "bursts takes each of factor, on_s, off_s once"),
        ("diurnal:5:peak=0.5", "peak=0.5: must be at least 1"),
        ("diurnal:5:peak=nan", "peak=nan: must be at least 1"),
    ],
)
def test_what_is_no_process_is_one_line(text: str, says: str) -> None:
    with pytest.raises(SpecError) as refused:
        parse_arrivals(text, "--arrivals")
    assert str(refused.value).startswith(f"--arrivals={text!r}: ")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make_trace(Poisson(rate_rps=1.0), (1, 1)), "give exactly one"),
        (lambda: make_trace(Poisson(rate_rps=1.0), (1, 1), count=1, duration_s=1.0), "give exactly one"),
        (lambda: make_trace(Poisson(rate_rps=1.0), (1, 1), count=0), "count=0"),
        (lambda: make_trace(Poisson(rate_rps=1e6), (1, 1), duration_s=1e6), "at most 20,000,000"),
        (lambda: make_trace(Poisson(rate_rps=1e-6), (1, 1), duration_s=1e-3), "no request arrives"),
        (lambda: make_trace(Poisson(rate_rps=1.0), (0, 1), count=1), "isl=0"),
        (lambda: make_trace(Bursts(rate_rps=1.0, on_s=2e-3, off_s=2e-3), (1, 1), duration_s=1e6), "on_s=0.002: changes rate"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call: Callable[[], object], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        call()
