"""A training plan on a terminal, from the plan's JSON object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

from tandem.report.text import gib, table

_PARTS = {
    "weights": "weights, fp32",
    "gradients": "gradients, fp32",
    "optimiser": "AdamW's moments, fp32",
    "gathered": "layers gathered to work on",
    "activations": "activations",
    "logits": "logits and the head's gradient",
}
_TIMES = {
    "linears": "linears",
    "head": "head",
    "attention": "attention",
    "scan": "scan",
    "memory": "norms, activations, loss",
    "tensor_parallel": "tensor parallelism",
    "context_parallel": "context parallelism",
    "sharding": "gathering and scattering not hidden",
    "optimiser": "optimiser",
}
_SMALLER = {
    "activations": "a smaller batch.micro, parallel.recompute=full or a larger parallel.tp makes them smaller",
    "logits": "a larger parallel.tp makes them smaller",
    "gathered": "a larger parallel.tp makes them smaller",
}


def duration(seconds: float) -> str:
    """Seconds in the unit that leaves one to three digits before the point."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def count(number: float) -> str:
    """A large number with its power of a thousand: 12.3 B, 20 T."""
    for name, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:,.4g} {name}"
    return f"{number:,.0f}"


def plan_text(plan: Mapping[str, Any]) -> Group:
    """The whole plan: what the run is, memory of a rank, time of a step, and sentences for what a number does not say."""
    return Group(_run_table(plan), _memory_table(plan), _time_table(plan), *plan_sentences(plan))


def _run_table(plan: Mapping[str, Any]) -> Table:
    t = table(f"{plan['name']}: {plan['model']}", "!what", "value")
    t.add_row("parameters", f"{plan['parameters']:,}")
    if plan["active_parameters"] != plan["parameters"]:
        t.add_row("active parameters a token", f"{plan['active_parameters']:,}")
    t.add_row("tokens", f"{count(plan['tokens'])} in {plan['steps']:,} steps of {plan['tokens_per_step']:,}")
    t.add_row("FLOPs", f"{plan['flops']:.3g}, {plan['hardware_flops'] / plan['flops'] - 1:.1%} more computed")
    linears = f"{plan['linears']} linears"
    if plan["fp8_linears"]:
        linears += f", {plan['fp8_linears']} in FP8, {len(plan['kept_linears'])} kept in bf16"
    t.add_row("number formats", linears)
    t.add_row("learning rate", _schedule(plan))
    if len(plan["phases"]) > 1:
        begins = ", ".join(f"{phase['begins_step']:,}" for phase in plan["phases"])
        t.add_row("phases begin at steps", begins)
    seconds = plan["seconds"]
    span = f"{duration(seconds['low'])} to {duration(seconds['high'])}"
    t.add_row("time", f"{duration(seconds['value'])} ({span}) on {_machine(plan)}")
    if plan["hardware"] != "cpu":
        t.add_row("GPU hours", f"{seconds['value'] * plan['gpus'] / 3600:,.0f}")
    t.add_row("tokens/s", f"{plan['tokens_per_step'] * plan['steps'] / seconds['value']:,.0f}")
    t.add_row("MFU", f"{plan['mfu']:.0%}")
    return t


def _schedule(plan: Mapping[str, Any]) -> str:
    warm, decays = plan["warmup_steps"], plan["decay_begins_step"]
    said = [f"warm-up over {warm:,} steps"] if warm else []
    return ", ".join([*said, "constant" if decays >= plan["steps"] else f"decay from step {decays:,}"])


def _machine(plan: Mapping[str, Any]) -> str:
    if plan["hardware"] == "cpu":
        return "this machine's CPU" + (f", {plan['gpus']} ranks" if plan["gpus"] > 1 else "")
    return f"{plan['gpus']:,} x {plan['hardware']}"


def _memory_table(plan: Mapping[str, Any]) -> Table:
    t = table("Memory of a rank", "!part", ">size")
    held = plan["bytes_per_rank"]
    for name, title in _PARTS.items():
        if held[name]:
            t.add_row(title, gib(held[name]))
    t.add_row("total", gib(held["total"]), end_section=True)
    t.add_row("there is", gib(plan["bytes_available"]))
    return t


def _time_table(plan: Mapping[str, Any]) -> Table:
    t = table("Time of a step", "!part", ">seconds", ">share")
    parts = plan["seconds_per_step"]
    total = sum(parts.values())
    for name, title in _TIMES.items():
        if parts[name]:
            t.add_row(title, f"{parts[name]:,.3g}", f"{parts[name] / total:.0%}")
    return t


def plan_sentences(plan: Mapping[str, Any]) -> Iterator[str]:
    """Whether it fits and what would help, what the time rests on, and why it cannot be run here."""
    if not plan["fits"]:
        part = plan["largest_part"]
        size = gib(plan["bytes_per_rank"][part])
        helps = _SMALLER.get(part, "more gpus make them smaller")
        yield f"It does not fit: most of it, {size}, is {part}; {helps}."
    if plan["seconds"]["evidence"] == "calibrated":
        yield "The time is that of passes of this model, measured here just now. --json has all numbers."
    else:
        rates = "two measured rates of this machine" if plan["hardware"] == "cpu" else "measured kernels, one after the other"
        yield f"The time is that of {rates}; no such run was measured: it may be half or twice as long. --json has all numbers."
    if plan["plan_only"]:
        yield f"It can be planned, not run: {plan['plan_only']}."
