"""`tandem bench` from the outside: what it prints of a server whose answers are known, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="pip install tandem-lm[bench]")
from aiohttp import web
from bench_cases import Stub, in_thread

Command = Callable[..., subprocess.CompletedProcess[str]]
LOOP = ["--isl", "6", "--osl", "3", "--concurrency", "2"]


def failing(*numbers: int) -> Callable[[], Stub]:
    """A stub whose stream breaks off for these of its requests, counted from 1."""

    def make() -> Stub:
        count = 0

        async def answer(stream: web.StreamResponse, body: dict[str, Any]) -> None:
            nonlocal count
            count += 1
            if count in numbers:
                await Stub.lines(stream, b'{"error": {"message": "worker died"}}')
            else:
                await stub.whole(stream, body)

        stub = Stub(answer=answer)
        return stub

    return make


def test_one_object_of_a_closed_loop_with_intervals(command: Command, tmp_path: Path) -> None:
    learned, page = tmp_path / "rows.csv", tmp_path / "page.html"
    with in_thread(Stub) as (url, stub):
        done = command(
            "bench", f"{url}/v1/", *LOOP, "--requests", "4", "--repeats", "2", "--ttft", "60", "--learn", str(learned),
            "--report", str(page), "--json", OPENAI_API_KEY="secret",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["url"] == url
    assert data["model"] == "served"
    assert data["load"] == {"name": "6 + 3 tokens", "requests": 4, "concurrency": 2}
    assert data["requests"] == {"arrived": 4, "completed": 4, "cancelled": 0, "failed": 0, "unfinished": 0}
    assert (data["prompt_tokens"], data["output_tokens"], data["attainment"]) == (24, 12, 1.0)
    assert {"mean", "p50", "p90", "p99"} == set(data["ttft_s"])
    low, mean, high = (data["intervals"]["ttft_s"]["mean"][end] for end in ("low", "mean", "high"))
    assert low <= mean <= high
    assert len(data["runs"]) == 2
    assert len(stub.bodies) == 2 * (4 + 1)
    assert set(stub.headers) == {"Bearer secret"}
    assert len({tuple(body["prompt"]) for body in stub.bodies}) == 10
    assert learned.read_text().splitlines()[0] == "id,model,isl,osl,concurrency,ttft_s,tpot_s"
    assert len(learned.read_text().splitlines()) == 3
    assert "served, measured" in page.read_text()


def test_a_table_for_people(command: Command) -> None:
    with in_thread(Stub) as (url, _):
        done = command("bench", url, "--isl", "6", "--osl", "3", "--arrivals", "poisson:1000", "--requests", "5")
    assert done.returncode == 0, done.stderr
    assert "5 requests of" in done.stdout
    assert "TTFT" in done.stdout
    assert "5 of 5 requests completed" in done.stdout
    assert "--repeats 3 gives one" in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--concurrency: state it for a closed loop, or --arrivals or --trace for an open one"),
        ([*LOOP, "--arrivals", "poisson:5"], "--arrivals='poisson:5': an open loop"),
        (["--concurrency", "2"], "--isl, --osl: state both, or --trace"),
        ([*LOOP, "--duration", "5"], "--duration=5.0: changes nothing in a closed loop"),
        ([*LOOP, "--requests", "1"], "concurrency=2: more than there are requests, 1"),
        ([*LOOP, "--requests", "0"], "requests=0"),
        (["--isl", "6", "--osl", "3", "--concurrency", "0"], "concurrency=0: must be a whole number from 1"),
        (["--isl", "6", "--osl", "3", "--concurrency", "-3"], "concurrency=-3: must be"),
        (["--trace", "azure-conversation-2023", "--concurrency", "2", "--requests", "-5"], "requests=-5: must be"),
        (["--isl", "6", "--osl", "3", "--arrivals", "poisson:5", "--requests", "0"], "requests=0: must be"),
        (["--isl", "6", "--osl", "1", "--concurrency", "2", "--learn", "rows.csv"], "--osl=1: calibration learns TPOT too"),
        ([*LOOP, "--learn", "rows.csv", "--report", "./rows.csv"], "--report='rows.csv': is the file of --learn"),
        ([*LOOP, "--scale", "2"], "--scale=2.0: changes nothing in a closed loop without --trace"),
        (["--isl", "9999999", "--osl", "3", "--concurrency", "99"], "prompt tokens; at most 1,000,000,000"),
        ([*LOOP, "--model", "a\nb"], "model='a\\nb': must be printable"),
        ([*LOOP, "--repeats", "0"], "repeats=0"),
        ([*LOOP, "--warmup", "-1"], "warmup=-1"),
        ([*LOOP, "--timeout", "0"], "timeout=0"),
        ([*LOOP, "--percentile", "90"], "--percentile=90.0: changes nothing without --ttft or --tpot"),
        ([*LOOP, "--ttft", "-1"], "ttft_s=-1"),
        ([*LOOP, "--report", "nowhere/page.html"], "create it first"),
        (["--trace", "azure-conversation-2023", "--concurrency", "2", "--learn", "rows.csv"], "--learn='rows.csv'"),
        (["--trace", "azure-conversation-2023", "--concurrency", "2", "--scale", "2"], "--scale=2.0"),
        ([*LOOP, "--", "--prefill", "1"], "--prefill 1: options of `tandem serve` change no server that runs"),
        (LOOP, "does not list its models"),
    ],
)
def test_refused_in_one_line(refused: Callable[..., str], words: list[str], told: str) -> None:
    assert told in refused("bench", "http://127.0.0.1:9", *words)


def test_a_model_that_is_none_is_the_servers_own_line(refused: Callable[..., str]) -> None:
    assert "the server did not start" in refused("bench", "no-such-model", *LOOP)


def test_a_scheme_has_no_case(refused: Callable[..., str], command: Command) -> None:
    assert "'ftp://h': must be an address that begins with http://" in refused("bench", "ftp://h", *LOOP)
    with in_thread(Stub) as (url, _):
        done = command("bench", url.replace("http", "HTTP") + "/v1", *LOOP, "--requests", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["url"] == url


def test_a_question_to_serve_is_no_server(refused: Callable[..., str]) -> None:
    told = refused("bench", "nano-align-hybrid", *LOOP, "--", "--help")
    assert told.startswith("the server did not start: it ended after ")
    assert "Usage: " in told


def test_what_was_measured_is_shown_before_anything_is_learned(command: Command, tmp_path: Path) -> None:
    """Where no run can be learned from, that is said after the table, the report and why requests failed."""
    learned, page = tmp_path / "rows.csv", tmp_path / "page.html"
    with in_thread(failing(2)) as (url, _):  # the first is the warm-up
        done = command("bench", url, *LOOP, "--requests", "4", "--learn", str(learned), "--report", str(page))
    assert done.returncode == 2
    assert "3 of 4 requests completed" in done.stdout
    assert "1 failed: the stream broke off: worker died" in done.stdout
    assert done.stderr.startswith("error: learn=")
    assert done.stderr.endswith("no run to learn from: run 1, 1 of 4 requests failed: the stream broke off: worker died\n")
    assert done.stderr.count("\n") == 1
    assert not learned.exists()
    assert "worker died" in page.read_text()


@pytest.mark.parametrize("json_out", [False, True])
def test_a_run_that_failed_is_not_learned_from(command: Command, tmp_path: Path, json_out: bool) -> None:
    learned = tmp_path / "rows.csv"
    words = ["--requests", "2", "--repeats", "3", "--learn", str(learned), *["--json"][: int(json_out)]]
    with in_thread(failing(5)) as (url, _):  # of the second run: each has a warm-up and two requests
        done = command("bench", url, *LOOP, *words)
    assert done.returncode == 0, done.stderr
    left = "left out run 2, 1 of 2 requests failed: the stream broke off: worker died\n"
    line = f"learned from 2 of 3 runs: {learned}; {left}"
    assert (done.stderr if json_out else done.stdout).endswith(line)
    if json_out:
        assert [run["requests"]["failed"] for run in json.loads(done.stdout)["runs"]] == [0, 1, 0]
    else:
        assert "run 2: 1 failed: the stream broke off: worker died" in done.stdout
        assert done.stderr == ""
    ids = [row.split(",")[0] for row in learned.read_text().splitlines()[1:]]
    assert [name.rpartition("-")[2] for name in ids] == ["1", "3"]


def test_answers_of_other_lengths_are_not_learned_from(command: Command, tmp_path: Path) -> None:
    async def short(stream: web.StreamResponse, body: dict[str, Any]) -> None:
        await Stub.lines(stream, b'{"choices": [{"text": "x"}]}', b'{"choices": [{"text": "x"}]}')
        await Stub.event(stream, {"choices": [], "usage": {"prompt_tokens": 6, "completion_tokens": 2}})

    with in_thread(lambda: Stub(answer=short)) as (url, _):
        done = command("bench", url, *LOOP, "--requests", "2", "--learn", str(tmp_path / "rows.csv"))
    assert done.returncode == 2
    assert "2 of 2 requests completed" in done.stdout
    assert "no run to learn from: run 1, answers of 2 tokens, 3 asked" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_runs_before_one_that_breaks_off_are_shown(command: Command, tmp_path: Path) -> None:
    with in_thread(failing(4)) as (url, _):  # the warm-up of the second run
        words = ["--requests", "2", "--repeats", "2", "--learn", str(tmp_path / "rows.csv")]
        done = command("bench", url, *LOOP, *words)
    assert done.returncode == 2
    assert "2 of 2 requests completed" in done.stdout
    assert done.stderr.startswith("error: run 2 of 2 was not measured: ")
    assert done.stderr.endswith("the stream broke off: worker died\n")
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_costs_no_measurement(command: Command, tmp_path: Path) -> None:
    with in_thread(Stub) as (url, _):
        done = command("bench", url, *LOOP, "--requests", "2", "--report", f"{'long' * 62}.html", "-m", "[/served]")
    assert done.returncode == 2
    assert "[/served]: 2 requests of 6 + 3 tokens" in done.stdout  # a name is no markup
    assert "2 of 2 requests completed" in done.stdout
    assert "cannot be written" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    words = ["--learn", "rows.csv", "--report", "page.html"]
    with (
        in_thread(lambda: Stub(hold=99)) as (url, stub),
        subprocess.Popen(
            [sys.executable, "-m", "tandem.cli", "bench", url, *LOOP, "--warmup", "0", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env={**os.environ, "NO_COLOR": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in background jobs
        ) as bench,
    ):  # fmt: skip
        until = time.monotonic() + 60
        while len(stub.bodies) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        bench.send_signal(signal.SIGINT)
        try:
            out, err = bench.communicate(timeout=60)
        finally:
            bench.kill()  # or leaving the block would wait for it
    assert (bench.returncode, out, err) == (130, "", "")
    assert list(tmp_path.iterdir()) == []
