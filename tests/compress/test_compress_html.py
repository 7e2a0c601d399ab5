"""The pages of a compression and of its plan: what their figures and tables say, from objects that are small enough to know."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.cli.app import main
from tandem.compress.recipe import plan_json, search_recipe
from tandem.compress.recipe_files import load_recipe
from tandem.report import compress_figures as figures
from tandem.report.compress_html import compression_page, compression_plan_page
from tandem.report.compress_text import size
from tandem.spec.catalog import load_spec
from tandem.spec.model import ModelSpec

MSE = (0.5, 0.01, 0.4, 0.2, 0.0, 0.3)
SIZES = {"layers": 6, "attention_layers": 1, "hidden_size": 4, "ffn_size": 6, "mamba_heads": 2, "mamba_head_dim": 2,
         "attention_heads": 2, "experts": None, "expert_ffn_size": None}  # fmt: skip


@pytest.fixture(scope="module")
def teacher() -> ModelSpec:
    """Six layers of the nano hybrid."""
    spec = load_spec("nano-hybrid")
    return ModelSpec(name="<b>six</b>", vocab_size=64, hidden_size=spec.hidden_size, layers=spec.layers[:6])


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    recipe = load_recipe("nano-compress")
    found: dict[str, Any] = json.loads(json.dumps(plan_json(recipe, search_recipe(recipe))))
    return found


def layer_score(layer: int, mse: float) -> dict[str, Any]:
    return {"layer": layer, "logit_mse": mse, "relative_mse": mse, "hidden_mse": mse, "block_influence": mse,
            "perplexity": None if layer == 4 else 1000 * mse}  # fmt: skip


def candidate(parameters: int, rate: float | None, quality: float, loss: float | None = None, **sizes: int) -> dict[str, Any]:
    estimate = {"value": rate, "low": 0.5 * (rate or 0), "high": 2 * (rate or 0), "evidence": "transferred"}
    pool = {"parallelism": {"tp": 1, "pp": 1, "ep": 1, "dp": 1, "cpp": 1}, "batch": 8, "replicas": 1, "role": "colocated",
            "chunk_tokens": None}  # fmt: skip
    deployment = {"mode": "colocated", "gpus": 1, "model": "m", "hardware": "l4", "backend": "vllm", "colocated": pool,
                  "precision": {"weights": "bf16", "activations": "bf16", "kv": "bf16", "state": "fp32"}}  # fmt: skip
    seconds = {**estimate, "value": 0.25, "low": 0.2, "high": 0.3}
    priced = {"tokens_per_s": estimate, "ttft_s": seconds, "tpot_s": seconds, "gpus": 1, "deployment": deployment}
    return {
        **SIZES, **sizes, "parameters": parameters, "active_parameters": parameters, "total_bytes": 2 * parameters,
        "tokens_per_s": rate, "quality": quality, "loss": loss, "on_frontier": False, "kept_layers": None,
        "prediction": priced if rate is not None else None, "refused": None if rate is not None else "too large for one",
    }  # fmt: skip


def search(teacher: dict[str, Any], *rows: dict[str, Any]) -> dict[str, Any]:
    return {"teacher": teacher, "limits": {"total_bytes": 1500}, "candidates": [*rows], "frontier": [*rows[::-1]],
            "considered": 9, "fitting": 2, "refused": {"total_bytes": 7}}  # fmt: skip


def held(parameters: int) -> dict[str, int]:
    return {"total_bytes": 2 * parameters, "parameters": parameters, "active_parameters": parameters}


def evaluation(right: float) -> dict[str, Any]:
    return {
        "reasoning": {"thinking on": {"all": {"accuracy": right, "low": right - 0.1, "high": right + 0.05}}},
        "budgets": {"64": {}},
    }


@pytest.fixture
def run() -> dict[str, Any]:
    """A run of six layers to four, its depth scored in three rounds, of which two were needed."""
    whole, shorter = candidate(1000, None, 1000.0), candidate(900, 80.0, 1.0)
    small, smaller = candidate(700, 100.0, 0.9, 0.02, ffn_size=3), candidate(650, 110.0, 0.8, 0.03, hidden_size=3)
    rounds = [
        [layer_score(i, mse) for i, mse in enumerate(MSE)],
        [layer_score(i, 2 * mse) for i, mse in enumerate(MSE) if i != 4],
        [layer_score(i, 3 * mse) for i, mse in enumerate(MSE) if i not in (4, 1)],
    ]
    depth = {"kept_layers": [0, 2, 3, 5], "order": [4, 1, 3], "metric": "logit-mse", "perplexity": 12.5, "rounds": rounds,
             "search": search(whole, small)}  # fmt: skip
    scores = {"hidden_size": {"0": [1.0, 3.0, 2.0, 2.0], "1": [4.0, 4.0, 1.0, 3.0]}, "ffn_size": {"1": [1, 2, 3, 4, 5, 9]},
              "mamba_heads": {"0": [1.0, 1.0]}}  # fmt: skip
    width = {
        "shape": {"layers": None, "hidden_size": None, "ffn_size": 3, "mamba_heads": 2}, "scores": scores, "ranking": [],
        "kept": {"hidden": [0, 1, 2, 3], "layers": {"0": {"heads": [0, 1]}, "1": {"ffn": [3, 4, 5]}}},
        "search": search(shorter, small, smaller),
    }  # fmt: skip
    first = [{"tokens": 1000, "loss": 0.5, "by_source": {}}, {"tokens": 2000, "loss": 0.25, "by_source": {}}]
    second = [{"tokens": 1500, "loss": 0.4, "by_source": {}}, {"tokens": 3000, "loss": 0.125, "by_source": {}}]
    reports = {
        "teacher": {"stage": "teacher", "model": "six", "held": held(1000)},
        "depth": {"what": "cut in depth", "held": held(900), "metrics": depth},
        "distil-1": {"what": "distillation", "held": held(900), "metrics": {"tokens": 2000, "kl": 0.25, "course": first}},
        "width": {"what": "cut in width", "held": held(700), "metrics": width},
        "distil-2": {"what": "distillation", "held": held(700), "metrics": {"tokens": 3000, "kl": 0.125, "course": second}},
    }
    for name, right in zip(reports, (0.8, 0.25, 0.6, 0.375, 0.7), strict=True):
        reports[name] |= {"seconds": 60.0, "evaluation": evaluation(right)}
    metrics = {"teacher": held(1000), "student": held(700), "evaluation": None, "seconds": 300.0, "reports": reports}
    return {"checkpoint": "out/run/model", "metrics": metrics}


def table_rows(page: str) -> list[list[str]]:
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", page)]
    return [row for row in cells if row]


def parts_of(run: dict[str, Any], stage: str) -> dict[str, Any]:
    found: dict[str, Any] = run["metrics"]["reports"][stage]["metrics"]
    return found


def test_the_page_of_a_run_says_what_was_cut_and_what_it_came_to(run: dict[str, Any], teacher: ModelSpec) -> None:
    student = ModelSpec(name="four", vocab_size=64, hidden_size=96, layers=tuple(teacher.layers[i] for i in (0, 2, 3, 5)))
    page = compression_page("six & four", run, teacher=teacher, student=student)
    assert page.count("<!doctype html>") == 1
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert "&lt;b&gt;six&lt;/b&gt;" in page
    assert "<b>six" not in page
    assert "<h1>six &amp; four</h1>" in page
    rows = table_rows(page)
    assert ["layers", "6", "4", "66.7%"] in rows
    assert ["hidden size", f"{teacher.hidden_size}", "96", f"{96 / teacher.hidden_size:.1%}"] in rows
    assert ["parameters", "1,000", "700", "70.0%"] in rows
    assert re.search(r"<code>M<s>-</s>M-<s>.</s>.</code>", page)
    assert "Left out: 1, 4 (from 0)" in page
    stages = {row[0]: row for row in rows if len(row) == 8 and row[0] in run["metrics"]["reports"]}
    assert stages["distil-2"][1:6] == ["distillation", "700", size(1400), "3,000", "0.1250"]
    assert stages["width"][4:6] == ["-", "-"]
    assert stages["depth"][6].startswith("25.0%")
    assert [row for row in rows if len(row) == 8 and row[0] in "123"] == [
        ["1", "4", "Mamba", "0", "-", "0", "1 (MLP, 0.01)", "yes"],
        ["2", "1", "MLP", "0.02", "20", "0.02", "3 (MLP, 0.4)", "yes"],
        ["3", "3", "MLP", "0.6", "600", "0.6", "5 (attention, 0.9)", "no"],
    ]


def test_predictions_are_those_of_the_models_that_there_were(run: dict[str, Any], teacher: ModelSpec) -> None:
    """After the cut in depth it is the model that the search in width began with, not the depth search's candidate."""
    rows = {row[0]: row for row in table_rows(compression_page("x", run, teacher=teacher, student=teacher))}
    assert rows["after depth"][1:3] == ["80.0", "40.0 to 160.0"]
    assert rows["after width"][1:3] == ["100.0", "50.0 to 200.0"]
    assert rows["after width"][-1] == "transferred"
    assert rows["teacher"][-2:] == ["too large for one", "-"]


