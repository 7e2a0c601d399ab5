"""The page of `tandem validate --report`: predicted against measured, and all error sets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from tandem.perf.held_out import HeldOut
from tandem.perf.peer import PeerAnswers
from tandem.perf.validate import ErrorSet, Predictions, measured
from tandem.report.html import bullets, cards, chart, footer, html_table, page
from tandem.report.text import ms, short
from tandem.report.validate_text import OWN_COLUMNS, PEER_COLUMNS, SECTIONS, cells, pairs, section_of, sentences, title_of

FAMILY_COLOURS = {"dense": "#4269d0", "moe": "#e0661a", "mla": "#2f9e62", "hybrid": "#9a6bce"}
BACKEND_SYMBOLS = {"vllm": "circle", "sglang": "square", "trtllm": "diamond", "tandem": "x"}
GREY = "rgba(90,93,104,.25)"
TITLES = {"tpot_s": "TPOT", "ttft_s": "TTFT"}
AXIS_UNIT = {"tpot_s": (1e3, "ms"), "ttft_s": (1.0, "s")}


def scatter_figure(p: Predictions, metric: str) -> go.Figure:
    """Predicted against measured on logarithmic axes: validation rows with their interval, coloured by family and shaped by
    backend; calibration rows grey behind them."""
    figure = go.Figure()
    scale, unit = AXIS_UNIT[metric]
    x, y = measured(p, metric) * scale, getattr(p, metric) * scale
    low, high = p.low[metric] * scale, p.high[metric] * scale
    ends = [float(min(x.min(), y.min())) / 1.3, float(max(x.max(), y.max())) * 1.3]
    figure.add_scatter(
        x=ends, y=ends, mode="lines", line={"color": "#1c1d22", "width": 1}, name="predicted = measured", hoverinfo="skip"
    )
    judged = p.validation
    if not judged.all():
        figure.add_scattergl(
            x=x[~judged], y=y[~judged], mode="markers", name="calibration side", hoverinfo="skip",
            marker={"size": 4, "color": GREY},
        )  # fmt: skip
    for family, colour in FAMILY_COLOURS.items():
        of_family = judged & np.array([r.model.family == family for r in p.rows])
        for backend, symbol in BACKEND_SYMBOLS.items():
            chosen = np.flatnonzero(of_family & np.array([r.backend == backend for r in p.rows]))
            if not len(chosen):
                continue
            bars = {"type": "data", "symmetric": False, "array": (high - y)[chosen], "arrayminus": (y - low)[chosen]}
            figure.add_scatter(
                x=x[chosen], y=y[chosen], mode="markers", name=f"{family}, {backend}",
                marker={"size": 6, "color": colour, "symbol": symbol}, customdata=[_hover(p, int(i), metric) for i in chosen],
                error_y={**bars, "color": colour, "thickness": 0.5, "width": 0},
                hovertemplate="%{customdata}<extra></extra>",
            )  # fmt: skip
    for axis, word in ((figure.update_xaxes, "measured"), (figure.update_yaxes, "predicted")):
        axis(title=f"{TITLES[metric]} {word}, {unit}", type="log", range=[float(np.log10(e)) for e in ends], dtick=1)
    return figure


def _hover(p: Predictions, i: int, metric: str) -> str:
    r = p.rows[i]
    lengths = f"{r.isl:,} + {r.osl:,} tokens, {r.concurrency:,} in flight, {r.precision.weights}"
    layout = f"{r.replicas} x decode ({r.parallelism})" if r.prefill else str(r.parallelism)
    values = f"measured {ms(getattr(r, metric))}, predicted {ms(getattr(p, metric)[i])}"
    interval = f"80 %: {ms(p.low[metric][i])} to {ms(p.high[metric][i])}"
    return "<br>".join((f"{short(r.model.name)} on {r.hardware.name}, {r.backend}", layout, lengths, values, interval))


def held_out_figure(sets: Sequence[ErrorSet]) -> go.Figure:
    """Median error on co-located validation rows of each GPU and model when no coefficient saw its rows."""
    figure = go.Figure()
    chosen = [p for p in pairs(sets) if p[0].side == "validation" and not p[0].name.endswith(" disaggregated")]
    names = [title_of(pair[0]) for pair in chosen]
    for index, (metric, colour) in enumerate((("tpot_s", "#4269d0"), ("ttft_s", "#e0661a"))):
        errors = [100 * pair[index].median_ape for pair in chosen]
        figure.add_bar(
            y=names, x=errors, orientation="h", name=TITLES[metric], marker={"color": colour},
            hovertemplate="%{y}: %{x:.1f} %<extra>" + TITLES[metric] + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(title="median absolute error, %")
    figure.update_yaxes(autorange="reversed")
    return figure


def _section(title: str, sets: Sequence[ErrorSet]) -> str:
    found = pairs(sets)
    with_peer = any(p[0].peer for p in found)
    columns = [c.replace("!", "") for c in (*OWN_COLUMNS, *(PEER_COLUMNS if with_peer else ()))]
    return f"<h2>{title}</h2>" + html_table(columns, [cells(p, with_peer) for p in found])


def validate_page(
    p: Predictions,
    sets: Sequence[ErrorSet],
    held_out: Sequence[HeldOut],
    answered: dict[str, dict[str, float]],
    peer: PeerAnswers | None,
    source: str,
) -> str:
    """Everything that `tandem validate` found, as one document."""
    whole = [s for s in sets if s.side == "validation" and s.name in ("all", "disaggregated")]
    words = {"all": "co-located", "disaggregated": "disaggregated"}
    heads = [(f"{s.median_ape:.1%}", f"{TITLES[s.metric]} median error, {s.n:,} {words[s.name]} rows") for s in whole]
    lead = f"{len(p.rows):,} measured rows ({source}); {int(p.validation.sum()):,} of them are of settings that no fit has seen"
    body = [f"<h1>Predicted against measured</h1><p class='lead'>{lead}</p>", cards(heads), bullets(sentences(answered, peer))]
    for metric, title in TITLES.items():
        body += [f"<h2>{title}</h2>", "<p class='note'>Bars: the 80 % interval.</p>", chart(scatter_figure(p, metric), 620)]
    if held_out:
        left_out = [s for h in held_out for s in h.sets()]
        body += ["<h2>What nobody fitted</h2>", chart(held_out_figure(left_out), 760)]
    for section, title in SECTIONS.items():
        chosen = [s for s in sets if section_of(s) == section]
        if chosen:
            body.append(_section(title, chosen))
    body.append(footer(["Printed by tandem validate; the same figures, unrounded: tandem validate --json"]))
    return page("Predicted against measured", "".join(body))
