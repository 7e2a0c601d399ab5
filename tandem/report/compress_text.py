"""A compression's plan on a terminal, from its JSON object: the teacher, the candidates, and what they were chosen by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

from tandem.report.alignment_text import figures
from tandem.report.text import EVIDENCE_TEXT, gib, table
from tandem.report.training_text import count

_SIZES = {
    "layers": "layers",
    "attention_layers": "attention",
    "hidden_size": "hidden",
    "ffn_size": "FFN",
    "mamba_heads": "Mamba heads",
    "mamba_head_dim": "channels",
    "attention_heads": "query heads",
    "experts": "experts",
    "expert_ffn_size": "expert FFN",
}


def size(value: float) -> str:
    """Bytes in GiB, or in MiB where that is less than one."""
    return gib(value) if value >= 2**30 else f"{value / 2**20:,.2f} MiB"


def compress_plan_text(plan: Mapping[str, Any]) -> Group:
    """The table of teacher and candidates, and sentences for what a number does not say."""
    return Group(_candidates(plan), *plan_sentences(plan))


def _candidates(plan: Mapping[str, Any]) -> Table:
    rows = [plan["teacher"], *plan["candidates"]]
    shown = [name for name in _SIZES if len({row[name] for row in rows}) > 1 or name in ("layers", "hidden_size")]
    budget = plan["budget"]
    length = f"{budget['batch']} x {budget['context']:,} tokens"
    names = ["!", *(f">{_SIZES[name]}" for name in shown), ">parameters", f">bytes, {length}", ">tok/s", ">frontier"]
    t = table(f"{plan['name']}: {plan['model']} compressed", *names)
    for number, row in enumerate(rows):
        rate = row["tokens_per_s"]
        t.add_row(
            "teacher" if number == 0 else str(number),
            *("-" if row[name] is None else f"{row[name]:,}" for name in shown),
            count(row["parameters"]),
            size(row["total_bytes"]),
            "-" if rate is None else f"{rate:,.1f}",
            "yes" if row["on_frontier"] else "",
            end_section=number == 0,
        )
    return t


def compressed_text(run: Mapping[str, Any]) -> Group:
    """A finished compression: the teacher and the model after every stage, one row each."""
    metrics = run["metrics"]
    reports = metrics["reports"]
    found = {name: figures(report.get("evaluation") or {}) for name, report in reports.items()}
    asked = list(dict.fromkeys(question for by in found.values() for question in by))
    names = ["!after", ">parameters", ">bytes", ">tokens", ">distance", *(f">{name}" for name in asked)]
    t = table("Compression: bytes at the budget's context, KL from the teacher in nats a token, right answers", *names)
    for name, report in reports.items():
        held, course = report["held"], report.get("metrics", {})
        t.add_row(
            name,
            count(held["parameters"]),
            size(held["total_bytes"]),
            count(course["tokens"]) if "tokens" in course else "-",
            f"{course['kl']:.4f}" if "kl" in course else "-",
            *(found[name].get(question, "-") for question in asked),
        )
    share = metrics["student"]["total_bytes"] / metrics["teacher"]["total_bytes"]
    return Group(t, f"{share:.1%} of the teacher's bytes: {run['checkpoint']}")


def plan_sentences(plan: Mapping[str, Any]) -> Iterator[str]:
    """What fits, what was predicted and on what evidence, and what is not known yet."""
    limits = ", ".join(
        f"{size(v) if name == 'total_bytes' else count(v)} {name.replace('total_bytes', 'in all').replace('_', ' ')}"
        for name, v in plan["limits"].items()
    )
    yield f"{plan['fitting']:,} of {plan['considered']:,} shapes fit{f' ({limits})' if limits else ''}."
    objective, best = plan["objective"], next((c["prediction"] for c in plan["candidates"] if c["prediction"]), None)
    if objective is not None and best is not None:
        evidence = best["tokens_per_s"]["evidence"]
        asked = f"{objective['gpus']} x {objective['hardware']}" if objective["kind"] == "cluster" else objective["hardware"]
        traffic = objective.get("trace") or f"{objective['isl']:,} tokens in, {objective['osl']:,} out"
        at = "" if objective["kind"] == "cluster" else f", batch {objective['batch']}"
        yield f"Predicted for {asked}, {traffic}{at}; evidence {evidence}: {EVIDENCE_TEXT[evidence]}."
        low, value, high = (best["tokens_per_s"][name] for name in ("low", "value", "high"))
        yield (
            f"A prediction's interval is {low / value:.0%} to {high / value:.0%} of it. Shapes of one model share most of the "
            "error, but a few per cent between them tell nothing."
        )
    if plan["teacher"]["refused"]:
        yield f"The teacher cannot be served so: {plan['teacher']['refused']}."
    for note in plan["notes"]:
        yield f"{note[0].upper()}{note[1:]}."
    yield "--json has all numbers, the layers that stay and the deployments."
