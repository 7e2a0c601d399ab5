"""Released models: found by name, small, with a card that says what they do, and they do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import tandem
from tandem.model.tokenizer import load_tokenizer
from tandem.spec.catalog import find_weights, load_spec, released_names
from tandem.train.data.procedural import evaluation_problems
from tandem.train.evaluate import task_accuracy
from tandem.train.recipe_files import recipe_names

NAMES = ("nano-hybrid", "nano-long", "nano-transformer")


def card(folder: Path) -> dict[str, Any]:
    _, front, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    read: dict[str, Any] = yaml.safe_load(front)
    return read


def test_released_models_are_those_of_recipes_and_small() -> None:
    assert set(NAMES) <= set(released_names()) <= set(recipe_names())
    folders = [find_weights(name) for name in released_names()]
    assert sum(file.stat().st_size for folder in folders for file in folder.rglob("*")) <= 30e6


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
