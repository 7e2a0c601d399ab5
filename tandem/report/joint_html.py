"""The joint study's page and tables: the plane of models and cells, and the four cases of elastic scaling. Takes the study's
JSON."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from rich.console import Group
from rich.table import Table

from tandem.report.html import bullets, footer, html_table, page
from tandem.report.study_html import charts, opening
from tandem.report.text import table
from tandem.spec.units import GIB

PLANE = (
    "!cell", "!model", ">GiB at 128k", ">quality proxy, B params", "!deployed", ">gain", ">req/s within bounds",
    ">tok/s/GPU", ">GPUs for load",
)  # fmt: skip
CASES = ("traffic", "case", "sizes", ">GPUs", ">at most", ">GPU hours", ">in time")
ELASTIC_FIGURE = "elastic"
DEPLOYED = {"colocated": "shared", "piggybacked": "in chunks", "disaggregated": "split"}


def plane_cells(data: Mapping[str, Any]) -> list[list[str]]:
    """One row a cell and model, in the order of `PLANE`; a cell is named once."""
    rows, last = [], ""
    for r in data["findings"]["plane"]:
        rows.append(
            [
                r["cell"] if r["cell"] != last else "", r["model"], f"{r['total_bytes'] / GIB:.1f}",
                f"{r['parameters'] / 1e9:.2f}", DEPLOYED[r["mode"]], "-" if r["gain"] is None else f"{r['gain']:.2f}",
                f"{r['goodput_rps']:.1f}", f"{r['tokens_per_s_per_gpu']:,.0f}", f"{r['gpus_for_load']:,}",
            ]
        )  # fmt: skip
        last = r["cell"]
    return rows


def case_cells(data: Mapping[str, Any]) -> list[list[str]]:
    """One row a traffic and case, in the order of `CASES`."""
    rows = []
    for traffic, outcome in data["findings"]["elastic"].items():
        for i, (case, r) in enumerate(outcome["cases"].items()):
            rows.append(
                [
                    traffic if i == 0 else "", case, r["sizes"], f"{r['gpus']:.1f}", f"{r['most_gpus']}",
                    f"{r['gpu_hours']:.2f}", f"{r['attainment']:.1%}",
                ]
            )  # fmt: skip
    return rows


def _load_note(data: Mapping[str, Any]) -> str:
    setting = data["findings"]["setting"]
    budget = f"{setting['gpus']} x {setting['hardware']}"
    return f"{budget}, TTFT up to {setting['ttft_s']:g} s; load: {setting['load_rps']:g} requests/s"


def joint_tables(data: Mapping[str, Any]) -> Group:
    """Both tables on a terminal."""
    return Group(
        _table(f"The plane: {_load_note(data)}", PLANE, plane_cells(data)),
        _table("Elastic scaling on top, on the same arrivals", CASES, case_cells(data)),
    )


def _table(title: str, columns: tuple[str, ...], rows: list[list[str]]) -> Table:
    made = table(title, *columns)
    for i, row in enumerate(rows):
        made.add_row(*row, end_section=i + 1 == len(rows) or rows[i + 1][0] != "")
    return made


def joint_page(title: str, lead: str, data: Mapping[str, Any]) -> str:
    """The whole study from its JSON object."""
    claims, figures = data["claims"], dict(data["figures"])
    scaling = {ELASTIC_FIGURE: figures.pop(ELASTIC_FIGURE)}
    setting = data["findings"]["setting"]
    heads = [
        (f"{sum(bool(c['holds']) for c in claims)} of {len(claims)}", "claims hold"),
        (f"{setting['gpus']} x {setting['hardware']}", "budget"),
        (f"{len(data['findings']['shapes'])}", "shapes"),
        (f"{data['points_evaluated']:,}", "design points priced"),
        (f"{data['seconds']:.0f} s", "on this machine"),
    ]
    return page(
        title,
        "".join(
            [
                *opening(title, lead, heads, data),
                f"<h2>Model by model</h2><p class='note'>{escape(_load_note(data))}. Requests/s of the budget within the "
                "bounds; in chunks: shared, prompts ride along with decode steps; GPUs in whole instances of what is "
                "recommended.</p>",
                html_table([name.lstrip("!") for name in PLANE], plane_cells(data)),
                *charts(figures),
                "<h2>Elastic scaling on top</h2><p class='note'>Constant pools are the cheapest that keep the objective on "
                "these arrivals; sizes are workers that prefill (P) and decode (D), of elastic pools those at the start.</p>",
                html_table(CASES, case_cells(data)),
                *charts(scaling),
                "<h2>Assumptions</h2>",
                bullets(data["assumptions"]),
                bullets([f"{name}: {what}" for name, what in data["backends"].items()]),
                footer(["Numbers, every shape among them: claims.json beside this page."]),
            ]
        ),
    )
