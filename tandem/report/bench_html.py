"""The page of `tandem bench --report`: distributions of what clients felt, and every request over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from tandem.report.bench_text import ALL_RUNS, SPREADS, bench_lines, load_text, mean_of_runs
from tandem.report.html import bullets, cards, chart, footer, html_table, page
from tandem.report.text import ms
from tandem.sched import metrics
from tandem.sched.request import Request
from tandem.spec.workload import Slo

if TYPE_CHECKING:  # they need the extra `[bench]`
    from tandem.bench.load import Load
    from tandem.bench.run import BenchRun

COLOURS = ("#4269d0", "#e0661a", "#2f9e62", "#9a6bce", "#c23b62", "#6c6c75")
QUANTILES = np.linspace(0.0, 100.0, 201)
MEASURES = {"ttft_s": metrics.ttft_s, "tpot_s": metrics.tpot_s, "e2e_s": metrics.e2e_s}


def values(requests: Sequence[Request], name: str) -> list[float]:
    """A measure of the requests that completed, seconds."""
    found = (MEASURES[name](request) for request in requests if metrics.completed(request))
    return [value for value in found if value is not None]


def distribution_figure(runs: Sequence[BenchRun], name: str, bound_s: float | None) -> go.Figure:
    """Share of completed requests within so many milliseconds, one line a run."""
    figure = go.Figure()
    for number, run in enumerate(runs):
        there = values(run.requests, name)
        if there:
            x = np.percentile(there, QUANTILES) * 1e3
            line = {"color": COLOURS[number % len(COLOURS)], "width": 2}
            figure.add_scatter(x=x, y=QUANTILES, mode="lines", name=f"run {number + 1}", line=line)
    if bound_s is not None:
        line = {"dash": "dash", "color": "#c23b62", "width": 1.5}
        figure.add_shape(type="line", x0=bound_s * 1e3, x1=bound_s * 1e3, y0=0, y1=1, yref="paper", line=line)
    figure.update_xaxes(title=f"{SPREADS[name]}, ms", rangemode="tozero")
    figure.update_yaxes(title="% of requests at or below", range=[0, 101])
    figure.update_layout(showlegend=len(runs) > 1)
    return figure


def timeline_figure(run: BenchRun) -> go.Figure:
    """TTFT of every request of a run, by when it arrived."""
    figure = go.Figure()
    whole = [request for request in run.requests if metrics.completed(request)]
    marker = {"color": "#4269d0", "size": 5}
    figure.add_scatter(
        x=[r.arrival_s for r in whole], y=[(metrics.ttft_s(r) or 0.0) * 1e3 for r in whole], mode="markers", marker=marker,
        customdata=[[r.isl, r.osl] for r in whole],
        hovertemplate="%{x:.2f} s: %{y:.1f} ms<br>%{customdata[0]} + %{customdata[1]} tokens<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title="arrival, s", rangemode="tozero")
    figure.update_yaxes(title="TTFT, ms", rangemode="tozero")
    return figure


def bench_page(
    url: str, model: str, load: Load, runs: Sequence[BenchRun], slo: Slo | None, intervals: Mapping[str, Any]
) -> str:
    """One document: the first run in full, the others beside it."""
    stats = runs[0].stats(slo)
    heads = [(f"{stats.completed:,} of {stats.arrived:,}", "requests completed")]
    heads += [(ms(s.p50), f"{label} p50") for s, label in ((stats.ttft_s, "TTFT"), (stats.tpot_s, "TPOT")) if s is not None]
    heads.append((f"{stats.tokens_per_s:,.0f}", "output tokens/s"))
    if stats.attainment is not None:
        heads.append((f"{stats.attainment:.0%}", "within the objective"))
    rows = []
    for name, label in SPREADS.items():
        spread = getattr(stats, name)
        if spread is not None:
            cells = [ms(value) for value in (spread.mean, spread.p50, spread.p90, spread.p99)]
            rows.append([label, *cells, mean_of_runs(intervals.get(name, {}).get("mean"))])
    bounds = {} if slo is None else {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s}
    body = [
        f"<h1>{escape(model)}, measured</h1><p class='lead'>{escape(load_text(load))}</p>",
        cards(heads),
        html_table(("", ">mean", ">p50", ">p90", ">p99", f">{ALL_RUNS}"), rows),
        bullets(bench_lines(url, [load], runs, slo, None)),
    ]
    for name, label in SPREADS.items():
        if values(runs[0].requests, name):
            body.append(f"<h2>{label}</h2>" + chart(distribution_figure(runs, name, bounds.get(name)), 320))
    if values(runs[0].requests, "ttft_s"):
        body.append("<h2>Over time</h2>" + chart(timeline_figure(runs[0]), 320))
    body.append(footer(["Printed by tandem bench; all of it, in SI units: tandem bench --json"]))
    return page(f"{model}, measured", "".join(body))
