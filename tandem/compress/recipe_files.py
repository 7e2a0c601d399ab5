"""Recipes of compression as YAML files: see `tandem.spec.recipes`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tandem.compress.recipe import CompressRecipe
from tandem.spec.recipes import names_in, read_recipe, recipes_folder


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with Tandem."""
    return names_in(recipes_folder() / "compress")


def load_recipe(name_or_path: str | Path, changes: Sequence[str] = ()) -> CompressRecipe:
    """A recipe, changed by `field.path=value`. Raises SpecError for a name, a field or a value that is not known."""
    return read_recipe(CompressRecipe, recipes_folder() / "compress", name_or_path, changes)[0]
