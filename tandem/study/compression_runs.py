"""Finished compression runs as data: distance from the teacher, next-token loss, right answers and bytes after every stage.

FOLDER/<variant>/seed-<k>/
metrics.json      what `tandem compress` left: by stage the cut or the distillation, held-out text, evaluation
throughput.json   beside the variants: tokens a second of teacher and student in the engine, where it was measured
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.spec.errors import SpecError
from tandem.study.alignment_runs import Question, accuracy_of, mean
from tandem.study.seeds import runs_in

TEACHER = "teacher"
"""The report of the model that is compressed."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A model after a stage, or the teacher. Losses are nats a learned token of held-out text."""

    cut: bool
    total_bytes: int
    parameters: int
    kl: float | None = None
    """Distance from the teacher; None where it was not judged."""
    nll: float | None = None
    """Of the true next token."""
    tokens: int = 0
    """Distilled on in this stage."""
    course: tuple[tuple[int, float], ...] = ()
    """Tokens and held-out loss on the way, in order; the loss is the one that is learned."""
    accuracy: Mapping[Question, Mapping[str, float]] = field(default_factory=dict)
    """Share of right answers by question and task (`all`: every task); empty where none was asked."""

    @property
    def overall(self) -> float | None:
        """Mean of the right answers over suites and ways of asking."""
        return mean([tasks["all"] for tasks in self.accuracy.values()])

    def right(self, question: Question) -> float | None:
        """Right answers; None where that was not asked."""
        return self.accuracy.get(question, {}).get("all")


@dataclass(frozen=True, kw_only=True)
class CompressionRun:
    """A finished run: the teacher and every stage, in order."""

    variant: str
    seed: int
    stages: Mapping[str, StageResult]
    seconds: float

    def __post_init__(self) -> None:
        if TEACHER not in self.stages or not any(stage.tokens for stage in self.stages.values()):
            raise SpecError(f"{self.variant}/seed-{self.seed}: must report its teacher and a distillation")

    @property
    def teacher(self) -> StageResult:
        """The model that was compressed."""
        return self.stages[TEACHER]

    @property
    def last(self) -> StageResult:
        """The model at the end."""
        return list(self.stages.values())[-1]

    @property
    def last_cut(self) -> StageResult | None:
        """The model right after the last cut."""
        return next((stage for stage in reversed(list(self.stages.values())) if stage.cut), None)

    @property
    def tokens(self) -> int:
        """Distilled on, over all stages."""
        return sum(stage.tokens for stage in self.stages.values())

    @property
    def share(self) -> float:
        """Of the teacher's bytes that the last model takes."""
        return self.last.total_bytes / self.teacher.total_bytes


def read_run(folder: Path, variant: str, seed: int) -> CompressionRun | None:
    """The run in a folder, None where it has not finished. Raises SpecError where its files cannot be read."""
    if not (folder / "metrics.json").is_file():
        return None
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return CompressionRun(
            variant=variant,
            seed=seed,
            stages={name: _stage(report) for name, report in metrics["reports"].items()},
            seconds=float(metrics["seconds"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as wrong:
        raise SpecError(f"{folder}: is no finished run ({type(wrong).__name__}: {' '.join(str(wrong).split())})") from None


def _stage(report: Mapping[str, Any]) -> StageResult:
    found = report.get("metrics", {})
    course = sorted((int(point["tokens"]), float(point["loss"])) for point in found.get("course", ()))
    return StageResult(
        cut=str(report.get("what", "")).startswith("cut"),
        total_bytes=int(report["held"]["total_bytes"]),
        parameters=int(report["held"]["parameters"]),
        kl=None if found.get("kl") is None else float(found["kl"]),
        nll=None if found.get("nll") is None else float(found["nll"]),
        tokens=int(found.get("tokens", 0)),
        course=tuple(course),
        accuracy=accuracy_of(report.get("evaluation") or {}),
    )


def read_runs(folder: Path) -> dict[str, dict[int, CompressionRun]]:
    """All finished runs by variant and seed. Raises SpecError where there is none."""
    return runs_in(folder, read_run, made_by="benchmarks/compression_runs.py")


def as_row(run: CompressionRun) -> dict[str, Any]:
    """The numbers of a run for tables."""
    cut = run.last_cut
    return {
        "variant": run.variant,
        "seed": run.seed,
        "stages": list(run.stages),
        "tokens": run.tokens,
        "parameters": run.last.parameters,
        "share": run.share,
        "kl_after_cut": None if cut is None else cut.kl,
        "kl": run.last.kl,
        "nll": run.last.nll,
        "teacher_overall": run.teacher.overall,
        "overall": run.last.overall,
        "accuracy": {", ".join(question): tasks["all"] for question, tasks in run.last.accuracy.items()},
        "seconds": run.seconds,
    }
