"""The figures of the study of compression as plain numbers: means over seeds, their 95 % intervals dashed beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tandem.study.alignment_figures import curve, numbers_in, throughput_figure
from tandem.study.alignment_runs import Throughput
from tandem.study.compression_claims import (
    CROSS_ENTROPY,
    DEPTH_ONLY,
    GROUP_BLIND,
    PRUNED,
    SCRATCH,
    WHOLE,
    WIDTH_ONLY,
    Measure,
    Runs,
    cut_kl,
    kl,
    nll,
)
from tandem.study.compression_runs import TEACHER, CompressionRun
from tandem.study.result import Figure, Panel, Series

NAMES = {
    WHOLE: "the whole recipe",
    PRUNED: "pruned, one cut in width",
    SCRATCH: "the same shape from scratch",
    CROSS_ENTROPY: "without the teacher",
    GROUP_BLIND: "heads ranked all together",
    DEPTH_ONLY: "depth only",
    WIDTH_ONLY: "width only",
}
"""Variants in words."""
_RECOVERY = {
    "what is left out": (PRUNED, SCRATCH, GROUP_BLIND),
    "depth against width": (DEPTH_ONLY, WIDTH_ONLY),
    "the whole recipe": (WHOLE,),
}
_LOSSES: Mapping[str, Measure] = {
    "KL from the teacher after the last cut": cut_kl,
    "KL from the teacher at the end": kl,
    "loss of the next token at the end": nll,
}


def figures_of(runs: Runs, throughput: Throughput | None) -> dict[str, Figure]:
    """Those whose runs are there, by name."""
    names = {TEACHER: "teacher", WHOLE: "compressed"}
    made = {
        "recovery": _recovery(runs),
        "losses": _losses(runs),
        "answers": _answers(runs),
        "throughput": throughput_figure(throughput, names, "Teacher and compressed model"),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def path_of(run: CompressionRun) -> dict[int, float]:
    """Held-out loss by tokens distilled on so far, over all distillations; the later one where they meet."""
    found: dict[int, float] = {}
    before = 0
    for stage in run.stages.values():
        found |= {before + tokens: loss for tokens, loss in stage.course}
        before += stage.tokens
    return found


def _points(runs: Sequence[CompressionRun]) -> Iterator[tuple[float, list[float]]]:
    paths = [path_of(run) for run in runs]
    for tokens in sorted(set.intersection(*(set(path) for path in paths))) if paths else ():
        yield float(tokens), [path[tokens] for path in paths]


def _recovery(runs: Runs) -> Figure | None:
    panels = []
    for title, variants in _RECOVERY.items():
        series = [s for name in variants for s in curve(NAMES[name], name, _points(list(runs.get(name, {}).values())))]
        if series:
            panels.append(Panel(title=title, series=tuple(series)))
    if not panels:
        return None
    return Figure(
        title="Recovery against tokens",
        note="Distance from the teacher on held-out text during distillation; means over seeds, dashed: 95 % intervals. Where "
        "the whole recipe cuts again, the distance jumps.",
        x_title="tokens distilled on",
        y_title="KL, nats a token",
        panels=tuple(panels),
    )


def _losses(runs: Runs) -> Figure | None:
    here = [name for name in NAMES if name in runs]
    panels = []
    for title, measure in _LOSSES.items():
        series = []
        for x, name in enumerate(here):
            points = [(found, f"seed {seed}") for seed, run in runs[name].items() if (found := measure(run)) is not None]
            if points:
                y, text = zip(*points, strict=True)
                series.append(Series(name=NAMES[name], x=[float(x)] * len(y), y=y, text=text, role=name, style="markers"))
        if series:
            panels.append(Panel(title=title, series=tuple(series)))
    if not panels:
        return None
    return Figure(
        title="Distance and loss of every variant",
        note="Held-out text; each mark is a run. Of two variants only those that claims compare have equal bytes and tokens.",
        x_title="",
        y_title="nats a token",
        panels=tuple(panels),
        x_labels=tuple(here),
    )


def _answers(runs: Runs) -> Figure | None:
    """The whole recipe after every stage, by suite and way of asking."""
    every = list(runs.get(WHOLE, {}).values())
    stages = list(dict.fromkeys(name for run in every for name in run.stages))
    asked = list(dict.fromkeys(question for run in every for question in run.teacher.accuracy))
    series = []
    for question in asked:
        points = [
            (float(x), numbers_in(run.stages[stage].right(question) for run in every if stage in run.stages))
            for x, stage in enumerate(stages)
        ]
        series += curve(", ".join(question), ", ".join(question), points, (0.0, 1.0))
    if not series:
        return None
    return Figure(
        title="Right answers after each stage",
        note="The whole recipe on held-out questions, greedy; means over seeds, dashed: 95 % intervals.",
        x_title="",
        y_title="share right",
        panels=(Panel(title="all tasks", series=tuple(series)),),
        x_labels=tuple(stages),
    )
