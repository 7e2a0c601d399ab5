"""The elastic study: traffic, bound, constant sizes, claims; and the whole of it on a minute of traffic."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.spec.errors import SpecError
from tandem.spec.workload import Trace
from tandem.study import elastic_cells, elastic_static
from tandem.study.elastic import run_foreseen
from tandem.study.elastic_bound import clairvoyant, prompt_seconds, spread_over
from tandem.study.elastic_cells import SERVICES, Cell, as_row, cell_names, ready, run_cell
from tandem.study.elastic_claims import better, interval, over_static
from tandem.study.elastic_ratio import ceiling_rps, ratios
from tandem.study.elastic_rules import RULES
from tandem.study.elastic_traffic import JITTER_S, TRAFFIC, denser, synthetic_day

TRAFFIC_NAME = "synthetic-day"


def small(requests: int = 300, seed: int = 1) -> Trace:
    return synthetic_day(requests / 2.0, 2.0, seed=seed)


@pytest.fixture(scope="module")
def made():
    cell = Cell(service=SERVICES["qwen3-8b"], traffic=TRAFFIC[TRAFFIC_NAME])
    return ready(cell, trace=synthetic_day(200.0, 12.0, seed=3))


class TestTraffic:
    @given(st.floats(0.2, 6.0), st.integers(0, 5))
    @settings(max_examples=30, deadline=None)
    def test_denser_keeps_where_and_how_long(self, scale: float, seed: int) -> None:
        trace = small()
        more = denser(trace, scale, seed=seed)
        assert len(more) == pytest.approx(scale * len(trace), rel=0.25)
        assert np.all(np.diff(more.arrival_s) >= 0)
        assert more.arrival_s[0] == 0
        assert set(more.isl.tolist()) <= set(trace.isl.tolist())
        assert more.arrival_s[-1] <= trace.arrival_s[-1] + 2 * JITTER_S

    def test_lengths_stay_in_pairs(self) -> None:
        trace = small()
        pairs = set(zip(trace.isl.tolist(), trace.osl.tolist(), strict=True))
        more = denser(trace, 3.5)
        assert set(zip(more.isl.tolist(), more.osl.tolist(), strict=True)) <= pairs

    def test_whole_scale_keeps_every_request(self) -> None:
        trace = small()
        more = denser(trace, 2)
        assert len(more) == 2 * len(trace)
        assert set(zip(trace.isl.tolist(), trace.osl.tolist(), strict=True)) <= set(
            zip(more.isl.tolist(), more.osl.tolist(), strict=True)
        )

    def test_same_seed_same_day(self) -> None:
        a, b, c = small(seed=4), small(seed=4), small(seed=5)
        assert np.array_equal(a.arrival_s, b.arrival_s)
        assert not np.array_equal(a.arrival_s[:50], c.arrival_s[:50])

    def test_the_day_swings(self) -> None:
        counts = np.histogram(synthetic_day(1000.0, 50.0, seed=0).arrival_s, bins=4)[0]
        assert counts[1] + counts[2] > 2 * (counts[0] + counts[3])


class TestCells:
    def test_names(self) -> None:
        assert len(cell_names()) == len(TRAFFIC) * len(SERVICES)
        with pytest.raises(SpecError, match="cell='nothing': must be one of servegen"):
            ready("nothing")
        with pytest.raises(SpecError, match="policy='none': must be elastic, peak or one of dynamo-load"):
            run_cell(Cell(service=SERVICES["qwen3-8b"], traffic=TRAFFIC[TRAFFIC_NAME]), "none")

    def test_every_policy_serves_all_and_pays(self, made) -> None:
        for policy in ("elastic", "peak", *RULES, (2, 3)):
            row = as_row(run_cell(made, policy))
            assert row["completed"] == len(made.trace), policy
            assert row["gpu_hours"] > 0, policy

    def test_the_same_twice(self, made) -> None:
        for policy in ("elastic", "dynamo-1x"):
            first, second = (as_row(run_cell(made, policy)) for _ in range(2))
            assert {**first, "seconds": 0} == {**second, "seconds": 0}

    def test_constant_sizes_pay_for_all_the_time(self, made) -> None:
        run = run_cell(made, (2, 3))
        assert run.gpu_hours == pytest.approx(5 * run.result.duration_s / 3600.0)


class TestBound:
    @given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 30), st.floats(0.1, 3)), min_size=1, max_size=12))
    def test_spread_is_the_mean_of_what_is_active(self, spans) -> None:
        begin, length, weight = (np.array(x) for x in zip(*spans, strict=True))
        found = spread_over(begin, begin + length, weight, 10.0, 9)
        for i in range(9):
            inside = np.clip(np.minimum(begin + length, 10.0 * (i + 1)) - np.maximum(begin, 10.0 * i), 0, None)
            assert found[i] == pytest.approx(float(np.sum(inside * weight)) / 10.0, abs=1e-6)

    def test_order_of_the_three(self, made) -> None:
        bound = clairvoyant(made)
        assert 0 < bound.work <= bound.whole <= bound.sized

    def test_prompts_take_no_less_than_the_bound_says(self, made) -> None:
        alone = np.array([made.kind.times.prefill_s(int(n), 0) for n in made.trace.isl])
        in_a_step = made.trace.isl <= made.kind.limits.step_tokens
        assert in_a_step.sum() > 1000
        assert np.all(prompt_seconds(made)[in_a_step] <= alone[in_a_step] + 1e-12)

    def test_no_policy_that_attains_all_takes_less_than_the_work(self, made) -> None:
        served = [run_cell(made, policy) for policy in ((1, 2), (1, 4), (2, 6), (3, 8), "elastic", "ray-serve")]
        whole = [run for run in served if run.attainment > 0.999]
        assert whole
        assert all(run.gpu_hours >= clairvoyant(made).work for run in whole)

    def test_constant_traffic_by_brute_force(self, made) -> None:
        # Equal requests at equal gaps: no constant sizes that attain all are below the whole workers of the bound.
        n = 2400
        trace = Trace(name="even", arrival_s=np.arange(n) / 20.0, isl=np.full(n, 2000, np.int64), osl=np.full(n, 200, np.int64))
        even = ready(made.cell, trace=trace)
        bound = clairvoyant(even)
        least = min(run.gpu_hours for p in (1, 2, 3) for d in (1, 2, 3, 4) if (run := run_cell(even, (p, d))).attainment == 1.0)
        assert bound.work <= least
        assert bound.whole <= least + 2 * 60.0 * 5 / 3600.0

    def test_more_room_takes_more_workers_and_the_same_work(self, made) -> None:
        tight, roomy = clairvoyant(made), clairvoyant(made, utilisation=0.5)
        assert roomy.sized > tight.sized
        assert (roomy.work, roomy.whole) == (tight.work, tight.whole)

    def test_the_clairvoyant_as_a_policy(self, made) -> None:
        run = run_foreseen(made, clairvoyant(made))
        assert run.completed == len(made.trace)


class TestStatic:
    @given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6))
    @settings(deadline=None)
    def test_finds_the_cheapest_of_separable_pools(self, need_p: int, need_d: int, p0: int, d0: int) -> None:
        # Misses fall off with either pool on its own.
        def misses(sizes):
            return (max(0.0, 0.1 * (need_p - sizes[0])), max(0.0, 0.1 * (need_d - sizes[1])))

        def run(_made, sizes):
            late, slow = misses(sizes)
            return SimpleNamespace(attainment=max(0.0, 1 - late - slow), gpu_hours=float(sum(sizes)), sizes=sizes)

        fake = SimpleNamespace(peak=(1, 1))
        original = elastic_static.late_and_slow
        elastic_static.late_and_slow = lambda r, _m: misses(r.sizes)
        try:
            found = elastic_static.search_static(fake, 0.99, start=(p0, d0), most_runs=60, run=run)
        finally:
            elastic_static.late_and_slow = original
        assert found.best is not None
        assert found.best.sizes == (need_p, need_d)
        assert found.hours_at(0.99) == need_p + need_d
        assert found.hours_at(1.1) is None

    def test_gives_up_at_its_most_runs(self) -> None:
        def run(_made, sizes):
            return SimpleNamespace(attainment=0.0, gpu_hours=float(sum(sizes)), sizes=sizes)

        original = elastic_static.late_and_slow
        elastic_static.late_and_slow = lambda _r, _m: (0.5, 0.5)
        try:
            found = elastic_static.search_static(SimpleNamespace(peak=(2, 2)), 0.95, most_runs=4, run=run)
        finally:
            elastic_static.late_and_slow = original
        assert found.best is None
        assert len(found.runs) == 4


class TestClaims:
    def test_better_is_no_worse_in_both_and_better_in_one(self) -> None:
        def row(attainment: float, hours: float):
            return {"attainment": attainment, "gpu_hours": hours}

        assert better(row(0.9, 1), row(0.9, 2))
        assert better(row(0.95, 2), row(0.9, 2))
        assert not better(row(0.9, 2), row(0.9, 2))
        assert not better(row(0.8, 1), row(0.9, 2))
        assert not better(row(0.9, 2), row(0.8, 1))

    def test_over_static_interpolates_the_frontier(self) -> None:
        tried = [{"gpu_hours": h, "attainment": a} for h, a in ((10, 0.5), (20, 0.9), (25, 0.8), (30, 1.0))]
        assert over_static({"gpu_hours": 15, "attainment": 0.7}, tried) == pytest.approx(1.0)
        assert over_static({"gpu_hours": 15, "attainment": 0.95}, tried) == pytest.approx(0.6)
        assert over_static({"gpu_hours": 15, "attainment": 0.4}, tried) is None
        assert over_static({"gpu_hours": 15, "attainment": 0.7}, []) is None

    def test_interval_of_three(self) -> None:
        mean, half = interval([1.0, 2.0, 3.0])
        assert mean == 2.0
        assert half == pytest.approx(4.303 / np.sqrt(3), rel=1e-3)
        assert interval([5.0]) == (5.0, float("inf"))


def test_no_split_serves_more_than_its_pools() -> None:
    found = ratios(workers=3, tpots_s=(0.04,), mixes=((4096, 64),), holds=0.3)
    assert [(s.prefill, s.decode) for s in found.by_tpot] == [(1, 2), (2, 1)]
    cell = Cell(service=SERVICES["deepseek-r1"], traffic=TRAFFIC[TRAFFIC_NAME])
    made = ready(
        cell, trace=elastic_cells.Trace(name="one", arrival_s=np.zeros(1), isl=np.array([16384]), osl=np.array([2048]))
    )
    for s in (*found.by_tpot, *found.by_mix):
        assert 0 <= s.rps <= ceiling_rps(made.kind, made, s.mix, s.tpot_s, (s.prefill, s.decode)) * 1.01
    best = found.best(found.by_mix, (4096, 64))
    assert found.kept(found.by_mix, (4096, 64), best.prefill) == 1.0
