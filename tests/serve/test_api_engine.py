"""The API over real engines in pools: what OpenAI's own client gets, and what no request may do to the workers."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import openai
import pytest
import torch
from fake_frontend import FakeFrontend
from live_server import DEADLINE_S, Live
from small_models import small_model
from toy_tokenizer import toy_tokenizer

from tandem.model.load import save_model
from tandem.serve.launch import Launched, ServeOptions

torch.set_num_threads(1)
MODEL = "small"
CHAT = "/v1/chat/completions"
USER: Any = [{"role": "user", "content": "Hi there"}]
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }} <tool_call>{% endfor %}"
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "rivers": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["city", "rivers"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "visit", "parameters": SCHEMA}}]
NOT_SHOWN = {"0": -100, "1": -100, "2": -100}
"""Special tokens, which texts leave out."""
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module", params=["1p+1d", "1c"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("api")
    save_model(small_model("hybrid"), folder)
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    prefill = 1 if request.param == "1p+1d" else 0
    launched = Launched(
        ServeOptions(
            model=str(folder), name=MODEL, prefill=prefill, threads=1, cache_bytes=1 << 22, max_batch=8, dtype="float32"
        )
    )
    live = Live(cast("FakeFrontend", launched.pools), launched.app, 1.0)
    live.start()
    yield live
    live.close()


def create(server: Live, **fields: Any) -> Any:
    return server.client.chat.completions.create(model=MODEL, messages=USER, **fields)


def gauges(server: Live, name: str) -> float:
    text = server.http.get("/metrics").text
    return sum(float(value) for value in re.findall(rf"^tandem_{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE))


def eventually(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.01)


def all_is_free(server: Live) -> None:
    for name in ("num_requests_running", "num_requests_waiting", "cache_blocks_used", "cache_slots_used"):
        eventually(lambda name=name: gauges(server, name) == 0)
    assert cast("Any", server.frontend).in_flight == 0
    assert "tandem_request_retries_total 0.0" in server.http.get("/metrics").text  # no worker has died


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 7}])
def test_a_stream_is_the_whole_answer_and_counts_match(server: Live, sampling: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        **sampling,
        "max_completion_tokens": 40,
        "logprobs": True,
        "top_logprobs": 2,
        "n": 2,
        "logit_bias": NOT_SHOWN,
    }
    whole = create(server, **fields)
    chunks = list(create(server, **fields, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
        assert "".join(piece.delta.content or "" for piece in mine) == choice.message.content
        assert [e for piece in mine if piece.logprobs for e in piece.logprobs.content] == choice.logprobs.content
        written = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
        assert written.decode("utf-8", "replace").startswith(choice.message.content.rstrip("\ufffd"))
        if sampling["temperature"] == 0:
            assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in choice.logprobs.content)
    assert whole.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in whole.choices)
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_json_and_calls_are_of_their_schema(server: Live) -> None:
    fields: dict[str, Any] = {"max_completion_tokens": 150, "temperature": 1, "seed": 3}
    found = [create(server, response_format=FORMAT, **fields).choices[0].message.content]
    chunks = [c.choices[0] for c in create(server, response_format=FORMAT, stream=True, **fields)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == found[0]
    fields |= {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    answer = create(server, **fields).choices[0]
    assert answer.finish_reason == "tool_calls"
    streamed = [c.choices[0] for c in create(server, stream=True, **fields)]
    calls = [call for chunk in streamed for call in chunk.delta.tool_calls or ()]
    assert streamed[-1].finish_reason == "tool_calls"
    for call in [*answer.message.tool_calls, *calls]:
        assert call.function.name == "visit"
        found.append(call.function.arguments)
    for text in found:
        value = json.loads(text)
        assert value["city"] in ("Paris", "Rome")
        assert set(map(type, value["rivers"])) <= {bool}


def test_a_stream_that_is_closed_frees_everything(server: Live) -> None:
    streams = [create(server, stream=True, max_completion_tokens=400, extra_body={"ignore_eos": True}) for _ in range(12)]
    for stream in streams:
        next(iter(stream))
        stream.close()
    all_is_free(server)


def test_completions_of_several_prompts(server: Live) -> None:
    fields: dict[str, Any] = {"model": MODEL, "prompt": ["One", "Two, three"], "n": 2, "max_tokens": 9, "seed": 4}
    whole = server.client.completions.create(**fields)
    texts = dict.fromkeys(range(4), "")
    for chunk in server.client.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len("OneTwo, three")


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}}


EXTREMES: list[dict[str, Any]] = [
    {"temperature": 1e-300},
    {"temperature": 2, "presence_penalty": -2, "frequency_penalty": -2, "repetition_penalty": 0.01, "logit_bias": {"5": 100}},
    {"repetition_penalty": 1e-300},
    {"repetition_penalty": 10, "temperature": 0},
    {"top_p": 5e-324},
    {"min_p": 1, "top_k": 10**9},
    {"logit_bias": {str(i): -100 for i in range(259)}},
    {"logit_bias": {str(i): 1 for i in range(10_000)}},
    {"stop": ["x" * 10_000] * 4},
    {"stop": "\u0000\ufffd\U0001f600"},
    {"stop_token_ids": list(range(64))},
    {"n": 64, "max_completion_tokens": 2},
    {"thinking_budget": 0},
    {"thinking_budget": 10**9},
    {"logprobs": True, "top_logprobs": 20},
    {"messages": [{"role": "user", "content": "x" * 1_000_000}]},
    {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(128)], "tool_choice": "required"},
    schema({"type": "string", "pattern": "^((a{0,1000}){0,1000}){0,1000}$"}),
    schema({"type": "string", "pattern": "(.*a.{1,30}){12}"}),
    schema({"type": "string", "pattern": "(?=a)b"}),
    schema({"type": "array", "minItems": 10**6}),
    schema({"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}} for j in range(8)]} for i in range(8)]}),
    schema({"$ref": "#"}),
    schema({"$ref": "file:///etc/passwd"}),
    schema({"enum": [f"v{i}" for i in range(30_000)]}),
    schema({"type": "object", "x-guidance": {"whitespace_pattern": "(a{1000}){1000}"}}),
    schema({"not": {}}),
]


def test_no_request_fails_here_or_harms_a_worker(server: Live) -> None:
    before = create(server, temperature=0, max_completion_tokens=20).choices[0].message.content
    for fields in EXTREMES:
        body = {"model": MODEL, "messages": USER, "max_completion_tokens": 30, **fields}
        answer = server.http.post(CHAT, json=body)
        assert answer.status_code in (200, 400), (fields, answer.text)
    assert create(server, temperature=0, max_completion_tokens=20).choices[0].message.content == before
    all_is_free(server)


def test_the_context_is_filled_to_its_last_token_and_not_beyond(server: Live) -> None:
    most = server.http.get("/v1/models").json()["data"][0]["max_model_len"]

    def ask(isl: int) -> Any:
        return server.client.completions.create(model=MODEL, prompt=[5] * isl, max_tokens=1)

    assert ask(most - 1).usage.total_tokens == most
    for isl in (most, most + 1):
        with pytest.raises(openai.BadRequestError, match="context holds"):
            ask(isl)
