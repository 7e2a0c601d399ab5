"""The page of the study of pre-training: claims, a table of every run, figures. Takes the study's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from rich.table import Table

from tandem.report.html import bullets, cards, chart, footer, html_table, page
from tandem.report.study_html import claims_table, figure_of
from tandem.report.text import table

COLUMNS = ("variant", ">seeds", ">tokens", ">loss", ">held-out", ">answers", ">needles at the longest", ">tokens/s", ">minutes")
ROW_PIXELS = 380
"""Of a row of panels."""


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
            _mean([run["loss"] for run in runs], "{:.4f}"),
            _mean([run["held_out_loss"] for run in runs], "{:.4f}"),
            _mean([run["accuracy"] for run in runs], "{:.1%}"),
            _mean([run["needles"][max(run["needles"], key=int)] if run["needles"] else None for run in runs], "{:.1%}"),
            _mean([run["tokens_per_s"] for run in runs], "{:,.0f}"),
            _mean([run["seconds"] / 60 for run in runs], "{:.1f}"),
        ]
        for name, runs in groups.items()
    ]


def _mean(values: list[float | None], form: str) -> str:
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
    claims, backends = data["claims"], list(data["backends"])
    held = sum(bool(c["holds"]) for c in claims)
    hours = sum(run["seconds"] for run in data["findings"]["runs"]) / 3600
    heads = [
        (f"{held} of {len(claims)}", "claims hold"),
        (f"{data['points_evaluated']}", "runs"),
        (f"{data['points_considered'] / 1e6:.1f} M", "tokens trained"),
        (f"{hours:.1f} h", "of training"),
    ]
    body = [
        f"<h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p>",
        cards(heads),
        "<h2>Claims</h2>",
        claims_table(claims, backends),
        "<h2>Runs</h2><p class='note'>Means over seeds.</p>",
        html_table(COLUMNS, variant_rows(data)),
    ]
    for figure in data["figures"].values():
        body.append(f"<h2>{escape(figure['title'])}</h2><p class='note'>{escape(figure['note'])}</p>")
        body.append(chart(figure_of(figure), 100 + ROW_PIXELS * -(-len(figure["panels"]) // 2)))
    body += ["<h2>Assumptions</h2>", bullets(data["assumptions"])]
    body.append(footer(["Numbers: claims.json beside this page."]))
    return page(title, "".join(body))
