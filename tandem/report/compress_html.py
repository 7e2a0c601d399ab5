"""The pages of a compression: of a finished run and of a plan. They take the JSON objects that the command prints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from tandem.compress.shape import common_sizes
from tandem.report.alignment_text import figures
from tandem.report.compress_figures import (
    answers_figure,
    bytes_figure,
    first_round_figure,
    recovery_figure,
    rounds_figure,
    shapes_figure,
    title_of,
    units_figure,
)
from tandem.report.compress_text import plan_sentences, size
from tandem.report.html import bullets, cards, chart, footer, html_table, page
from tandem.report.text import EVIDENCE_TEXT, describe, ms
from tandem.report.training_text import count, duration
from tandem.spec.design import Deployment, Estimate
from tandem.spec.model import MLP, Attention, Mamba2, Mixer, ModelSpec, MoE

_STYLE = """<style>
:root{color-scheme:light dark}
html{background:var(--paper,#fff)}
.chart .main-svg{background:transparent!important}
td{white-space:nowrap}
tr.best{background:var(--mark,#fff6ec)}
.layers{font-size:1.05rem;letter-spacing:.18em;overflow-wrap:anywhere}
.layers s{color:#fff;background:#c2500c;text-decoration:none;border-radius:.2rem;padding:0 .12em;margin-right:.15em}
th.n{white-space:normal}
@media (prefers-color-scheme:dark){
:root{--ink:#e6e6ea;--soft:#a2a5ae;--line:#3a3c44;--tint:#25272e;--paper:#17181c;--mark:#3a2c1e}
.chart text{fill:var(--ink)!important}
.chart .xaxislayer-above path,.chart .yaxislayer-above path,.chart .crisp{stroke:var(--soft)!important}
.chart .hoverlayer text{fill:#1c1d22!important}
}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,28rem),1fr));gap:0 1rem}
.panels>*{min-width:0}
@media (max-width:40rem){body{padding:1.2rem .8rem 3rem}}
</style>"""
_SIZES = (
    "layers", "attention_layers", "hidden_size", "ffn_size", "mamba_heads", "mamba_head_dim", "attention_heads", "experts",
    "expert_ffn_size",
)  # fmt: skip
_LETTERS: dict[type[Mixer], tuple[str, str]] = {
    Mamba2: ("M", "Mamba"), MLP: ("-", "MLP"), Attention: ("*", "attention"), MoE: ("E", "MoE")
}  # fmt: skip
_PREDICTED = ("model", ">tok/s", ">80 % interval", ">TTFT", ">TPOT", ">GPUs", "deployment", "evidence")


def compression_page(name: str, run: Mapping[str, Any], *, teacher: ModelSpec, student: ModelSpec) -> str:
    """A finished run as a page of its own: `run` is its JSON object, `teacher` and `student` are the models at its ends."""
    metrics = run["metrics"]
    reports = metrics["reports"]
    parts = {stage: report.get("metrics", {}) for stage, report in reports.items()}
    searches = {stage: part["search"] for stage, part in parts.items() if "search" in part}
    tokens = sum(part["tokens"] for part in parts.values() if "tokens" in part)
    before, after = metrics["teacher"], metrics["student"]
    heads = [
        (f"{after['total_bytes'] / before['total_bytes']:.1%}", "of the teacher's bytes"),
        (count(after["parameters"]), f"parameters, of {count(before['parameters'])}"),
        (f"{len(student.layers)}", f"layers, of {len(teacher.layers)}"),
    ]
    distances = [part["kl"] for part in parts.values() if "kl" in part]
    if distances:
        heads += [(f"{distances[-1]:.4f}", "KL from the teacher, nats a token"), (count(tokens), "tokens distilled on")]
    heads.append((duration(metrics["seconds"]), "of work"))
    limit = next((search["limits"].get("total_bytes") for search in searches.values()), None)
    held = {stage: report["held"]["total_bytes"] for stage, report in reports.items() if stage == "teacher" or _cuts(report)}
    body = [
        _STYLE,
        f"<h1>{escape(name)}</h1><p class='lead'>{escape(teacher.name)} made smaller: cut, and distilled from itself.</p>",
        cards(heads),
        "<h2>Stages</h2>",
        "<p class='note'>Bytes at the budget's context and batch; distance is KL(teacher || model) on held-out text in nats a "
        "token; right answers with 95 % intervals.</p>",
        _stages(reports),
        "<h2>What was cut</h2>",
        _patterns(teacher, parts),
        _sizes(teacher, student, before, after),
        chart(bytes_figure(held, limit), 110 + 38 * len(held)),
        *_recovery(reports),
        *_predictions(reports, searches),
    ]
    for stage, part in parts.items():
        if "rounds" in part:
            body += ["<h2>Why these layers</h2>", *_depth(part, teacher)]
        if "scores" in part:
            body += ["<h2>Why these units</h2>", *_width(part)]
        if "search" in part:
            body += [f"<h2>Shapes looked at: {escape(stage)}</h2>", *_search(part["search"], chosen="scores" in part)]
    body.append(footer([f"checkpoint: {run['checkpoint']}", f"teacher: {reports['teacher']['model']}"]))
    return page(f"{name}: {teacher.name} compressed", "".join(body))


def compression_plan_page(plan: Mapping[str, Any]) -> str:
    """A plan as a page of its own, from the object that `tandem compress RECIPE --plan --json` prints."""
    rows = [plan["teacher"], *plan["candidates"]]
    best, budget = plan["candidates"][0], plan["budget"]
    heads = [
        (f"{plan['fitting']:,} of {plan['considered']:,}", "shapes fit"),
        (size(plan["teacher"]["total_bytes"]), "the teacher takes"),
        (size(best["total_bytes"]), "the first candidate"),
        (count(best["parameters"]), f"parameters, of {count(plan['teacher']['parameters'])}"),
    ]
    if best["tokens_per_s"] is not None:
        rate = plan["teacher"]["tokens_per_s"]
        heads.append((f"{best['tokens_per_s']:,.1f}", "tok/s predicted" + ("" if rate is None else f", of {rate:,.1f}")))
    named = {"teacher" if i == 0 else f"candidate {i}": row["total_bytes"] for i, row in enumerate(rows)}
    held = f"Weights, caches and states of {budget['batch']} x {budget['context']:,} tokens"
    held += f", and {size(budget['overhead_bytes'])} of overhead." if budget["overhead_bytes"] else "."
    lead = f"A smaller {plan['model']}: what fits, and what it would do."
    body = [
        _STYLE,
        f"<h1>{escape(plan['name'])}</h1><p class='lead'>{escape(lead)}</p>",
        cards(heads),
        bullets([*plan_sentences(plan)]),
        "<h2>Bytes against the budget</h2>",
        f"<p class='note'>{escape(held)}</p>",
        chart(bytes_figure(named, plan["limits"].get("total_bytes")), 110 + 38 * len(named)),
        "<h2>Candidates</h2>",
        *_search(plan, chosen=True),
    ]
    priced = [(name, row) for name, row in zip(named, rows, strict=True) if row["prediction"]]
    if priced:
        body += ["<h2>Predicted deployments</h2>", html_table(_PREDICTED, [_predicted(name, row) for name, row in priced])]
    if plan["stages"]:
        body += ["<h2>Stages</h2>", _planned_stages(plan["stages"])]
    return page(f"{plan['name']}: plan of a compression", "".join(body))


def _cuts(report: Mapping[str, Any]) -> bool:
    return "search" in report.get("metrics", {})


def _stages(reports: Mapping[str, Mapping[str, Any]]) -> str:
    found = {stage: figures(report.get("evaluation") or {}) for stage, report in reports.items()}
    asked = list(dict.fromkeys(question for by in found.values() for question in by))
    columns = ("after", "what", ">parameters", ">bytes", ">tokens", ">distance", *(f">{name}" for name in asked), ">time")
    rows = []
    for stage, report in reports.items():
        part = report.get("metrics", {})
        rows.append([
            stage, report.get("what", "-"), count(report["held"]["parameters"]), size(report["held"]["total_bytes"]),
            count(part["tokens"]) if "tokens" in part else "-", f"{part['kl']:.4f}" if "kl" in part else "-",
            *(found[stage].get(question, "-") for question in asked), duration(report["seconds"]),
        ])  # fmt: skip
    return html_table(columns, rows)


def _letter(mixer: Mixer) -> tuple[str, str]:
    return _LETTERS.get(type(mixer), ("?", type(mixer).__name__))


def _patterns(teacher: ModelSpec, parts: Mapping[str, Mapping[str, Any]]) -> str:
    """The teacher's layers as letters, those that left marked."""
    stays = next((set(part["kept_layers"]) for part in parts.values() if "kept_layers" in part), None)
    letters = [_letter(mixer)[0] for mixer in teacher.layers]
    shown = "".join(a if stays is None or i in stays else f"<s>{a}</s>" for i, a in enumerate(letters))
    legend = ", ".join(f"{a} {word}" for a, word in dict.fromkeys(_letter(mixer) for mixer in teacher.layers))
    gone = [] if stays is None else [str(i) for i in range(len(letters)) if i not in stays]
    left = f" Left out: {', '.join(gone)} (from 0)." if gone else " All layers stay."
    return f"<p class='layers'><code>{shown}</code></p><p class='note'>{legend}.{left}</p>"


def _sizes(teacher: ModelSpec, student: ModelSpec, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    rows: list[tuple[str, float, float]] = [("layers", len(teacher.layers), len(student.layers))]
    was, is_now = common_sizes(teacher), common_sizes(student)
    rows += [(title_of(name), was[name] or 0, is_now[name] or 0) for name in was if was[name] is not None]
    rows += [(title_of(name), before[name], after[name]) for name in ("parameters", "active_parameters")]
    shown = [[name, f"{a:,}", f"{b:,}", f"{b / a:.1%}"] for name, a, b in rows]
    a, b = before["total_bytes"], after["total_bytes"]
    shown.append(["bytes at the budget's context", size(a), size(b), f"{b / a:.1%}"])
    return html_table(("", ">teacher", ">this model", ">share"), shown)


def _recovery(reports: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    if any("course" in report.get("metrics", {}) for report in reports.values()):
        yield "<h2>Recovery</h2><p class='note'>Lower is nearer to the teacher. Points of one distillation are joined.</p>"
        yield chart(recovery_figure(reports), 380)
    if any(figures(report.get("evaluation") or {}) for report in reports.values()):
        yield "<h2>Right answers after each stage</h2><p class='note'>Held-out questions, greedy; bars are 95 % intervals.</p>"
        yield chart(answers_figure(reports), 380)


def _predictions(reports: Mapping[str, Any], searches: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What was predicted of the teacher and of what each cut left, found again by parameters and bytes."""
    known = {
        (row["parameters"], row["total_bytes"]): row
        for search in searches.values()
        for row in (*search["frontier"], *search["candidates"], search["teacher"])
    }
    rows = {}
    for stage, report in reports.items():
        row = known.get((report["held"]["parameters"], report["held"]["total_bytes"]))
        if row is not None and (stage == "teacher" or _cuts(report)):
            rows["teacher" if stage == "teacher" else f"after {stage}"] = row
    if not any(row["prediction"] for row in rows.values()):
        return
    yield "<h2>Predicted deployments</h2>"
    yield "<p class='note'>What serving each model is predicted to give; nothing was served here.</p>"
    yield html_table(_PREDICTED, [_predicted(name, row) for name, row in rows.items()])
    evidence = dict.fromkeys(row["prediction"]["tokens_per_s"]["evidence"] for row in rows.values() if row["prediction"])
    yield bullets([f"{name}: {EVIDENCE_TEXT[name]}." for name in evidence])


def _predicted(name: str, row: Mapping[str, Any]) -> list[str]:
    found = row["prediction"]
    if found is None:
        return [name, *"-----", row["refused"] or "not asked", "-"]
    rate = Estimate(**found["tokens_per_s"])
    times = [ms(found[key]["value"]) for key in ("ttft_s", "tpot_s")]
    deployment = describe(Deployment.from_json(found["deployment"]))
    interval = f"{rate.low:,.1f} to {rate.high:,.1f}"
    return [name, f"{rate.value:,.1f}", interval, *times, f"{found['gpus']}", deployment, rate.evidence]


def _depth(part: Mapping[str, Any], teacher: ModelSpec) -> Iterator[str]:
    kinds = [_letter(mixer)[1] for mixer in teacher.layers]
    yield (
        "<p class='note'>Mean square of the logits' change without a layer, over the mean square of the logits. The layer that "
        "is missed least leaves, and what is left is scored again. Open points left.</p>"
    )
    yield chart(first_round_figure(part, kinds), 340)
    if len(part["rounds"]) > 1:
        yield chart(rounds_figure(part, len(kinds)), 130 + 34 * len(part["rounds"]))
    rows = []
    for number, (layer, scores) in enumerate(zip(part["order"], part["rounds"], strict=False), start=1):
        ranked = sorted(scores, key=lambda one: one["relative_mse"])
        own = next(one for one in scores if one["layer"] == layer)
        second = next((one for one in ranked if one["layer"] != layer), None)
        rows.append([
            f"{number}", f"{layer}", kinds[layer], f"{own['relative_mse']:.3g}", _perplexity(own["perplexity"]),
            f"{own['block_influence']:.3g}",
            "-" if second is None else f"{second['layer']} ({kinds[second['layer']]}, {second['relative_mse']:.3g})",
            "no" if layer in part["kept_layers"] else "yes",
        ])  # fmt: skip
    columns = [">round", ">layer", "kind", ">change of the logits", ">perplexity without", ">block influence"]
    columns += ["next", "left in the end"]
    yield html_table(columns, rows)
    yield f"<p class='note'>Perplexity of the whole model on the same text: {_perplexity(part['perplexity'])}.</p>"


def _perplexity(value: float | None) -> str:
    return f"{value:,.4g}" if value is not None and math.isfinite(value) else "-"


def _width(part: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "<p class='note'>Each point is a unit's score over the mean of its layer: what its activations come to on the "
        "calibration text. Layers are those of the model that was cut. Heads are ranked inside their groups and embedding "
        "channels by the sum over all norms, so kept and cut overlap; where there are many units, only some are drawn.</p>"
    )
    counts = {name: len(next(iter(by_layer.values()))) for name, by_layer in part["scores"].items()}
    stays = {name: part["shape"].get(name) or there for name, there in counts.items()}
    cut = [name for name in counts if stays[name] < counts[name]]
    yield "<div class='panels'>"
    for name in cut:
        where = "" if name == "hidden_size" else ", in each layer"
        yield f"<div><h3>{escape(title_of(name))}</h3><p class='note'>{stays[name]:,} of {counts[name]:,} stay{where}.</p>"
        yield chart(units_figure(name, part), 300) + "</div>"
    yield "</div>"
    whole = [f"{title_of(name)} ({counts[name]:,})" for name in counts if name not in cut]
    if whole:
        yield f"<p class='note'>Not cut: {escape(', '.join(whole))}.</p>"


def _search(search: Mapping[str, Any], *, chosen: bool) -> Iterator[str]:
    """Table of candidates, the first of them marked where it was `chosen`, and the frontier."""
    rows = [search["teacher"], *search["candidates"]]
    refused = ", ".join(f"{n:,} for {title_of(name)}" for name, n in search["refused"].items())
    fit = f"{search['fitting']:,} of {search['considered']:,} shapes fit"
    fit += f"; left out: {refused}. Candidates come best first." if refused else ". Candidates come best first."
    if not chosen:
        fit += " Only the layers of the first were cut here: widths are decided once the model has recovered."
    yield f"<p class='note'>{escape(fit)}</p>"
    yield _candidates(rows, best=1 if chosen else None)
    if any(row["tokens_per_s"] is not None for row in search["candidates"]):
        compared = [*search["candidates"], *search["frontier"]]
        by_loss = all(row["loss"] is not None for row in compared)
        yield "<p class='note'>Further right is faster, further up is better. No shape is better and faster than one of the "
        yield "frontier; differences of a few per cent in predicted throughput tell nothing.</p>"
        yield chart(shapes_figure(search, by_loss=by_loss), 400)


def _candidates(rows: Sequence[Mapping[str, Any]], best: int | None) -> str:
    shown = [name for name in _SIZES if len({row[name] for row in rows}) > 1 or name in ("layers", "hidden_size")]
    distilled = any(row["loss"] is not None for row in rows)
    names = ["", *(f">{title_of(name)}" for name in shown), ">parameters", ">bytes", ">tok/s"]
    share = rows[0]["quality"] <= 1
    names += [*([">importance kept"] if share else []), *([">distance"] if distilled else []), "frontier"]
    cells = []
    for number, row in enumerate(rows):
        line = ["before" if number == 0 else f"{number}", *("-" if row[name] is None else f"{row[name]:,}" for name in shown)]
        rate = row["tokens_per_s"]
        line += [count(row["parameters"]), size(row["total_bytes"]), "-" if rate is None else f"{rate:,.1f}"]
        if share:
            line.append(f"{row['quality']:.1%}")
        if distilled:
            line.append("-" if row["loss"] is None else f"{row['loss']:.4f}")
        cells.append([*line, "yes" if row["on_frontier"] else ""])
    return html_table(names, cells, best)


def _planned_stages(stages: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, stage in stages.items():
        part = stage["distil"]
        if part is None:
            rows.append([name, f"cut in {stage['cut']}", "-", "-", "-", "-"])
            continue
        rates = f"{part['lr']:g} to {part['final_lr']:g}"
        rows.append([name, "distillation", count(part["tokens"]), f"{part['length']:,}", f"{part['rows']:,}", rates])
    return html_table(("stage", "what", ">tokens", ">sequence", ">sequences a step", "learning rate"), rows)
