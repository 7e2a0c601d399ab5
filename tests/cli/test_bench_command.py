"""`tandem bench` from the outside: what it prints of a server whose answers are known, and what it refuses."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason="pip install tandem-lm[bench]")
from bench_cases import Stub, in_thread

Command = Callable[..., subprocess.CompletedProcess[str]]
LOOP = ["--isl", "6", "--osl", "3", "--concurrency", "2"]


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
