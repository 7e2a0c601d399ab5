"""Self-contained HTML pages: Plotly inlined, no network, readable without JavaScript except for the charts themselves."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tandem.plan.option import Option
from tandem.plan.planner import Plan
from tandem.report.text import MODE_TITLES, describe, gib, ms, plan_sentences, span

COLOURS = {"colocated": "#4269d0", "piggybacked": "#9a6bce", "disaggregated": "#e0661a"}
_BANDS = {"colocated": "rgba(66,105,208,.13)", "piggybacked": "rgba(154,107,206,.13)", "disaggregated": "rgba(224,102,26,.13)"}
_CLASS_COLOURS = {
    "gemm": "#4269d0", "moe": "#1f3f94", "attention_prefill": "#e0661a", "attention_decode": "#f2a154",
    "mla_prefill": "#e0661a", "mla_decode": "#f2a154", "scan_prefill": "#2f9e62", "scan_decode": "#2f9e62",
    "conv_prefill": "#8fd0a8", "conv_decode": "#8fd0a8", "memory": "#b9b9c0", "allreduce": "#c23b62",
    "alltoall": "#8f2446", "send": "#e58aa5", "host": "#6c6c75",
}  # fmt: skip
_STYLE = """
:root{--ink:#1c1d22;--soft:#5d6068;--line:#e3e4e8;--tint:#f6f7f9}
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);margin:0 auto;padding:2.5rem 1.5rem 5rem;max-width:66rem}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .3rem} h2{font-size:1.2rem;margin:2.6rem 0 .4rem} p{margin:.5rem 0;max-width:48rem}
.lead{color:var(--soft);font-size:1.05rem} .note{color:var(--soft);font-size:.9rem}
.cards{display:flex;flex-wrap:wrap;gap:.8rem;margin:1.2rem 0}.card{background:var(--tint);border-radius:.5rem;padding:.7rem 1rem;min-width:8.5rem}
.card b{display:block;font-size:1.3rem}.card span{color:var(--soft);font-size:.85rem}
table{border-collapse:collapse;width:100%;font-size:.88rem;margin:.6rem 0}th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;white-space:nowrap}tr.best{background:#fff6ec}.wide{overflow-x:auto}ul{max-width:52rem;padding-left:1.2rem}li{margin:.25rem 0}
.chart{margin:.4rem 0 1rem}footer{margin-top:3rem;color:var(--soft);font-size:.85rem;border-top:1px solid var(--line);padding-top:.8rem}
"""


def page(title: str, body: str) -> str:
    """A whole HTML document around `body`, with Plotly inlined once."""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style><script>{get_plotlyjs()}</script></head>"
        f"<body>{body}</body></html>\n"
    )


def chart(figure: go.Figure, height: int) -> str:
    """A figure as a block of the page, in the page's own style."""
    figure.update_layout(
        template="simple_white",
        height=height,
        margin={"l": 70, "r": 20, "t": 20, "b": 60},
        font={"family": "system-ui,-apple-system,'Segoe UI',sans-serif", "size": 13},
        legend={"orientation": "h", "y": 1.12, "x": 0},
        hoverlabel={"align": "left"},
    )
    config = {"displaylogo": False, "responsive": True, "displayModeBar": False}
    return f"<div class='chart'>{figure.to_html(full_html=False, include_plotlyjs=False, config=config)}</div>"


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
    return "<div class='cards'>" + "".join(f"<div class='card'><b>{escape(v)}</b><span>{escape(k)}</span></div>" for v, k in items) + "</div>"


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
        figure.add_vline(x=1 / plan.slo.tpot_s, line={"dash": "dot", "color": "#8a8d95"}, annotation_text="TPOT bound")
    figure.update_xaxes(title="interactivity, tok/s/user (1 / TPOT)", type="log")
    figure.update_yaxes(title="throughput, tok/s/GPU over all GPUs", rangemode="tozero")
    return figure


def _hover(o: Option) -> str:
    return describe(o.deployment).replace("; ", "<br>") + f"<br>TTFT {ms(o.ttft_s.value)}, {o.deployment.gpus} GPUs"


def memory_figure(plan: Plan) -> go.Figure:
    """Memory of the fullest GPU of every pool, against what is usable."""
    parts = (("weight_bytes", "weights", "#4269d0"), ("kv_bytes", "attention cache", "#e0661a"), ("state_bytes", "recurrent state", "#2f9e62"))
    figure = go.Figure()
    rows = [(f"{MODE_TITLES[m]}: {role}", use) for m, o in plan.options.items() for role, use in o.memory.items()][::-1]
    for key, title, colour in (*parts, ("workspace_bytes", "workspace", "#b9b9c0")):
        figure.add_bar(
            y=[name for name, _ in rows], x=[use[key] / 2**30 for _, use in rows], name=title, orientation="h",
            marker={"color": colour}, hovertemplate="%{x:.2f} GiB<extra>" + title + "</extra>",
        )  # fmt: skip
    usable = rows[0][1]["usable_bytes"] / 2**30
    figure.add_vline(x=usable, line={"dash": "dot", "color": "#1c1d22"}, annotation_text=f"usable {usable:.1f} GiB")
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title="GiB on the fullest GPU")
    return figure


