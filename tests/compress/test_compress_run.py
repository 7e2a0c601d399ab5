from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compress_cases import shaken

pytest.importorskip("trl", reason="pip install tandem-lm[train]")
from tandem.align.chat import make_chat_model
from tandem.compress.recipe import CompressRecipe, WithoutPart
from tandem.compress.recipe_files import load_recipe
from tandem.compress.run import run_recipe
from tandem.model.load import load_model, save_model
from tandem.model.tokenizer import load_tokenizer
from tandem.spec.catalog import load_spec
from tandem.spec.errors import SpecError
from tandem.spec.model import MLP, Attention, Mamba2, ModelSpec
from tandem.study.compression_runs import read_run

MAMBA = Mamba2(num_heads=4, head_dim=8, state_dim=8, groups=2)
MLP_LAYER = MLP(ffn_size=64, gated=False)
ATTENTION = Attention(num_heads=4, num_kv_heads=2, head_dim=8)
RECIPE = """
about: A test's
teacher: {teacher}
budget: {{share: 0.75, context: 64, batch: 1}}
depth: {{layers: [6, 5], joint: true}}
width: {{hidden_size: [32, 28, 24], ffn_size: [64, 48, 40], mamba_heads: [4, 2]}}
select: {{by: total_bytes, take: 2}}
objective: {{fixed_batch: {{hardware: l4, batch: 4, isl: 32, osl: 32}}}}
ranking: {{tokens: 512, length: 64, rows: 4, lr: 1.0e-3, final_lr: 1.0e-4, top_k: 20}}
calibration: {{samples: 8, length: 64}}
data:
  pretraining: nano-hybrid
  changes: [data.sources.reasoning.documents=300, "data.sources.word-problems.documents=60"]
  post: {{tasks: [chain_sum, spell_backward], reasoning: 60, instructions: 30, tools: 6}}
stages:
  depth: {{cut: depth}}
  distil-1: {{distil: {{tokens: 4096, length: 128, rows: 8, lr: 3.0e-4, final_lr: 3.0e-5, warmup_steps: 1, linears: fp32}}}}
  width: {{cut: width}}
  distil-2: {{distil: {{tokens: 4096, length: 128, rows: 8, lr: 3.0e-4, final_lr: 3.0e-5, warmup_steps: 1, linears: fp32}}}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "prepared"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model of random weights with nano-hybrid's tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    base = load_tokenizer("nano-hybrid")
    spec = ModelSpec(
        name="teacher",
        vocab_size=base.backend.get_vocab_size(),
        hidden_size=32,
        layers=(MAMBA, MLP_LAYER, ATTENTION, MLP_LAYER, MAMBA, MLP_LAYER),
    )
    decoder = shaken(spec)
    decoder.source = load_model("nano-hybrid").source
    make_chat_model(decoder, folder / "tokenizer")
    save_model(decoder, folder / "model")
    return folder / "model"


def recipe_of(tmp_path: Path, model: Path, **changes: Any) -> CompressRecipe:
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE.format(teacher=model))
    return replace(load_recipe(file), **changes)


def nothing(folder: Path, recipe: CompressRecipe) -> dict[str, Any]:
    return {}


@pytest.mark.slow
def test_a_compression_from_beginning_to_end(tmp_path: Path, teacher: Path, data: Path) -> None:
    recipe, heard = recipe_of(tmp_path, teacher), []
    done = run_recipe(recipe, tmp_path / "run", assess=nothing, date="2026-01-01", data_folder=data, listen=heard.append)
    assert done is not None
    before, after = load_spec(teacher), load_spec(done.checkpoint)
    budget = recipe.budget
    assert budget.held(after)["total_bytes"] <= 0.75 * budget.held(before)["total_bytes"]
    reports = done.metrics["reports"]
    assert list(reports) == ["teacher", "depth", "distil-1", "width", "distil-2"]
    assert len(reports["depth"]["metrics"]["kept_layers"]) == len(after.layers)
    for name in ("distil-1", "distil-2"):
        course = reports[name]["metrics"]["course"]
        assert course[-1]["loss"] < course[0]["loss"]
        assert reports[name]["metrics"]["kl"] == pytest.approx(course[-1]["loss"], rel=0.1)  # on other rows of the same text
        assert course[-1]["tokens"] == 4096
    distances = [reports[name]["metrics"]["kl"] for name in ("depth", "distil-1", "width", "distil-2")]
    assert distances[1] < distances[0]
    assert distances[3] < distances[2]
    assert read_run(tmp_path / "run", "whole", 0).last.kl == reports["distil-2"]["metrics"]["kl"]
    ranked = reports["width"]["metrics"]["ranking"]
    chosen = reports["width"]["metrics"]["shape"]
    assert len(ranked) == 2
    assert {k: v for k, v in min(ranked, key=lambda one: one["kl"]).items() if k != "kl"} == chosen
    weights = load_model(done.checkpoint, dtype="auto").backbone.embeddings.weight
    assert weights.dtype == torch.bfloat16
    card = (done.checkpoint / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == str(teacher)
    assert f"{after.parameters:,}" in card
    assert load_tokenizer(done.checkpoint).template is not None
    json.dumps(done.to_json())
    steps = len([event for event in heard if event["kind"] == "step"])
    again = run_recipe(recipe, tmp_path / "run", assess=nothing, date="2026-01-01", data_folder=data, listen=heard.append)
    assert again == done
    assert len([event for event in heard if event["kind"] == "step"]) == steps


class Interrupted(Exception):
    pass


@pytest.mark.slow
def test_a_run_that_was_stopped_comes_to_the_same_model(tmp_path: Path, teacher: Path, data: Path) -> None:
    """Stopped inside a distillation, and scored in little memory the second time."""
    recipe = recipe_of(tmp_path, teacher, ranking=None)
    recipe = replace(recipe, stages={name: recipe.stages[name] for name in ("depth", "distil-1", "width")})
    whole = run_recipe(recipe, tmp_path / "whole", assess=nothing, date="2026-01-01", data_folder=data)

    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_recipe(recipe, tmp_path / "stopped", assess=nothing, date="2026-01-01", data_folder=data, listen=stop)
    little = replace(recipe, memory_bytes=3_000_000)
    resumed = run_recipe(little, tmp_path / "stopped", assess=nothing, date="2026-01-01", data_folder=data)
    assert whole is not None
    assert resumed is not None
    a, b = (load_model(run.checkpoint, dtype="auto").state_dict() for run in (whole, resumed))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    with pytest.raises(SpecError, match=r"holds a run of another recipe \(seed differs\)"):
        run_recipe(replace(recipe, seed=1), tmp_path / "stopped", assess=nothing, date="2026-01-01", data_folder=data)


def test_what_cannot_be_run_is_refused_before_anything_is_written(tmp_path: Path, teacher: Path) -> None:
    for changes, message in (
        ({"plan_only": "not here"}, "recipe='tiny': not here; --plan shows its candidates"),
        ({"stages": {}}, "stages={}: nothing is run"),
        ({"teacher": "qwen3-8b"}, "its weights are not here"),
    ):
        with pytest.raises(SpecError, match=message):
            run_recipe(recipe_of(tmp_path, teacher, **changes), tmp_path / "run", assess=nothing, date="2026-01-01")
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_a_study_leaves_out(tmp_path: Path, teacher: Path, data: Path) -> None:
    """Random weights, the next token instead of the teacher: the same shapes, and worse or other than with them."""
    plain = recipe_of(tmp_path, teacher, ranking=None)
    plain = replace(plain, stages={name: plain.stages[name] for name in ("width", "distil-2")}, depth=None)
    found = {}
    for name, without in (
        ("whole", WithoutPart()),
        ("scratch", WithoutPart(weights=True)),
        ("cross-entropy", WithoutPart(teacher=True)),
        ("blind", WithoutPart(groups=True)),
    ):
        recipe = replace(plain, without=without)
        done = run_recipe(recipe, tmp_path / name, assess=nothing, date="2026-01-01", data_folder=data)
        assert done is not None
        found[name] = done.metrics["reports"]
    assert len({json.dumps(reports["width"]["held"]) for reports in found.values()}) == 1
    cuts = {name: load_model(tmp_path / name / "width" / "model").state_dict() for name in found}
    first = "backbone.layers.0.mixer.A_log"
    assert torch.equal(cuts["whole"][first], cuts["cross-entropy"][first])
    assert not torch.equal(cuts["whole"][first], cuts["scratch"][first])
    ends = {name: reports["distil-2"]["metrics"] for name, reports in found.items()}
    assert ends["whole"]["kl"] < ends["scratch"]["kl"]
    assert ends["whole"]["course"][0]["loss"] < 2 < ends["cross-entropy"]["course"][0]["loss"]


@pytest.mark.slow
def test_a_model_that_fits_after_its_depth_is_not_cut_in_width(tmp_path: Path, teacher: Path, data: Path) -> None:
    recipe = recipe_of(tmp_path, teacher, ranking=None)
    budget = replace(recipe.budget, share=0.97)
    recipe = replace(recipe, budget=budget, stages={name: recipe.stages[name] for name in ("depth", "width")})
    done = run_recipe(recipe, tmp_path / "run", assess=nothing, date="2026-01-01", data_folder=data)
    assert done is not None
    depth, width = (done.metrics["reports"][name] for name in ("depth", "width"))
    assert width["metrics"]["within_budget"] is True
    assert width["held"] == depth["held"]
    assert width["metrics"]["kl"] == depth["metrics"]["kl"] > 0
