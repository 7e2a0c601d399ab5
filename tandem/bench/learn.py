"""Measured runs as rows that `tandem calibrate serving --rows` reads."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from tandem.sched.metrics import RunStats
from tandem.spec.errors import SpecError
from tandem.spec.files import write_whole

COLUMNS = ("id", "model", "isl", "osl", "concurrency", "ttft_s", "tpot_s")


def check_rows_file(path: Path) -> None:
    """Refuse a file that has other columns, before anything is measured."""
    if path.is_file() and _read(path)[0] != list(COLUMNS):
        raise SpecError(f"learn={str(path)!r}: has other columns than `tandem bench --learn` writes, {','.join(COLUMNS)}")


def add_rows(path: Path, model: str, isl: int, osl: int, concurrency: int, runs: Sequence[RunStats]) -> None:
    """Add a row for each run to a file, which need not be there. Means, as calibration reads them."""
    lines = _read(path) if path.is_file() else [list(COLUMNS)]
    for stats in runs:
        if stats.ttft_s is None or stats.tpot_s is None:
            raise SpecError("learn: a run without TTFT or TPOT teaches nothing; let answers have two tokens or more")
        times = [f"{spread.mean:.6g}" for spread in (stats.ttft_s, stats.tpot_s)]
        lines.append([f"bench-{len(lines)}", model, str(isl), str(osl), str(concurrency), *times])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_whole(path, text.getvalue())


def _read(path: Path) -> list[list[str]]:
    try:
        return [row for row in csv.reader(path.read_text(encoding="utf-8").splitlines()) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as wrong:
        raise SpecError(f"learn={str(path)!r}: cannot be read ({' '.join(str(wrong).split())})") from None