def test_a_run_without_objective_questions_or_distillation_has_a_page(run: dict[str, Any], teacher: ModelSpec) -> None:
    bare = copy.deepcopy(run)
    reports = bare["metrics"]["reports"]
    for name in ("distil-1", "width", "distil-2"):
        del reports[name]
    for report in reports.values():
        report["evaluation"] = None
    parts_of(bare, "depth")["search"] = search(candidate(1000, None, 1.0), candidate(900, None, 0.9))
    page = compression_page("x", bare, teacher=teacher, student=teacher)
    for absent in ("Recovery", "Right answers", "Predicted deployments", "Why these units"):
        assert f"<h2>{absent}" not in page
        assert f"<h2>{absent}" in compression_page("x", run, teacher=teacher, student=teacher) or absent == "Right answers"
    assert "<h2>Why these layers" in page


def test_rounds_show_every_score_and_mark_what_left(run: dict[str, Any]) -> None:
    heat, marks = figures.rounds_figure(parts_of(run, "depth"), 6).data
    assert [[round(10**z, 6) if z is not None else None for z in row] for row in heat.z] == [
        [0.5, 0.01, 0.4, 0.2, 0.001, 0.3], [1.0, 0.02, 0.8, 0.4, None, 0.6], [1.5, None, 1.2, 0.6, None, 0.9],
    ]  # fmt: skip
    assert list(zip(marks.y, marks.x, strict=True)) == [("1", 4), ("2", 1), ("3", 3)]


