"""An evaluation on a terminal, from its JSON object: scores side by side, the budget curve, what to know of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from tandem.report.text import table

BETTER = " *"
SUITE_TITLES = {
    "reasoning": "reasoning",
    "budgets": "reasoning at a thinking budget",
    "instructions": "instructions",
    "tools": "tools",
    "needles": "needles",
    "lm-eval": "lm-eval",
}
WRITING = ("suite", "asked", "model", ">thinking", ">answer", ">closed as due", ">finished")
"""Heads of `writing_rows`; lengths are tokens."""
BUDGET = ("budget", "model", ">right", ">thinking", ">answer", ">one mark", ">unaided", ">forced", ">finished")
"""Heads of `budget_rows`; lengths are tokens."""


def percent(value: float | None) -> str:
    """A share in percent; - where it is not known."""
    return "-" if value is None else f"{value:.1%}"


def interval(found: Mapping[str, Any] | None) -> str:
    """An accuracy with its 95 % interval."""
    return "-" if found is None else f"{found['accuracy']:.1%} ({100 * found['low']:.0f} to {100 * found['high']:.0f})"


def tokens(value: float | None) -> str:
    """A mean number of tokens."""
    return "-" if value is None else f"{value:,.1f}"


def row_keys(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Suite, how it was asked and task of every score but those at budgets, in order; a lone task once."""
    found: dict[tuple[str, str, str], None] = {}
    for model in data["models"]:
        for suite, modes in model["metrics"].items():
            for mode, by_task in modes.items() if suite != "budgets" else ():
                lone = len(by_task) == 2
                for task in list(by_task)[1:] if lone else by_task:
                    found[suite, mode, task] = None
    order = list(SUITE_TITLES)
    return sorted(found, key=lambda key: order.index(key[0]))


def score_of(model: Mapping[str, Any], key: tuple[str, str, str]) -> Mapping[str, Any] | None:
    """A model's score in a row; None where it was not asked."""
    suite, mode, task = key
    found: Mapping[str, Any] | None = model["metrics"].get(suite, {}).get(mode, {}).get(task)
    return found


def best_in(data: Mapping[str, Any], key: tuple[str, str, str]) -> str | None:
    """The model that the tests name better than every other that was asked the same; None where there is none."""
    about = [c for c in data["comparisons"] if (c["suite"], c["mode"], c["task"]) == key]
    for model in data["models"]:
        own = [c for c in about if model["name"] in (c["a"], c["b"])]
        if own and all(c["better"] == model["name"] for c in own):
            return str(model["name"])
    return None


def score_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """Suite, how it was asked, task and a cell for each model; repeated words are left out."""
    rows: list[list[str]] = []
    before = ("", "")
    for suite, mode, task in row_keys(data):
        best = best_in(data, (suite, mode, task))
        cells = [
            interval(score_of(model, (suite, mode, task))) + (BETTER if model["name"] == best else "")
            for model in data["models"]
        ]
        shown = (SUITE_TITLES[suite] if suite != before[0] else "", mode if (suite, mode) != before else "")
        rows.append([*shown, task, *cells])
        before = (suite, mode)
    return rows


def asked_all(data: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    """Suite, how it was asked, model and the score of all tasks together, but for those at budgets."""
    for suite in SUITE_TITLES:
        modes = (
            {mode: None for model in data["models"] for mode in model["metrics"].get(suite, {})} if suite != "budgets" else {}
        )
        for mode in modes:
            for model in data["models"]:
                found = score_of(model, (suite, mode, "all"))
                if found is not None:
                    yield suite, mode, model["name"], found


def writing_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """How long thinking and answers were and how they ended, in the order of `WRITING`."""
    return [
        [
            SUITE_TITLES[suite], mode, name, tokens(found["thinking_tokens"]), tokens(found["answer_tokens"]),
            percent(found["one_closing_mark"]), percent(found["finished"]),
        ]
        for suite, mode, name, found in asked_all(data)
        if found["answer_tokens"] is not None
    ]  # fmt: skip


def part_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """Shares of what a right answer is made of, a cell for each model; no rows where suites have no parts."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for suite, mode, name, found in asked_all(data):
        for part, value in found["parts"].items():
            rows.setdefault((suite, mode, part), {})[name] = percent(value)
    names = [model["name"] for model in data["models"]]
    return [
        [SUITE_TITLES[suite], mode, part, *(cells.get(n, "-") for n in names)] for (suite, mode, part), cells in rows.items()
    ]


def budget_points(model: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """A model's scores by thinking budget, and at the end without one."""
    points = [(f"{point['budget']:,}", point) for point in model["metrics"].get("budgets", ())]
    free = model["metrics"].get("reasoning", {}).get("thinking on")
    return [*points, ("none", free["all"])] if points and free else points


def budget_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """A row for each budget and model, in the order of `BUDGET`."""
    by_budget: dict[str, list[list[str]]] = {}
    for model in data["models"]:
        for budget, found in budget_points(model):
            by_budget.setdefault(budget, []).append(
                [
                    budget, model["name"], interval(found), tokens(found["thinking_tokens"]), tokens(found["answer_tokens"]),
                    percent(found["one_closing_mark"]), percent(found["one_closing_mark_unaided"]), percent(found["forced"]),
                    percent(found["finished"]),
                ]
            )  # fmt: skip
    return [row for rows in by_budget.values() for row in rows]


def evaluation_text(data: Mapping[str, Any]) -> Group:
    """All of it."""
    names = [model["name"] for model in data["models"]]
    parts: list[Table | str] = [
        _filled("Right answers (95 % interval)", ["suite", "asked", "task", *(f">{n}" for n in names)], score_rows(data))
    ]
    budgets = budget_rows(data)
    if budgets:
        parts.append(_filled("By thinking budget (lengths in tokens, means)", BUDGET, budgets))
    made_of = [row for row in part_rows(data) if ":" not in row[2]]
    if made_of:
        parts.append(_filled("Of these answers", ["suite", "asked", "part", *(f">{n}" for n in names)], made_of))
    if writing_rows(data):
        parts.append(_filled("How they were written (lengths in tokens, means)", WRITING, writing_rows(data)))
    return Group(*parts, *sentences(data))


def _filled(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    t = table(title, *(f"!{name}" for name in columns))
    for row in rows:
        t.add_row(*row)
    return t


def sentences(data: Mapping[str, Any]) -> Iterator[str]:
    """What the star says, what each model's numbers leave out, and how long it took."""
    if len(data["models"]) > 1:
        told = any(c["better"] for c in data["comparisons"])
        yield star_sentence() if told else "No difference between these models is more than an accident could make (McNemar)."
    for model in data["models"]:
        for note in model["notes"]:
            yield f"{model['name']}: {note}."
    yield f"{data['seconds']:,.0f} s; --json has all numbers, --report F.html a page with answers to read."


def star_sentence() -> str:
    """What a star beside a score means."""
    return (
        "*: better than every other model on the same problems, by McNemar's exact test; "
        "accident puts a star into at most 1 report of 20 (Holm)."
    )
