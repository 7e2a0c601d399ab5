"""No input brings a 5xx: bodies made from the served OpenAPI description, mutated bodies, and bytes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
import schemathesis
from fake_frontend import FakeFrontend, byte_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_server import MODEL, make_app
from schemathesis import checks

from tandem.serve.auth import ApiKeys, hash_key

CHAT = "/v1/chat/completions"
KEY = "k"
CALLS = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call> text'


def app_of(script: str = "Hello") -> Any:
    keys = ApiKeys((("ann", bytes.fromhex(hash_key(KEY))),))
    return make_app(FakeFrontend(script, max_context=10**6), keys=keys, tokenizer=byte_tokenizer())


APP = app_of(CALLS)
schema = schemathesis.openapi.from_asgi("/openapi.json", APP)
CHECKS = [
    checks.not_a_server_error,
    *(
        checks.CHECKS.get_one(name)
        for name in (
            "status_code_conformance",
            "content_type_conformance",
            "response_headers_conformance",
            "response_schema_conformance",
            "negative_data_rejection",
            "unsupported_method",
        )
    ),
]


@schema.parametrize()
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_the_description_is_true(case: schemathesis.Case) -> None:
    if isinstance(case.body, dict) and case.body.get("model"):
        case.body["model"] = MODEL if isinstance(case.body["model"], str) else case.body["model"]
    case.call_and_validate(headers={"authorization": f"Bearer {KEY}"}, checks=CHECKS)


def test_the_description_names_every_route_and_field() -> None:
    raw = schema.raw_schema
    assert set(raw["paths"]) == {"/health", "/ready", "/metrics", "/v1/models", "/v1/models/{name}", CHAT, "/v1/completions"}
    body = raw["components"]["schemas"]["ChatRequest"]
    assert body["additionalProperties"] is False
    assert {"messages", "thinking_budget", "logit_bias"} <= set(body["properties"])
    for path in (CHAT, "/v1/completions"):
        operation = raw["paths"][path]["post"]
        assert set(operation["responses"]) >= {"200", "400", "401", "404", "408", "413", "429", "500", "503"}
        assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
        assert operation["security"] == [{"HTTPBearer": []}]


def send(content: bytes, path: str = CHAT) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(APP, raise_app_exceptions=True)
        headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as client:
            return await client.post(path, content=content)

    return asyncio.run(go())


def check(response: httpx.Response) -> None:
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "\n" not in error["message"]
        assert "Traceback" not in response.text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from([MODEL, "user", "text"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
WHOLE: dict[str, Any] = {
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}], "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "c", "tool_call_id": "1"},
    ],
    "stream": True, "stream_options": {"include_usage": True}, "n": 2, "max_tokens": 5, "seed": 3, "user": "u",
    "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "logit_bias": {"5": 1}, "stop": ["x"], "stop_token_ids": [3],
    "presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.5, "ignore_eos": True, "thinking_budget": 4,
    "logprobs": True, "top_logprobs": 2, "parallel_tool_calls": False, "metadata": {"a": "b"},
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
    "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": {"type": "function", "function": {"name": "f"}},
    "chat_template_kwargs": {"enable_thinking": True},
}  # fmt: skip
PROMPT = {"model": MODEL, "prompt": [[1, 2], [3]], "logprobs": 2, "max_tokens": 3, "n": 2, "stream": True}


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of a body lies."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, inner in items for place in places(inner, (*at, key)))]


def put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = put(value[place[0]], place[1:], new)
    return copy


@pytest.mark.parametrize(("whole", "path"), [(WHOLE, CHAT), (PROMPT, "/v1/completions")])
def test_whole_bodies_are_served(whole: dict[str, Any], path: str) -> None:
    assert send(json.dumps(whole).encode(), path).status_code == 200


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), new=json_values)
def test_any_value_in_any_place(data: st.DataObject, new: Any) -> None:
    whole, path = data.draw(st.sampled_from([(WHOLE, CHAT), (PROMPT, "/v1/completions")]))
    body = put(whole, data.draw(st.sampled_from(places(whole))), new)
    check(send(json.dumps(body).encode(), path))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), new=st.binary(max_size=8))
def test_any_bytes_in_any_place(data: st.DataObject, new: bytes) -> None:
    raw = json.dumps(data.draw(st.sampled_from([WHOLE, PROMPT]))).encode()
    at = data.draw(st.integers(0, len(raw)))
    check(send(raw[:at] + new + raw[at + data.draw(st.integers(0, 8)) :]))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_body(content: bytes) -> None:
    response = send(content)
    assert response.status_code == 400
    check(response)
