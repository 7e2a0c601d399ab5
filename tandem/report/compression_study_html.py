"""The page of the study of compression: claims, tables of runs, pairs and rates, figures. Takes the study's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from tandem.report.alignment_html import rate_rows
from tandem.report.html import html_table
from tandem.report.pretraining_html import mean_text
from tandem.report.study_html import runs_page
from tandem.report.text import table

COLUMNS = (
    "variant",
    ">seeds",
    ">tokens",
    ">bytes",
    ">KL after the cut",
    ">KL",
    ">loss",
    ">right, teacher",
    ">right",
    ">minutes",
)
PAIRS = ("claimed to be better", "beside", "measure", ">better", ">other", ">difference", ">seeds")
RATES = (
    "batch, tokens of prompt and output",
    ">compressed, tokens/s",
    ">teacher, tokens/s",
    ">compressed / teacher",
    ">rounds",
)


def compression_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """One row a variant, means over its seeds, in the order of `COLUMNS`; - where a run has no such number."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in data["findings"]["runs"]:
        groups.setdefault(run["variant"], []).append(run)

    def of(runs: list[Mapping[str, Any]], name: str, form: str) -> str:
        return mean_text([run[name] for run in runs], form)

    return [
        [
            name,
            f"{len(runs)}",
            mean_text([run["tokens"] / 1e6 for run in runs], "{:.2f} M"),
            of(runs, "share", "{:.1%}"),
            of(runs, "kl_after_cut", "{:.4f}"),
            of(runs, "kl", "{:.4f}"),
            of(runs, "nll", "{:.4f}"),
            of(runs, "teacher_overall", "{:.1%}"),
            of(runs, "overall", "{:.1%}"),
            mean_text([run["seconds"] / 60 for run in runs], "{:.1f}"),
        ]
        for name, runs in groups.items()
    ]


def pair_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """One row a pair and measure, in the order of `PAIRS`; differences with 95 % intervals."""
    rows = []
    for row in data["findings"]["pairs"]:
        half = "unknown" if row["half"] is None else f"{row['half']:.4f}"
        means = [mean_text(row[side], "{:.4f}") for side in ("b", "a")]
        difference = f"{row['mean']:+.4f} ± {half}"
        rows.append([row["b_variant"], row["a_variant"], row["measure"], *means, difference, f"{len(row['seeds'])}"])
    return rows


def compression_table(data: Mapping[str, Any]) -> Table:
    """All variants on a terminal."""
    t = table("Runs, means over seeds", *COLUMNS)
    for row in compression_rows(data):
        t.add_row(*row)
    return t


def compression_study_page(title: str, lead: str, data: Mapping[str, Any]) -> str:
    """The whole study from its JSON object."""
    tables = [
        "<h2>Runs</h2><p class='note'>Means over seeds. KL from the teacher and loss of the next token are nats a token of "
        "held-out text; bytes are a share of the teacher's.</p>",
        html_table(COLUMNS, compression_rows(data)),
    ]
    if data["findings"]["pairs"]:
        note = "Equal bytes and tokens, seed by seed; losses in nats a token, answers as shares."
        tables += [f"<h2>Pairs</h2><p class='note'>{note}</p>", html_table(PAIRS, pair_rows(data))]
    if data["findings"]["throughput"]:
        tables += ["<h2>Throughput</h2><p class='note'>Means over rounds.</p>", html_table(RATES, rate_rows(data))]
    return runs_page(title, lead, data, "of compression", tables)
