"""Finished alignment runs, read from their folders: `FOLDER/<variant>/seed-<k>` with what `tandem align` leaves there.

metrics.json      reports of every stage: evaluation on held-out questions, course of training, sweep of the merge
budgets.json      evaluation at thinking budgets of the model after one stage, where it was made
throughput.json   beside the variants: tokens a second of the aligned models in the engine, where it was measured
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.spec.errors import SpecError
from tandem.study.seeds import runs_in

FINAL = "final"
"""The report of the model that ships."""
Question = tuple[str, str]
"""A suite and how it was asked: `("reasoning", "thinking on")`."""


@dataclass(frozen=True, kw_only=True)
class BudgetPoint:
    """What reasoning questions came to at one thinking budget (tokens). Shares are of answers, lengths means in tokens."""

    budget: int
    accuracy: float
    one_mark: float | None
    """Exactly one closing mark, and no second one where the model is left alone after it."""
    forced: float | None
    """Blocks that the budget closed."""
    answer_tokens: float | None
    thinking_tokens: float | None


@dataclass(frozen=True, kw_only=True)
class CoursePoint:
    """Some steps of reinforcement learning: mean reward, and KL to the model before the stage (nats a token)."""

    step: int
    reward: float
    kl: float | None


@dataclass(frozen=True, kw_only=True)
class AlignmentRun:
    """A finished run. Accuracies are shares of right answers to held-out questions."""

    variant: str
    seed: int
    accuracy: Mapping[str, Mapping[Question, Mapping[str, float]]]
    """By stage (`base` first, `final` last), by question, by task; `all` is the whole suite."""
    after: Mapping[str, str]
    """The stage that each stage goes on from."""
    budgets: Mapping[str, tuple[BudgetPoint, ...]]
    """By stage, smallest budget first: `final`, and the one of budgets.json."""
    courses: Mapping[str, tuple[CoursePoint, ...]]
    """By stage of reinforcement learning."""
    sweeps: Mapping[str, tuple[tuple[float, float], ...]]
    """By stage that merges: alpha and share verified, smallest alpha first."""
    merged: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """By stage that merges: the two stages whose models it merges."""
    seconds: float

    def __post_init__(self) -> None:
        if FINAL not in self.accuracy:
            raise SpecError(f"{self.variant}/seed-{self.seed}: has no report of its last model")

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that were evaluated, in order."""
        return tuple(self.accuracy)

    def right(self, stage: str, question: Question, task: str = "all") -> float | None:
        """Accuracy after a stage; None where that was not asked."""
        return self.accuracy.get(stage, {}).get(question, {}).get(task)

    def suite(self, stage: str, suite: str) -> float | None:
        """Mean of the accuracies of a suite over the ways in which it was asked; None where it was not."""
        return mean([tasks["all"] for (name, _), tasks in self.accuracy.get(stage, {}).items() if name == suite])

    def overall(self, stage: str) -> float | None:
        """Mean of the accuracies of all suites and ways of asking."""
        return mean([tasks["all"] for tasks in self.accuracy.get(stage, {}).values()])


