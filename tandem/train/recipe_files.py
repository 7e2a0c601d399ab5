"""Recipes of training as YAML files and as JSON: see `tandem.spec.recipes`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tandem.spec.recipes import build, names_in, read_recipe, recipes_folder
from tandem.train.recipe import Recipe


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with Tandem."""
    return names_in(recipes_folder())


def load_recipe(name_or_path: str | Path, changes: Sequence[str] = ()) -> tuple[Recipe, Path]:
    """A recipe, changed by `field.path=value`, and the folder that its paths start from. Raises SpecError as `read_recipe`."""
    return read_recipe(Recipe, recipes_folder(), name_or_path, changes)


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON data, every field stated; `recipe_from_json` reads it."""
    data: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return data


def recipe_from_json(data: dict[str, Any]) -> Recipe:
    """A recipe that `recipe_json` wrote."""
    return build(Recipe, data)