def test_layers_that_left_are_open_points(run: dict[str, Any]) -> None:
    kinds = ["Mamba", "MLP", "Mamba", "MLP", "attention", "MLP"]
    traces = figures.first_round_figure(parts_of(run, "depth"), kinds).data
    drawn = {x: symbol for trace in traces for x, symbol in zip(trace.x, trace.marker.symbol, strict=True)}
    assert sorted(i for i, symbol in drawn.items() if symbol == "circle-open") == [1, 4]
    assert {trace.name: list(trace.x) for trace in traces} == {"Mamba": [0, 2], "MLP": [1, 3, 5], "attention": [4]}


def test_units_are_drawn_as_kept_or_cut(run: dict[str, Any]) -> None:
    kept, cut = figures.units_figure("ffn_size", parts_of(run, "width")).data
    assert (kept.name, list(kept.y)) == ("kept", [1.0, 1.25, 2.25])
    assert (cut.name, list(cut.y)) == ("cut", [0.25, 0.5, 0.75])
    (hidden,) = figures.units_figure("hidden_size", parts_of(run, "width")).data
    assert len(hidden.y) == 8


def test_of_experts_neurons_those_count_that_half_of_the_experts_keep() -> None:
    cut = {"scores": {"expert_ffn_size": {"3": [1.0, 2.0, 3.0, 2.0]}},
           "kept": {"hidden": [], "layers": {"3": {"experts": [0, 1, 2], "expert_ffn": [[0, 2], [2, 3], [1, 3]]}}}}  # fmt: skip
    kept, gone = figures.units_figure("expert_ffn_size", cut).data
    assert (list(kept.y), list(gone.y)) == ([1.0, 1.5], [0.5, 1.0])


def test_recovery_goes_on_where_the_last_distillation_ended(run: dict[str, Any]) -> None:
    figure = figures.recovery_figure(run["metrics"]["reports"])
    assert [(t.name, list(t.x), list(t.y)) for t in figure.data] == [
        ("distil-1", [1.0, 2.0], [0.5, 0.25]), ("distil-2", [3.5, 5.0], [0.4, 0.125]),
    ]  # fmt: skip
    assert [(a.text, a.x) for a in figure.layout.annotations] == [("cut in depth", 0.0), ("cut in width", 2.0)]
    low, high = figure.layout.yaxis.range
    assert 10**low < 0.125 < 0.5 < 10**high


