"""The page of the study of pre-training: claims, a table of every run, figures. Takes the study's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from tandem.report.html import html_table
from tandem.report.study_html import runs_page
from tandem.report.text import table

COLUMNS = ("variant", ">seeds", ">tokens", ">loss", ">held-out", ">answers", ">needles at the longest", ">tokens/s", ">minutes")


def variant_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """One row a variant, means over its seeds, in the order of `COLUMNS`; - where a run was not asked."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in data["findings"]["runs"]:
        groups.setdefault(run["variant"], []).append(run)
    return [
        [
            name,
            f"{len(runs)}",
            f"{runs[0]['tokens'] / 1e6:.2f} M",
            mean_text([run["loss"] for run in runs], "{:.4f}"),
            mean_text([run["held_out_loss"] for run in runs], "{:.4f}"),
            mean_text([run["accuracy"] for run in runs], "{:.1%}"),
            mean_text([run["needles"][max(run["needles"], key=int)] if run["needles"] else None for run in runs], "{:.1%}"),
            mean_text([run["tokens_per_s"] for run in runs], "{:,.0f}"),
            mean_text([run["seconds"] / 60 for run in runs], "{:.1f}"),
        ]
        for name, runs in groups.items()
    ]


def mean_text(values: list[float | None], form: str) -> str:
    """The mean of those that are there, formatted; - where none is."""
    there = [value for value in values if value is not None]
    return form.format(sum(there) / len(there)) if there else "-"


def variants_table(data: Mapping[str, Any]) -> Table:
    """All variants on a terminal."""
    t = table("Runs, means over seeds", *COLUMNS)
    for row in variant_rows(data):
        t.add_row(*row)
    return t


def pretraining_sentences(data: Mapping[str, Any]) -> list[str]:
    """Why each claim that fails does, what is missing, and what was run."""
    lines = [f"{c['id']}, why not: {c['why']}" for c in data["claims"] if not c["holds"]]
    lacking = data["findings"]["missing"]
    if lacking:
        lines.append("runs not there yet: " + ", ".join(f"{name} ({count} seeds)" for name, count in lacking.items()))
    held = sum(bool(c["holds"]) for c in data["claims"])
    trained = f"{data['points_evaluated']} runs of {data['points_considered'] / 1e6:.1f} million tokens together"
    lines.append(f"{held} of {len(data['claims'])} claims hold; {trained}")
    return lines


def pretraining_page(title: str, lead: str, data: Mapping[str, Any]) -> str:
    """The whole study from its JSON object."""
    runs = ["<h2>Runs</h2><p class='note'>Means over seeds.</p>", html_table(COLUMNS, variant_rows(data))]
    return runs_page(title, lead, data, "of training", runs)
