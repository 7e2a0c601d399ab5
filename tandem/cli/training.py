"""`tandem train`: run a recipe, or say what it would take."""

from __future__ import annotations

import datetime
import shlex
from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.needed import need
from tandem.spec.errors import SpecError


def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's name or YAML file; without one, all are listed.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FIELD.PATH=VALUE]...", help="Settings to change: batch.tokens=1e6 optimiser.lr=1e-3."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; one that is there is gone on with. Default: out/train/RECIPE.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Prepared data that runs may share. Default: within the run.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what the run takes and train nothing.")] = False,
    hardware: Annotated[
        str | None, typer.Option(help="With --plan: GPU to plan for; default the recipe's, else this machine.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="With --plan: how many of them.")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard's files too.")] = False,
    json_out: Annotated[bool, typer.Option("--json", help="Print one JSON object (SI units) on stdout.")] = False,
) -> None:
    """Train a model by a recipe: data, pre-training in phases, checkpoints, evaluation. Under torchrun, on many ranks."""
    from tandem.cli.app import emit
    from tandem.train.recipe_files import load_recipe, recipe_names

    if recipe is None:
        return _list(recipe_names(), json_out)
    chosen, folder = load_recipe(recipe, changes or ())
    if not plan or (hardware is None and chosen.hardware is None):
        need("torch", doing="training")
    if plan:
        from tandem.report import text, training_text
        from tandem.train.plan import plan_run

        planned = plan_run(chosen, hardware=hardware, gpus=gpus)
        if json_out:
            return emit(planned.to_json())
        return text.console().print(training_text.plan_text(planned.to_json()))
    for option, value in (("--hardware", hardware), ("--gpus", gpus)):
        if value is not None:
            raise SpecError(f"{option}={value!r}: changes nothing without --plan")
    from tandem.cli.train_progress import Progress
    from tandem.train.run import run_recipe

    with Progress(chosen) as progress:
        trained = run_recipe(
            chosen,
            folder,
            out or Path("out/train") / chosen.name,
            date=datetime.date.today().isoformat(),
            command=shlex.join(["tandem", "train", recipe, *(changes or ())]),
            data_folder=data,
            listen=progress.listen,
            tensorboard=tensorboard,
        )
    if trained is None:  # a rank that is not the first
        return None
    if json_out:
        return emit(trained.to_json())
    return progress.summary(trained.checkpoint, trained.metrics)


def _list(names: tuple[str, ...], json_out: bool) -> None:
    from tandem.cli.app import emit
    from tandem.report import text
    from tandem.train.recipe_files import load_recipe

    loaded = [load_recipe(name)[0] for name in names]
    if json_out:
        return emit({"items": [{"name": r.name, "about": r.about, "runs_here": r.plan_only is None} for r in loaded]})
    out = text.console()
    for r in loaded:
        out.print(f"{r.name:22} {r.about}{'' if r.plan_only is None else ' (--plan only)'}", soft_wrap=True)
    return None
