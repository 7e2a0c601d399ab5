"""Pieces of a card: YAML in front, Markdown after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml


def card(front: Mapping[str, Any], parts: Iterable[str]) -> str:
    """YAML that a hub reads, then Markdown; empty parts are left out."""
    head = yaml.safe_dump(dict(front), sort_keys=False, width=120)
    return f"---\n{head}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def code(text: str, language: str = "console") -> str:
    """A fenced block."""
    return f"```{language}\n{text}\n```"


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; an empty string where it has no row."""
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    if not lines:
        return ""
    return "\n".join(["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *lines])


def bullets(lines: Iterable[str]) -> str:
    """A list with a line each."""
    return "\n".join(f"- {' '.join(line.split())}" for line in lines)


def scores_by_question(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The overall score of each suite and way of asking, of the metrics that an evaluation reports."""
    return {
        f"{suite}, {mode}": scores["all"]
        for suite, modes in evaluation.items()
        if isinstance(modes, Mapping)
        for mode, scores in modes.items()
    }


def score_cell(found: Mapping[str, Any] | None) -> str:
    """The share right with its interval, or a dash."""
    return "-" if found is None else f"{found['accuracy']:.1%} ({found['low']:.1%} to {found['high']:.1%})"
