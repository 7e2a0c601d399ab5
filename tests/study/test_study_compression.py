"""The study of compression on made-up runs whose differences are known."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem.cli import studying
from tandem.report.compression_study_html import compression_rows, compression_study_page, pair_rows
from tandem.spec.errors import SpecError
from tandem.study.compression import study_compression
from tandem.study.compression_claims import both, less, within
from tandem.study.compression_figures import path_of
from tandem.study.compression_runs import read_runs
from tandem.study.result import StudyResult
from tandem.study.seeds import Paired

ALL = tuple(f"C{number}" for number in range(1, 9))
KL = {
    "whole": 0.10, "pruned": 0.12, "scratch": 0.80, "cross-entropy": 0.30, "group-blind": 0.15, "depth-only": 0.20,
    "width-only": 0.13,
}  # fmt: skip
CUT_KL = {"scratch": 5.0, "group-blind": 1.5, "depth-only": 0.9, "width-only": 1.1}
"""Right after the cut; 1.0 of others."""
JITTER = (0.0, 0.004, -0.004)
"""What a seed adds to every loss and share."""
QUESTIONS = (("reasoning", "thinking on"), ("tools", "thinking off"))


def evaluation(share: float) -> dict[str, Any]:
    return {
        suite: {mode: {task: {"accuracy": share} for task in ("all", "sums")}} for suite, mode in QUESTIONS
    }  # fmt: skip


def write_run(
    folder: Path, variant: str, seed: int, *, kl: float | None = None, nll: float | None = None, cut_kl: float | None = None,
    held: int = 690, tokens: int = 4000, right: float = 0.59, ask: bool = True,
    course: tuple[float, ...] = (1.0, 0.5, 0.3, 0.2, 0.12),
) -> Path:  # fmt: skip
    """A finished run from a teacher of 1,000 bytes that is right in 60 %; `course` is that of the last distillation."""
    place = folder / variant / f"seed-{seed}"
    place.mkdir(parents=True)
    add = JITTER[seed % 3]
    end = (KL[variant] if kl is None else kl) + (1 + KL[variant]) * add
    loss = (1.5 + KL[variant] if nll is None else nll) + add
    begun = (CUT_KL.get(variant, 1.0) if cut_kl is None else cut_kl) + add

    def cut(what: str) -> dict[str, Any]:
        metrics = {"search": {}, "kl": begun, "nll": begun + 1.5}
        return {"what": f"cut in {what}", "held": {"total_bytes": held, "parameters": held}, "metrics": metrics}

    def distil(amount: int, losses: tuple[float, ...]) -> dict[str, Any]:
        points = [{"tokens": amount * i // (len(losses) - 1), "loss": one + add * (1 + i)} for i, one in enumerate(losses)]
        metrics = {"tokens": amount, "course": list(reversed(points)), "kl": end, "nll": loss}
        return {"what": "distillation", "held": {"total_bytes": held, "parameters": held}, "metrics": metrics}

    reports: dict[str, Any] = {"teacher": {"stage": "teacher", "held": {"total_bytes": 1000, "parameters": 900}}}
    if variant == "whole":
        reports |= {"depth": cut("depth"), "distil-1": distil(tokens // 2, (2.0, 0.4)), "width": cut("width")}
        reports["distil-2"] = distil(tokens, course)
    else:
        reports |= {"cut": cut("depth" if variant == "depth-only" else "width"), "distil": distil(tokens, course)}
    for stage, report in reports.items():
        report["seconds"] = 60.0
        if ask:
            report["evaluation"] = evaluation(0.6 if stage == "teacher" else right + add)
    metrics = {"seconds": 300.0, "reports": reports}
    (place / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return place


def write_all(folder: Path, *, rates: float = 1.3, **changed: dict[str, Any]) -> None:
    """Three seeds of every variant; `changed` by a variant's name with _ for -."""
    for variant in KL:
        settings = {"held": 695} if variant == "depth-only" else {}
        for seed in range(3):
            write_run(folder, variant, seed, **(settings | changed.get(variant.replace("-", "_"), {})))
    rounds = [{"teacher": 1000 - i, "whole": rates * (1000 + i)} for i in range(3)]
    short = [{"teacher": 1000.0, "whole": 500.0}]
    settings = [
        {"batch": 32, "prompt_tokens": 64, "output_tokens": tokens, "rounds": found}
        for tokens, found in ((448, rounds), (8, short))
    ]
    (folder / "throughput.json").write_text(json.dumps({"machine": "a machine", "settings": settings}), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("compression")
    write_all(made)
    return made


@pytest.fixture(scope="module")
def study(folder: Path) -> StudyResult:
    return study_compression(folder)


def held(result: StudyResult) -> dict[str, bool | None]:
    return {claim.id: claim.holds for claim in result.claims}


def test_claims_come_out_as_the_runs_were_made(study: StudyResult) -> None:
    assert held(study) == dict.fromkeys(ALL, True)
    values = {claim.id: claim.values for claim in study.claims}
    assert values["C1"]["kl"]["mean"] == pytest.approx(0.12 - 0.8)
    assert values["C1"]["kl"]["differences"] == pytest.approx([-0.68, -0.68 * 1.004, -0.68 * 0.996])
    assert values["C1"]["nll"]["mean"] == pytest.approx(-0.68)
    assert values["C2"]["kl"]["mean"] == pytest.approx(0.12 - 0.3)
    assert values["C2"]["accuracy"]["mean"] == pytest.approx(0)
    assert values["C3"]["kl_after_cut"]["mean"] == pytest.approx(1.0 - 1.5)
    assert values["C4"]["kl"]["mean"] == pytest.approx(0.13 - 0.2)
    assert values["C4"]["kl_after_cut"]["mean"] == pytest.approx(1.1 - 0.9)
    assert values["C5"]["first"]["mean"] == pytest.approx(0.3 - 1.0)
    assert values["C5"]["second"]["b"] == pytest.approx([0.12, 0.14, 0.1])
    assert values["C6"]["accuracy"]["differences"] == pytest.approx([-0.01, -0.006, -0.014])
    assert values["C7"]["ratio"]["a"] == [1000, 999, 998]
    assert values["C8"]["shares"] == [0.69] * 3
    by_id = {claim.id: claim for claim in study.claims}
    assert "depth is nearer" in by_id["C4"].why
    assert "69.5%" in by_id["C4"].why
    assert "1.30x" in by_id["C7"].ours
    assert "0.50x" in by_id["C7"].why
    assert study.findings["missing"] == {}


@pytest.mark.parametrize(
    ("changed", "refuted"),
    [
        ({"scratch": {"kl": 0.05}}, "C1"),
        ({"scratch": {"nll": 1.0}}, "C1"),
        ({"cross_entropy": {"kl": 0.05}}, "C2"),
        ({"group_blind": {"kl": 0.05}}, "C3"),
        ({"group_blind": {"cut_kl": 0.5}}, "C3"),
        ({"depth_only": {"kl": 0.05, "held": 695}}, "C4"),
        ({"pruned": {"course": (0.1, 0.5, 0.6, 0.3, 0.12)}}, "C5"),
        ({"pruned": {"course": (1.0, 0.5, 0.3, 0.4, 0.5)}}, "C5"),
        ({"whole": {"right": 0.55}}, "C6"),
        ({"rates": 0.9}, "C7"),
        ({"whole": {"held": 701}}, "C8"),
    ],
)
def test_claims_can_fail(tmp_path: Path, changed: dict[str, Any], refuted: str) -> None:
    write_all(tmp_path, **changed)
    assert held(study_compression(tmp_path)) == {name: name != refuted for name in ALL}


def test_one_seed_decides_nothing_but_bytes(tmp_path: Path) -> None:
    for variant in KL:
        write_run(tmp_path, variant, 0)
    result = study_compression(tmp_path)
    assert held(result) == {name: None for name in ALL if name not in ("C7", "C8")} | {"C8": True}
    assert all("unknown" in claim.ours and "too few" in claim.why for claim in result.claims if claim.id != "C8")
    assert result.findings["missing"] == dict.fromkeys(KL, 2) | {"throughput": 1}


@pytest.mark.parametrize(
    ("changed", "id"),
    [({"depth_only": {"held": 705}}, "C4"), ({"scratch": {"tokens": 8000}}, "C1"), ({"group_blind": {"held": 680}}, "C3")],
)
def test_unequal_pairs_are_not_compared(tmp_path: Path, changed: dict[str, Any], id: str) -> None:
    write_all(tmp_path, **changed)
    result = study_compression(tmp_path)
    assert set(held(result)) == set(ALL) - {id}
    (lacks,) = result.findings["missing"].items()
    (variant,) = changed
    assert variant.replace("_", "-") in lacks[0]
    assert lacks[1] == 3
    assert not any(row["a_variant"] == variant.replace("_", "-") for row in result.findings["pairs"])


def test_a_pair_without_a_distance_after_the_cut_is_judged_by_the_end(tmp_path: Path) -> None:
    def forget(metrics: dict[str, Any]) -> None:
        for key in ("kl", "nll"):
            metrics["reports"]["cut"]["metrics"].pop(key)

    write_all(tmp_path)
    for seed in range(3):
        edit(tmp_path / "group-blind" / f"seed-{seed}", forget)
        edit(tmp_path / "depth-only" / f"seed-{seed}", forget)
    result = study_compression(tmp_path)
    assert held(result) == dict.fromkeys(ALL, True)
    by_id = {claim.id: claim for claim in result.claims}
    assert "kl_after_cut" not in by_id["C3"].values
    assert "not judged" in by_id["C3"].ours


def test_nothing_asked_leaves_out_what_is_judged_by_answers(tmp_path: Path) -> None:
    for seed in range(2):
        for variant in KL:
            write_run(tmp_path, variant, seed, ask=False)
    result = study_compression(tmp_path)
    assert set(held(result)) == set(ALL) - {"C6", "C7"}
    assert "answers" not in result.figures
    assert "throughput" not in result.figures


@pytest.mark.parametrize(
    ("low", "high", "below", "near"),
    [
        (-0.03, -0.01, True, None),
        (-0.03, 0.01, None, None),
        (-0.015, -0.01, True, True),
        (-0.04, -0.03, True, False),
        (0.01, 0.03, False, True),
        (0, 0, False, True),
    ],
)
def test_verdicts_follow_the_whole_interval(low: float, high: float, below: bool | None, near: bool | None) -> None:
    values = [low, high] if low == high else [(low + high) / 2 + sign * (high - low) / 2 / 12.706 for sign in (-1, 1)]
    found = Paired(seeds=(0, 1), a=(0.0, 0.0), b=tuple(values), differences=tuple(values))
    assert less(found) is below
    assert within(found, 0.02) is near


def test_a_claim_of_two_parts_needs_both() -> None:
    assert both(True, True) is True
    assert both(True, None) is None
    assert both(None, False) is False


def test_a_run_is_read_in_order(folder: Path) -> None:
    run = read_runs(folder)["whole"][0]
    assert list(run.stages) == ["teacher", "depth", "distil-1", "width", "distil-2"]
    assert run.last_cut is run.stages["width"]
    assert run.tokens == 6000
    assert [tokens for tokens, _ in run.last.course] == [0, 1000, 2000, 3000, 4000]
    assert path_of(run) == {0: 2.0, 2000: 1.0, 3000: 0.5, 4000: 0.3, 5000: 0.2, 6000: 0.12}


def edit(place: Path, change: Callable[[dict[str, Any]], object]) -> None:
    metrics = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
    change(metrics)
    (place / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        lambda metrics: metrics.pop("reports"),
        lambda metrics: metrics["reports"].pop("teacher"),
        lambda metrics: metrics["reports"].pop("distil"),
        lambda metrics: metrics["reports"]["cut"].pop("held"),
        lambda metrics: metrics["reports"]["distil"]["metrics"].update(course=[{"tokens": "a\nb", "loss": 1}]),
        lambda metrics: metrics["reports"]["distil"].update(evaluation=[1]),
        lambda metrics: metrics.update(seconds=None),
    ],
)
def test_a_malformed_run_is_one_line(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(write_run(tmp_path, "pruned", 0), change)
    with pytest.raises(SpecError, match="seed-0") as error:
        study_compression(tmp_path)
    assert "\n" not in str(error.value)


def test_unfinished_runs_are_left_out(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="holds no finished run; benchmarks/compression_runs"):
        study_compression(tmp_path)
    write_run(tmp_path, "pruned", 0)
    (write_run(tmp_path, "pruned", 1) / "metrics.json").unlink()
    assert set(read_runs(tmp_path)["pruned"]) == {0}


def test_the_page_has_every_claim_figure_and_table(study: StudyResult) -> None:
    data = json.loads(json.dumps(study.to_json(), allow_nan=False))
    html = compression_study_page("Compression", "lead", data)
    assert set(data["figures"]) == {"recovery", "losses", "answers", "throughput"}
    assert html.count("class='chart'") == len(data["figures"])
    assert all(f"id='{claim}'" in html for claim in ALL)
    rows = {row[0]: row[1:] for row in compression_rows(data)}
    assert rows["pruned"] == ["3", "0.00 M", "69.0%", "1.0000", "0.1200", "1.6200", "60.0%", "59.0%", "5.0"]
    table = {(row[1], row[2]): row for row in pair_rows(data)}
    assert table["depth-only", "KL after the cut"] == [
        "width-only", "depth-only", "KL after the cut", "1.1000", "0.9000", "+0.2000 ± 0.0000", "3",
    ]  # fmt: skip
    assert len(table) == 16
    panels = {panel["title"]: panel for panel in data["figures"]["recovery"]["panels"]}
    assert {series["role"] for series in panels["what is left out"]["series"]} == {"pruned", "scratch", "group-blind"}
    assert tuple(data["figures"]["losses"]["x_labels"]) == tuple(KL)


def test_names_of_others_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    bad = "<img src=x onerror=alert(1)>"
    place = write_run(tmp_path, "whole", 0)

    def rename(metrics: dict[str, Any]) -> None:
        reports = metrics["reports"]
        reports[bad] = reports.pop("distil-2")
        for report in reports.values():
            report["evaluation"][bad] = report["evaluation"].pop("tools")

    edit(place, rename)
    place.rename(tmp_path / "whole" / "seed-1")
    (tmp_path / "<b>bold").mkdir()
    (tmp_path / "whole" / "seed-1").rename(tmp_path / "<b>bold" / "seed-1")
    write_run(tmp_path, "whole", 0)
    edit(tmp_path / "whole" / "seed-0", rename)
    data = json.loads(json.dumps(study_compression(tmp_path).to_json(), allow_nan=False))
    html = compression_study_page("<i>title", "<u>lead", data)
    assert not any(text in html for text in (bad, "<b>bold", "<i>title", "<u>lead"))
    assert "&lt;b&gt;bold" in html


def test_the_command_prints_one_object_and_writes_the_page(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    studying.run_compression(folder, tmp_path / "out", json_out=True)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert [claim["id"] for claim in json.loads(printed)["claims"]] == list(ALL)
    assert (tmp_path / "out" / "study-compression.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    studying.run_compression(folder, None, json_out=False)
    assert "8 of 8 claims hold, 0 undecided; 21 runs" in capsys.readouterr().out


def test_it_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tandem.study.compression import study_compression; "
        "study_compression(Path(sys.argv[1])); assert not {'torch', 'transformers', 'plotly'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=60)
