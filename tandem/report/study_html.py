"""A study as one page: claims on top, then a chart for every figure. Takes the study's JSON, so that any study is drawn "
"alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tandem.report.html import COLOURS, bullets, cards, chart, footer, page
from tandem.report.study_text import UNPRINTED, verdict

PALETTE = ("#2f9e62", "#c23b62", "#1f9bb5", "#8a6d3b", "#d6a419", "#5b3a8c", "#6c6c75", "#e58aa5")
"""Colours of curves that are no mode's; none of them is a mode's colour."""
_ROLES = {**COLOURS, "printed": "#1c1d22"}
_HEIGHT = 380
CLASSES = {True: "yes", False: "no", None: ""}
"""How a verdict looks."""


def figure_of(data: Mapping[str, Any]) -> go.Figure:
    """The panels of one figure side by side; a curve's name is in the legend once, its colour follows its role."""
    panels: Sequence[Mapping[str, Any]] = data["panels"]
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    drawn = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[escape(p["title"]) for p in panels],
        horizontal_spacing=0.09,
        vertical_spacing=0.16,
    )
    for note, axis in zip(drawn.layout.annotations, drawn.select_yaxes(), strict=False):
        note.update(yanchor="top", y=axis.domain[1], bgcolor="rgba(255,255,255,.75)", font={"size": 13})
    colours: dict[str, str] = {}
    shown: set[str] = set()
    for number, panel in enumerate(panels):
        for series in panel["series"]:
            key = series["role"] or series["name"]
            colour = _ROLES.get(key) or colours.setdefault(key, PALETTE[len(colours) % len(PALETTE)])
            drawn.add_scatter(
                x=series["x"], y=series["y"], name=escape(series["name"]), legendgroup=series["name"],
                showlegend=len(series["x"]) > 0 and series["name"] not in shown, text=list(series["text"]) or None,
                mode="markers" if series["style"] == "markers" else "lines",
                line={"color": colour, "width": 2, "dash": "dash" if series["style"] == "dash" else "solid"},
                marker={"color": colour, "size": 10, "symbol": "diamond"},
                hovertemplate="%{x:.4g}, %{y:.4g}<br>%{text}" if series["text"] else "%{x:.4g}, %{y:.4g}",
                row=number // columns + 1, col=number % columns + 1,
            )  # fmt: skip
            shown |= {series["name"]} if len(series["x"]) else set()
        span = _span([y for series in panel["series"] for y in series["y"]], data["y_log"])
        drawn.update_yaxes(range=span, row=number // columns + 1, col=number % columns + 1)
    drawn.update_xaxes(type="log" if data["x_log"] else "linear", title=data["x_title"], title_standoff=6)
    drawn.update_yaxes(type="log" if data["y_log"] else "linear", exponentformat="power" if data["y_log"] else "none")
    if data["x_labels"]:
        drawn.update_xaxes(tickvals=list(range(len(data["x_labels"]))), ticktext=[escape(label) for label in data["x_labels"]])
    for row in range(1, rows + 1):
        drawn.update_yaxes(title=data["y_title"], row=row, col=1)
    return drawn


def _span(values: Sequence[float], log: bool) -> tuple[float, float] | None:
    """The range of an axis, from zero where it is linear, with room on top for the panel's title."""
    if not values or min(values) < 0 or max(values) <= 0:
        return None
    if not log:
        return 0.0, 1.15 * max(values)
    low, high = math.log10(min(v for v in values if v > 0)), math.log10(max(values))
    return low - 0.05 * max(high - low, 0.2), high + 0.15 * max(high - low, 0.2)


def _height(data: Mapping[str, Any]) -> int:
    return 100 + _HEIGHT * -(-len(data["panels"]) // 2)


def charts(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Every figure under its title and note; numbered where its name is a number."""
    blocks = []
    for number, figure in figures.items():
        label = f"Figure {number}: " if number.isdigit() else ""
        blocks.append(f"<h2>{escape(label + figure['title'])}</h2><p class='note'>{escape(figure['note'])}</p>")
        blocks.append(chart(figure_of(figure), _height(figure)))
    return blocks


def claims_table(claims: Sequence[Mapping[str, Any]], backends: Sequence[str]) -> str:
    """Every claim with its verdict; the reason unfolds below it."""
    head = "".join(f"<th>{escape(c)}</th>" for c in ("", "claim", "printed", "ours", *(f"holds ({b})" for b in backends)))
    rows = []
    for c in claims:
        verdicts = [c["holds"], c["holds_engine"]][: len(backends)]
        cells = "".join(f"<td class='{CLASSES[v]}'>{verdict(v)}</td>" for v in verdicts)
        ours = "<br>".join(f"<i>{escape(b)}</i>: {escape(c['ours_by'][b])}" for b in backends)
        rows.append(
            "<tr "
            f"id='{escape(c['id'])}'><td><b>{escape(c['id'])}</b></td><td>{escape(c['title'])}<br><small>{escape(c['source'])}"
            f"</small></td><td>{escape(c['printed'] or UNPRINTED)}</td><td>{ours}<details>"
            f"<summary>why</summary>{escape(c['why'])}</details></td>{cells}</tr>"
        )
    style = (
        "<style>.claims td{vertical-align:top;white-space:normal;text-align:left}.claims td:nth-child(4){min-width:22rem}"
        ".yes{color:#2f7d4f;font-weight:600}.no{color:#b3261e;font-weight:600}.claims details{margin-top:.3rem}"
        ".claims summary{cursor:pointer}</style>"
    )
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f"{style}<div class='wide'><table class='claims'>{body}</table></div>"


def opening(title: str, lead: str, heads: Sequence[tuple[str, str]], data: Mapping[str, Any]) -> list[str]:
    """How every study's page begins: what it is, headline numbers, claims."""
    return [
        f"<h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p>",
        cards(heads),
        "<h2>Claims</h2>",
        claims_table(data["claims"], list(data["backends"])),
    ]


def study_page(title: str, lead: str, data: Mapping[str, Any]) -> str:
    """A whole study from its JSON object."""
    claims, backends = data["claims"], list(data["backends"])
    held = sum(bool(c["holds"]) for c in claims)
    heads = [
        (f"{held} of {len(claims)}", f"claims hold ({backends[0]})"),
        (f"{data['points_evaluated']:,}", "design points priced"),
        (f"{data['points_considered']:,}", "looked at"),
        (f"{data['seconds']:.0f} s", "on this machine"),
    ]
    body = opening(title, lead, heads, data)
    if data["errata"]:
        body += ["<h2>What cannot come from the stated model</h2>", bullets(data["errata"])]
    body += charts(data["figures"])
    body += ["<h2>Assumptions</h2>", bullets(data["assumptions"])]
    body.append(bullets([f"{name}: {what}" for name, what in data["backends"].items()]))
    body.append(footer([f"Figures are drawn with backend {backends[0]}. Numbers: claims.json beside this page."]))
    return page(title, "".join(body))


def runs_page(title: str, lead: str, data: Mapping[str, Any], work: str, tables: Sequence[str]) -> str:
    """A study of finished runs from its JSON object: headline numbers, claims, its own tables (HTML), figures, assumptions.
    `work` is what the runs' hours went into."""
    claims, undecided = data["claims"], sum(c["holds"] is None for c in data["claims"])
    heads = [
        (f"{sum(bool(c['holds']) for c in claims)} of {len(claims)}", "claims hold"),
        *([(f"{undecided}", "undecided")] if undecided else []),
        (f"{data['points_evaluated']}", "runs"),
        (f"{sum(run['seconds'] for run in data['findings']['runs']) / 3600:.1f} h", work),
    ]
    return page(
        title,
        "".join(
            [
                *opening(title, lead, heads, data),
                *tables,
                *charts(data["figures"]),
                "<h2>Assumptions</h2>",
                bullets(data["assumptions"]),
                footer(["Numbers: claims.json beside this page."]),
            ]
        ),
    )
