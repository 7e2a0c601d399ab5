"""The figures of the study of pre-training as plain numbers: means over seeds, smoothed where steps are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

from tandem.study.pretraining_claims import (
    FP8,
    FP8_TENSOR,
    FP32,
    HYBRID,
    LONG,
    ONE_BLEND,
    SHORT,
    TRANSFORMER,
    Runs,
    needle_lengths,
)
from tandem.study.pretraining_runs import TrainingRun
from tandem.study.result import Figure, Panel, Series
from tandem.study.seeds import half_interval

NAMES = {
    HYBRID: "hybrid, bf16", TRANSFORMER: "Transformer, bf16", FP8: "FP8 blocks", FP8_TENSOR: "FP8, a scale a tensor",
    FP32: "fp32", ONE_BLEND: "one blend", LONG: "long-context phase", SHORT: "as many tokens at the old length",
}  # fmt: skip
"""Variants in words."""
PANELS = {
    "number formats": (FP32, HYBRID, FP8, FP8_TENSOR),
    "hybrid and Transformer": (HYBRID, TRANSFORMER),
    "three phases and one blend": (HYBRID, ONE_BLEND),
}
POINTS = 60
"""Of a drawn curve; each is the mean of the steps around it."""
BEGIN = 0.1
"""Share of a run that a loss curve leaves out: the fall from a random model, which hides everything else."""
_MILLION = 1e6


def figures_of(runs: Runs) -> dict[str, Figure]:
    """Those whose runs are there, by name."""
    made = {
        "loss": _loss(runs),
        "gap": _gap(runs),
        "sources": _bars(
            {name: by_seed for name, by_seed in runs.items() if name not in (LONG, SHORT)},
            "Held-out loss over that of the hybrid in bf16",
            "per cent of the loss",
            lambda run: _over(run, runs.get(HYBRID, {})),
        ),
        "answers": _bars(runs, "Verified answers by task", "share right", _shares),
        "long": _bars(
            {name: by_seed for name, by_seed in runs.items() if name in (HYBRID, LONG, SHORT)},
            "Held-out loss on the long-context phase's sequences",
            "nats a token",
            lambda run: run.long_held_out,
        ),
        "needles": _needles(runs),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def smoothed(values: Sequence[float], points: int = POINTS) -> list[float]:
    """Means of `points` equal pieces, or the values themselves where they are fewer."""
    count = min(points, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def _mean_curve(runs: Iterable[TrainingRun]) -> tuple[list[float], list[float]]:
    """Millions of tokens and the mean loss over seeds, without the beginning."""
    curves = list(runs)
    steps = min(len(run.losses) for run in curves)
    begin = round(BEGIN * steps)
    mean = [sum(run.losses[i] for run in curves) / len(curves) for i in range(begin, steps)]
    return [n / _MILLION for n in smoothed(curves[0].tokens[begin:steps])], smoothed(mean)


def _loss(runs: Runs) -> Figure | None:
    panels = []
    for title, variants in PANELS.items():
        here = [name for name in variants if name in runs]
        series = [Series(name=NAMES[name], x=x, y=y, role=name) for name in here for x, y in [_mean_curve(runs[name].values())]]
        if len(series) > 1:
            panels.append(Panel(title=title, series=tuple(series)))
    if not panels:
        return None
    return Figure(
        title="Training loss",
        note=f"Mean over seeds; the first {BEGIN:.0%} are left out. The blend changes at 60 and 90 % of the tokens, the "
        "learning rate falls over the last 18 %.",
        x_title="million tokens",
        y_title="nats a learned token",
        panels=tuple(panels),
        y_log=True,
    )


def _gap(runs: Runs) -> Figure | None:
    series: list[Series] = []
    wide = runs.get(HYBRID, {})
    for name in (FP8, FP8_TENSOR, FP32):
        seeds = sorted(set(wide) & set(runs.get(name, {})))
        if not seeds:
            continue
        curves = [
            smoothed([100 * (b / a - 1) for a, b in zip(wide[s].losses, runs[name][s].losses, strict=False)]) for s in seeds
        ]
        x = [n / _MILLION for n in smoothed(wide[seeds[0]].tokens)]
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        series.append(Series(name=NAMES[name], x=x, y=mean, role=name))
        if len(seeds) > 1:
            for sign in (-1.0, 1.0):
                edge = [m + sign * half_interval(v) for m, v in zip(mean, zip(*curves, strict=True), strict=True)]
                series.append(Series(name=f"{NAMES[name]}, 95 %", x=x, y=edge, role=name, style="dash"))
    if not series:
        return None
    return Figure(
        title="Training loss over that of bf16",
        note="Step by step on the same batches from the same weights; dashed: 95 % intervals over seeds.",
        x_title="million tokens",
        y_title="per cent of the loss",
        panels=(Panel(title="hybrid", series=tuple(series)),),
    )


def _shares(run: TrainingRun) -> dict[str, float]:
    return {task: found["accuracy"] for task, found in run.accuracy.items()}


def _over(run: TrainingRun, base: Mapping[int, TrainingRun]) -> dict[str, float]:
    """Held-out loss by source, as per cent over that of the base at the same seed; empty where it has none."""
    if run.seed not in base:
        return {}
    wide = base[run.seed].held_out
    return {name: 100 * (loss / wide[name] - 1) for name, loss in run.held_out.items() if name in wide}


def _bars(runs: Runs, title: str, unit: str, values: Callable[[TrainingRun], Mapping[str, float]]) -> Figure | None:
    asked = {name: [run for run in runs[name].values() if values(run)] for name in NAMES if name in runs}
    here = {name: found for name, found in asked.items() if found}
    sets = [set(values(run)) for found in here.values() for run in found]
    cases = sorted(set.intersection(*sets)) if sets else []
    if not cases:
        return None
    series = []
    for place, (name, found) in enumerate(here.items()):
        shift = (place - (len(here) - 1) / 2) * 0.6 / max(1, len(here))
        points = [(i + shift, values(run)[case], f"seed {run.seed}") for i, case in enumerate(cases) for run in found]
        x, y, text = zip(*points, strict=True)
        series.append(Series(name=NAMES[name], x=x, y=y, text=text, role=name, style="markers"))
    return Figure(
        title=title,
        note="Each mark is a run.",
        x_title="",
        y_title=unit,
        panels=(Panel(title="at the end of the run", series=tuple(series)),),
        x_labels=tuple(cases),
    )


def _needles(runs: Runs) -> Figure | None:
    lengths = needle_lengths(runs)
    here = [name for name in (HYBRID, SHORT, LONG) if any(run.needles for run in runs.get(name, {}).values())]
    kinds = sorted({kind for name in here for run in runs[name].values() for kind in run.needles})
    if not lengths or len(here) < 2:
        return None
    panels = []
    for kind in kinds:
        series = []
        for name in here:
            points = [
                (float(n), sum(found) / len(found))
                for n in lengths
                if (
                    found := [run.needles[kind][n]["accuracy"] for run in runs[name].values() if n in run.needles.get(kind, {})]
                )
            ]
            x, y = zip(*points, strict=True) if points else ((), ())
            label = "before" if name == HYBRID else NAMES[name]
            series.append(Series(name=label, x=x, y=y, role=name))
        panels.append(Panel(title=kind, series=tuple(series)))
    return Figure(
        title="Needles found by length of the text",
        note="Mean over seeds. The base model was trained on sequences of 512 tokens.",
        x_title="tokens of the prompt",
        y_title="share found",
        panels=tuple(panels),
        x_log=True,
    )
