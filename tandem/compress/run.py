"""A compression from beginning to end: cut, distil, cut, distil; stopped and gone on with at will. Read `run_recipe` first."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tandem.compress.cards import model_card
from tandem.compress.data import Prepared, prepare_data
from tandem.compress.recipe import CompressRecipe
from tandem.compress.stages import Stage, run_cut, run_distil
from tandem.model.load import load_model, save_model
from tandem.model.memory import keep_freed_memory
from tandem.spec.catalog import find_weights, load_spec, read_json
from tandem.spec.errors import SpecError
from tandem.spec.files import write_whole
from tandem.train.loop import Listener
from tandem.train.ranks import Ranks, joined
from tandem.train.run_folder import claimed_folder

Assess = Callable[[Path, CompressRecipe], dict[str, Any]]
"""Figures of a checkpoint: its folder, and the recipe whose questions it is asked."""
_REPORT, _METRICS = "report.json", "metrics.json"
_MAY_DIFFER = ("about", "memory_bytes")


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What a run leaves."""

    checkpoint: Path
    metrics: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The contract's fields."""
        return {"checkpoint": str(self.checkpoint), "metrics": self.metrics}


def run_recipe(
    recipe: CompressRecipe,
    out: Path,
    *,
    assess: Assess,
    date: str,
    command: str | None = None,
    data_folder: Path | None = None,
    listen: Listener = lambda event: None,
) -> Compressed | None:
    """Run a recipe into the folder `out`, or go on with the run that is there; every rank calls this, the first one returns.

    A stage leaves `out/STAGE/model` and `out/STAGE/report.json`: what was cut and why, or how the distance from the teacher
    fell, and what `assess` found. The last model is `out/model`, in bf16 with its card. Data are prepared into `data_folder`
    (default: `out/data`). Raises SpecError for settings that cannot be run.
    """
    if recipe.plan_only is not None:
        raise SpecError(f"recipe={recipe.name!r}: {recipe.plan_only}; --plan shows its candidates")
    if not recipe.stages:
        raise SpecError("stages={}: nothing is run; state which cuts and distillations, or ask for --plan")
    teacher = find_weights(recipe.teacher)  # refused before anything is written
    stated = json.loads(json.dumps(asdict(recipe)))
    with joined() as ranks, ExitStack() as held:
        mine = claimed_folder(out, stated, may_differ=_MAY_DIFFER, holds=("model", *recipe.stages))
        ranks.by_first(lambda: held.enter_context(mine))
        if not torch.cuda.is_available():
            keep_freed_memory()
        run = _Run(recipe, teacher, out, data_folder or out / "data", assess, ranks, listen if ranks.first else _nobody)
        return run.to_the_end(date, command)


def _nobody(event: dict[str, Any]) -> None:
    """Told nothing: ranks behind the first."""


@dataclass
class _Run:
    recipe: CompressRecipe
    teacher: Path
    out: Path
    data: Path
    assess: Assess
    ranks: Ranks
    listen: Listener

    def to_the_end(self, date: str, command: str | None) -> Compressed | None:
        """Every stage that is not finished, then the model and its card."""
        recipe, out = self.recipe, self.out
        if (out / _METRICS).is_file():
            return Compressed(checkpoint=out / "model", metrics=dict(read_json(out / _METRICS)))
        prepared: list[Prepared] = []
        self.ranks.by_first(lambda: prepared.append(self._prepare()))
        self.ranks.barrier()
        data = prepared[0] if prepared else self._prepare()
        reports = {"teacher": self._teacher()}
        source = self.teacher
        for name in recipe.stages:
            reports[name] = self._stage(name, source, data)
            source = out / name / "model"
        if not self.ranks.first:
            return None
        model = load_model(source, dtype=torch.float32).to(torch.bfloat16)
        save_model(model, out / "model")
        write_whole(out / "model" / "README.md", model_card(recipe, model.spec, reports, date=date, command=command))
        metrics = {
            "teacher": reports["teacher"]["held"],
            "student": recipe.budget.held(model.spec),
            "evaluation": reports[list(recipe.stages)[-1]].get("evaluation"),
            "seconds": sum(report["seconds"] for report in reports.values()),
            "reports": reports,
        }
        write_whole(out / _METRICS, json.dumps(metrics, indent=1) + "\n")
        return Compressed(checkpoint=out / "model", metrics=metrics)

    def _prepare(self) -> Prepared:
        def tell(stage: str, source: str, documents: int) -> None:
            self.listen({"kind": "data", "stage": stage, "source": source, "documents": documents})

        return prepare_data(self.recipe, self.teacher, self.data, progress=tell)

    def _teacher(self) -> dict[str, Any]:
        spec = load_spec(self.teacher)
        return self._kept(
            self.out / "teacher.json",
            "teacher",
            lambda: {"stage": "teacher", "model": self.recipe.teacher, "held": self.recipe.budget.held(spec)},
            self.teacher,
        )

    def _stage(self, name: str, source: Path, data: Prepared) -> dict[str, Any]:
        part = self.recipe.stages[name]
        stage = Stage(
            recipe=self.recipe,
            name=name,
            source=source,
            teacher=self.teacher,
            out=self.out,
            data=data,
            ranks=self.ranks,
            listen=self.listen,
        )

        def work() -> dict[str, Any]:
            doing = "distillation" if part.distil is not None else f"cut in {part.cut}"
            self.listen({"kind": "stage", "stage": name, "doing": doing})
            metrics = run_distil(stage, part.distil) if part.distil is not None else run_cut(stage, part.cut or "width")
            spec = load_spec(self.out / name / "model")
            return {"stage": name, "what": doing, "held": self.recipe.budget.held(spec), "metrics": metrics}

        return self._kept(self.out / name / _REPORT, name, work, self.out / name / "model")

    def _kept(self, file: Path, name: str, work: Callable[[], dict[str, Any]], model: Path) -> dict[str, Any]:
        """The report that is there, or that of work which is done now and of the model's evaluation."""
        if file.is_file():
            return dict(read_json(file))
        started = time.perf_counter()
        report = work()
        if self.ranks.first:
            if self.recipe.evaluate is not None:
                self.listen({"kind": "stage", "stage": name, "doing": "evaluation"})
                report["evaluation"] = self.assess(model, self.recipe)
            report["seconds"] = time.perf_counter() - started
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(report, indent=1) + "\n")
            self.listen({"kind": "report", **report})
        self.ranks.barrier()
        return dict(read_json(file))
