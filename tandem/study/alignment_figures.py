"""The figures of the study of alignment as plain numbers: means over seeds, their 95 % intervals dashed beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from tandem.study.alignment_claims import (
    HYBRID,
    INSTRUCTIONS,
    NO_TRUNCATION,
    OFF,
    ON,
    RLHF,
    TRANSFORMER,
    TRUNCATION,
    Runs,
    points_at,
    setting_named,
)
from tandem.study.alignment_runs import FINAL, AlignmentRun, BudgetPoint, CoursePoint, Question, Throughput
from tandem.study.result import Figure, Panel, Series
from tandem.study.seeds import half_interval

NAMES = {HYBRID: "hybrid", TRANSFORMER: "Transformer", NO_TRUNCATION: "hybrid, no thoughts cut off"}
"""Variants in words."""
_SHARES = (0.0, 1.0)
Points = Iterable[tuple[float, Sequence[float]]]
"""x, and what each seed found there."""


def figures_of(runs: Runs, throughput: Throughput | None) -> dict[str, Figure]:
    """Those whose runs are there, by name."""
    made = {
        "stages": _stages(runs),
        "thinking": _thinking(runs),
        "budgets": _budgets(runs),
        "marks": _after_truncation(
            runs, {"closing marks": lambda point: point.one_mark}, "Exactly one closing mark, the model left alone",
            "share of answers", _SHARES,
        ),
        "lengths": _after_truncation(
            runs, {"answers": lambda point: point.answer_tokens, "thoughts": lambda point: point.thinking_tokens},
            "Lengths against thinking budget", "tokens", (0.0, None),
        ),
        "reward": _courses(
            runs, "Reward of reinforcement learning", "reward", lambda point: point.reward,
            f" Of {INSTRUCTIONS} it is the verifier's, 1 or 0; of {RLHF} a reward model's score, whose zero means nothing.",
        ),
        "kl": _courses(runs, "KL to the model before the stage", "nats a token", lambda point: point.kl),
        "merge": _merge(runs),
        "throughput": throughput_figure(
            throughput, {name: NAMES[name] for name in (HYBRID, TRANSFORMER)}, "The aligned models"
        ),
    }  # fmt: skip
    return {name: figure for name, figure in made.items() if figure is not None}


def curve(name: str, role: str, points: Points, bounds: tuple[float | None, float | None] = (None, None)) -> list[Series]:
    """The mean, and where any point has two seeds the ends of its 95 % interval (no further than `bounds`), dashed."""
    there = [(x, values) for x, values in points if values]
    if not there:
        return []
    x = [x for x, _ in there]
    means = [sum(values) / len(values) for _, values in there]
    made = [Series(name=name, x=x, y=means, role=role)]
    wide = [(x, mean, half_interval(values)) for (x, values), mean in zip(there, means, strict=True) if len(values) > 1]
    for sign in (-1.0, 1.0) if wide else ():
        edge = [_within(mean + sign * half, bounds) for _, mean, half in wide]
        made.append(Series(name=f"{name}, 95 %", x=[x for x, _, _ in wide], y=edge, role=role, style="dash"))
    return made


def _within(value: float, bounds: tuple[float | None, float | None]) -> float:
    low, high = bounds
    value = value if low is None else max(low, value)
    return value if high is None else min(high, value)


def _known(runs: Runs) -> dict[str, Mapping[int, AlignmentRun]]:
    """Variants of the study that are there, in its order."""
    return {name: runs[name] for name in NAMES if name in runs}


def numbers_in(values: Iterable[float | None]) -> list[float]:
    """Those that are not None."""
    return [value for value in values if value is not None]


def _stages(runs: Runs) -> Figure | None:
    """Of a variant that ends early the last model is left out: it is that of its last stage."""
    here = _known(runs)
    every = [run for by_seed in here.values() for run in by_seed.values()]
    stages = list(dict.fromkeys(stage for run in every for stage in run.stages if stage != FINAL))
    asked = list(dict.fromkeys(question for run in every for question in run.accuracy[FINAL]))
    if not asked:
        return None

    def points(by_seed: Mapping[int, AlignmentRun], question: Question) -> Points:
        for x, stage in enumerate((*stages, FINAL)):
            of = [run for run in by_seed.values() if stage != FINAL or len(run.stages) > len(stages)]
            yield float(x), numbers_in(run.right(stage, question) for run in of)

    panels = [
        Panel(
            title=f"{question[0]}, {question[1]}",
            series=tuple(
                s for name, by_seed in here.items() for s in curve(NAMES[name], name, points(by_seed, question), _SHARES)
            ),
        )
        for question in asked
    ]
    return Figure(
        title="Right answers after each stage",
        note="Held-out questions, greedy; means over seeds, dashed: 95 % intervals. final is the model that ships, in bf16.",
        x_title="",
        y_title="share right",
        panels=tuple(panels),
        x_labels=(*stages, FINAL),
    )


def _thinking(runs: Runs) -> Figure | None:
    here = {name: by_seed for name, by_seed in _known(runs).items() if name != NO_TRUNCATION}
    every = [run for by_seed in here.values() for run in by_seed.values()]
    tasks = sorted({task for run in every for task in run.accuracy[FINAL].get(ON, {}) if task != "all"})
    panels = []
    for name, by_seed in here.items():
        series = []
        for shift, question in ((-0.12, OFF), (0.12, ON)):
            points = [
                (x + shift, found, f"seed {run.seed}")
                for x, task in enumerate(tasks)
                for run in by_seed.values()
                if (found := run.right(FINAL, question, task)) is not None
            ]
            if points:
                x, y, text = zip(*points, strict=True)
                series.append(Series(name=question[1], x=x, y=y, text=text, role=question[1], style="markers"))
        if len(series) == 2:
            panels.append(Panel(title=NAMES[name], series=tuple(series)))
    if not panels:
        return None
    return Figure(
        title="Reasoning with thinking on and off",
        note="The last model; each mark is a run.",
        x_title="",
        y_title="share right",
        panels=tuple(panels),
        x_labels=tuple(tasks),
    )


def _at_budgets(by_seed: Mapping[int, AlignmentRun], stage: str, value: Callable[[BudgetPoint], float | None]) -> Points:
    asked = points_at(by_seed, stage)
    for budget in sorted(next(iter(asked.values()))) if asked else ():
        yield float(budget), numbers_in(value(points[budget]) for points in asked.values())


def _budgets(runs: Runs) -> Figure | None:
    series = [
        s
        for name, by_seed in _known(runs).items()
        if name != NO_TRUNCATION
        for s in curve(NAMES[name], name, _at_budgets(by_seed, FINAL, lambda point: point.accuracy), _SHARES)
    ]
    if not series:
        return None
    return Figure(
        title="Accuracy against thinking budget",
        note="The last model on the reasoning questions; means over seeds, dashed: 95 % intervals. Thinking is closed at the "
        "next newline after so many tokens.",
        x_title="thinking budget, tokens",
        y_title="share right",
        panels=(Panel(title="all tasks", series=tuple(series)),),
    )


def _after_truncation(
    runs: Runs,
    values: Mapping[str, Callable[[BudgetPoint], float | None]],
    title: str,
    unit: str,
    bounds: tuple[float | None, float | None],
) -> Figure | None:
    """With thoughts cut off and without, after the same stage."""
    panels = []
    for name, value in values.items():
        series = [
            s
            for variant in (HYBRID, NO_TRUNCATION)
            for s in curve(NAMES[variant], variant, _at_budgets(runs.get(variant, {}), TRUNCATION, value), bounds)
        ]
        if series:
            panels.append(Panel(title=name, series=tuple(series)))
    if not panels:
        return None
    return Figure(
        title=title,
        note=f"After {TRUNCATION}, with thoughts cut off in training and without; means over seeds, dashed: 95 % intervals.",
        x_title="thinking budget, tokens",
        y_title=unit,
        panels=tuple(panels),
    )


def _courses(runs: Runs, title: str, unit: str, value: Callable[[CoursePoint], float | None], note: str = "") -> Figure | None:
    here = _known(runs)
    stages = list(dict.fromkeys(stage for by_seed in here.values() for run in by_seed.values() for stage in run.courses))
    panels = []
    for stage in stages:
        series = []
        for name, by_seed in here.items():
            courses = [{p.step: value(p) for p in run.courses[stage]} for run in by_seed.values() if stage in run.courses]
            steps = sorted(set.intersection(*(set(course) for course in courses))) if courses else []
            points = [(float(step), numbers_in(course[step] for course in courses)) for step in steps]
            series += curve(NAMES[name], name, points)
        if series:
            panels.append(Panel(title=stage, series=tuple(series)))
    if not panels:
        return None
    return Figure(
        title=title,
        note=f"Means over seeds, dashed: 95 % intervals.{note}",
        x_title="step",
        y_title=unit,
        panels=tuple(panels),
    )


def _merge(runs: Runs) -> Figure | None:
    series: list[Series] = []
    for name, by_seed in _known(runs).items():
        sweeps = [dict(sweep) for run in by_seed.values() for sweep in run.sweeps.values()]
        alphas = sorted(set.intersection(*(set(sweep) for sweep in sweeps))) if sweeps else []
        series += curve(NAMES[name], name, [(alpha, [sweep[alpha] for sweep in sweeps]) for alpha in alphas], _SHARES)
    if not series:
        return None
    return Figure(
        title="Sweep of the merge",
        note="w = (1 - alpha) first + alpha second, on the questions that choose alpha; means, dashed: 95 % intervals.",
        x_title="alpha",
        y_title="share verified",
        panels=(Panel(title="of all questions", series=tuple(series)),),
    )


def throughput_figure(throughput: Throughput | None, names: Mapping[str, str], note: str) -> Figure | None:
    """Tokens a second of two models, each round a mark; `names` are the models in words."""
    settings = () if throughput is None else throughput.settings
    series = []
    for shift, name in zip((-0.08, 0.08), names, strict=True):
        points = [(x + shift, rate) for x, one in enumerate(settings) for rate in one.of(name).values()]
        if points:
            x, y = zip(*points, strict=True)
            series.append(Series(name=names[name], x=x, y=y, role=name, style="markers"))
    if throughput is None or not series:
        return None
    return Figure(
        title="Generation in the engine",
        note=f"{note} in turns; each mark is a round. {throughput.machine}.",
        x_title="",
        y_title="tokens a second",
        panels=(Panel(title="batch, tokens of prompt and output", series=tuple(series)),),
        x_labels=tuple(setting_named(one) for one in settings),
    )
