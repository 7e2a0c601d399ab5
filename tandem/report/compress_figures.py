"""Figures of a compression, from its JSON: scores of layers and units, shapes against throughput, bytes, recovery."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

PALETTE = ("#4269d0", "#e0661a", "#2f9e62", "#c23b62", "#8a6d3b", "#1f9bb5", "#9a6bce", "#6c6c75")
KEPT, CUT = "#4269d0", "#e0661a"
_MOST_POINTS = 40
"""Of one layer's units that stay, and of those that do not; of more, so many evenly over their scores."""
_UNITS = {
    "hidden_size": "hidden", "ffn_size": "ffn", "mamba_heads": "heads", "mamba_head_dim": "channels",
    "attention_heads": "heads", "experts": "experts", "expert_ffn_size": "expert_ffn",
}  # fmt: skip


def title_of(name: str) -> str:
    """A size's field name in words."""
    return name.replace("_", " ").replace("ffn", "FFN").replace("mamba", "Mamba")


def first_round_figure(depth: Mapping[str, Any], kinds: Sequence[str]) -> go.Figure:
    """What leaving out each layer of the whole model does to its logits, by kind of layer; those that left are open."""
    figure, stayed = _bare(), set(depth["kept_layers"])
    scores = _positive(depth["rounds"][0])
    for number, kind in enumerate(dict.fromkeys(kinds)):
        there = [layer for layer in scores if kinds[layer] == kind]
        if not there:
            continue
        colour = PALETTE[number % len(PALETTE)]
        figure.add_scatter(
            x=there, y=[scores[layer] for layer in there], mode="markers", name=escape(kind),
            marker={
                "size": 10, "color": colour, "line": {"width": 2, "color": colour},
                "symbol": ["circle" if layer in stayed else "circle-open" for layer in there],
            },
            customdata=["stays" if layer in stayed else "left" for layer in there],
            hovertemplate="layer %{x}, %{customdata}: %{y:.3g}<extra>" + escape(kind) + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(title="layer of the teacher, from 0", range=[-0.7, len(kinds) - 0.3])
    figure.update_yaxes(title="change of the logits", **_logarithmic(scores.values()))
    figure.update_layout(showlegend=True)
    return figure


def rounds_figure(depth: Mapping[str, Any], layers: int) -> go.Figure:
    """Every round's score of every layer that could leave in it, as a colour; the one that left is marked."""
    figure = _bare()
    rounds = [_positive(part) for part in depth["rounds"]]
    order = depth["order"]
    names = [str(i + 1) for i in range(len(rounds))]
    logs = [[math.log10(part[layer]) if layer in part else None for layer in range(layers)] for part in rounds]
    there = [value for row in logs for value in row if value is not None]
    ticks = _ticks(math.floor(min(there)), math.ceil(max(there)))
    figure.add_heatmap(
        x=list(range(layers)), y=names, z=logs, colorscale="Viridis", xgap=1, ygap=1, hoverongaps=False,
        customdata=[[part.get(layer) for layer in range(layers)] for part in rounds],
        hovertemplate="round %{y}, layer %{x}: %{customdata:.3g}<extra></extra>",
        colorbar={"title": {"text": "change"}, "tickvals": ticks, "ticktext": [f"1e{tick}" for tick in ticks], "thickness": 14},
    )  # fmt: skip
    figure.add_scatter(
        x=list(order[: len(rounds)]), y=names[: len(order)], mode="markers", name="left in this round", showlegend=True,
        marker={"symbol": "x", "size": 11, "color": "#fff", "line": {"width": 1.5, "color": "#1c1d22"}}, hoverinfo="skip",
    )  # fmt: skip
    figure.update_xaxes(title="layer of the teacher, from 0", range=[-0.6, layers - 0.4])
    figure.update_yaxes(title="round", autorange="reversed", type="category")
    return figure


def _positive(scores: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Relative errors by layer; one of 0 is drawn a tenth of the least above it."""
    found = {one["layer"]: one["relative_mse"] for one in scores}
    least = min((value for value in found.values() if value > 0), default=1.0)
    return {layer: value if value > 0 else least / 10 for layer, value in found.items()}


def _logarithmic(values: Iterable[float]) -> dict[str, Any]:
    """Settings of a logarithmic axis over these values, with every tick's number written out."""
    there = [value for value in values if value > 0] or [1.0]
    low, high = math.log10(min(there)), math.log10(max(there))
    steps = (1, 2, 5) if high - low < 2 else (1,)
    ticks = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    margin = 0.06 * (high - low) + 0.04
    return {
        "type": "log",
        "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
        "range": [low - margin, high + margin],
    }


def _ticks(low: int, high: int) -> list[int]:
    return list(range(low, high + 1, max(1, (high - low) // 6)))


def units_figure(size: str, cut: Mapping[str, Any]) -> go.Figure:
    """Scores of one kind of units, layer by layer and over the layer's mean; kept ones beside those that were cut."""
    figure = _bare()
    layers = sorted(int(layer) for layer in cut["scores"][size])
    found: dict[bool, tuple[list[float], list[float]]] = {True: ([], []), False: ([], [])}
    for place, layer in enumerate(layers):
        values = cut["scores"][size][str(layer)]
        mean = sum(values) / len(values) or 1.0
        stays = _stays(size, layer, len(values), cut["kept"])
        for kept, (xs, ys) in found.items():
            points = thinned([value / mean for unit, value in enumerate(values) if (unit in stays) == kept])
            ys += points
            xs += [place + (-0.13 if kept else 0.13)] * len(points)
    for kept, (xs, ys) in found.items():
        if xs:
            name = "kept" if kept else "cut"
            figure.add_scatter(
                x=xs, y=ys, mode="markers", name=name, showlegend=True,
                marker={"size": 6, "opacity": 0.6, "color": KEPT if kept else CUT},
                hovertemplate="%{y:.3g} x the layer's mean<extra>" + name + "</extra>",
            )  # fmt: skip
    shown = range(0, len(layers), max(1, -(-len(layers) // 24)))
    figure.update_xaxes(
        title="norm before layer, the last one the final norm" if size == "hidden_size" else "layer",
        tickvals=list(shown), ticktext=[str(layers[i]) for i in shown], range=[-0.6, len(layers) - 0.4],
    )  # fmt: skip
    figure.update_yaxes(title="score / mean of the layer", rangemode="tozero")
    return figure


def _stays(size: str, layer: int, units: int, kept: Mapping[str, Any]) -> frozenset[int]:
    """Units of a layer that stay; of experts' neurons those that at least half of the experts keep."""
    if size == "hidden_size":
        return frozenset(kept["hidden"])
    there = kept["layers"].get(str(layer), {}).get(_UNITS[size])
    if there is None:
        return frozenset(range(units))
    if size != "expert_ffn_size":
        return frozenset(there)
    sets = [frozenset(row) for row in there]
    return frozenset(unit for unit in range(units) if 2 * sum(unit in row for row in sets) >= len(sets))


def thinned(values: Iterable[float], most: int = _MOST_POINTS) -> list[float]:
    """The values in rising order; of more than `most` so many, evenly, the least and the largest among them."""
    ranked = sorted(values)
    if len(ranked) <= most:
        return ranked
    return [ranked[round(i * (len(ranked) - 1) / (most - 1))] for i in range(most)]


def shapes_figure(search: Mapping[str, Any], *, by_loss: bool) -> go.Figure:
    """Predicted throughput against what is expected of the quality: candidates, frontier, teacher, the first candidate."""
    figure = _bare()
    key = "loss" if by_loss else "quality"

    def points(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        there = [row for row in rows if row["tokens_per_s"] is not None and row[key] is not None]
        return {
            "x": [row["tokens_per_s"] for row in there],
            "y": [row[key] for row in there],
            "customdata": [_sizes_in_words(row) for row in there],
            "hovertemplate": "%{x:,.1f} tok/s, %{y:.4g}<br>%{customdata}<extra></extra>",
        }

    frontier = sorted(search["frontier"], key=lambda row: row["tokens_per_s"])
    figure.add_scatter(
        **points(frontier), mode="lines+markers", name="frontier", line={"color": "#8a8c94", "width": 2}, marker={"size": 7}
    )
    figure.add_scatter(
        **points(search["candidates"][1:]), mode="markers", name="candidates", marker={"size": 12, "color": KEPT}
    )
    figure.add_scatter(
        **points(search["candidates"][:1]), mode="markers", name="best candidate",
        marker={"size": 17, "color": CUT, "symbol": "star"},
    )  # fmt: skip
    if points([search["teacher"]])["x"]:
        figure.add_scatter(
            **points([search["teacher"]]), mode="markers", name="before",
            marker={"size": 12, "color": "#2f9e62", "symbol": "diamond"},
        )  # fmt: skip
    figure.update_xaxes(title="predicted output tok/s")
    if by_loss:
        figure.update_yaxes(title="distance after a short distillation", autorange="reversed")
    else:
        share = search["teacher"]["quality"] <= 1
        figure.update_yaxes(title="share of importance kept" if share else "parameters")
    figure.update_layout(showlegend=True)
    return figure


def _sizes_in_words(row: Mapping[str, Any]) -> str:
    names = ("layers", "hidden_size", "ffn_size", "mamba_heads", "mamba_head_dim", "attention_heads", "experts")
    return ", ".join(f"{title_of(name)} {row[name]:,}" for name in names if row[name] is not None)


def bytes_figure(rows: Mapping[str, float], limit: float | None) -> go.Figure:
    """Bytes at the budget's context and batch, one bar a model, and the most that is allowed."""
    figure = _bare()
    scale, unit = (2**30, "GiB") if max(rows.values()) >= 2**30 else (2**20, "MiB")
    values = [value / scale for value in rows.values()]
    within = [limit is None or value <= limit for value in rows.values()]
    figure.add_bar(
        y=[escape(name) for name in rows], x=values, orientation="h", showlegend=False, text=[f"{v:,.2f}" for v in values],
        textposition="auto", marker={"color": [KEPT if fits else "#8a8c94" for fits in within]},
        hovertemplate="%{x:,.2f} " + unit + "<extra></extra>",
    )  # fmt: skip
    if limit is not None:
        figure.add_vline(x=limit / scale, line={"dash": "dash", "color": CUT, "width": 2}, opacity=1, layer="above")
        figure.add_annotation(
            x=limit / scale, y=1, yref="paper", yanchor="bottom", showarrow=False, text=f"budget {limit / scale:,.2f}"
        )
    figure.update_xaxes(title=unit, rangemode="tozero")
    figure.update_yaxes(autorange="reversed", automargin=True, type="category")
    figure.update_layout(bargap=0.35)
    return figure


def recovery_figure(reports: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """Distance from the teacher on held-out text against the tokens of all distillations; a cut is a dashed line."""
    figure, before, unit = _bare(), 0, _token_unit(reports)
    number = 0
    for name, report in reports.items():
        metrics = report.get("metrics", {})
        if "kept_layers" in metrics or "scores" in metrics:
            figure.add_vline(x=before / unit[0], line={"dash": "dot", "color": "#8a8c94", "width": 1.5}, opacity=1)
            figure.add_annotation(
                x=before / unit[0], y=0, yref="paper", yanchor="bottom", xanchor="left", xshift=4, showarrow=False,
                text=escape(report.get("what", name)), font={"size": 12},
            )  # fmt: skip
        if "course" not in metrics:
            continue
        figure.add_scatter(
            x=[(before + point["tokens"]) / unit[0] for point in metrics["course"]],
            y=[point["loss"] for point in metrics["course"]], mode="lines+markers", name=escape(name), showlegend=True,
            line={"color": PALETTE[number % len(PALETTE)], "width": 2}, marker={"size": 6},
            hovertemplate="%{x:.4g}: %{y:.4g}<extra>" + escape(name) + "</extra>",
        )  # fmt: skip
        before += metrics["tokens"]
        number += 1
    figure.update_xaxes(title=f"tokens of all distillations, {unit[1]}", rangemode="tozero")
    found = [point["loss"] for report in reports.values() for point in report.get("metrics", {}).get("course", ())]
    figure.update_yaxes(title="held-out KL, nats a token", **_logarithmic(found))
    return figure


def _token_unit(reports: Mapping[str, Mapping[str, Any]]) -> tuple[float, str]:
    total = sum(report.get("metrics", {}).get("tokens", 0) for report in reports.values())
    return next(((scale, name) for scale, name in ((1e9, "billions"), (1e6, "millions")) if total >= scale), (1e3, "thousands"))


def answers_figure(reports: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """Right answers of the teacher and of the model after every stage, by what was asked, with 95 % intervals."""
    figure = _bare()
    found: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for stage, report in reports.items():
        for suite, modes in (report.get("evaluation") or {}).items():
            for mode, by_task in modes.items() if suite != "budgets" else ():
                found.setdefault(f"{suite}, {mode}", []).append((stage, by_task["all"]))
    for number, (question, scores) in enumerate(found.items()):
        right = [100 * score["accuracy"] for _, score in scores]
        figure.add_scatter(
            x=[escape(stage) for stage, _ in scores], y=right, mode="lines+markers", name=escape(question), showlegend=True,
            line={"color": PALETTE[number % len(PALETTE)], "width": 2}, marker={"size": 8},
            error_y={
                "type": "data", "symmetric": False, "thickness": 1.2, "width": 3,
                "array": [max(0.0, 100 * score["high"] - value) for (_, score), value in zip(scores, right, strict=True)],
                "arrayminus": [max(0.0, value - 100 * score["low"]) for (_, score), value in zip(scores, right, strict=True)],
            },
            hovertemplate="%{x}: %{y:.1f} %<extra>" + escape(question) + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=[escape(name) for name in reports])
    figure.update_yaxes(title="right answers, %", rangemode="tozero")
    return figure


def _bare() -> go.Figure:
    figure = go.Figure()
    figure.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)")
    return figure