@dataclass(frozen=True, kw_only=True)
class ThroughputSetting:
    """Generation at one batch and length, models in turns: by round, tokens a second of each variant."""

    batch: int
    prompt_tokens: int
    output_tokens: int
    rounds: tuple[Mapping[str, float], ...]

    def of(self, variant: str) -> dict[int, float]:
        """Tokens a second by round."""
        return {number: found[variant] for number, found in enumerate(self.rounds) if variant in found}


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What was measured, and on what."""

    machine: str
    settings: tuple[ThroughputSetting, ...]


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there; None where none is."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def read_run(folder: Path, variant: str, seed: int) -> AlignmentRun | None:
    """The run in a folder, None where it has not finished. Raises SpecError where its files cannot be read."""
    if not (folder / "metrics.json").is_file():
        return None
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        reports = metrics["reports"]
        evaluated = {name: report["evaluation"] for name, report in reports.items() if "evaluation" in report}
        return AlignmentRun(
            variant=variant,
            seed=seed,
            accuracy={name: accuracy_of(evaluation) for name, evaluation in evaluated.items()},
            after={name: report["after"] for name, report in reports.items() if "after" in report},
            budgets=_budgets(folder, evaluated),
            courses={name: _course(report) for name, report in reports.items() if report.get("what") == "grpo"},
            sweeps={name: _sweep(report) for name, report in reports.items() if report.get("what") == "merge"},
            merged=_merged(folder),
            seconds=float(metrics["seconds"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as wrong:
        raise SpecError(f"{folder}: is no finished run ({type(wrong).__name__}: {' '.join(str(wrong).split())})") from None


def accuracy_of(evaluation: Mapping[str, Any]) -> dict[Question, dict[str, float]]:
    """Shares of right answers in what `tandem evaluate` found, by question and task; answers at thinking budgets left out."""
    return {
        (suite, mode): {"all": float(tasks["all"]["accuracy"])} | {task: float(tasks[task]["accuracy"]) for task in tasks}
        for suite, modes in evaluation.items()
        if suite != "budgets"
        for mode, tasks in modes.items()
    }


def _budgets(folder: Path, evaluated: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[BudgetPoint, ...]]:
    found = {name: evaluation["budgets"] for name, evaluation in evaluated.items() if evaluation.get("budgets")}
    file = folder / "budgets.json"
    if file.is_file():
        more = json.loads(file.read_text(encoding="utf-8"))
        found[str(more["stage"])] = more["budgets"]
    return {
        stage: tuple(sorted((_point(point) for point in points), key=lambda point: point.budget))
        for stage, points in found.items()
    }


def _point(point: Mapping[str, Any]) -> BudgetPoint:
    return BudgetPoint(
        budget=int(point["budget"]),
        accuracy=float(point["accuracy"]),
        one_mark=_number(point["one_closing_mark_unaided"]),
        forced=_number(point["forced"]),
        answer_tokens=_number(point["answer_tokens"]),
        thinking_tokens=_number(point["thinking_tokens"]),
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _course(report: Mapping[str, Any]) -> tuple[CoursePoint, ...]:
    return tuple(
        CoursePoint(step=int(point["step"]), reward=float(point["reward"]), kl=_number(point.get("kl")))
        for point in report["metrics"]["course"]
    )


def _sweep(report: Mapping[str, Any]) -> tuple[tuple[float, float], ...]:
    return tuple(sorted((float(row["alpha"]), float(row["verified"])) for row in report["metrics"]["sweep"]))


def _merged(folder: Path) -> dict[str, tuple[str, str]]:
    stages = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["stages"]
    merges = {name: stage["merge"] for name, stage in stages.items() if stage["merge"] is not None}
    return {name: (str(merge["first"]), str(merge["second"])) for name, merge in merges.items()}


def read_runs(folder: Path) -> dict[str, dict[int, AlignmentRun]]:
    """All finished runs by variant and seed. Raises SpecError where there is none."""
    return runs_in(folder, read_run, made_by="benchmarks/alignment_runs.py")


def read_throughput(folder: Path) -> Throughput | None:
    """What was measured beside the runs, None where nothing was. Raises SpecError where the file cannot be read."""
    file = folder / "throughput.json"
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        settings = tuple(
            ThroughputSetting(
                batch=int(one["batch"]),
                prompt_tokens=int(one["prompt_tokens"]),
                output_tokens=int(one["output_tokens"]),
                rounds=tuple({name: float(rate) for name, rate in found.items()} for found in one["rounds"]),
            )
            for one in data["settings"]
        )
        return Throughput(machine=str(data["machine"]), settings=settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as wrong:
        raise SpecError(f"{file}: cannot be read ({type(wrong).__name__}: {' '.join(str(wrong).split())})") from None


def as_row(run: AlignmentRun) -> dict[str, Any]:
    """The numbers of a run for tables."""
    return {
        "variant": run.variant,
        "seed": run.seed,
        "stages": list(run.stages),
        "accuracy": {f"{suite}, {mode}": tasks["all"] for (suite, mode), tasks in run.accuracy[FINAL].items()},
        "overall": run.overall(FINAL),
        "seconds": run.seconds,
    }
