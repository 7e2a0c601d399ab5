"""Self-contained HTML pages: Plotly inlined, no network, readable without JavaScript except for the charts themselves."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tandem.plan.option import Option
from tandem.plan.planner import Plan
from tandem.report.text import MODE_TITLES, change_label, describe, gib, ms, plan_sentences, span

COLOURS = {"colocated": "#4269d0", "piggybacked": "#9a6bce", "disaggregated": "#e0661a"}
_BANDS = {"colocated": "rgba(66,105,208,.13)", "piggybacked": "rgba(154,107,206,.13)", "disaggregated": "rgba(224,102,26,.13)"}
_CLASS_COLOURS = {
    "gemm": "#4269d0", "moe": "#1f3f94", "attention_prefill": "#e0661a", "attention_decode": "#f2a154",
    "mla_prefill": "#e0661a", "mla_decode": "#f2a154", "scan_prefill": "#2f9e62", "scan_decode": "#2f9e62",
    "conv_prefill": "#8fd0a8", "conv_decode": "#8fd0a8", "memory": "#b9b9c0", "allreduce": "#c23b62",
    "alltoall": "#8f2446", "send": "#e58aa5", "host": "#6c6c75",
}  # fmt: skip


def page(title: str, body: str) -> str:
    """A whole HTML document around `body`, with Plotly inlined once."""
    style = (resources.files("tandem.report") / "page.css").read_text(encoding="utf-8")
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{style}</style><script>{get_plotlyjs()}</script></head>"
        f"<body>{body}</body></html>\n"
    )


def chart(figure: go.Figure, height: int) -> str:
    """A figure as a block of the page, in the page's own style."""
    figure.update_layout(
        template="simple_white",
        height=height,
        margin={"l": 70, "r": 20, "t": 20, "b": 60},
        font={"family": "system-ui,-apple-system,'Segoe UI',sans-serif", "size": 13},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        hoverlabel={"align": "left"},
    )
    config = {"displaylogo": False, "responsive": True, "displayModeBar": False}
    return f"<div class='chart'>{figure.to_html(full_html=False, include_plotlyjs=False, config=config)}</div>"


def mark_vertical(figure: go.Figure, x: float, text: str) -> None:
    """A dashed vertical line over the whole height, with a word at its foot."""
    line = {"dash": "dash", "color": "#1c1d22", "width": 1.5}
    figure.add_shape(type="line", x0=x, x1=x, y0=0, y1=1, yref="paper", line=line, layer="above")
    figure.add_annotation(
        x=x,
        y=0.02,
        yref="paper",
        text=text,
        showarrow=False,
        xanchor="left",
        xshift=5,
        yanchor="bottom",
        bgcolor="rgba(255,255,255,.8)",
    )


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]], best: int | None = None) -> str:
    """A table; columns whose name starts with > are aligned right, row `best` is marked."""
    classes = [" class='n'" if c.startswith(">") else "" for c in columns]
    head = "".join(f"<th{k}>{escape(c.lstrip('>'))}</th>" for c, k in zip(columns, classes, strict=True))
    lines = []
    for i, row in enumerate(rows):
        cells = "".join(f"<td{k}>{escape(cell)}</td>" for cell, k in zip(row, classes, strict=True))
        lines.append(f"<tr{' class=best' if i == best else ''}>{cells}</tr>")
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def cards(items: Sequence[tuple[str, str]]) -> str:
    """Headline numbers: (value, what it is)."""
    return (
        "<div class='cards'>"
        + "".join(f"<div class='card'><b>{escape(v)}</b><span>{escape(k)}</span></div>" for v, k in items)
        + "</div>"
    )