def test_answers_have_their_intervals(run: dict[str, Any]) -> None:
    (trace,) = figures.answers_figure(run["metrics"]["reports"]).data
    assert list(trace.y) == pytest.approx([80, 25, 60, 37.5, 70])
    assert list(trace.error_y.array) == pytest.approx([5] * 5)
    assert list(trace.error_y.arrayminus) == pytest.approx([10] * 5)


def test_what_is_over_the_budget_is_grey() -> None:
    figure = figures.bytes_figure({"a": 3 * 2.0**30, "b": 2.0**30}, 2.0**31)
    assert list(figure.data[0].x) == [3.0, 1.0]
    assert list(figure.data[0].marker.color) == ["#8a8c94", figures.KEPT]
    assert figure.layout.shapes[0].x0 == 2.0


def test_losses_are_shown_where_all_are_known(run: dict[str, Any]) -> None:
    found = parts_of(run, "width")["search"]
    by_loss = {trace.name: trace for trace in figures.shapes_figure(found, by_loss=True).data}
    assert list(by_loss["frontier"].y) == [0.02, 0.03]
    assert list(by_loss["frontier"].x) == [100.0, 110.0]
    assert "before" not in by_loss
    proxy = {trace.name: trace for trace in figures.shapes_figure(found, by_loss=False).data}
    assert list(proxy["best candidate"].y) == [0.9]
    assert list(proxy["before"].y) == [1.0]


@given(st.lists(st.floats(-1e6, 1e6), max_size=200), st.integers(2, 50))
def test_thinned_values_are_some_of_them_with_both_ends(values: list[float], most: int) -> None:
    found = figures.thinned(values, most)
    assert found == sorted(found)
    assert len(found) == min(len(values), most)
    assert set(found) <= set(values)
    if values:
        assert (found[0], found[-1]) == (min(values), max(values))


def test_the_page_of_a_plan_has_every_candidate_and_the_budget(plan: dict[str, Any]) -> None:
    page = compression_plan_page(plan)
    rows = table_rows(page)
    for number, row in enumerate(plan["candidates"], start=1):
        (line,) = (cells for cells in rows if cells[0] == f"{number}")
        assert f"{row['hidden_size']:,}" in line
        assert size(row["total_bytes"]) in line
        assert f"{row['tokens_per_s']:,.1f}" in line
    assert page.count("<tr class=best>") == 1
    assert [row[0] for row in rows if row[1] == "distillation"] == ["distil-1", "distil-2"]
    assert f"budget {plan['limits']['total_bytes'] / 2**20:,.2f}" in page


def test_the_command_writes_the_page_of_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], plan: dict[str, Any]
) -> None:
    file = tmp_path / "plan.html"
    monkeypatch.setattr(sys, "argv", ["tandem", "compress", "nano-compress", "--plan", "--json", "--report", str(file)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert json.loads(capsys.readouterr().out) == plan
    assert table_rows(file.read_text(encoding="utf-8")) == table_rows(compression_plan_page(plan))


@pytest.mark.slow
def test_the_command_writes_the_page_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: dict[str, Any]
) -> None:
    pytest.importorskip("trl", reason="pip install tandem-lm[train]")
    pytest.importorskip("reasoning_gym", reason="pip install tandem-lm[train]")
    from tandem.compress import run as runs

    checkpoint, file = Path(load_recipe("nano-compress").teacher), tmp_path / "run.html"
    done = runs.Compressed(checkpoint=checkpoint, metrics=run["metrics"])
    monkeypatch.setattr(runs, "run_recipe", lambda *given, **more: done)
    monkeypatch.setattr("tandem.spec.catalog.load_spec", lambda name: load_spec(str(name)))
    monkeypatch.setattr(sys, "argv", ["tandem", "compress", "nano-compress", "--json", "--report", str(file)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert json.loads(capsys.readouterr().out) == done.to_json()
    assert "<h1>nano-compress</h1>" in file.read_text(encoding="utf-8")


def test_a_folder_that_is_not_there_is_refused_before_the_search(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tandem", "compress", "nano-compress", "--plan", "--report", "no/such/folder/x.html"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code
    out, err = capsys.readouterr()
    assert out == ""
    assert "report=" in err
    assert "create it first" in err
