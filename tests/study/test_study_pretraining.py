"""The study of pre-training on made-up runs whose differences are known, and its interval beside scipy's."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from random import Random
from statistics import stdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tandem.report.pretraining_html import pretraining_page, pretraining_sentences, variant_rows
from tandem.spec.errors import SpecError
from tandem.study.pretraining import study_pretraining
from tandem.study.pretraining_figures import smoothed
from tandem.study.pretraining_runs import read_runs
from tandem.study.result import StudyResult
from tandem.study.seeds import half_interval, paired

STEPS = 100
SOURCES = ("plays", "reasoning")


def write_run(
    folder: Path, variant: str, seed: int, *, scale: float = 1.0, right: float = 0.5, reasoning: float = 1.0,
    needles: dict[int, float] | None = None, linears: str = "bf16", questions: float | None = None,
) -> Path:  # fmt: skip
    """A finished run: loss falls from 8 to 2 with noise of its seed, all losses times `scale`."""
    place = folder / variant / f"seed-{seed}"
    place.mkdir(parents=True)
    draw = Random(seed)
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        loss = scale * (2 + 6 * math.exp(-step / 20) + draw.gauss(0, 0.02))
        lines.append({"kind": "step", "step": step, "loss": loss, "tokens": step * 4096, "tokens_per_s": 3000.0})
    level = 2 + 0.05 * seed
    losses = {"plays": scale * level, "reasoning": scale * reasoning * level}
    lines.insert(50, {"kind": "held_out", "step": 50, "loss": dict.fromkeys(SOURCES, 9.0)})
    lines.append({"kind": "held_out", "step": STEPS, "loss": losses})
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    accuracy = {task: {"accuracy": right + 0.01 * seed, "low": 0.0, "high": 1.0, "count": 100} for task in ("sums", "legs")}
    metrics = {"loss": lines[-2]["loss"], "steps_s": 60.0, "accuracy": accuracy}
    if needles:
        found = {str(n): {"accuracy": a, "count": 40} for n, a in needles.items()}
        metrics["needles"] = {"single": found, "chain": found}
    (place / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    (place / "recipe.json").write_text(json.dumps({"precision": {"linears": linears}}), encoding="utf-8")
    if questions is not None:
        (place / "long.json").write_text(json.dumps({"long-questions": questions + 0.01 * seed}), encoding="utf-8")
    return place


def write_all(folder: Path, *, fp8: float = 1.004, phases: float = 1.03, after: float = 0.6, questions: float = 2.4) -> None:
    for seed in range(3):
        jitter = 1 + 0.0005 * seed
        write_run(folder, "hybrid", seed, needles={512: 0.5, 2048: 0.05}, questions=3.0)
        write_run(folder, "hybrid-fp8", seed, scale=fp8 * jitter, linears="fp8-block")
        write_run(folder, "hybrid-fp32", seed, scale=0.999 * jitter, linears="fp32")
        write_run(folder, "transformer", seed, scale=1.05 * jitter, right=0.4 - 0.002 * seed)
        write_run(folder, "one-blend", seed, reasoning=phases * jitter, right=0.45 - 0.002 * seed)
        write_run(folder, "long", seed, needles={512: 0.6, 2048: after + 0.01 * seed}, right=0.495, questions=questions)
        write_run(folder, "short", seed, needles={512: 0.5, 2048: 0.06 + 0.005 * seed}, questions=2.8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pretraining")
    write_all(made)
    return made


@pytest.fixture(scope="module")
def study(folder: Path) -> StudyResult:
    return study_pretraining(folder)


def held(result: StudyResult) -> dict[str, bool]:
    return {claim.id: claim.holds for claim in result.claims}


def test_claims_come_out_as_the_runs_were_made(study: StudyResult) -> None:
    assert held(study) == {
        "P1": True,
        "P2": True,
        "P4": True,
        "P5": True,
        "P6": True,
        "P7": True,
        "P8": True,
        "P9": True,
        "P10": True,
    }
    gap = study.claims[0].values["held_out"]
    assert gap["mean"] == pytest.approx(1.004 * 1.0005 - 1)
    assert gap["half"] == pytest.approx(stats.t.ppf(0.975, 2) * 1.004 * 0.0005 / math.sqrt(3), rel=1e-3)
    assert study.findings["missing"] == {"hybrid-fp8-tensor": 3}


def test_claims_can_fail(tmp_path: Path) -> None:
    write_all(tmp_path, fp8=1.02, phases=0.99, after=0.05, questions=2.9)
    assert held(study_pretraining(tmp_path)) == {
        "P1": False, "P2": False, "P4": True, "P5": True, "P6": False, "P7": True, "P8": False, "P9": False, "P10": True,
    }  # fmt: skip


def test_one_seed_proves_nothing(tmp_path: Path) -> None:
    write_run(tmp_path, "hybrid", 0)
    write_run(tmp_path, "hybrid-fp8", 0, scale=1.001)
    result = study_pretraining(tmp_path)
    assert held(result) == {"P1": False}
    assert "unknown" in result.claims[0].ours
    json.dumps(result.to_json(), allow_nan=False)
    assert set(result.figures) == {"loss", "gap", "sources", "answers"}


@pytest.mark.parametrize(("spread", "proven"), [(0.0005, True), (0.004, False)])
def test_a_gap_is_small_when_its_whole_interval_is(tmp_path: Path, spread: float, proven: bool) -> None:
    for seed in range(3):
        write_run(tmp_path, "hybrid", seed)
        write_run(tmp_path, "hybrid-fp8", seed, scale=1.006 + spread * (seed - 1))
    assert held(study_pretraining(tmp_path)) == {"P1": proven}


def test_only_seeds_that_both_have_are_paired(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        write_run(tmp_path, "hybrid", seed)
    for seed in (1, 2, 5):
        write_run(tmp_path, "transformer", seed, scale=2.0)
    runs = read_runs(tmp_path)
    found = paired(runs["hybrid"], runs["transformer"], lambda run: run.held_out["plays"], relative=True)
    assert found is not None
    assert found.seeds == (1, 2)
    assert found.differences == pytest.approx((1.0, 1.0))
    assert paired(runs["hybrid"], runs["transformer"], lambda run: None) is None


@given(values=st.lists(st.floats(-10, 10), min_size=2, max_size=11))
def test_the_interval_is_scipys(values: list[float]) -> None:
    wanted = stats.t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    assert half_interval(values) == pytest.approx(wanted, rel=1e-3, abs=1e-9)


@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=300), points=st.integers(1, 80))
def test_smoothing_keeps_the_mean_of_equal_pieces(values: list[float], points: int) -> None:
    made = smoothed(values, points)
    assert len(made) == min(points, len(values))
    assert min(values) - 1e-9 <= min(made)
    assert max(made) <= max(values) + 1e-9
    if len(values) % len(made) == 0:
        assert sum(made) / len(made) == pytest.approx(sum(values) / len(values), abs=1e-9)


def test_unfinished_runs_are_left_out_and_broken_ones_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="holds no finished run"):
        read_runs(tmp_path)
    write_run(tmp_path, "hybrid", 0)
    (write_run(tmp_path, "hybrid", 1) / "metrics.json").unlink()
    (tmp_path / "hybrid" / "seed-x").mkdir()
    assert set(read_runs(tmp_path)["hybrid"]) == {0}
    broken = write_run(tmp_path, "hybrid", 2)
    (broken / "metrics.jsonl").write_text('{"kind": "step"', encoding="utf-8")
    with pytest.raises(SpecError, match=r"seed-2: is no finished run") as refused:
        read_runs(tmp_path)
    assert "\n" not in str(refused.value)


def test_the_page_and_the_table_have_every_variant(study: StudyResult) -> None:
    data = json.loads(json.dumps(study.to_json(), allow_nan=False))
    html = pretraining_page("Pre-training", "lead", data)
    rows = {row[0]: row for row in variant_rows(data)}
    assert set(rows) == {"hybrid", "hybrid-fp8", "hybrid-fp32", "transformer", "one-blend", "long", "short"}
    assert all(name in html for name in rows)
    assert rows["hybrid"][1:3] == ["3", "0.41 M"]
    assert rows["transformer"][6] == "-"
    assert rows["hybrid"][6] == "5.0%"
    assert set(data["figures"]) == {"loss", "gap", "sources", "answers", "long", "needles"}
    assert "http" not in html.split("plotly")[0]
    assert any("hybrid-fp8-tensor (3 seeds)" in line for line in pretraining_sentences(data))


def test_it_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tandem.study.pretraining import study_pretraining; "
        "study_pretraining(Path(sys.argv[1])); assert not {'torch', 'transformers', 'plotly'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=60)