def bullets(lines: Sequence[str]) -> str:
    """A list of sentences."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def frontier_figure(plan: Plan) -> go.Figure:
    """tok/s/GPU against tok/s/user for every mode, each with its band, and the recommended deployment."""
    figure = go.Figure()
    for mode, title in MODE_TITLES.items():
        points = [o for o in plan.frontier if o.deployment.mode == mode]
        if not points:
            continue
        x = [o.tokens_per_s_per_user.value for o in points]
        low, high = [o.tokens_per_s_per_gpu.low for o in points], [o.tokens_per_s_per_gpu.high for o in points]
        figure.add_scatter(
            x=x + x[::-1], y=high + low[::-1], fill="toself", fillcolor=_BANDS[mode], line={"width": 0}, hoverinfo="skip",
            showlegend=False, legendgroup=mode, mode="lines",
        )  # fmt: skip
        figure.add_scatter(
            x=x, y=[o.tokens_per_s_per_gpu.value for o in points], mode="lines+markers", name=title, legendgroup=mode,
            line={"color": COLOURS[mode], "width": 2}, marker={"size": 6}, customdata=[_hover(o) for o in points],
            hovertemplate="%{x:.0f} tok/s/user, %{y:.0f} tok/s/GPU<br>%{customdata}<extra></extra>",
        )  # fmt: skip
    best = plan.best
    figure.add_scatter(
        x=[best.tokens_per_s_per_user.value], y=[best.tokens_per_s_per_gpu.value], mode="markers", name="recommended",
        marker={"symbol": "star", "size": 16, "color": "#1c1d22"}, customdata=[_hover(best)],
        hovertemplate="recommended<br>%{customdata}<extra></extra>",
    )  # fmt: skip
    if plan.slo.tpot_s is not None:
        mark_vertical(figure, 1 / plan.slo.tpot_s, "TPOT bound")
    figure.update_xaxes(title="interactivity, tok/s/user (1 / TPOT)", rangemode="tozero")
    figure.update_yaxes(title="throughput, tok/s/GPU over all GPUs", rangemode="tozero")
    return figure


def _hover(o: Option) -> str:
    return describe(o.deployment).replace("; ", "<br>") + f"<br>TTFT {ms(o.ttft_s.value)}, {o.deployment.gpus} GPUs"


def _pool_title(mode: str, role: str) -> str:
    return f"{role} pool" if mode == "disaggregated" else MODE_TITLES[mode]


def memory_figure(plan: Plan) -> go.Figure:
    """Memory of the fullest GPU of every pool, against what is usable."""
    parts = (
        ("weight_bytes", "weights", "#4269d0"),
        ("kv_bytes", "attention cache", "#e0661a"),
        ("state_bytes", "recurrent state", "#2f9e62"),
    )
    figure = go.Figure()
    rows = [(_pool_title(m, role), use) for m, o in plan.options.items() for role, use in o.memory.items()][::-1]
    for key, title, colour in (*parts, ("workspace_bytes", "workspace", "#b9b9c0")):
        figure.add_bar(
            y=[name for name, _ in rows], x=[use[key] / 2**30 for _, use in rows], name=title, orientation="h",
            marker={"color": colour}, hovertemplate="%{x:.2f} GiB<extra>" + title + "</extra>",
        )  # fmt: skip
    usable = rows[0][1]["usable_bytes"] / 2**30
    mark_vertical(figure, usable, f"usable {usable:.1f} GiB")
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title="GiB on the fullest GPU")
    return figure


def time_figure(plan: Plan) -> go.Figure:
    """Where the time of one step goes, by class of operation, in shares of the step."""
    figure = go.Figure()
    rows = [(_pool_title(m, role), times) for m, o in plan.options.items() for role, times in o.time_by_class.items()][::-1]
    for name in _CLASS_COLOURS:
        if not any(name in times for _, times in rows):
            continue
        totals = [sum(c["seconds"] for c in times.values()) for _, times in rows]
        seconds = [times.get(name, {"seconds": 0.0})["seconds"] for _, times in rows]
        figure.add_bar(
            y=[row for row, _ in rows], x=[100 * s / t for s, t in zip(seconds, totals, strict=True)],
            name=name.replace("_", " "), orientation="h", marker={"color": _CLASS_COLOURS[name]},
            customdata=[ms(s) for s in seconds],
            hovertemplate="%{x:.1f} % (%{customdata})<extra>" + name.replace("_", " ") + "</extra>",
        )  # fmt: skip
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title="share of one step, % (a co-located pool's step without its prompts)")
    return figure


def options_table(plan: Plan) -> str:
    """The best deployment of each mode."""
    rows = [
        [
            MODE_TITLES[mode], describe(o.deployment), str(o.deployment.gpus), f"{o.tokens_per_s:,.0f}",
            span(o.tokens_per_s_per_gpu), span(o.tokens_per_s_per_user), ms(o.ttft_s.value), ms(o.tpot_s.value),
        ]
        for mode, o in plan.options.items()
    ]  # fmt: skip
    best = next(i for i, o in enumerate(plan.options.values()) if o is plan.best)
    columns = ("mode", "deployment", ">GPUs", ">tok/s", ">tok/s/GPU (80 %)", ">tok/s/user (80 %)", ">TTFT", ">TPOT")
    return html_table(columns, rows, best)


def changes_table(plan: Plan) -> str:
    """The recommendation under other bounds and budgets."""
    rows = [
        [
            change_label(c["change"]), MODE_TITLES[c["recommended"]] if c["recommended"] else "nothing meets it",
            f"{c['tokens_per_s']:,.0f}" if c["tokens_per_s"] else "-", f"{c['gain']:.2f}" if c["gain"] else "-",
        ]
        for c in plan.changes
    ]  # fmt: skip
    return html_table(("if", "recommended", ">tok/s", ">disaggregated / co-located"), rows)


def top_table(plan: Plan, limit: int = 12) -> str:
    """Frontier deployments that meet the SLO, best throughput first."""
    bound = plan.slo.tpot_s or float("inf")
    fitting = sorted((o for o in plan.frontier if o.tpot_s.value <= bound), key=lambda o: -o.tokens_per_s_per_gpu.value)[:limit]
    rows = [
        [
            MODE_TITLES[o.deployment.mode], describe(o.deployment), str(o.deployment.gpus), span(o.tokens_per_s_per_gpu),
            f"{o.tokens_per_s_per_user.value:,.0f}", ms(o.ttft_s.value), ms(o.tpot_s.value),
        ]
        for o in fitting
    ]  # fmt: skip
    return html_table(("mode", "deployment", ">GPUs", ">tok/s/GPU (80 %)", ">tok/s/user", ">TTFT", ">TPOT"), rows)


def plan_section(plan: Plan) -> str:
    """A plan as a part of a page: answer, frontier, memory, time, table."""
    best = plan.best
    heads = [
        (MODE_TITLES[best.deployment.mode], f"on {best.deployment.gpus} of {plan.gpus} {plan.hardware.title}"),
        (f"{best.tokens_per_s_per_gpu.value:,.0f}", "tok/s/GPU"),
        (f"{best.tokens_per_s_per_user.value:,.0f}", "tok/s/user"),
        (ms(best.ttft_s.value), "TTFT"),
        (ms(best.tpot_s.value), "TPOT"),
        (gib(best.memory[next(iter(best.memory))]["weight_bytes"]), "weights a GPU"),
    ]
    bars = 110 + 46 * sum(len(o.memory) for o in plan.options.values())
    return (
        cards(heads)
        + bullets(plan_sentences(plan))
        + options_table(plan)
        + "<h2>What would change the answer</h2>"
        + changes_table(plan)
        + "<h2>Frontier</h2><p class='note'>Higher and further right is better. Bands: 80 % interval of measured rows of this "
        "kind; a disaggregated band also reaches down to 75 % of the rate-matched value, which real systems show.</p>"
        + chart(frontier_figure(plan), 460)
        + "<h2>Memory</h2>"
        + chart(memory_figure(plan), bars)
        + "<h2>Where a step's time goes</h2>"
        + chart(time_figure(plan), bars)
        + "<h2>Top deployments under the objective</h2>"
        + top_table(plan)
    )


def footer(lines: Sequence[str]) -> str:
    """Small print at the end of a page."""
    return "<footer>" + "<br>".join(escape(line) for line in lines) + "</footer>"


def plan_page(plan: Plan) -> str:
    """One plan as a page of its own."""
    w = plan.workload
    title = f"{plan.model.name} on {plan.gpus} {plan.hardware.title}"
    refused = [f"{count:,} points refused: {reason}" for reason, count in plan.refused.items()]
    d = plan.best.deployment
    lengths = f"{w.mean_isl:,.0f} prompt and {w.mean_osl:,.0f} output tokens on average"
    lead = f"{w.name}: {lengths}, {d.precision} on {d.backend}"
    body: list[Any] = [f"<h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p>", plan_section(plan), footer(refused)]
    return page(title, "".join(body))
