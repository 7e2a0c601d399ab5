"""`tandem compress`: make a smaller model, or look for its shape."""

from __future__ import annotations

import datetime
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tandem.cli.assessing import assess
from tandem.cli.needed import need
from tandem.spec.errors import SpecError
from tandem.spec.files import require_folder, write_whole
from tandem.spec.units import require_number

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
    hardware: Annotated[
        str | None,
        typer.Option(help="GPU that deployments are predicted on instead of the recipe's; `host` is this machine."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; one that is there is gone on with. Default: out/compress/RECIPE.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="GiB of weights and hidden states held while scoring and cutting. Default: no bound.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show the candidates and what each would do; run nothing.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML page of the run or the plan here.")] = None,
    json_out: Annotated[bool, typer.Option("--json", help="Print one JSON object (SI units) on stdout.")] = False,
) -> None:
    """Make a model smaller until it fits a budget: layers and widths, judged by the deployment that they make possible."""
    from tandem.cli.app import emit
    from tandem.compress.recipe import plan_json, search_recipe
    from tandem.compress.recipe_files import load_recipe, recipe_names
    from tandem.report import text

    require_folder("report", report)
    if recipe is None:
        return _list([load_recipe(name) for name in recipe_names()], json_out)
    settings = [*(changes or ()), *([f"objective.kind={objective}"] if objective is not None else ())]
    chosen = load_recipe(recipe, settings)
    if hardware is not None:
        settings += _on(chosen, hardware)
        chosen = load_recipe(recipe, settings)
    if memory is not None:
        chosen = replace(chosen, memory_bytes=round(require_number("memory", memory, high=1e6) * 2**30))
    if not plan:
        return _run(chosen, out, shlex.join(["tandem", "compress", recipe, *settings]), report, json_out)
    with text.progress("searching") as step:
        found = plan_json(chosen, search_recipe(chosen, progress=step))
    if report is not None:
        from tandem.report.compress_html import compression_plan_page

        write_whole(report, compression_plan_page(found))
    if json_out:
        return emit(found)
    from tandem.report.compress_text import compress_plan_text

    return text.console().print(compress_plan_text(found))


def _on(recipe: CompressRecipe, hardware: str) -> list[str]:
    """The settings that predict a recipe's objectives on other hardware."""
    if recipe.objective is None:
        raise SpecError(f"--hardware={hardware!r}: {recipe.name} has no objective that would be predicted on it")
    parts = ("fixed_batch", "cluster")
    return [f"objective.{part}.hardware={hardware}" for part in parts if getattr(recipe.objective, part) is not None]


def _run(recipe: CompressRecipe, out: Path | None, command: str, report: Path | None, json_out: bool) -> None:
    from tandem.cli.app import emit

    need("torch", "trl", "reasoning_gym", doing="compression")
    from tandem.cli.align_progress import Progress
    from tandem.compress.run import run_recipe

    with Progress() as progress:
        done = run_recipe(
            recipe,
            out or Path("out/compress") / recipe.name,
            assess=_assess,
            date=datetime.date.today().isoformat(),
            command=command,
            listen=progress.listen,
        )
    if done is None:  # a rank behind the first
        return None
    if report is not None:
        from tandem.report.compress_html import compression_page
        from tandem.spec.catalog import load_spec

        teacher, student = load_spec(recipe.teacher), load_spec(done.checkpoint)
        write_whole(report, compression_page(recipe.name, done.to_json(), teacher=teacher, student=student))
    if json_out:
        return emit(done.to_json())
    from tandem.report import text
    from tandem.report.compress_text import compressed_text

    return text.console().print(compressed_text(done.to_json()))


def _assess(folder: Path, recipe: CompressRecipe) -> dict[str, Any]:
    """Held-out questions of a recipe, put to a checkpoint."""
    part = recipe.evaluate
    assert part is not None
    return assess(folder, tasks=part.tasks, problems=part.problems, max_tokens=part.max_tokens)


def _list(recipes: list[CompressRecipe], json_out: bool) -> None:
    from tandem.cli.app import emit
    from tandem.report import text

    if json_out:
        return emit({"items": [{"name": r.name, "about": r.about, "runs_here": r.plan_only is None} for r in recipes]})
    out = text.console()
    for r in recipes:
        out.print(f"{r.name:24} {r.about}{'' if r.plan_only is None else f' (not here: {r.plan_only})'}", soft_wrap=True)
    return None
