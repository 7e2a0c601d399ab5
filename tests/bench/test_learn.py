"""What becomes a row of calibration, and what does not."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason="pip install tandem-lm[bench]")
from bench_cases import measured

from tandem.bench.learn import add_rows, check_rows_file, flaw, learn_from
from tandem.bench.load import Load, fixed_trace
from tandem.bench.run import BenchRun
from tandem.perf.measurements import read_measurements
from tandem.sched.metrics import RunStats
from tandem.sched.request import Request
from tandem.spec.errors import SpecError

STARTED = datetime(2026, 5, 4, 3, 2, 1, 7, tzinfo=UTC)
STATED = {"hardware": "h100-sxm", "backend": "vllm", "tp": "1"}


def answered(number: int = 0, *, isl: int = 5, osl: int = 3, first_s: float = 0.5, done_s: float = 1.0) -> Request:
    return Request(
        id=str(number), isl=isl, osl=osl, max_tokens=3, arrival_s=0.0, first_token_s=first_s, done_s=done_s,
        finish_reason="length",
    )  # fmt: skip


def failed(number: int = 0) -> Request:
    return Request(id=str(number), isl=5, max_tokens=3, arrival_s=0.0, done_s=1.0, finish_reason="error")


def run_of(*requests: Request, **failures: int) -> BenchRun:
    return BenchRun(requests=requests, failures=failures, duration_s=1.0, sent_late_s=None)


def slow_stats() -> RunStats:
    """Of a stub they are shorter than any server's."""
    stats = measured(Load(trace=fixed_trace(5, 3, 4), concurrency=2))[0].stats()
    assert stats.ttft_s is not None
    assert stats.tpot_s is not None
    return replace(stats, ttft_s=replace(stats.ttft_s, mean=0.25), tpot_s=replace(stats.tpot_s, mean=0.0125))


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (run_of(answered(), answered()), None),
        (run_of(answered(), failed(), failed(), busy=2), "2 of 3 requests failed: busy"),
        (run_of(answered(osl=2)), "answers of 2 tokens, 3 asked"),
        (run_of(answered(), answered(osl=1), answered(osl=4)), "answers of 1 to 4 tokens, 3 asked"),
        (run_of(answered(isl=6)), "prompts of 6 tokens, 5 asked"),
        (run_of(answered(), answered(first_s=1.0)), "1 answers came in one piece, which has no TPOT"),
    ],
)
def test_a_run_teaches_only_if_each_request_got_what_it_asked_for(run: BenchRun, why: str | None) -> None:
    assert flaw(run, 5, 3) == why


def test_runs_with_a_flaw_are_left_out_and_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    runs = [run_of(answered()), run_of(answered(), failed(), busy=1), run_of(answered(osl=2)), run_of(answered())]
    line = learn_from(file, "Qwen/Qwen3-8B", 5, 3, 1, runs, STARTED)
    left = "left out run 2, 1 of 2 requests failed: busy; run 3, answers of 2 tokens, 3 asked"
    assert line == f"learned from 2 of 4 runs: {file}; {left}"
    ids = [row.split(",")[0] for row in file.read_text().splitlines()]
    assert ids == ["id", "bench-20260504T030201.000007-1", "bench-20260504T030201.000007-4"]


def test_where_no_run_teaches_nothing_is_written(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    with pytest.raises(SpecError, match=r"no run to learn from: run 1, 1 of 1 requests failed: busy$"):
        learn_from(file, "Qwen/Qwen3-8B", 5, 3, 1, [run_of(failed(), busy=1)], STARTED)
    assert not file.exists()


def test_learned_rows_are_read_by_calibration(tmp_path: Path) -> None:
    """Together with what the bench does not know: the GPU and the backend. No two files have rows of one id."""
    slow = slow_stats()
    file, other = tmp_path / "rows.csv", tmp_path / "other.csv"
    add_rows(file, "Qwen/Qwen3-8B", 1000, 100, 8, {1: slow, 2: slow}, STARTED)
    check_rows_file(file)
    add_rows(file, "Qwen/Qwen3-8B", 1000, 100, 8, {1: slow}, STARTED + timedelta(hours=1))
    add_rows(other, "Qwen/Qwen3-8B", 1000, 100, 8, {1: slow, 2: slow}, STARTED + timedelta(microseconds=1))
    rows = read_measurements([file, other], STATED, "calibration")
    assert len({row.row_id for row in rows}) == 5
    assert {(row.ttft_s, row.tpot_s) for row in rows} == {(0.25, 0.0125)}


def test_a_file_of_other_columns_is_refused_and_a_spreadsheets_mark_is_not(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(SpecError, match="other columns"):
        check_rows_file(file)
    add_rows(tmp_path / "fine.csv", "Qwen/Qwen3-8B", 1000, 100, 8, {1: slow_stats()}, STARTED)
    file.write_text("\ufeff" + (tmp_path / "fine.csv").read_text(), encoding="utf-8")
    check_rows_file(file)
