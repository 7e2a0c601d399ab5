"""Finished training runs, read from their folders: `FOLDER/<variant>/seed-<k>` with what `tandem train` leaves there.

metrics.json      the last step, verified answers by task, facts found in long texts by kind and length
metrics.jsonl     every step and every evaluation on held-out text
recipe.json       the settings
long.json         loss on held-out sequences of the long-context phase by source, where it was measured
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.spec.errors import SpecError
from tandem.study.seeds import runs_in

Share = Mapping[str, float]
"""accuracy, low, high, count: as metrics.json has a task."""
FINAL = 0.05
"""Share of the steps, at the end, whose losses are a run's final training loss."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A finished run. Losses are nats a learned token."""

    variant: str
    seed: int
    tokens: tuple[int, ...]
    """Positions trained after each step."""
    losses: tuple[float, ...]
    held_out: Mapping[str, float]
    """Loss by source at the end."""
    accuracy: Mapping[str, Share]
    """By task."""
    needles: Mapping[str, Mapping[int, Share]]
    """By kind and by tokens of the prompt."""
    long_held_out: Mapping[str, float]
    """Loss by source on held-out sequences of the long-context phase; empty where it was not measured."""
    seconds: float
    tokens_per_s: float
    """Median of the steps."""
    precision: str

    def __post_init__(self) -> None:
        if not self.losses or len(self.losses) != len(self.tokens):
            raise SpecError(f"{self.variant}/seed-{self.seed}: its journal has no steps")

    @property
    def final_loss(self) -> float:
        """Mean training loss of the last twentieth of the steps."""
        count = max(1, round(FINAL * len(self.losses)))
        return sum(self.losses[-count:]) / count

    @property
    def held_out_loss(self) -> float | None:
        """Mean over the sources; None without held-out text."""
        return sum(self.held_out.values()) / len(self.held_out) if self.held_out else None

    @property
    def mean_accuracy(self) -> float | None:
        """Mean over the tasks; None where none was asked for."""
        shares = [found["accuracy"] for found in self.accuracy.values()]
        return sum(shares) / len(shares) if shares else None

    def needles_at(self, length: int) -> float | None:
        """Mean over the kinds at one length; None where it was not asked for."""
        shares = [by_length[length]["accuracy"] for by_length in self.needles.values() if length in by_length]
        return sum(shares) / len(shares) if shares else None


def read_run(folder: Path, variant: str, seed: int) -> TrainingRun | None:
    """The run in a folder, None where it has not finished. Raises SpecError where its files cannot be read."""
    if not (folder / "metrics.json").is_file():
        return None
    try:
        metrics, recipe = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("metrics", "recipe"))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        needles, long = metrics.get("needles", {}), _there(folder / "long.json")
        steps = [line for line in lines if line["kind"] == "step"]
        held_out = [line for line in lines if line["kind"] == "held_out"]
        return TrainingRun(
            variant=variant,
            seed=seed,
            tokens=tuple(int(step["tokens"]) for step in steps),
            losses=tuple(float(step["loss"]) for step in steps),
            held_out={k: float(v) for k, v in held_out[-1]["loss"].items()} if held_out else {},
            accuracy=metrics.get("accuracy", {}),
            needles={kind: {int(n): found for n, found in by.items()} for kind, by in needles.items()},
            long_held_out={name: float(loss) for name, loss in long.items()},
            seconds=float(metrics["steps_s"]),
            tokens_per_s=_median([float(step["tokens_per_s"]) for step in steps]),
            precision=str(recipe["precision"]["linears"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as wrong:
        raise SpecError(f"{folder}: is no finished run ({type(wrong).__name__}: {' '.join(str(wrong).split())})") from None


def _there(file: Path) -> dict[str, Any]:
    """What a file holds that not every run has."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def read_runs(folder: Path) -> dict[str, dict[int, TrainingRun]]:
    """All finished runs by variant and seed. Raises SpecError where there is none."""
    return runs_in(folder, read_run, made_by="benchmarks/pretraining_runs.py")


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def as_row(run: TrainingRun) -> dict[str, Any]:
    """The numbers of a run for tables."""
    return {
        "variant": run.variant,
        "seed": run.seed,
        "tokens": run.tokens[-1],
        "loss": run.final_loss,
        "held_out_loss": run.held_out_loss,
        "held_out": dict(run.held_out),
        "accuracy": run.mean_accuracy,
        "by_task": {task: found["accuracy"] for task, found in run.accuracy.items()},
        "needles": {str(n): run.needles_at(n) for n in sorted({n for by in run.needles.values() for n in by})},
        "long_held_out": dict(run.long_held_out),
        "seconds": run.seconds,
        "tokens_per_s": run.tokens_per_s,
        "precision": run.precision,
    }
