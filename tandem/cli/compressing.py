"""`tandem compress`: look for the shape of a smaller model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tandem.spec.errors import SpecError

if TYPE_CHECKING:
    from tandem.compress.recipe import CompressRecipe


def compress(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's name or YAML file; without one, all are listed.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FIELD.PATH=VALUE]...", help="Settings to change: budget.share=0.5 select.take=5."),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="fixed-batch or cluster: which of the recipe's objectives candidates are judged by.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show the candidates and what each would do; run nothing.")] = False,
    json_out: Annotated[bool, typer.Option("--json", help="Print one JSON object (SI units) on stdout.")] = False,
) -> None:
    """Make a model smaller until it fits a budget: layers and widths, judged by the deployment that they make possible."""
    from tandem.cli.app import emit
    from tandem.compress.recipe import plan_json, search_recipe
    from tandem.compress.recipe_files import load_recipe, recipe_names
    from tandem.report import text

    if recipe is None:
        return _list([load_recipe(name) for name in recipe_names()], json_out)
    chosen = load_recipe(recipe, [*(changes or ()), *([f"objective.kind={objective}"] if objective is not None else ())])
    if not plan:
        why = chosen.plan_only or "running follows in a later version"
        raise SpecError(f"recipe={recipe!r}: cannot be run: {why}; --plan shows its candidates")
    with text.progress("searching") as step:
        found = plan_json(chosen, search_recipe(chosen, progress=step))
    if json_out:
        return emit(found)
    from tandem.report.compress_text import compress_plan_text

    return text.console().print(compress_plan_text(found))


def _list(recipes: list[CompressRecipe], json_out: bool) -> None:
    from tandem.cli.app import emit
    from tandem.report import text

    if json_out:
        return emit({"items": [{"name": r.name, "about": r.about, "runs_here": r.plan_only is None} for r in recipes]})
    out = text.console()
    for r in recipes:
        out.print(f"{r.name:24} {r.about}{'' if r.plan_only is None else f' (not here: {r.plan_only})'}", soft_wrap=True)
    return None
