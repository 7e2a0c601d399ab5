"""An alignment from beginning to end: stage after stage, each one evaluated; stopped and gone on with at will."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tandem.align.cards import model_card
from tandem.align.chat import make_chat_model
from tandem.align.material import seed_of
from tandem.align.recipe import AlignRecipe
from tandem.align.rollout import Generator
from tandem.align.stages import Stage, run_stage
from tandem.model.hybrid import Decoder
from tandem.model.load import load_model, renamed, save_model
from tandem.model.memory import keep_freed_memory
from tandem.model.tokenizer import Tokenizer, load_tokenizer
from tandem.spec.catalog import find_weights, read_json
from tandem.spec.errors import SpecError
from tandem.spec.files import write_whole
from tandem.train.loop import Listener
from tandem.train.run_folder import claimed_folder

Assess = Callable[[Path, bool], dict[str, Any]]
"""Figures of a checkpoint: folder, and whether it is the aligned model, which is asked at every thinking budget too."""
_REPORT, _METRICS = "report.json", "metrics.json"
MakeGenerator = Callable[[Decoder, Tokenizer], Generator]


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """What a run leaves."""

    checkpoint: Path
    metrics: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The contract's fields."""
        return {"checkpoint": str(self.checkpoint), "metrics": self.metrics}


def run_recipe(
    recipe: AlignRecipe,
    out: Path,
    *,
    make_generator: MakeGenerator,
    assess: Assess,
    date: str,
    command: str | None = None,
    listen: Listener = lambda event: None,
) -> Aligned:
    """Run a recipe into the folder `out`, or go on with the run that is there: finished stages are not run again.

    A stage leaves `out/STAGE/model` (fp32, so that small steps are not lost between stages) and `out/STAGE/report.json`: what
    it learned from, the course of its training, and what `assess` found. The last model is `out/model`, in bf16 with its card,
    and is assessed as it is. Seconds are those of the processes that finished each part. Raises SpecError for settings that
    cannot be run.
    """
    if recipe.plan_only is not None:
        raise SpecError(f"recipe={recipe.name!r}: {recipe.plan_only}")
    find_weights(recipe.base)  # refused before anything is written
    with claimed_folder(out, json.loads(json.dumps(asdict(recipe))), may_differ=("about",), holds=("model", *recipe.stages)):
        if not torch.cuda.is_available():
            keep_freed_memory()
        finished = all((out / name / _REPORT).is_file() for name in recipe.stages) and (out / _METRICS).is_file()
        reports = {"base": _base(recipe, out, assess, listen)}
        for name in recipe.stages:
            reports[name] = _stage(recipe, name, out, make_generator, assess, listen)
        if finished:
            return Aligned(checkpoint=out / "model", metrics=dict(read_json(out / _METRICS)))
        return _finish(recipe, out, reports, assess, listen, date, command)


def _base(recipe: AlignRecipe, out: Path, assess: Assess, listen: Listener) -> dict[str, Any]:
    file = out / "base.json"
    if file.is_file():
        return dict(read_json(file))
    started = time.perf_counter()
    listen({"kind": "stage", "stage": "base", "doing": "evaluation"})
    report: dict[str, Any] = {"stage": "base", "model": recipe.base, "evaluation": assess(find_weights(recipe.base), False)}
    report["seconds"] = time.perf_counter() - started
    write_whole(file, json.dumps(report, indent=1) + "\n")
    listen({"kind": "report", **report})
    return report


def _stage(
    recipe: AlignRecipe, name: str, out: Path, make_generator: MakeGenerator, assess: Assess, listen: Listener
) -> dict[str, Any]:
    folder = out / name
    file = folder / _REPORT
    if file.is_file():
        return dict(read_json(file))
    started = time.perf_counter()
    before = recipe.before(name)
    source = find_weights(recipe.base) if before is None else out / before / "model"
    decoder = load_model(source)
    if before is None:
        decoder = renamed(decoder, name=recipe.name, context=recipe.context)
    tokenizer = make_chat_model(decoder, out / "tokenizer") if before is None else load_tokenizer(source)
    listen({"kind": "stage", "stage": name, "doing": recipe.stages[name].kind})
    stage = Stage(
        recipe=recipe,
        name=name,
        decoder=decoder,
        tokenizer=tokenizer,
        out=out,
        seed=seed_of(recipe.seed, name),
        make_generator=make_generator,
        listen=listen,
    )
    kind = recipe.stages[name].kind
    report: dict[str, Any] = {"stage": name, "what": kind, "after": before or "base", "metrics": run_stage(stage)}
    if kind in ("sft", "grpo", "dpo"):
        save_model(stage.decoder, folder / "model")
    if kind != "reward_model":
        trained = time.perf_counter()
        listen({"kind": "stage", "stage": name, "doing": "evaluation"})
        report["evaluation"] = assess(folder / "model", False)
        report["evaluation_s"] = time.perf_counter() - trained
    report["seconds"] = time.perf_counter() - started
    write_whole(file, json.dumps(report, indent=1) + "\n")
    listen({"kind": "report", **report})
    return report


def _finish(
    recipe: AlignRecipe,
    out: Path,
    reports: dict[str, dict[str, Any]],
    assess: Assess,
    listen: Listener,
    date: str,
    command: str | None,
) -> Aligned:
    folder = out / "model"
    started = time.perf_counter()
    decoder = load_model(out / recipe.last / "model").to(torch.bfloat16)
    save_model(decoder, folder)
    listen({"kind": "stage", "stage": "final", "doing": "evaluation"})
    final: dict[str, Any] = {"stage": "final", "after": recipe.last, "evaluation": assess(folder, True)}
    final["seconds"] = time.perf_counter() - started
    listen({"kind": "report", **final})
    reports = {**reports, "final": final}
    write_whole(folder / "README.md", model_card(recipe, decoder.spec, reports, date=date, command=command))
    metrics = {
        "evaluation": final["evaluation"],
        "seconds": sum(report["seconds"] for report in reports.values()),
        "reports": reports,
    }
    write_whole(out / _METRICS, json.dumps(metrics, indent=1) + "\n")
    return Aligned(checkpoint=folder, metrics=metrics)