def time_figure(plan: Plan) -> go.Figure:
    """Where the time of one step goes, by class of operation, in shares of the step."""
    figure = go.Figure()
    rows = [(f"{MODE_TITLES[m]}: {role}", times) for m, o in plan.options.items() for role, times in o.time_by_class.items()][::-1]
    for name in _CLASS_COLOURS:
        if not any(name in times for _, times in rows):
            continue
        totals = [sum(c["seconds"] for c in times.values()) for _, times in rows]
        seconds = [times.get(name, {"seconds": 0.0})["seconds"] for _, times in rows]
        figure.add_bar(
            y=[row for row, _ in rows], x=[100 * s / t for s, t in zip(seconds, totals, strict=True)], name=name.replace("_", " "),
            orientation="h", marker={"color": _CLASS_COLOURS[name]}, customdata=[ms(s) for s in seconds],
            hovertemplate="%{x:.1f} % (%{customdata})<extra>" + name.replace("_", " ") + "</extra>",
        )  # fmt: skip
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title="share of one step, % (a co-located pool's step without its prompts)")
    return figure


def options_table(plan: Plan) -> str:
    """The best deployment of each mode."""
    rows = [
        [
            MODE_TITLES[mode], describe(o.deployment), str(o.deployment.gpus), f"{o.tokens_per_s:,.0f}", span(o.tokens_per_s_per_gpu),
            span(o.tokens_per_s_per_user), ms(o.ttft_s.value), ms(o.tpot_s.value),
        ]
        for mode, o in plan.options.items()
    ]  # fmt: skip
    best = next(i for i, o in enumerate(plan.options.values()) if o is plan.best)
    columns = ("mode", "deployment", ">GPUs", ">tok/s", ">tok/s/GPU (80 %)", ">tok/s/user (80 %)", ">TTFT", ">TPOT")
    return html_table(columns, rows, best)


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
        (ms(best.ttft_s.value), "TTFT, queue-free"),
        (ms(best.tpot_s.value), "TPOT"),
        (gib(best.memory[next(iter(best.memory))]["weight_bytes"]), "weights a GPU"),
    ]
    bars = 110 + 46 * sum(len(o.memory) for o in plan.options.values())
    return (
        cards(heads)
        + bullets(plan_sentences(plan))
        + options_table(plan)
        + "<h2>Frontier</h2><p class='note'>Higher and further right is better. Bands: 80 % interval of measured rows of this kind; "
        "a disaggregated band also reaches down to 75 % of the rate-matched value, which real systems show.</p>"
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
    lead = f"{w.name}: {w.mean_isl:,.0f} prompt and {w.mean_osl:,.0f} output tokens on average, {plan.best.deployment.precision} on {plan.best.deployment.backend}"
    body: list[Any] = [f"<h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p>", plan_section(plan), footer(refused)]
    return page(title, "".join(body))
