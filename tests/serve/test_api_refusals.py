"""What the API refuses, over a real socket: by name, and with the status that fits."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from fake_frontend import FakeFrontend
from live_server import MODEL, TOOLS, USER, Live, chat, gather, live

from tandem.engine.types import EngineRequest

IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]
NO_TOOL = {"type": "function", "function": {"name": "h"}}


def refusal(server: Live, path: str = "/v1/chat/completions", **fields: Any) -> tuple[int, str, str | None]:
    response = server.http.post(path, json={"model": MODEL, **fields})
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return response.status_code, error["message"], error["param"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "messages[0].content[0].type"),
        ({"messages": USER, "reasoning_effort": "low"}, "reasoning_effort"),
        ({"messages": USER, "functions": []}, "functions"),
        ({"messages": USER, "min_tokens": 3}, "min_tokens"),
        ({"messages": USER, "n": 0}, "n"),
        ({"messages": USER, "n": 100}, "n"),
        ({"messages": USER, "temperature": 2.1}, "temperature"),
        ({"messages": USER, "stop": ["a"] * 5}, "stop"),
        ({"messages": USER, "stop": ""}, "stop"),
        ({"messages": USER, "stop": "a" * 10_001}, "stop"),
        ({"messages": USER, "repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"messages": USER, "max_tokens": 0}, "max_tokens"),
        ({"messages": USER, "max_tokens": 10**9}, "max_tokens"),
        ({"messages": USER, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "prompt"),
        ({"messages": USER, "logit_bias": {"a": 1}}, "logit_bias"),
        ({"messages": USER, "logit_bias": {"999999": 1}}, "logit_bias"),
        ({"messages": USER, "logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"messages": USER, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": USER, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": USER, "tool_choice": "required"}, "tool_choice"),
        ({"messages": USER, "tools": TOOLS * 2}, "tools"),
        ({"messages": USER, "tools": TOOLS, "tool_choice": NO_TOOL}, "tool_choice.function.name"),
        ({"messages": USER, "response_format": {"type": "xml"}}, "response_format.type"),
        ({"messages": USER, "chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs.messages"),
        ({"messages": USER, "stop_token_ids": [999999]}, "stop_token_ids"),
    ],
)  # fmt: skip
def test_what_will_not_do_is_named(server: Live, fields: dict[str, Any], param: str) -> None:
    status, message, named = refusal(server, **fields)
    assert (status, named) == (400, param), message
    assert server.frontend.asked == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 33, "n": 2}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "a", "n": 65}, "n"),
        ({"prompt": [1, "a"]}, "prompt[0]"),
    ],
)
def test_what_completions_will_not_do_is_named(server: Live, fields: dict[str, Any], param: str) -> None:
    status, message, named = refusal(server, "/v1/completions", **fields)
    assert (status, named) == (400, param), message


def test_a_list_that_is_too_long_is_not_called_a_wrong_text(server: Live) -> None:
    _, message, _ = refusal(server, messages=USER, stop=list("abcde"))
    assert "at most 4" in message


def test_fields_that_change_nothing_are_taken(server: Live) -> None:
    extra = {"metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x", "prompt_cache_key": "y"}
    chat(server, **extra, extra_body={"prompt_cache_retention": "24h", "modalities": ["text"]})


@pytest.mark.parametrize("stream", [False, True])
def test_failures_of_the_engine(server: Live, stream: bool) -> None:
    frontend = server.frontend
    fields: Any = {"model": MODEL, "messages": USER, "stream": stream}

    def status() -> tuple[int, str]:
        response = server.http.post("/v1/chat/completions", json=fields)
        text = response.text.removeprefix("data: ") if response.status_code != 200 else response.text
        return response.status_code, text

    frontend.refusal = "grammar.kind=lark: the text does not compile"
    assert status()[0] == 400
    frontend.refusal = "no worker is left"
    code, text = status()
    assert (code, "no worker is left" in text) == (503, True)
    frontend.refusal, frontend.fail = None, RuntimeError("secret details")
    code, text = status()
    assert (code, "secret" in text) == (500, False)
    frontend.fail_at = 3
    code, text = status()
    assert code == (200 if stream else 500)
    assert '{"error":{"message":"something went wrong' in text
    assert "secret" not in text
    frontend.fail, frontend.reason = None, "error"
    code, text = status()
    assert code == (200 if stream else 500)
    assert "the engine broke" in text
    assert "[DONE]" not in text
    frontend.script = ""
    assert status()[0] == 500
    frontend.script, frontend.error = "abc", "grammar.text: is too large to be followed"
    assert status()[0] == (200 if stream else 400)
    frontend.script, frontend.error = "", "the engine broke"
    frontend.reason = "cancelled"
    assert status()[0] == 503
    frontend.reason = "stop"
    if stream:
        frontend.script, frontend.reason = "abc", "error"
        with pytest.raises(openai.APIError, match="the engine broke"):
            gather(server)


def test_an_engine_that_refuses_before_its_first_token(server: Live) -> None:
    class Refusing(FakeFrontend):
        def outputs(self, request: EngineRequest) -> Any:
            last = super().outputs(request)[-1]
            return [type(last)(request.id, 0, (), "", finish_reason="error", error="max_tokens=9: the cache holds 8")]

    with live(Refusing()) as other:
        assert refusal(other, messages=USER)[0] == 400
