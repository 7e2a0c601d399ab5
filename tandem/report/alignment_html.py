"""The page of the study of alignment: claims, tables of runs, stages and rates, figures. Takes the study's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from rich.table import Table

from tandem.report.html import html_table
from tandem.report.pretraining_html import mean_text
from tandem.report.study_html import runs_page
from tandem.report.text import table

RATES = (
    "batch, tokens of prompt and output",
    ">hybrid, tokens/s",
    ">Transformer, tokens/s",
    ">hybrid / Transformer",
    ">rounds",
)


def run_columns(data: Mapping[str, Any]) -> list[str]:
    """Columns of `run_rows`: suites with thinking on and off."""
    return [
        "variant",
        ">seeds",
        *(f">{_short(question)}" for question in _questions(data)),
        ">all",
        ">minutes",
    ]


def _questions(data: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(question for run in data["findings"]["runs"] for question in run["accuracy"]))


def _short(question: str) -> str:
    return question.replace("thinking ", "")


def run_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """One row a variant: right answers of the last model, means over its seeds; - where a run was not asked."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in data["findings"]["runs"]:
        groups.setdefault(run["variant"], []).append(run)
    return [
        [
            name,
            f"{len(runs)}",
            *(mean_text([run["accuracy"].get(question) for run in runs], "{:.1%}") for question in _questions(data)),
            mean_text([run["overall"] for run in runs], "{:.1%}"),
            mean_text([run["seconds"] / 60 for run in runs], "{:.1f}"),
        ]
        for name, runs in groups.items()
    ]


def change_columns(data: Mapping[str, Any]) -> list[str]:
    """Columns of the tables of `change_rows`."""
    return ["stage", *(f">{_short(question)}" for question in _questions(data))]


def change_rows(data: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """By variant one row a stage: per cent right after it and what it changed, in points; - where it was not asked."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in data["findings"]["changes"]:
        half = "unknown" if row["half"] is None else f"{100 * row['half']:.1f}"
        added = "" if row["mean"] is None else f" ({100 * row['mean']:+.1f} ± {half})"
        text = mean_text([100 * share for share in row["b"]], "{:.1f}") + added
        found.setdefault(row["variant"], {}).setdefault(row["stage"], {})[row["question"]] = text
    asked = _questions(data)
    return {
        variant: [[stage, *(by.get(question, "-") for question in asked)] for stage, by in stages.items()]
        for variant, stages in found.items()
    }


def rate_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """Generation of both aligned models, in the order of `RATES`."""
    return [
        [
            row["setting"],
            mean_text(row["b"], "{:,.0f}"),
            mean_text(row["a"], "{:,.0f}"),
            f"{1 + row['mean']:.2f} ± {'unknown' if row['half'] is None else format(row['half'], '.2f')}",
            f"{len(row['seeds'])}",
        ]
        for row in data["findings"]["throughput"]
    ]


def alignment_table(data: Mapping[str, Any]) -> Table:
    """All variants on a terminal."""
    t = table("Right answers of the last model, means over seeds", *run_columns(data))
    for row in run_rows(data):
        t.add_row(*row)
    return t


def alignment_sentences(data: Mapping[str, Any]) -> list[str]:
    """Why each claim that does not hold does not, what is missing, and what was run."""
    whys = {False: "why not", None: "not decided"}
    lines = [f"{c['id']}, {whys[c['holds']]}: {c['why']}" for c in data["claims"] if not c["holds"]]
    lacking = data["findings"]["missing"]
    if lacking:
        lines.append("not there yet: " + ", ".join(f"{name} ({count})" for name, count in lacking.items()))
    held = sum(bool(c["holds"]) for c in data["claims"])
    undecided = sum(c["holds"] is None for c in data["claims"])
    lines.append(f"{held} of {len(data['claims'])} claims hold, {undecided} undecided; {data['points_evaluated']} runs")
    return lines


def alignment_study_page(title: str, lead: str, data: Mapping[str, Any]) -> str:
    """The whole study from its JSON object."""
    tables = [
        "<h2>Runs</h2><p class='note'>Right answers of the last model to held-out questions; means over seeds.</p>",
        html_table(run_columns(data), run_rows(data)),
    ]
    if data["findings"]["throughput"]:
        tables += ["<h2>Throughput</h2><p class='note'>Means over rounds.</p>", html_table(RATES, rate_rows(data))]
    note = "Per cent right, and in brackets the points over the model that a stage goes on from, with 95 % intervals."
    tables += ["<h2>What each stage changed</h2>", f"<p class='note'>{note}</p>"]
    for variant, rows in change_rows(data).items():
        tables += [f"<h3>{escape(variant)}</h3>", html_table(change_columns(data), rows)]
    return runs_page(title, lead, data, "of alignment", tables)
