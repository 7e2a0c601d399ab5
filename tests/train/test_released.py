"""Released models: found by name, small, with a card that says what they do, and they do it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

import tandem
from tandem.align import recipe_files as align_recipes
from tandem.compress import recipe_files as compress_recipes
from tandem.evaluation.run import evaluate_models
from tandem.evaluation.settings import EvaluationSettings
from tandem.model.tokenizer import load_tokenizer
from tandem.spec.catalog import find_weights, load_spec, released_names
from tandem.train.data.procedural import evaluation_problems
from tandem.train.evaluate import task_accuracy
from tandem.train.recipe_files import recipe_names

NAMES = ("nano-hybrid", "nano-hybrid-fp8", "nano-long", "nano-transformer")
ALIGNED = tuple(name for name in released_names() if name in align_recipes.recipe_names())


def card(folder: Path) -> dict[str, Any]:
    _, front, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    read: dict[str, Any] = yaml.safe_load(front)
    return read


def size(names: Iterable[str]) -> int:
    return sum(file.stat().st_size for name in names for file in find_weights(name).rglob("*"))


def test_released_models_are_those_of_recipes_and_small() -> None:
    bases, rest = set(recipe_names()), {*align_recipes.recipe_names(), *compress_recipes.recipe_names()}
    assert set(NAMES) <= set(released_names()) <= bases | rest
    assert size(bases & set(released_names())) <= 30e6
    assert all(size([name]) <= 8.5e6 for name in rest & set(released_names()))


@pytest.mark.parametrize("name", NAMES)
def test_a_released_model_is_found_by_its_name_and_has_its_cards(name: str) -> None:
    folder = find_weights(name.upper())
    assert find_weights(folder / "config.json") == folder
    spec = load_spec(name)
    model = tandem.load_model(name, dtype="auto")
    assert sum(p.numel() for p in model.parameters()) == spec.parameters
    assert str(next(model.parameters()).dtype) == "torch.bfloat16"
    front = card(folder)
    assert front["license"] == "apache-2.0"
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert f"tandem train {name}\n" in text
    assert f"{spec.parameters:,} parameters" in text
    data = (folder / "DATA.md").read_text(encoding="utf-8")
    assert "MIT License" in data
    assert "/work" not in text + data


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_released_model_answers_as_its_card_says(name: str) -> None:
    (index,) = card(find_weights(name))["model-index"]
    stated = {result["dataset"]["name"]: result["metrics"][0]["value"] for result in index["results"]}
    task = max(stated, key=lambda task: stated[task])
    model, tokenizer = tandem.load_model(name), load_tokenizer(name)
    found = task_accuracy(model, tokenizer, task, evaluation_problems(task, 60))
    assert found.low - 0.02 <= stated[task] <= found.high + 0.02
    assert stated[task] > 0.3


def stated_shares(folder: Path, stage: str) -> dict[str, tuple[float, float, float]]:
    """Share right with its interval, by what was asked, of a stage's row in the card of an aligned model."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (folder / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith(("| after |", f"| {stage} |"))
    ]
    head, row = rows[-2:]
    numbers = [[float(number) / 100 for number in re.findall(r"([\d.]+)%", cell)] for cell in row[1:]]
    return {asked: (found[0], found[1], found[2]) for asked, found in zip(head[1:], numbers, strict=True) if found}


@pytest.mark.parametrize("name", ALIGNED)
def test_an_aligned_model_has_its_card_and_its_chat_format(name: str) -> None:
    pytest.importorskip("trl", reason="pip install tandem-lm[train]")
    folder = find_weights(name)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert card(folder)["base_model"] == align_recipes.load_recipe(name).base
    assert f"tandem align {name}\n" in text
    assert f"{load_spec(name).parameters:,} parameters" in text
    assert "/work" not in text
    assert stated_shares(folder, "final")["reasoning, thinking on"][0] > 0.4
    template = load_tokenizer(name).template
    assert template is not None
    assert "no_think" in template


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIGNED)
def test_an_aligned_model_answers_as_its_card_says(name: str) -> None:
    pytest.importorskip("trl", reason="pip install tandem-lm[train]")
    recipe = align_recipes.load_recipe(name)
    settings = EvaluationSettings(suites=("reasoning", "tools"), tasks=recipe.tasks, problems=25, budgets=(), max_tokens=256)
    found = evaluate_models([name], settings)["models"][0]["metrics"]
    stated = stated_shares(find_weights(name), "final")
    for suite in ("reasoning", "tools"):
        score = found[suite]["thinking on"]["all"]
        share, low, high = stated[f"{suite}, thinking on"]
        assert score["low"] - 0.02 <= share <= score["high"] + 0.02
        assert low <= share <= high
