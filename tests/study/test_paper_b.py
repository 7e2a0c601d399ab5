"""The study of paper B: on a reduced space its schema and laws; once, slowly, the whole of it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tandem.spec.errors import SpecError
from tandem.study.paper_b import study_paper_b
from tandem.study.paper_b_claims import FINDINGS
from tandem.study.paper_b_elastic import whole_of
from tandem.study.paper_b_measures import Measures, measure, step_parts
from tandem.study.paper_b_space import DYNAMIC, MODELS, PREFILL_HEAVY, PaperBSpace, lognormal, trace_shaped
from tandem.study.paper_b_tests import TESTS
from tandem.study.result import Claim, Series, StudyResult

IDS = [f"F{i}" for i in range(1, 13)] + [f"T{i}" for i in range(1, 10)]
DOC = Path(__file__).parents[2] / "docs" / "study-paper-b.md"


@pytest.fixture(scope="module")
def small() -> StudyResult:
    """Instances of at most 8 GPUs, kernels only."""
    return study_paper_b(engine=False, max_instance_gpus=8)


@pytest.fixture(scope="module")
def measured() -> Measures:
    return measure(PaperBSpace("tandem", max_instance_gpus=8))


def test_every_claim_is_there_once_with_its_reason(small: StudyResult) -> None:
    assert [c.id for c in small.claims] == IDS == [c.id for c in (*FINDINGS, *TESTS)]
    assert all(c.why and c.source and c.printed and c.ours for c in small.claims)
    assert all(c.holds_engine is None for c in small.claims)


def test_its_json_is_plain_and_complete(small: StudyResult) -> None:
    data = json.loads(json.dumps(small.to_json(), allow_nan=False))
    assert {"claims", "points_evaluated", "seconds", "figures", "assumptions", "errata", "backends"} <= set(data)
    for claim in data["claims"]:
        assert {"id", "printed", "ours", "holds", "why", "source", "values"} <= set(claim)
        assert isinstance(claim["holds"], bool)
    assert set(data["figures"]) >= {"1", "2", "5", "6", "7", "8", "9", "10", "11", "12", "14"}
    for figure in data["figures"].values():
        assert figure["panels"]
        assert all(panel["series"] for panel in figure["panels"])


def test_frontiers_in_figures_fall(small: StudyResult) -> None:
    for number in ("1", "2", "6", "7", "8", "11", "14"):
        for panel in small.figures[number].panels:
            for series in panel.series:
                assert list(series.x) == sorted(series.x)
                assert list(series.y) == sorted(series.y, reverse=True)


def test_points_priced_are_fewer_than_those_looked_at(small: StudyResult) -> None:
    assert 0 < small.points_evaluated < small.points_considered


def test_a_fixed_ratio_never_beats_re_matching(measured: Measures) -> None:
    for f in measured.fixed.values():
        assert max(f.area, f.relaxed, f.tight) <= 1 + 1e-9
    # The decode pool alone sets the rate at the tight end: a fixed ratio r keeps at least 1 / (1 + r) (erratum, Figure 10).
    assert all(f.tight >= 1 / (1 + f.ratio) - 1e-9 for f in measured.fixed.values())
    for i, row in enumerate(measured.elastic.kept):
        assert row[i] == pytest.approx(1.0)
        assert all(0 < share <= 1 + 1e-9 for share in row)
    assert all(0 < share <= 1 for _, share in measured.elastic.best_fixed.values())


def test_the_planner_in_a_budget_never_beats_exact_balance_and_comes_close_in_a_large_one(measured: Measures) -> None:
    shares = [w.kept for w in measured.elastic.whole]
    assert shares
    assert max(shares) <= 1 + 1e-9
    assert max(shares) > 0.9
    kept = whole_of(measured.space.get("8B", PREFILL_HEAVY))
    assert kept[-1].kept == pytest.approx(1.0, abs=0.03)


def test_a_step_is_the_sum_of_its_parts(measured: Measures) -> None:
    for model in MODELS:
        swept = measured.space.get(model, PREFILL_HEAVY)
        split = swept.split()
        for i in (0, len(split) // 2, len(split) - 1):
            assert sum(step_parts(swept, split, i)) == pytest.approx(1 / split.tokens_per_s_per_user[i], rel=1e-6)


def test_chunks_of_a_pipeline(measured: Measures) -> None:
    for points in measured.cpp.values():
        times = [p.ttft_s for p in points]
        assert times == sorted(times, reverse=True)
        # Never better than the stages: TTFT(PP) >= T / PP.
        assert all(p.ttft_s >= times[0] / p.stages * 0.999 for p in points)


def test_dynamic_traffic_has_the_stated_medians_and_a_seed() -> None:
    trace = trace_shaped(*DYNAMIC)
    assert trace.mean_isl == pytest.approx(4096 * 1154.70 / 1020, rel=1e-3)
    assert lognormal(*DYNAMIC, 0.5) == lognormal(*DYNAMIC, 0.5)
    assert lognormal(*DYNAMIC, 0.5).mean_isl == pytest.approx(4096 * 2.718281828 ** (0.5**2 / 2), rel=0.01)


def test_a_sweep_is_priced_once() -> None:
    space = PaperBSpace("tandem", max_instance_gpus=1)
    assert space.get("8B", DYNAMIC) is space.get("8B", DYNAMIC)
    assert space.points_priced <= space.points_considered


def test_a_claim_without_a_reason_and_a_ragged_curve_are_refused() -> None:
    claim = Claim(id="F1", title="t", printed="p", ours="o", holds=False, holds_engine=None, why="because", source="s")
    with pytest.raises(SpecError, match="F1: why is empty"):
        Claim(**{**asdict(claim), "why": " "})
    with pytest.raises(SpecError, match="x has 1, y 2"):
        Series(name="a", x=[1.0], y=[1.0, 2.0])


def test_t2_says_whether_more_than_the_order_is_the_printed_one(measured: Measures) -> None:
    judge = next(t for t in TESTS if t.id == "T2").judge

    def spans(sizes: dict[str, float]) -> Measures:
        return replace(measured, spans={k: s._replace(common_relaxed=sizes[k], common_tight=1.0) for k, s in found.items()})

    found = {k: s for k, s in measured.spans.items() if k in ("405B", "70B", "8B")}
    printed, ours = judge(spans({"405B": 10.4, "70B": 2.1, "8B": 0.8})), judge(spans({"405B": 239, "70B": 2.6, "8B": 1.3}))
    assert printed.holds
    assert ours.holds
    assert "order and size" in printed.text
    assert "23.1, 1.2, 1.7 times the printed: the order only" in ours.text


@pytest.mark.slow
def test_the_whole_study() -> None:
    result = study_paper_b()
    assert result.points_evaluated >= 500_000
    assert result.seconds < 120
    assert [c.id for c in result.claims] == IDS
    assert all(c.why.strip() for c in result.claims if not c.holds)
    # The page in docs/ shows these verdicts, the engine's gains, and that T2 holds by order only.
    page = DOC.read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| ([FT]\d+) \|.*\| (holds|no) \|$", page, flags=re.MULTILINE))
    assert shown == {c.id: "holds" if c.holds else "no" for c in result.claims}
    values = {c.id: c.values for c in result.claims}
    gains = [f"{values['F2']['trtllm'][model]:.2f}" for model in ("8B", "70B", "405B")]
    assert f"with the engine's host time {', '.join(gains)}." in page
    span = values["T2"]["tandem"]["common"]
    assert f"| {span['405B']:.0f}, {span['70B']:.1f}, {span['8B']:.1f} over the common range: **by order only** |" in page
