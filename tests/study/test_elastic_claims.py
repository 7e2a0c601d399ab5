"""Verdicts, figures and page of the elastic study from outcomes made by hand; and `--quick` for real."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tandem.report.elastic_html import COLUMNS, elastic_page, elastic_sentences, policies_table, policy_rows
from tandem.study.elastic import CellOutcome, assumptions
from tandem.study.elastic_claims import claims_of, over_static
from tandem.study.elastic_figures import figures_of
from tandem.study.elastic_ratio import Ratios, Served
from tandem.study.elastic_rules import RULES
from tandem.study.result import StudyResult

RULE = "dynamo-load"
MIX = (16384, 2048)


def row(policy: str, attainment: float, hours: float) -> dict:
    numbers = {"goodput": 1.0, "changes": 2, "ttft_p90_s": 0.5, "tpot_mean_s": 0.01, "completed": 10, "seconds": 0.0}
    return {"cell": "", "policy": policy, "attainment": attainment, "gpu_hours": hours, **numbers}


def outcome(cell: str, elastic: tuple[float, float], rule: tuple[float, float], seed: int = 0) -> CellOutcome:
    static = (row("1P1D", 0.5, 50.0), row("2P2D", 0.96, 90.0), row("peak", 0.99, 100.0))
    rows = (row("peak", 0.99, 100.0), row("elastic", *elastic), row(RULE, *rule), row("clairvoyant", 0.97, 55.0))
    best = row("static best 2P2D", 0.96, 90.0)
    series = {"at_h": [0.0, 1.0], "prefill": [1.0, 2.0], "decode": [2.0, 2.0]}
    return CellOutcome(
        cell=cell,
        seed=seed,
        requests=10,
        tokens=100,
        gpus_per_worker=1,
        first=(1, 1),
        peak=(2, 3),
        rows=tuple({**r, "over_static": over_static(r, static)} for r in rows),
        bound={"work": 30.0, "whole": 45.0, "sized": 60.0},
        static=static,
        static_best={**best, "over_static": over_static(best, static)},
        series={"elastic": series, "sized": series},
    )


def split(rates: dict[float, tuple[float, float, float]]) -> Ratios:
    by_tpot = tuple(
        Served(mix=MIX, tpot_s=t, prefill=p, decode=4 - p, rps=rps)
        for t, row in rates.items()
        for p, rps in enumerate(row, start=1)
    )
    by_mix = tuple(
        Served(mix=m, tpot_s=0.04, prefill=p, decode=4 - p, rps=rps)
        for m, row in ((MIX, (1.0, 2.0, 3.0)), ((2048, 2048), (8.0, 4.0, 2.0)))
        for p, rps in enumerate(row, start=1)
    )
    return Ratios(workers=4, by_tpot=by_tpot, by_mix=by_mix)


GOOD = split({0.02: (4.0, 2.0, 1.0), 0.06: (2.0, 5.0, 6.0)})
DAY, OTHER = "servegen-deepseek-r1/qwen3-8b", "azure-code-2023/qwen3-8b"


def verdicts(main: list[CellOutcome], seeds: list[CellOutcome] | None = None, ratio: Ratios = GOOD):
    return {c.id: c for c in claims_of(main, seeds or main, ratio, [RULE])}


def test_all_hold_for_a_policy_that_is_better_everywhere() -> None:
    main = [outcome(DAY, (0.99, 65.0), (0.9, 70.0)), outcome(OTHER, (0.97, 60.0), (0.97, 61.0))]
    seeds = [outcome(DAY, (0.99, h), (0.9, 70.0), seed=i) for i, h in enumerate((65.0, 65.5, 64.5))]
    found = verdicts(main, seeds)
    assert {c.id for c in found.values() if c.holds} == set(found)
    assert list(found) == ["E1", "E2", "E3", "E4", "E5", "E6", "F9", "F10", "F9b"]


@pytest.mark.parametrize(
    ("elastic", "failing"),
    [
        ((0.989, 65.0), {"E1"}),  # attains less than peak
        ((0.99, 75.0), {"E1", "E2", "E3"}),  # more than 70 % of its hours, 1.25 over the bound, more hours than the rule
        ((0.94, 65.0), {"E1", "E5"}),  # misses the objective
    ],
)
def test_fails_where_a_target_is_missed(elastic: tuple[float, float], failing: set[str]) -> None:
    seeds = [outcome(DAY, (0.99, h), (0.9, 70.0), seed=i) for i, h in enumerate((65.0, 65.5, 64.5))]
    found = verdicts([outcome(DAY, elastic, (0.9, 70.0))], seeds)
    assert {c.id for c in found.values() if not c.holds} == failing


def test_a_rule_that_is_cheaper_and_worse_is_not_comparable_and_said_so() -> None:
    claim = verdicts([outcome(DAY, (0.99, 65.0), (0.5, 30.0))])["E3"]
    assert not claim.holds
    assert "not comparable in 1 of 1 (it missed the objective that ours kept in 1)" in claim.ours


def test_equal_attainment_reads_the_frontier_between_its_points() -> None:
    claim = verdicts([outcome(DAY, (0.975, 95.0 * 0.8), (0.9, 99.0))])["E4"]
    assert claim.values["shares"][DAY] == pytest.approx(0.8)
    claim = verdicts([outcome(DAY, (0.995, 80.0), (0.9, 99.0))])["E4"]
    assert claim.values["shares"][DAY] is None
    assert not claim.holds


def test_ratio_claims_fail_for_a_service_that_one_split_suits() -> None:
    flat = split({0.02: (1.0, 2.0, 1.9), 0.06: (2.0, 4.0, 3.0)})
    found = verdicts([outcome(DAY, (0.99, 65.0), (0.9, 70.0))], ratio=flat)
    assert not found["F9"].holds
    assert not found["F10"].holds
    assert found["F10"].values["kept"] == {"0.06 at 0.02": 1.0, "0.02 at 0.06": 1.0}
    # 2048/2048 serves 2 of 8 with the split for 16k/2k, and 1 of 3 the other way.
    assert found["F9b"].values["kept"]["16384/2048"]["2048/2048"] == 0.25


def study(main: list[CellOutcome]) -> dict:
    return StudyResult(
        study="elastic",
        claims=claims_of(main, main, GOOD, [RULE]),
        figures=figures_of(main, GOOD),
        assumptions=assumptions(),
        errata=(),
        findings={"cells": {o.cell: vars(o) for o in main}},
        backends={"vllm": "simulated"},
        points_evaluated=9,
        points_considered=90,
        seconds=1.0,
    ).to_json()


def test_page_and_terminal_show_every_policy_and_claim() -> None:
    data = study([outcome(DAY, (0.99, 65.0), (0.9, 70.0)), outcome(OTHER, (0.97, 60.0), (0.97, 61.0))])
    page = elastic_page("Elastic", "lead", data)
    for text in (*(c["id"] for c in data["claims"]), DAY, OTHER, RULE, "static best 2P2D", "clairvoyant", "fixed ratio"):
        assert text in page
    assert policies_table(data).row_count == 2 * 5
    rows = policy_rows(data["findings"]["cells"][DAY])
    assert {len(r) for r in rows} == {len(COLUMNS)}
    assert rows[1][:6] == ["elastic", "99.0%", "65", "65%", "65%", "1.08"]
    assert rows[3][4] == "59%"  # 55 of 90 + (100 - 90) / 3 hours that constant sizes take for 97 %
    assert elastic_sentences(data)[-1].endswith("9 simulations of 90 requests in 1 s")


@pytest.mark.slow
def test_quick_study_runs_as_a_command(tmp_path) -> None:
    from tandem.cli.app import app

    done = CliRunner().invoke(app, ["study", "elastic", "--quick", "--json", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data == json.loads((tmp_path / "claims.json").read_text())
    assert "qwen3-8b" in (tmp_path / "study-elastic.html").read_text()
    (cell,) = data["findings"]["cells"].values()
    assert [r["policy"] for r in cell["rows"]] == ["peak", "elastic", *RULES, "clairvoyant", "clairvoyant 0.65"]
    assert len({r["completed"] for r in cell["rows"]}) == 1
    assert len(data["findings"]["seeds"]) == 3
