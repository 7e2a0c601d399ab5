"""Load, client and runs against a server of a few lines whose answers are known."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("aiohttp", reason="pip install tandem-lm[bench]")
from aiohttp import web
from bench_cases import Stub, measured

from tandem.bench.client import Target, served_model, session
from tandem.bench.load import FIRST_ID, LAST_ID, Load, fixed_trace
from tandem.sched.metrics import ttft_s
from tandem.spec.errors import SpecError
from tandem.spec.workload import Slo, Trace, TraceRows


@given(st.integers(1, 300), st.integers(1, 5), st.integers(0, 2**40))
def test_prompts_have_their_length_and_differ(isl: int, requests: int, seed: int) -> None:
    load = Load(trace=fixed_trace(isl, 2, requests), seed=seed)
    prompts = [load.prompt(i) for i in range(requests)]
    assert all(len(prompt) == isl for prompt in prompts)
    assert all(FIRST_ID <= token < LAST_ID for prompt in prompts for token in prompt)
    assert prompts == [load.prompt(i) for i in range(requests)]
    if isl > 20:
        assert len({tuple(prompt) for prompt in prompts}) == requests
        assert replace(load, seed=seed + 1).prompt(0) != prompts[0]


def test_prompts_share_the_prefixes_that_a_trace_shares() -> None:
    rows = TraceRows("t")
    rows.add(0.0, 25, 2, hashes=[7, 8])
    rows.add(1.0, 25, 2, hashes=[7, 9])
    load = Load(trace=rows.trace(prefix_block=10))
    first, second = load.prompt(0), load.prompt(1)
    assert first[:10] == second[:10]
    assert first[10:20] != second[10:20]
    assert len(first) == len(second) == 25


def test_a_closed_loop_keeps_so_many_in_flight() -> None:
    found, stub = measured(Load(trace=fixed_trace(5, 3, 12), concurrency=4), lambda: Stub(hold=4))
    assert stub.most == 4
    assert len(stub.bodies) == 12
    stats = found.stats()
    assert (stats.completed, stats.failed, stats.prompt_tokens, stats.output_tokens) == (12, 0, 60, 36)
    for request in found.requests:
        assert request.first_token_s is not None
        assert request.done_s is not None
        assert 0 <= request.arrival_s <= request.first_token_s <= request.done_s <= found.duration_s + request.arrival_s
    assert found.sent_late_s is None
    body = stub.bodies[0]
    assert body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert stub.headers == [None] * 12


def test_an_open_loop_counts_from_the_times_of_its_trace() -> None:
    """All in flight at once, as nothing is answered before the last has come; each arrives when the trace says."""
    times = np.array([0.0, 0.01, 0.015, 0.03])
    trace = Trace(name="t", arrival_s=times, isl=np.full(4, 3), osl=np.full(4, 2))
    found, stub = measured(Load(trace=trace), lambda: Stub(hold=4), key="secret")
    assert stub.most == 4
    assert [request.arrival_s for request in found.requests] == times.tolist()
    for request in found.requests[:-1]:
        first = ttft_s(request)
        assert first is not None
        assert first >= 0.029 - request.arrival_s  # the last one's time, less what a clock may round
    assert found.sent_late_s is not None
    assert stub.headers == ["Bearer secret"] * 4


def test_warm_up_is_sent_and_not_counted() -> None:
    found, stub = measured(Load(trace=fixed_trace(30, 2, 3), concurrency=1), warmup=2)
    assert len(stub.bodies) == 5
    assert len(found.requests) == 3
    assert len({tuple(body["prompt"]) for body in stub.bodies}) == 4  # both warm-ups are one prompt, none of those measured


async def _broken(stream: web.StreamResponse, body: dict[str, Any]) -> None:
    await Stub.event(stream, {"choices": [{"text": "x"}]})
    await Stub.event(stream, {"error": {"message": "worker died"}})


async def _uncounted(stream: web.StreamResponse, body: dict[str, Any]) -> None:
    await Stub.event(stream, {"choices": [{"text": "x"}]})


async def _silent(stream: web.StreamResponse, body: dict[str, Any]) -> None:
    await stream.write(b"data: [DONE]\n\n")


async def _garbled(stream: web.StreamResponse, body: dict[str, Any]) -> None:
    await stream.write(b"data: {nonsense\n\n")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (_broken, "worker died"),
        (_uncounted, "counted no tokens"),
        (_silent, "without tokens"),
        (_garbled, "Expecting property"),
    ],
)
def test_failures_are_counted_by_reason(answer: Any, why: str) -> None:
    found, _ = measured(Load(trace=fixed_trace(5, 3, 3), concurrency=1), lambda: Stub(answer=answer))
    assert list(found.failures.values()) == [3]
    assert why in next(iter(found.failures))
    row = found.to_json(Slo(ttft_s=1.0))
    assert row["requests"]["failed"] == 3
    assert row["attainment"] == 0.0
    json.dumps(row, allow_nan=False)


def refusing() -> Stub:
    stub = Stub()
    stub.status = 503
    return stub


def test_a_refusal_is_one_line_and_ends_the_run_where_it_is_the_first() -> None:
    found, _ = measured(Load(trace=fixed_trace(5, 3, 2), concurrency=2), refusing)
    assert found.failures == {"HTTP 503: no room here": 2}
    with pytest.raises(SpecError, match=r"5 \+ 3 tokens failed: HTTP 503: no room here"):
        measured(Load(trace=fixed_trace(5, 3, 2), concurrency=2), refusing, warmup=1)


@pytest.mark.parametrize(("names", "told"), [(["a", "b"], "serves a, b; name one with --model"), ([], "serves no model")])
def test_a_server_names_its_one_model(names: list[str], told: str) -> None:
    async def go(wanted: list[str]) -> str:
        stub = Stub()
        stub.names = wanted
        async with stub.serve() as server:
            url = str(server.make_url("")).rstrip("/")
            async with session(Target(url=url, model="")) as http:
                return await served_model(http, url)

    assert asyncio.run(go(["one"])) == "one"
    with pytest.raises(SpecError, match=told):
        asyncio.run(go(names))


def test_nobody_there_is_one_line() -> None:
    async def go() -> None:
        async with session(Target(url="http://127.0.0.1:9", model="")) as http:
            await served_model(http, "http://127.0.0.1:9")

    with pytest.raises(SpecError, match="does not list its models") as caught:
        asyncio.run(go())
    assert "\n" not in str(caught.value)


def test_more_in_flight_than_requests_is_refused() -> None:
    with pytest.raises(SpecError, match="concurrency=5: more than there are requests, 4"):
        Load(trace=fixed_trace(5, 3, 4), concurrency=5)
