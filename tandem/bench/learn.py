"""Measured runs as rows that `tandem calibrate serving --rows` reads."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from tandem.bench.run import BenchRun
from tandem.sched.metrics import RunStats, completed
from tandem.sched.request import Request
from tandem.spec.errors import SpecError
from tandem.spec.files import write_whole

COLUMNS = ("id", "model", "isl", "osl", "concurrency", "ttft_s", "tpot_s")


def check_rows_file(path: Path) -> None:
    """Refuse a file that has other columns, before anything is measured."""
    if path.is_file() and _read(path)[0] != list(COLUMNS):
        raise SpecError(f"learn={str(path)!r}: has other columns than `tandem bench --learn` writes, {','.join(COLUMNS)}")


def flaw(run: BenchRun, isl: int, osl: int) -> str | None:
    """Why a run of such prompts and answers is no measurement of them; None where each request was answered in full."""
    failed = len(run.requests) - sum(map(completed, run.requests))
    if failed:
        often = max(run.failures, key=lambda why: run.failures[why], default="")
        return f"{failed:,} of {len(run.requests):,} requests failed: {often}"
    counts: tuple[tuple[str, int, Callable[[Request], int]], ...] = (
        ("prompts", isl, lambda request: request.isl),
        ("answers", osl, lambda request: request.osl),
    )
    for what, asked, count in counts:
        found = sorted({count(request) for request in run.requests})
        if found != [asked]:
            return f"{what} of {' to '.join(f'{n:,}' for n in dict.fromkeys((found[0], found[-1])))} tokens, {asked:,} asked"
    whole = sum(request.first_token_s == request.done_s for request in run.requests)
    return f"{whole:,} answers came in one piece, which has no TPOT" if whole else None


def learn_from(
    path: Path, model: str, isl: int, osl: int, concurrency: int, runs: Sequence[BenchRun], started: datetime
) -> str:
    """Add the runs without a flaw to a file of rows; what was added, and what left out and why, in one line.

    Raises SpecError where none is without.
    """
    flaws = {number: flaw(run, isl, osl) for number, run in enumerate(runs, start=1)}
    good = {number: run.stats() for number, run in enumerate(runs, start=1) if flaws[number] is None}
    left = "; ".join(f"run {number}, {why}" for number, why in flaws.items() if why is not None)
    if not good:
        raise SpecError(f"learn={str(path)!r}: no run to learn from: {left}")
    add_rows(path, model, isl, osl, concurrency, good, started)
    return f"learned from {len(good):,} of {len(runs):,} runs: {path}" + (f"; left out {left}" if left else "")


def add_rows(
    path: Path, model: str, isl: int, osl: int, concurrency: int, runs: Mapping[int, RunStats], started: datetime
) -> None:
    """Add a row for each run to a file, which need not be there. Means, as calibration reads them.

    Ids are when the runs were `started` and their numbers, so that no two files have the same.
    """
    lines = _read(path) if path.is_file() else [list(COLUMNS)]
    for number, stats in runs.items():
        if stats.ttft_s is None or stats.tpot_s is None:
            raise SpecError("learn: a run without TTFT or TPOT teaches nothing; let answers have two tokens or more")
        times = [f"{spread.mean:.6g}" for spread in (stats.ttft_s, stats.tpot_s)]
        lines.append([f"bench-{started:%Y%m%dT%H%M%S.%f}-{number}", model, str(isl), str(osl), str(concurrency), *times])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_whole(path, text.getvalue())


def _read(path: Path) -> list[list[str]]:
    try:
        return [row for row in csv.reader(path.read_text(encoding="utf-8-sig").splitlines()) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as wrong:
        raise SpecError(f"learn={str(path)!r}: cannot be read ({' '.join(str(wrong).split())})") from None
