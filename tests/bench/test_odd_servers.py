"""Servers that answer something else than the protocol says: a failed request with a reason of one line, never a traceback."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="pip install tandem-lm[bench]")
from aiohttp import web
from aiohttp.test_utils import TestServer
from bench_cases import Stub, measured

from tandem.bench.client import Target, served_model, session
from tandem.bench.load import MOST_TOKENS, Load, fixed_trace
from tandem.spec.errors import SpecError

TOKEN = b'{"choices": [{"text": "x"}]}'
USAGE = b'{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}'


def saying(*data: bytes) -> Stub:
    async def answer(stream: web.StreamResponse, body: dict[str, Any]) -> None:
        await Stub.lines(stream, *data)

    return Stub(answer=answer)


def usage(value: str) -> bytes:
    return b'{"choices": [], "usage": ' + value.encode() + b"}"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ((b"5",), "the server sent 5, not an object"),
        ((b"[1]",), "the server sent [1], not an object"),
        ((b"null",), "the server sent null, not an object"),
        ((b'"worker died"',), 'the server sent "worker died", not an object'),
        ((b"[" * 100_000,), "maximum recursion depth exceeded"),
        ((b"\xff\xff",), "codec can't decode"),
        ((b"x" * (9 << 20),), "Got more than 8388608 bytes"),
        ((b'{"choices": 5}', USAGE), "choices=5: must be a list"),
        ((b'{"choices": {"text": "x"}}', USAGE), "choices={'text': 'x'}: must be a list"),
        ((TOKEN, usage("[1]")), "usage=[1]: must be an object"),
        ((TOKEN, usage("5")), "usage=5: must be an object"),
        ((TOKEN, usage("{}")), "the server counted no tokens"),
        ((TOKEN, usage('{"completion_tokens": 3}')), "usage.prompt_tokens=None: must be a whole number from 0"),
        ((TOKEN, usage('{"prompt_tokens": null, "completion_tokens": 3}')), "usage.prompt_tokens=None"),
        ((TOKEN, usage('{"prompt_tokens": true, "completion_tokens": 3}')), "usage.prompt_tokens=True"),
        ((TOKEN, usage('{"prompt_tokens": 5, "completion_tokens": 1e400}')), "usage.completion_tokens=inf"),
        ((TOKEN, usage('{"prompt_tokens": 5, "completion_tokens": "3"}')), "usage.completion_tokens='3'"),
        ((TOKEN, usage('{"prompt_tokens": 5, "completion_tokens": 0}')), "usage.completion_tokens=0: must be a whole number"),
        ((TOKEN, usage('{"prompt_tokens": 5, "completion_tokens": ' + "9" * 400 + "}")), "usage.completion_tokens=999"),
        ((TOKEN, b'{"error": "\\ud800\\u001b[31m\\nworker died"}'), "the stream broke off: ??[31m worker died"),
        ((TOKEN, b'{"error": {"message": "worker died", "code": 500}}'), "the stream broke off: worker died"),
        ((TOKEN, b'{"error": true}'), "the stream broke off: True"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_an_odd_stream_is_a_failed_request_with_a_line(data: tuple[bytes, ...], why: str) -> None:
    found, _ = measured(Load(trace=fixed_trace(5, 3, 2), concurrency=1), lambda: saying(*data))
    ((told, count),) = found.failures.items()
    assert count == 2
    assert told.startswith(why) or why in told
    assert told.isprintable()
    assert len(told) <= 200
    row = found.to_json()
    assert (row["requests"]["completed"], row["requests"]["failed"]) == (0, 2)
    json.dumps(row, allow_nan=False)


def test_no_error_is_none() -> None:
    """Some servers say so in every chunk."""
    chunk = b'{"choices": [{"text": "x"}], "error": null, "usage": null}'
    found, _ = measured(Load(trace=fixed_trace(5, 3, 2), concurrency=1), lambda: saying(chunk, chunk, USAGE, b"[DONE]"))
    assert found.failures == {}
    assert found.stats().completed == 2
    assert {(request.isl, request.osl) for request in found.requests} == {(5, 3)}


def test_an_answer_that_takes_too_long_says_how_long() -> None:
    found, _ = measured(Load(trace=fixed_trace(5, 3, 1), concurrency=1), lambda: Stub(hold=2), timeout_s=0.2)
    assert found.failures == {"no whole answer within 0.2 s": 1}


@pytest.mark.parametrize(
    ("listed", "told"),
    [
        (b"5", "it said 5, no list of names"),
        (b"[1]", "it said [1], no list of names"),
        (b"null", "it said None, no list of names"),
        (b'{"data": 5}', "it said {'data': 5}, no list of names"),
        (b'{"data": [5]}', "it said {'data': [5]}, no list of names"),
        (b'{"data": [{"id": 5}]}', "no list of names"),
        (b'{"data": [{"id": "\\ud800"}]}', "no list of names"),
        (b"[" * 100_000, "maximum recursion depth"),
        (b"\xff", "codec can't decode"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_odd_list_of_models_is_one_line(listed: bytes, told: str) -> None:
    async def go() -> str:
        stub = Stub()
        stub.listed = listed
        async with stub.serve() as server:
            url = str(server.make_url("")).rstrip("/")
            async with session(Target(url=url, model="")) as http:
                return await served_model(http, url)

    with pytest.raises(SpecError, match="does not list its models") as caught:
        asyncio.run(go())
    assert told in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_server_that_wants_a_key_says_so() -> None:
    async def go() -> None:
        async def models(request: web.Request) -> web.Response:
            return web.json_response({"error": {"message": "no key"}}, status=401)

        app = web.Application()
        app.router.add_get("/v1/models", models)
        async with TestServer(app) as server:
            url = str(server.make_url("")).rstrip("/")
            async with session(Target(url=url, model="")) as http:
                await served_model(http, url)

    with pytest.raises(SpecError, match=r"does not list its models \(HTTP 401: .*no key"):
        asyncio.run(go())


def test_what_nobody_can_print_or_hold_is_refused_before_it_is_sent() -> None:
    with pytest.raises(SpecError, match=r"model='\\udcff': must be printable"):
        Target(url="http://127.0.0.1:9", model="\udcff")
    with pytest.raises(SpecError, match="requests=101: have 1,010,000,000 prompt tokens"):
        Load(trace=fixed_trace(MOST_TOKENS // 100, 3, 101), concurrency=1)
