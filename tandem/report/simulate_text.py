"""`tandem simulate` for a terminal: what clients felt in milliseconds, what it cost, and where requests lost their time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from tandem.report.text import describe, ms, short, table
from tandem.sched.metrics import Spread
from tandem.sim.api import SimRun

SPREADS = {
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "e2e_s": "whole answer",
    "queue_s": "queue before prefill",
    "prefill_s": "prefill",
    "transfer_s": "state transfer",
}
COLUMNS = ("!", ">GPUs", ">!TTFT p50", ">!p99", ">!TPOT p50", ">!p99", ">goodput/s", ">attained", ">GPU h", ">USD")
Variant = tuple[str, SimRun, Mapping[str, Any] | None]
"""A name, its first run, and the paired differences from the first variant (None for that one)."""


def bounds_text(run: SimRun) -> str:
    """The objective in one line."""
    slo = run.slo
    if slo is None:
        return "no latency bound"
    sides = (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s))
    bounds = ", ".join(f"{label} <= {ms(value)}" for label, value in sides if value is not None)
    return f"{bounds or 'no latency bound'}, asked of at least {slo.percentile:g} % of requests (--percentile)"


def latency_table(run: SimRun, intervals: Mapping[str, Any] | None = None) -> Table:
    """Times of completed requests; with replications, the interval of each mean."""
    columns = ["!", ">mean", ">p50", ">p90", ">p99"] + ([">!mean, 95 %"] if intervals else [])
    d, trace = run.deployment, run.trace
    title = f"{short(d.model)} on {d.gpus} {d.hardware}, {d.mode}: {len(trace):,} requests of {trace.name}, {run.policy}"
    t = table(title, *columns)
    for name, label in SPREADS.items():
        spread: Spread | None = getattr(run.stats, name)
        if spread is None:
            continue
        cells = [ms(value) for value in (spread.mean, spread.p50, spread.p90, spread.p99)]
        if intervals:
            found = intervals.get(name, {}).get("mean")
            cells.append(f"{ms(max(found['low'], 0.0))} to {ms(found['high'])}" if found else "-")
        t.add_row(label, *cells)
    return t


def variants_table(variants: Sequence[Variant]) -> Table:
    """Deployments and policies under the same arrivals, one line each."""
    t = table("Under the same arrivals", *COLUMNS)
    for name, run, _ in variants:
        stats = run.stats
        times = [ms(value) for s in (stats.ttft_s, stats.tpot_s) if s is not None for value in (s.p50, s.p99)]
        times += ["-"] * (4 - len(times))
        t.add_row(
            variant_label(name, run), str(run.deployment.gpus), *times, _rate(stats.goodput), _share(stats.attainment),
            f"{run.gpu_hours:,.2f}", f"{run.price_usd:,.2f}",
        )  # fmt: skip
    return t


def variant_label(name: str, run: SimRun) -> str:
    """A variant with its policy, which is its name where it differs from the first in nothing else."""
    return name if name == run.policy else f"{name}, {run.policy}"


def difference_sentences(variants: Sequence[Variant]) -> list[str]:
    """Each variant against the first, with intervals where there are replications."""
    first, lines = variant_label(*variants[0][:2]), []
    for name, run, against in variants[1:]:
        found = against or {}
        parts = [
            _difference("mean TTFT", found.get("ttft_s", {}).get("mean"), ms),
            _difference("mean TPOT", found.get("tpot_s", {}).get("mean"), ms),
            _difference("attained", found.get("attainment"), lambda v: f"{v:.1%}"),
            _difference("GPU hours", found.get("gpu_hours"), lambda v: f"{v:,.2f}"),
        ]
        lines.append(f"{variant_label(name, run)} against {first}: " + "; ".join(part for part in parts if part))
    return lines


def _difference(label: str, value: Any, form: Callable[[float], str]) -> str:
    def signed(number: float) -> str:
        return ("-" if number < 0 else "+") + form(abs(number))

    if value is None:
        return ""
    if not isinstance(value, Mapping):
        return f"{label} {signed(value)}"
    clear = not value["low"] <= 0.0 <= value["high"]
    return f"{label} {signed(value['mean'])} ({signed(value['low'])} to {signed(value['high'])}{'' if clear else ', unclear'})"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def sentences(run: SimRun) -> list[str]:
    """Outcome, cost, and what holds requests up."""
    s = run.stats
    lines = [describe(run.deployment)]
    counts = f"{s.completed:,} of {s.arrived:,} requests completed in {s.duration_s:,.1f} s"
    lines.append(f"{counts}: {s.requests_per_s:,.2f} requests/s, {s.tokens_per_s:,.0f} output tok/s")
    if s.failed:
        lines.append(f"{s.failed:,} failed: longer than the memory of a worker that decodes")
    if run.slo is not None and s.attainment is not None:
        met = "met" if s.slo_met else "missed"
        lines.append(f"objective {met}: {s.attainment:.1%} within {bounds_text(run)}; goodput {_rate(s.goodput)} requests/s")
    cost = f"{run.gpu_hours:,.2f} GPU hours, {run.price_usd:,.2f} USD"
    made = f"{len(run.decisions)} decision{'s' * (len(run.decisions) > 1)}"
    lines.append(f"{cost}; {made} of the policy {run.policy}" if run.decisions else cost)
    lines.append(bottleneck(run))
    if run.trace.note:
        lines.append(run.trace.note)
    lines.append(f"{run.result.simulated_tokens:,} tokens in {run.seconds:.2f} s, {run.result.events:,} events")
    return lines


def bottleneck(run: SimRun) -> str:
    """What most of the time to the first token goes to, whether the queue grows, and what would help."""
    table, s = run.result.requests, run.stats
    if s.ttft_s is None or s.queue_s is None or s.prefill_s is None:
        return "bottleneck: no request completed"
    preempted = int(np.sum(table.preemptions > 0))
    after_s = run.stats.duration_s - float(table.arrival_s[-1])
    span_s = max(float(table.arrival_s[-1] - table.arrival_s[0]), 1e-9)
    later = table.queue_s[len(table) // 2 :]
    grows = len(table) >= 20 and float(np.nanmean(later)) > 2 * float(np.nanmean(table.queue_s[: len(table) // 2])) + 0.5
    split = run.deployment.mode == "disaggregated"
    pool = "prefill workers" if split else "workers"
    if s.queue_s.mean > 0.4 * s.ttft_s.mean:
        held = f"requests wait {ms(s.queue_s.mean)} for prefill, of a TTFT of {ms(s.ttft_s.mean)}: more {pool}, or a lower rate"
    elif s.transfer_s is not None and s.transfer_s.mean > 0.4 * s.ttft_s.mean:
        held = f"states take {ms(s.transfer_s.mean)} to a decode worker: its link, or more room there"
    else:
        held = f"prefill itself takes {ms(s.prefill_s.mean)} of a TTFT of {ms(s.ttft_s.mean)}: no queue to speak of"
    if grows:
        held += f"; the queue grows while requests arrive ({span_s:,.0f} s, and {after_s:,.0f} s more): it does not keep up"
    slo = run.slo
    if slo is not None and slo.tpot_s is not None and s.tpot_s is not None and s.tpot_s.p90 > slo.tpot_s:
        held += f"; TPOT p90 {ms(s.tpot_s.p90)} is above its bound: more {'decode workers' if split else 'workers'}"
    if preempted:
        held += f"; {preempted:,} requests were preempted for lack of memory"
    return f"bottleneck: {held}"
