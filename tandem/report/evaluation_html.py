"""The page of an evaluation: scores side by side, bars with intervals, accuracy against budget, answers to read.

Takes the evaluation's JSON object. Whatever a model wrote is escaped: it is shown, never obeyed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from tandem.report.evaluation_text import (
    BUDGET,
    SUITE_TITLES,
    WRITING,
    budget_points,
    budget_rows,
    part_rows,
    row_keys,
    score_of,
    score_rows,
    star_sentence,
    writing_rows,
)
from tandem.report.html import bullets, cards, chart, footer, html_table, page

_PALETTE = ("#4269d0", "#e0661a", "#2f9e62", "#c23b62", "#8a6d3b", "#1f9bb5", "#9a6bce", "#6c6c75")
_STYLE = """<style>
:root{color-scheme:light dark}
html{background:var(--paper,#fff)}
.chart .main-svg{background:transparent!important}
details.answer{border-bottom:1px solid var(--line);padding:.35rem 0;max-width:52rem}
details.answer summary{cursor:pointer;overflow-wrap:anywhere}
.answer pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--tint);padding:.6rem .8rem;border-radius:.4rem}
.answer pre{font-size:.85rem}
.right{color:var(--good,#2f7d4f);font-weight:600}.wrong{color:var(--bad,#b3261e);font-weight:600}
td{white-space:nowrap}
@media (prefers-color-scheme:dark){
:root{--ink:#e6e6ea;--soft:#a2a5ae;--line:#3a3c44;--tint:#25272e;--paper:#17181c;--good:#6fcf97;--bad:#ff8a80}
.chart text{fill:var(--ink)!important}
.chart .xaxislayer-above path,.chart .yaxislayer-above path,.chart .crisp{stroke:var(--soft)!important}
.chart .hoverlayer text{fill:#1c1d22!important}
}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));gap:0 1rem}
.panels>*{min-width:0}
@media (max-width:40rem){body{padding:1.2rem .8rem 3rem}}
</style>"""
_LONGEST = 1500
"""Characters of a question or an answer that are shown; its beginning and its end."""
_BAR_PIXELS = 17
_PANELS = (
    ("accuracy", "right answers, %", 100.0),
    ("thinking_tokens", "thinking tokens", 1.0),
    ("answer_tokens", "answer tokens", 1.0),
    ("one_closing_mark_unaided", "one closing mark, unaided, %", 100.0),
)


def evaluation_page(data: Mapping[str, Any]) -> str:
    """The whole evaluation as a page of its own."""
    models = data["models"]
    names = [model["name"] for model in models]
    title = ", ".join(names) if len(names) < 4 else f"{len(names)} models"
    body = [
        _STYLE,
        f"<h1>Evaluation of {escape(title)}</h1><p class='lead'>{escape(_lead(data))}</p>",
        cards(_heads(models)),
        "<h2>Scores</h2>",
        f"<p class='note'>{escape(_note(data))}</p>",
        html_table(("suite", "asked", "task", *(f">{name}" for name in names)), score_rows(data)),
    ]
    keys = row_keys(data)
    for suite in dict.fromkeys(key[0] for key in keys):
        of_suite = [key for key in keys if key[0] == suite]
        height = 90 + len(of_suite) * (12 + _BAR_PIXELS * len(models))
        body.append(f"<h2>{escape(SUITE_TITLES[suite].capitalize())}</h2>" + chart(bars(models, of_suite), height))
    if any(model["metrics"].get("budgets") for model in models):
        body.append(
            "<h2>Accuracy against thinking budget</h2><p class='note'>Tokens after which thinking is closed, at the next "
            "newline or 500 tokens later; bars are 95 % intervals. The last point has no budget. The engine lets no second "
            "closing mark follow; unaided is the share of answers in which the model itself writes none.</p>"
        )
        panels = "".join(chart(curve(models, *panel), 330) for panel in _PANELS)
        body += [f"<div class='panels'>{panels}</div>", html_table(BUDGET, budget_rows(data))]
    if part_rows(data):
        columns = ("suite", "asked", "part", *(f">{name}" for name in names))
        body += ["<h2>What right answers are made of</h2>", html_table(columns, part_rows(data))]
    if writing_rows(data):
        body += [
            "<h2>How answers were written</h2><p class='note'>Lengths in tokens; means.</p>",
            html_table(WRITING, writing_rows(data)),
        ]
    notes = [f"{model['name']}: {note}." for model in models for note in model["notes"]]
    if notes:
        body += ["<h2>To know</h2>", bullets(notes)]
    body += ["<h2>Answers</h2>", *(_answers(model, several=len(models) > 1) for model in models)]
    body.append(footer([f"{model['name']}: {model['checkpoint']}" for model in models]))
    return page(f"Evaluation of {title}", "".join(body))


def _lead(data: Mapping[str, Any]) -> str:
    asked = data["settings"]
    how = (
        "greedily" if not asked["temperature"] else f"at temperature {asked['temperature']:g}, {asked['samples']} answers each"
    )
    return f"{asked['problems']:,} problems a task, answered {how} in at most {asked['max_tokens']:,} tokens."


def _note(data: Mapping[str, Any]) -> str:
    intervals = "Share of right answers, with the 95 % interval in brackets."
    if len(data["models"]) < 2:
        return intervals
    told = any(c["better"] for c in data["comparisons"])
    return f"{intervals} {star_sentence() if told else 'No difference is more than an accident could make (McNemar).'}"


def _heads(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    found = []
    for model in models:
        for suite, modes in model["metrics"].items():
            if suite != "budgets" and modes:
                mode, by_task = next(iter(modes.items()))
                about = f"{model['name']}: {SUITE_TITLES[suite]}, {mode}"
                found.append((f"{by_task['all']['accuracy']:.1%}", about))
    return found[:8]


def bars(models: Sequence[Mapping[str, Any]], keys: Sequence[tuple[str, str, str]]) -> go.Figure:
    """A group of bars for each row, one a model, with its interval."""
    figure = go.Figure()
    labels = [f"{task}, {mode}" for _, mode, task in keys]
    for number, model in enumerate(models):
        found = [(label, score) for label, key in zip(labels, keys, strict=True) if (score := score_of(model, key))]
        if not found:
            continue
        right = [100 * score["accuracy"] for _, score in found]
        figure.add_bar(
            y=[escape(label) for label, _ in found], x=right, name=escape(model["name"]), orientation="h",
            marker={"color": _PALETTE[number % len(_PALETTE)]}, error_x=_errors([score for _, score in found], right),
            customdata=[f"{score['correct']:g} of {score['count']:,}" for _, score in found],
            hovertemplate="%{x:.1f} % (%{customdata})<extra>" + escape(model["name"]) + "</extra>",
        )  # fmt: skip
    figure.update_layout(barmode="group", bargap=0.25, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)")
    figure.update_xaxes(title="right answers, %", range=[0, 101])
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure


def curve(models: Sequence[Mapping[str, Any]], name: str, title: str, factor: float) -> go.Figure:
    """One measure against the thinking budget, a curve for each model; the accuracy with its intervals."""
    figure = go.Figure()
    ticks = list(dict.fromkeys(budget for model in models for budget, _ in budget_points(model)))
    ticks.sort(key=lambda text: float("inf") if text == "none" else int(text.replace(",", "")))
    for number, model in enumerate(models):
        there = [(budget, found) for budget, found in budget_points(model) if found[name] is not None]
        values = [factor * found[name] for _, found in there]
        figure.add_scatter(
            x=[budget for budget, _ in there], y=values, mode="lines+markers", name=escape(model["name"]), showlegend=True,
            line={"color": _PALETTE[number % len(_PALETTE)], "width": 2},
            error_y=_errors([found for _, found in there], values) if name == "accuracy" else None,
            hovertemplate="%{x}: %{y:.4g}<extra>" + escape(model["name"]) + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=ticks, title="thinking budget, tokens")
    figure.update_yaxes(rangemode="tozero", title=title)
    figure.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)")
    return figure


def _errors(found: Sequence[Mapping[str, Any]], values: Sequence[float]) -> dict[str, Any]:
    """Both arms of the intervals around values in percent."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, 100 * score["high"] - value) for score, value in zip(found, values, strict=True)],
        "arrayminus": [max(0.0, value - 100 * score["low"]) for score, value in zip(found, values, strict=True)],
        "thickness": 1.2,
        "width": 3,
        "color": "#8a8c94",
    }


def _answers(model: Mapping[str, Any], *, several: bool) -> str:
    parts = [f"<h3>{escape(model['name'])}</h3>"] if several else []
    if not model["samples"]:
        parts.append("<p class='note'>None.</p>")
    for sample in model["samples"]:
        mark = "<span class='right'>right</span>" if sample["right"] else "<span class='wrong'>wrong</span>"
        about = f"{SUITE_TITLES[sample['suite']]}, {sample['mode']}, {sample['task']}"
        beginning = " ".join(sample["question"].split())
        beginning = beginning if len(beginning) < 90 else beginning[:88] + " ..."
        parts.append(
            f"<details class='answer'><summary>{mark} {escape(about)}: {escape(beginning)}</summary>"
            f"<p class='note'>question</p><pre>{escape(_shown(sample['question']))}</pre>"
            f"<p class='note'>expected</p><pre>{escape(_shown(sample['expected']))}</pre>"
            f"<p class='note'>the model wrote</p><pre>{escape(_shown(sample['text'])) or '(nothing)'}</pre></details>"
        )
    return "".join(parts)


def _shown(text: str) -> str:
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]}\n[{len(text) - 2 * half:,} characters left out]\n{text[-half:]}"
