"""A study's claims on a terminal, from the study's JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from tandem.report.text import table

UNPRINTED = "nobody"
"""Shown where no printed number exists."""


def verdict(holds: bool | None) -> str:
    """`holds`, `no`, or `-` where it was not judged."""
    return "-" if holds is None else "holds" if holds else "no"


def claims_table(title: str, claims: Sequence[Mapping[str, Any]], backends: Sequence[str]) -> Table:
    """One row a claim: printed, ours, and the verdict of every backend."""
    t = table(title, "!", "claim", "printed", "ours", *(f"!{name}" for name in backends))
    for c in claims:
        verdicts = [verdict(c["holds"]), verdict(c["holds_engine"])][: len(backends)]
        t.add_row(c["id"], c["title"], c["printed"] or UNPRINTED, c["ours_by"][backends[0]], *verdicts, end_section=True)
    return t


def study_sentences(data: Mapping[str, Any]) -> list[str]:
    """Why each claim that fails does, what the paper's model cannot give, and what was run."""
    lines = [f"{c['id']}, why not: {c['why']}" for c in data["claims"] if not c["holds"]]
    lines += [f"not from the stated model: {text}" for text in data["errata"]]
    held = sum(bool(c["holds"]) for c in data["claims"])
    lines.append(
        f"{held} of {len(data['claims'])} claims hold; {data['points_evaluated']:,} design points priced of "
        f"{data['points_considered']:,} looked at, in {data['seconds']:.1f} s"
    )
    return lines
