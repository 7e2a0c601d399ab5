"""The page of `tandem simulate --report`: queues, pools and latencies over time, their distributions, and every decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from tandem.report.html import bullets, cards, chart, footer, html_table, page
from tandem.report.simulate_text import SPREADS, Variant, bounds_text, difference_sentences, sentences, variant_label
from tandem.report.text import ms, short
from tandem.sim.api import SimRun

ROLES = {"prefill_workers": "prefill", "decode_workers": "decode", "colocated_workers": "co-located", "starting": "starting"}
ROLE_COLOURS = ("#e0661a", "#4269d0", "#9a6bce", "#b9b9c0")
VARIANT_COLOURS = ("#4269d0", "#e0661a", "#2f9e62", "#9a6bce", "#c23b62", "#6c6c75")
QUANTILES = np.linspace(0.0, 100.0, 201)


def _line(figure: go.Figure, x: Any, y: Any, name: str, colour: str, **more: Any) -> None:
    figure.add_scatter(x=x, y=y, mode="lines", name=name, line={"color": colour, "width": 2, **more})


def queue_figure(run: SimRun) -> go.Figure:
    """Requests that wait and that decode, at the end of every window."""
    figure, series = go.Figure(), run.result.series
    _line(figure, series["at_s"], series["waiting"], "waiting for prefill", "#e0661a")
    _line(figure, series["at_s"], series["decoding"], "decoding", "#4269d0")
    figure.update_xaxes(title="time, s")
    figure.update_yaxes(title="requests", rangemode="tozero")
    return figure


def pool_figure(run: SimRun) -> go.Figure:
    """Workers of each role, and the GPUs that are held."""
    figure, series = go.Figure(), run.result.series
    for (key, title), colour in zip(ROLES.items(), ROLE_COLOURS, strict=True):
        if np.any(series[key] > 0):
            _line(figure, series["at_s"], series[key], title, colour, shape="hv")
    _line(figure, series["at_s"], series["gpus"], "GPUs held", "#1c1d22", shape="hv", dash="dot")
    for at_s, _ in run.decisions:
        figure.add_shape(type="line", x0=at_s, x1=at_s, y0=0, y1=1, yref="paper", line={"color": "#b9b9c0", "width": 1})
    figure.update_xaxes(title="time, s")
    figure.update_yaxes(title="workers, GPUs", rangemode="tozero")
    return figure


def latency_figure(run: SimRun, name: str, bound_s: float | None) -> go.Figure:
    """TTFT (p90) or TPOT (mean) of each window in milliseconds, beside its bound."""
    figure, series = go.Figure(), run.result.series
    title = "TTFT p90, ms" if name == "ttft_s" else "TPOT mean, ms"
    _line(figure, series["at_s"], series[name] * 1e3, title.removesuffix(", ms"), "#4269d0")
    if bound_s is not None:
        ends = [float(series["at_s"][0]), float(series["at_s"][-1])]
        _line(figure, ends, [bound_s * 1e3] * 2, "bound", "#c23b62", dash="dash")
    figure.update_xaxes(title="time, s")
    figure.update_yaxes(title=title, rangemode="tozero")
    return figure


def distribution_figure(variants: Sequence[Variant], name: str, bound_s: float | None) -> go.Figure:
    """Share of completed requests within so many milliseconds, one line a variant."""
    figure = go.Figure()
    for i, (label, run, _) in enumerate(variants):
        values: NDArray[np.float64] = getattr(run.result.requests, name)[run.result.requests.completed]
        values = values[~np.isnan(values)]
        if values.size:
            x = np.percentile(values, QUANTILES) * 1e3
            _line(figure, x, QUANTILES, variant_label(label, run), VARIANT_COLOURS[i % len(VARIANT_COLOURS)])
    if bound_s is not None:
        line = {"dash": "dash", "color": "#c23b62", "width": 1.5}
        figure.add_shape(type="line", x0=bound_s * 1e3, x1=bound_s * 1e3, y0=0, y1=1, yref="paper", line=line)
    figure.update_xaxes(title=f"{SPREADS[name]}, ms", rangemode="tozero")
    figure.update_yaxes(title="% of requests at or below", range=[0, 101])
    figure.update_layout(showlegend=len(variants) > 1)
    return figure


def decisions_table(run: SimRun) -> str:
    """When what was decided, and why."""
    rows = [
        [f"{at_s:,.0f} s", ", ".join(f"{count} {role}" for role, count in sorted(d.targets.items())), d.reason]
        for at_s, d in run.decisions
    ]
    return html_table((">at", "workers", "why"), rows)


def _latency_table(run: SimRun) -> str:
    rows = []
    for name, label in SPREADS.items():
        spread = getattr(run.stats, name)
        if spread is not None:
            rows.append([label, *(ms(value) for value in (spread.mean, spread.p50, spread.p90, spread.p99))])
    return html_table(("", ">mean", ">p50", ">p90", ">p99"), rows)


def _intervals_table(found: Mapping[str, Any]) -> str:
    rows = []
    for name, value in found.items():
        inner = value.items() if "mean" in value and isinstance(value["mean"], Mapping) else [("", value)]
        form = ms if name in SPREADS else lambda number: f"{number:,.3f}"
        for part, interval in inner:
            label = f"{SPREADS.get(name, name.replace('_', ' '))} {part}"
            rows.append([label, *(form(interval[end]) for end in ("mean", "low", "high"))])
    return html_table(("", ">mean", ">from", ">to"), rows)


def simulate_page(variants: Sequence[Variant], found: Mapping[str, Any] | None = None) -> str:
    """One document: the first variant in full, the others beside it; `found` are the intervals of its measures."""
    name, run, _ = variants[0]
    stats, trace, d = run.stats, run.trace, run.deployment
    title = f"{short(d.model)} on {d.gpus} {d.hardware}, simulated"
    lead = f"{variant_label(name, run)}: {len(trace):,} requests of {trace.name}; {bounds_text(run)}"
    heads = [(f"{stats.completed:,} of {stats.arrived:,}", "requests completed")]
    heads += [(ms(s.p90), f"{label} p90") for s, label in ((stats.ttft_s, "TTFT"), (stats.tpot_s, "TPOT")) if s is not None]
    if stats.attainment is not None:
        heads.append((f"{stats.attainment:.1%}", "within the objective"))
    heads += [(f"{run.gpu_hours:,.2f}", "GPU hours"), (f"{run.price_usd:,.2f}", "USD")]
    ttft_s, tpot_s = (None, None) if run.slo is None else (run.slo.ttft_s, run.slo.tpot_s)
    body = [f"<h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p>", cards(heads), bullets(sentences(run))]
    body.append(_latency_table(run))
    if found:
        body += ["<h2>Over replications</h2><p class='note'>95 % intervals of Student's t.</p>", _intervals_table(found)]
    if len(variants) > 1:
        body += ["<h2>Under the same arrivals</h2>", _variants_table(variants), bullets(difference_sentences(variants))]
    body += ["<h2>Requests in the system</h2>", chart(queue_figure(run), 340)]
    body += ["<h2>Workers</h2>", chart(pool_figure(run), 320)]
    body += ["<h2>TTFT over time</h2>", chart(latency_figure(run, "ttft_s", ttft_s), 320)]
    body += ["<h2>TPOT over time</h2>", chart(latency_figure(run, "tpot_s", tpot_s), 320)]
    body += ["<h2>How they spread</h2>", chart(distribution_figure(variants, "ttft_s", ttft_s), 340)]
    body.append(chart(distribution_figure(variants, "tpot_s", tpot_s), 340))
    if run.decisions:
        body += ["<h2>Decisions</h2>", decisions_table(run)]
    body.append(footer(["Printed by tandem simulate; all of it, in SI units: tandem simulate --json"]))
    return page(title, "".join(body))


def _variants_table(variants: Sequence[Variant]) -> str:
    rows = []
    for name, run, _ in variants:
        times = [ms(s.p90) if s else "-" for s in (run.ttft_s, run.tpot_s)]
        share = "-" if run.attainment is None else f"{run.attainment:.1%}"
        rows.append(
            [
                variant_label(name, run),
                str(run.deployment.gpus),
                *times,
                share,
                f"{run.gpu_hours:,.2f}",
                f"{run.price_usd:,.2f}",
            ]
        )
    return html_table(("", ">GPUs", ">TTFT p90", ">TPOT p90", ">attained", ">GPU hours", ">USD"), rows)
