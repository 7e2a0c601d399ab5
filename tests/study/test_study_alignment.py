"""The study of alignment on made-up runs whose differences are known."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alignment_study_cases import BUDGETS, STAGES, edit, point, write_all, write_run
from scipy import stats

from tandem.cli import studying
from tandem.report.alignment_html import alignment_sentences, alignment_study_page, change_rows, rate_rows, run_rows
from tandem.report.study_html import figure_of
from tandem.spec.errors import SpecError
from tandem.study.alignment import study_alignment
from tandem.study.alignment_claims import at_small, more, no_less, points_at, small_budgets
from tandem.study.alignment_figures import curve
from tandem.study.alignment_runs import read_runs
from tandem.study.result import StudyResult
from tandem.study.seeds import Paired, differences


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("alignment")
    write_all(made)
    return made


@pytest.fixture(scope="module")
def study(folder: Path) -> StudyResult:
    return study_alignment(folder)


def held(result: StudyResult) -> dict[str, bool | None]:
    return {claim.id: claim.holds for claim in result.claims}


ALL = tuple(f"A{number}" for number in range(1, 14))


def test_claims_come_out_as_the_runs_were_made(study: StudyResult) -> None:
    assert held(study) == dict.fromkeys(ALL, True)
    values = {claim.id: claim.values for claim in study.claims}
    assert values["A1"]["accuracy"]["mean"] == pytest.approx(0.2)
    assert values["A2"]["accuracy"]["differences"] == pytest.approx([0.2] * 3)
    assert values["A3"]["accuracy"]["mean"] == pytest.approx(0.3)
    assert values["A4"]["curve"] == [[0, pytest.approx(0.2)], [16, pytest.approx(0.4)], [64, pytest.approx(0.7)]]
    assert values["A5"]["over"]["b"] == pytest.approx([0.998, 0.9975, 0.997])  # budgets 0 and 16, after the truncation stage
    half = stats.t.ppf(0.975, 2) * 0.0005 / math.sqrt(3)
    assert values["A5"]["over"]["half"] == pytest.approx(half, rel=1e-3)
    assert values["A7"]["answer_tokens"]["mean"] == pytest.approx(sum((6 + i / 10) / (20 + i / 10) - 1 for i in range(3)) / 3)
    assert values["A8"]["reward"]["a"][0] == pytest.approx(0.3 + 0.2 * 0.5 / 8)
    assert values["A8"]["kl"] == pytest.approx(0.075)
    assert values["A10"]["alphas"] == [0.5, 0.5, 0.5]
    assert values["A11"]["over_second"]["mean"] == pytest.approx((0.69 - 0.68 + 0.71 - 0.72 + 0.8 - 0.78) / 3)
    assert values["A12"]["accuracy"]["mean"] == pytest.approx(0.1)
    assert values["A13"]["ratio"]["a"] == [1000, 999, 998]
    assert "1.50x" in study.claims[-1].ours
    assert "0.50x" in study.claims[-1].why
    assert study.findings["missing"] == {}


@pytest.mark.parametrize(
    ("made", "refuted"),
    [
        ({"off": -0.1}, {"A1"}),
        ({"curve": (0.7, 0.4, 0.2)}, {"A4"}),
        ({"curve": (0.2, 0.8, 0.7)}, {"A4"}),  # rises from end to end and yet falls
        ({"mark": 0.95}, {"A5"}),
        ({"plain": 0.999}, {"A6"}),
        ({"tokens": 25.0}, {"A7"}),
        ({"rise": -0.1}, {"A8", "A9"}),
        ({"sweep": (0.7, 0.65, 0.61)}, {"A10"}),
        ({"sweep": (0.61, 0.65, 0.7)}, {"A10"}),
        ({"transformer": -0.02}, {"A12"}),
        ({"rates": 0.9}, {"A13"}),
    ],
)
def test_claims_can_fail(tmp_path: Path, made: dict[str, Any], refuted: set[str]) -> None:
    write_all(tmp_path, **made)
    assert held(study_alignment(tmp_path)) == {name: name not in refuted for name in ALL}


@pytest.mark.parametrize(
    ("stage", "suite", "refuted"), [("ifeval-grpo", "instructions", "A2"), ("dpo", "tools", "A3"), ("merge", "tools", "A11")]
)
def test_a_stage_that_harms_refutes_its_claim(tmp_path: Path, stage: str, suite: str, refuted: str) -> None:
    def harm(metrics: dict[str, Any]) -> None:
        for tasks in metrics["reports"][stage]["evaluation"][suite].values():
            tasks["all"]["accuracy"] = 0.1

    write_all(tmp_path)
    for seed in range(3):
        edit(tmp_path / "hybrid" / f"seed-{seed}", harm)
    assert held(study_alignment(tmp_path))[refuted] is False


def test_one_seed_decides_nothing_and_says_so(tmp_path: Path) -> None:
    write_run(tmp_path, "hybrid", 0)
    write_run(tmp_path, "transformer", 0, ask=False)
    result = study_alignment(tmp_path)
    assert set(held(result).values()) == {None}
    assert all("unknown" in claim.ours and "too few" in claim.why for claim in result.claims)
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    lines = alignment_sentences(data)
    assert any(line.startswith("A1, not decided:") for line in lines)
    assert any("no-truncation (3)" in line and "throughput (1)" in line for line in lines)


def test_variants_are_compared_after_the_last_stage_that_both_have(tmp_path: Path) -> None:
    """A Transformer without the stages after dpo is not set beside a hybrid that had them."""
    for seed in range(3):
        write_run(tmp_path, "hybrid", seed)
        write_run(tmp_path, "transformer", seed, ask=False, last="dpo")

    def better(metrics: dict[str, Any]) -> None:
        for tasks in metrics["reports"]["final"]["evaluation"]["tools"].values():
            tasks["all"]["accuracy"] = 1.0

    for seed in range(3):
        edit(tmp_path / "hybrid" / f"seed-{seed}", better)
    claim = next(claim for claim in study_alignment(tmp_path).claims if claim.id == "A12")
    assert claim.values["accuracy"]["mean"] == pytest.approx(0.0)
    assert "after dpo" in claim.why


def test_what_seeds_disagree_on_is_not_decided(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, "hybrid", seed, off=0.1 * (seed - 1) + 0.05)
        write_run(tmp_path, "transformer", seed, ask=False, lower=(-0.01, 0.15, 0.01)[seed])
    found = held(study_alignment(tmp_path))
    assert found["A1"] is None
    assert found["A12"] is None


@pytest.mark.parametrize(
    ("low", "high", "above", "par"),
    [
        (0.01, 0.03, True, True),
        (-0.03, -0.01, False, False),
        (-0.01, 0.03, None, True),
        (-0.07, 0.03, None, None),
        (0, 0, False, True),
    ],
)
def test_verdicts_follow_the_whole_interval(low: float, high: float, above: bool | None, par: bool | None) -> None:
    values = [low, high] if low == high else [(low + high) / 2 + sign * (high - low) / 2 / 12.706 for sign in (-1, 1)]
    found = Paired(seeds=(0, 1), a=(0.0, 0.0), b=tuple(values), differences=tuple(values))
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)
    assert more(found) is above
    assert no_less(found, 0.05) is par


def test_relative_differences_leave_out_seeds_without_a_share() -> None:
    found = differences({0: 0.0, 1: 2.0, 2: None}, {0: 1.0, 1: 3.0, 2: 4.0}, relative=True)
    assert found is not None
    assert (found.seeds, found.differences) == ((1,), (0.5,))
    assert differences({0: 0.0}, {0: 1.0}, relative=True) is None


def test_only_budgets_that_all_seeds_were_asked_at_are_compared(tmp_path: Path) -> None:
    write_run(tmp_path, "hybrid", 0)
    other = write_run(tmp_path, "hybrid", 1)
    edit(other, lambda metrics: metrics["reports"]["final"]["evaluation"]["budgets"].pop())
    asked = points_at(read_runs(tmp_path)["hybrid"], "final")
    assert {seed: list(points) for seed, points in asked.items()} == {0: [16, 64], 1: [16, 64]}
    assert small_budgets(asked) == [16]
    assert small_budgets({seed: {64: points[64]} for seed, points in asked.items()}) == [64]
    assert at_small(asked, [0, 16], lambda found: found.one_mark) == {0: None, 1: None}
    assert points_at(read_runs(tmp_path)["hybrid"], "sft-2") == {}


def test_budgets_without_marks_leave_the_claims_about_them_out(tmp_path: Path) -> None:
    for seed in range(2):
        place = write_run(tmp_path, "hybrid", seed)
        asked = [point(budget, 0.5, None, 6.0) for budget in BUDGETS]
        (place / "budgets.json").write_text(json.dumps({"stage": "sft-3", "budgets": asked}), encoding="utf-8")
    result = study_alignment(tmp_path)
    assert not {"A5", "A6", "A7", "A12", "A13"} & set(held(result))
    assert "marks" not in result.figures


def test_intervals_are_dashed_and_stay_within_bounds() -> None:
    mean, low, high = curve("name", "role", [(1.0, [0.9, 1.0]), (2.0, [0.5]), (3.0, [])], (0.0, 1.0))
    assert (mean.x, mean.y, mean.style) == ([1.0, 2.0], [0.95, 0.5], "line")
    assert (low.x, high.x, low.style) == ([1.0], [1.0], "dash")
    assert low.y == pytest.approx([0.95 - 12.706 * 0.05], abs=1e-6)
    assert high.y == [1.0]
    assert curve("name", "role", [(3.0, [])]) == []


def test_what_a_file_has_in_any_order_is_read_in_order(folder: Path) -> None:
    run = read_runs(folder)["hybrid"][0]
    assert [point.budget for point in run.budgets["final"]] == list(BUDGETS)
    assert [alpha for alpha, _ in run.sweeps["merge"]] == [0.0, 0.5, 1.0]


def test_changes_are_beside_what_a_stage_goes_on_from(study: StudyResult) -> None:
    rows = {(r["variant"], r["stage"], r["question"]): r for r in study.findings["changes"]}
    assert rows["hybrid", "sft-1", "reasoning, thinking on"]["mean"] == pytest.approx(0.2)
    begun = rows["hybrid", "sft-1", "tools, thinking on"]  # the base was not asked
    assert (begun["mean"], begun["b"]) == (None, pytest.approx([0.4, 0.404, 0.396]))
    assert rows["hybrid", "rlhf", "tools, thinking off"]["mean"] == pytest.approx(-0.02)
    assert rows["hybrid", "merge", "tools, thinking on"]["mean"] == pytest.approx(0.0)  # beside dpo
    assert rows["no-truncation", "final", "reasoning, thinking on"]["mean"] == pytest.approx(0.0)


def test_unfinished_runs_are_left_out_and_broken_ones_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="holds no finished run"):
        read_runs(tmp_path)
    write_run(tmp_path, "hybrid", 0)
    (write_run(tmp_path, "hybrid", 1) / "metrics.json").unlink()
    assert set(read_runs(tmp_path)["hybrid"]) == {0}
    (write_run(tmp_path, "hybrid", 2) / "budgets.json").write_text("[1, 2", encoding="utf-8")
    refused(tmp_path, "seed-2: is no finished run")


@pytest.mark.parametrize(
    "change",
    [
        lambda metrics: metrics.pop("reports"),
        lambda metrics: metrics["reports"].pop("final"),
        lambda metrics: metrics["reports"]["rlhf"]["metrics"].pop("course"),
        lambda metrics: metrics["reports"]["merge"]["metrics"].update(sweep=[{"alpha": "a\nb", "verified": 1}]),
        lambda metrics: metrics["reports"]["dpo"]["evaluation"]["tools"]["thinking on"].pop("all"),
        lambda metrics: metrics["reports"]["dpo"].update(evaluation=[1]),
        lambda metrics: metrics.update(seconds=None),
    ],
)
def test_a_malformed_run_is_one_line(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit(write_run(tmp_path, "hybrid", 0), change)
    refused(tmp_path, "seed-0")


def refused(folder: Path, about: str) -> None:
    with pytest.raises(SpecError, match=about) as error:
        study_alignment(folder)
    assert "\n" not in str(error.value)


def test_malformed_rates_are_one_line(tmp_path: Path) -> None:
    write_run(tmp_path, "hybrid", 0)
    (tmp_path / "throughput.json").write_text('{"settings": [{"batch": 1}]}', encoding="utf-8")
    refused(tmp_path, r"throughput.json: cannot be read")


def test_what_evaluation_reports_is_what_is_read(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="pip install tandem-lm[engine]")
    from tandem.evaluation.run import metrics as metrics_of
    from tandem.evaluation.score import Answered

    def answered(worth: float, i: int, mark: bool | None) -> Answered:
        return Answered(
            problem=str(i), task=("sums", "legs")[i % 2], question="", expected="", text="", worth=worth, one_mark=True,
            one_mark_unaided=mark, finished=True, forced=i == 0, thinking_tokens=3, answer_tokens=4,
        )  # fmt: skip

    evaluated = metrics_of(
        {
            ("reasoning", "thinking on"): [answered(i < 3, i, None) for i in range(4)],
            ("budgets", "8"): [answered(i < 1, i, i < 2) for i in range(4)],
        }
    )
    place = write_run(tmp_path, "hybrid", 0)
    edit(place, lambda metrics: metrics["reports"]["final"].update(evaluation=evaluated))
    run = read_runs(tmp_path)["hybrid"][0]
    assert run.right("final", ("reasoning", "thinking on")) == 0.75
    assert run.right("final", ("reasoning", "thinking on"), "legs") == 0.5
    (found,) = run.budgets["final"]
    assert (found.budget, found.accuracy, found.one_mark, found.forced) == (8, 0.25, 0.5, 0.25)
    assert (found.thinking_tokens, found.answer_tokens) == (3, 4)


def test_the_page_has_every_claim_figure_and_table(study: StudyResult) -> None:
    data = json.loads(json.dumps(study.to_json(), allow_nan=False))
    html = alignment_study_page("Alignment", "lead", data)
    assert set(data["figures"]) == {
        "stages", "thinking", "budgets", "marks", "lengths", "reward", "kl", "merge", "throughput",
    }  # fmt: skip
    assert html.count("class='chart'") == len(data["figures"])
    assert all(f"id='{claim}'" in html for claim in ALL)
    assert "http" not in html.split("plotly")[0]
    rows = {row[0]: row for row in run_rows(data)}
    assert rows["hybrid"] == ["hybrid", "3", "69.0%", "49.0%", "71.0%", "51.0%", "80.0%", "60.0%", "63.3%", "10.0"]
    assert rate_rows(data)[0][0] == "batch 32, 64 + 448 tokens"
    changed = {(variant, row[0]): row[1:] for variant, rows in change_rows(data).items() for row in rows}
    assert changed["hybrid", "dpo"][4] == "80.0 (+30.0 ± 0.0)"
    assert changed["hybrid", "sft-1"] == ["50.0 (+20.0 ± 0.0)", "30.0", "30.0", "10.0", "40.0", "20.0"]
    stages = data["figures"]["stages"]
    assert tuple(stages["x_labels"]) == STAGES
    of_plain = [s for s in stages["panels"][0]["series"] if s["role"] == "no-truncation"]
    assert of_plain[0]["x"] == [0, 1, 2, 3]


def test_names_of_others_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    bad = "<img src=x onerror=alert(1)>"
    place = write_run(tmp_path, "<b>bold", 0)
    assert place.is_dir()
    run = write_run(tmp_path, "hybrid", 0)

    def rename(metrics: dict[str, Any]) -> None:
        for report in metrics["reports"].values():
            for modes in report.get("evaluation", {}).values():
                for tasks in modes.values() if isinstance(modes, dict) else ():
                    tasks[bad] = tasks.pop("sums")
        metrics["reports"][bad] = metrics["reports"].pop("sft-2")
        metrics["reports"]["sft-3"]["after"] = bad

    edit(run, rename)
    data = json.loads(json.dumps(study_alignment(tmp_path).to_json(), allow_nan=False))
    html = alignment_study_page("<i>title", "<u>lead", data)
    assert not any(text in html for text in (bad, "<b>bold", "<i>title", "<u>lead"))
    assert "&lt;b&gt;bold" in html
    for figure in data["figures"].values():  # plotly obeys some marks of HTML in what it draws
        drawn = figure_of(figure)
        shown = [*(note.text for note in drawn.layout.annotations), *(trace.name for trace in drawn.data)]
        shown += [text for axis in drawn.select_xaxes() for text in axis.ticktext or ()]
        assert not any("<" in text for text in shown)
    assert any(bad in figure["x_labels"] for figure in data["figures"].values())


def test_the_command_prints_one_object_and_writes_the_page(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    studying.run_alignment(folder, tmp_path / "out", json_out=True)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert [claim["id"] for claim in json.loads(printed)["claims"]] == list(ALL)
    written = json.loads((tmp_path / "out" / "claims.json").read_text(encoding="utf-8"))
    assert set(written["figures"]) == set(json.loads(printed)["figures"])
    assert (tmp_path / "out" / "study-alignment.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    studying.run_alignment(folder, None, json_out=False)
    shown = capsys.readouterr().out
    assert "A13" in shown
    assert "13 of 13 claims hold, 0 undecided; 9 runs" in shown


def test_it_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tandem.study.alignment import study_alignment; "
        "study_alignment(Path(sys.argv[1])); assert not {'torch', 'transformers', 'plotly'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=60)
