"""`tandem bench` for a terminal: what clients felt in milliseconds, and what the server yielded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from tandem.report.text import ms, table
from tandem.sched.metrics import RunStats, Spread
from tandem.spec.workload import Slo

if TYPE_CHECKING:  # they need the extra `[bench]`
    from tandem.bench.load import Load
    from tandem.bench.run import BenchRun

ALL_RUNS = "mean of all runs, 95 %"
SPREADS = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "whole answer"}
LATE_S = 0.01
"""A client that is later than this with its requests measures itself."""


def load_text(load: Load) -> str:
    """What was sent, in a few words."""
    count = f"{len(load.trace):,} requests of {load.trace.name}"
    return f"{count}, at the times of the trace" if load.concurrency is None else f"{count}, {load.concurrency} at any time"


def mean_of_runs(found: Mapping[str, float] | None) -> str:
    """A time's mean over runs and its interval; - where there is none."""
    return "-" if found is None else f"{ms(found['mean'])} ({ms(max(found['low'], 0.0))} to {ms(found['high'])})"


def bench_table(model: str, load: Load, stats: RunStats, intervals: Mapping[str, Any]) -> Table:
    """Times of the first run's completed requests; with repeats, the mean of all runs with its interval."""
    columns = ["!", ">mean", ">p50", ">p90", ">p99"] + ([f">!{ALL_RUNS}"] if intervals else [])
    found = table(f"{model}: {load_text(load)}{'; the first run' if intervals else ''}", *columns)
    for name, label in SPREADS.items():
        spread: Spread | None = getattr(stats, name)
        if spread is None:
            continue
        cells = [ms(value) for value in (spread.mean, spread.p50, spread.p90, spread.p99)]
        if intervals:
            cells.append(mean_of_runs(intervals.get(name, {}).get("mean")))
        found.add_row(label, *cells)
    return found


def bench_lines(url: str, loads: Sequence[Load], runs: Sequence[BenchRun], slo: Slo | None, report: Path | None) -> list[str]:
    """Outcome, what failed and why, and what to beware of."""
    run, stats = runs[0], runs[0].stats(slo)
    tokens = f"{stats.prompt_tokens:,} prompt and {stats.output_tokens:,} output tokens"
    lines = [
        f"{stats.completed:,} of {stats.arrived:,} requests completed in {stats.duration_s:,.1f} s at {url}: {tokens}",
        f"{stats.requests_per_s:,.2f} requests/s, {stats.tokens_per_s:,.1f} output tokens/s",
    ]
    if slo is not None and stats.attainment is not None:
        met = "met" if stats.slo_met else "missed"
        lines.append(
            f"objective {met}: {stats.attainment:.1%} of requests within it, {slo.percentile:g} % asked; goodput "
            f"{stats.goodput:,.2f} requests/s"
        )
    lines += [f"{count:,} failed: {why}" for why, count in run.failures.items()]
    if run.sent_late_s is not None and run.sent_late_s.p99 > LATE_S:
        lines.append(
            f"this client was late: 1 % of the requests were sent more than {ms(run.sent_late_s.p99)} after their times, "
            "which TTFT contains"
        )
    if len(runs) == 1:
        lines.append("one run has no interval; --repeats 3 gives one")
    if loads[0].trace.note:
        lines.append(loads[0].trace.note)
    if report is not None:
        lines.append(f"report: {report}")
    return lines
