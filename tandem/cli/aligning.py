"""`tandem align`: run a recipe's stages on a base checkpoint."""

from __future__ import annotations

import datetime
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tandem.cli.assessing import assess
from tandem.cli.needed import need

if TYPE_CHECKING:
    from tandem.align.recipe import AlignRecipe


def align(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's name or YAML file; without one, all are listed.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FIELD.PATH=VALUE]...", help="Settings to change: seed=1 stages.dpo.dpo.rounds=1."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; one that is there is gone on with. Default: out/align/RECIPE.")
    ] = None,
    json_out: Annotated[bool, typer.Option("--json", help="Print one JSON object (SI units) on stdout.")] = False,
) -> None:
    """Make a chat model of a base model: fine-tuning, reinforcement learning, preferences, merge; evaluated stage by stage."""
    from tandem.cli.app import emit

    need("torch", "trl", "reasoning_gym", doing="alignment")
    from tandem.align.recipe_files import load_recipe, recipe_names

    if recipe is None:
        return _list([load_recipe(name) for name in recipe_names()], json_out)
    chosen = load_recipe(recipe, changes or ())
    from tandem.align.run import run_recipe
    from tandem.cli.align_progress import Progress
    from tandem.engine.rollout import EngineRollouts

    with Progress() as progress:
        aligned = run_recipe(
            chosen,
            out or Path("out/align") / chosen.name,
            make_generator=EngineRollouts,
            assess=lambda folder, last: _assess(chosen, folder, last),
            date=datetime.date.today().isoformat(),
            command=shlex.join(["tandem", "align", recipe, *(changes or ())]),
            listen=progress.listen,
        )
    if json_out:
        return emit(aligned.to_json())
    from tandem.report import text
    from tandem.report.alignment_text import alignment_text

    return text.console().print(alignment_text(aligned.to_json()))


def _assess(recipe: AlignRecipe, folder: Path, last: bool) -> dict[str, Any]:
    """Held-out questions of a recipe, put to a checkpoint; to the last one at every thinking budget too."""
    part = recipe.evaluate
    return assess(
        folder,
        tasks=recipe.tasks,
        problems=part.problems,
        max_tokens=part.max_tokens,
        budgets=part.budgets if last else (),
    )


def _list(recipes: list[AlignRecipe], json_out: bool) -> None:
    from tandem.cli.app import emit
    from tandem.report import text

    if json_out:
        return emit({"items": [{"name": r.name, "about": r.about, "runs_here": r.plan_only is None} for r in recipes]})
    out = text.console()
    for r in recipes:
        out.print(f"{r.name:24} {r.about}{'' if r.plan_only is None else f' (not here: {r.plan_only})'}", soft_wrap=True)
    return None
