"""Recipes of alignment as YAML files: see `tandem.spec.recipes`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tandem.align.recipe import AlignRecipe
from tandem.spec.recipes import names_in, read_recipe, recipes_folder


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with Tandem."""
    return names_in(recipes_folder() / "align")


def load_recipe(name_or_path: str | Path, changes: Sequence[str] = ()) -> AlignRecipe:
    """A recipe, changed by `field.path=value`. Raises SpecError for a name, a field or a value that is not known."""
    return read_recipe(AlignRecipe, recipes_folder() / "align", name_or_path, changes)[0]
