"""An alignment on a terminal, from its JSON object: what each stage was worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.text import Text

from tandem.report.evaluation_text import interval
from tandem.report.text import table


def figures(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """The overall accuracy of every suite and way of asking, budgets left out, with its interval."""
    return {
        f"{suite}, {mode}": interval(scores["all"])
        for suite, modes in evaluation.items()
        if suite != "budgets"
        for mode, scores in modes.items()
    }


def alignment_text(run: Mapping[str, Any]) -> Group:
    """Rows are stages, columns what was asked."""
    reports = run["metrics"]["reports"]
    found = {name: figures(report["evaluation"]) for name, report in reports.items() if "evaluation" in report}
    asked = list(dict.fromkeys(question for by in found.values() for question in by))
    shown = table("Right answers to held-out questions, greedy, with 95 % intervals", "!after", *(f">{name}" for name in asked))
    for name, by in found.items():
        shown.add_row(name, *(by.get(question, "-") for question in asked))
    return Group(shown, Text(run["checkpoint"]))
