"""The elastic study's page: claims, a table of every policy in every cell, figures. Takes the study's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from rich.table import Table

from tandem.report.html import bullets, cards, chart, footer, html_table, page
from tandem.report.study_html import claims_table, figure_of
from tandem.report.text import table

COLUMNS = (
    "policy", ">in objective", ">GPU hours", ">over peak's", ">over constant", ">over bound", ">changes", ">TTFT p90", ">TPOT",
    ">good/s",
)  # fmt: skip
ON_TERMINAL = 7
"""Columns that fit there."""
ROW_PIXELS = 380
"""Of a row of panels."""


def policy_rows(cell: Mapping[str, Any]) -> list[list[str]]:
    """One row a policy, in the order of `COLUMNS`: GPU hours also over static-by-peak's, over those of constant sizes with the
    same attainment (- where none of those tried brackets it), and over the clairvoyant bound."""
    peak = next(r["gpu_hours"] for r in cell["rows"] if r["policy"] == "peak")
    sized = cell["bound"]["sized"]
    rows = [*cell["rows"], *([cell["static_best"]] if cell["static_best"] else [])]
    return [
        [
            r["policy"], f"{r['attainment']:.1%}", f"{r['gpu_hours']:.3g}", f"{r['gpu_hours'] / peak:.0%}",
            "-" if r["over_static"] is None else f"{r['over_static']:.0%}",
            f"{r['gpu_hours'] / sized:.2f}", f"{r['changes']:,}", f"{r['ttft_p90_s']:.2f} s",
            f"{1e3 * r['tpot_mean_s']:.1f} ms", f"{r['goodput']:.1f}",
        ]
        for r in rows
    ]  # fmt: skip


def policies_table(data: Mapping[str, Any]) -> Table:
    """All cells on a terminal."""
    t = table("Policies on the same arrivals", "cell", "policy", *COLUMNS[1:ON_TERMINAL])
    for name, cell in data["findings"]["cells"].items():
        rows = policy_rows(cell)
        for i, row in enumerate(rows):
            t.add_row(name if i == 0 else "", *row[:ON_TERMINAL], end_section=i == len(rows) - 1)
    return t


def elastic_sentences(data: Mapping[str, Any]) -> list[str]:
    """Why each claim that fails does, and what was run."""
    lines = [f"{c['id']}, why not: {c['why']}" for c in data["claims"] if not c["holds"]]
    held = sum(bool(c["holds"]) for c in data["claims"])
    lines.append(
        f"{held} of {len(data['claims'])} claims hold; {data['points_evaluated']:,} simulations of "
        f"{data['points_considered']:,} requests in {data['seconds']:.0f} s"
    )
    return lines


def _height(figure: Mapping[str, Any]) -> int:
    return 100 + ROW_PIXELS * -(-len(figure["panels"]) // 2)


def elastic_page(title: str, lead: str, data: Mapping[str, Any]) -> str:
    """The whole study from its JSON object."""
    claims, backends = data["claims"], list(data["backends"])
    held = sum(bool(c["holds"]) for c in claims)
    heads = [
        (f"{held} of {len(claims)}", "claims hold"),
        (f"{len(data['findings']['cells'])}", "cells of traffic and service"),
        (f"{data['points_evaluated']:,}", "simulations"),
        (f"{data['points_considered'] / 1e6:.1f} M", "requests simulated"),
        (f"{data['seconds']:.0f} s", "on this machine"),
    ]
    body = [
        f"<h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p>",
        cards(heads),
        "<h2>Claims</h2>",
        claims_table(claims, backends),
    ]
    for name, cell in data["findings"]["cells"].items():
        b = cell["bound"]
        note = (
            f"{cell['requests']:,} requests; clairvoyant: {b['sized']:.3g} GPU hours sized, {b['whole']:.3g} in whole workers "
            f"at full utilisation, {b['work']:.3g} of work; static-by-peak {cell['peak'][0]} prefill, {cell['peak'][1]} decode "
            f"workers of {cell['gpus_per_worker']} GPUs"
        )
        body.append(f"<h2>{escape(name)}</h2><p class='note'>{escape(note)}</p>")
        body.append(html_table(COLUMNS, policy_rows(cell)))
    for figure in data["figures"].values():
        body.append(f"<h2>{escape(figure['title'])}</h2><p class='note'>{escape(figure['note'])}</p>")
        body.append(chart(figure_of(figure), _height(figure)))
    body += ["<h2>Assumptions</h2>", bullets(data["assumptions"])]
    body.append(footer(["Numbers: claims.json beside this page."]))
    return page(title, "".join(body))
