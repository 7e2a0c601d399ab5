"""The API as OpenAI's own client sees it, over a real socket."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from fake_frontend import byte_tokenizer
from live_server import MODEL, TOOLS, USER, Live, chat, gather

from tandem.engine.types import TokenOutput
from tandem.serve.choices import ChatChoice
from tandem.serve.responses import ChatCompletion as OurChat
from tandem.serve.responses import Completion as OurCompletion


def test_a_chat(server: Live) -> None:
    answer = chat(server)
    assert answer.choices[0].message.content == "Hello, world"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.system_fingerprint.startswith("fp_")
    request = server.frontend.asked[0]
    assert server.app.state.serving.model_name == answer.model == MODEL
    usage = answer.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(request.prompt_ids), 12)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 4
    assert request.sampling.temperature == 1.0
    assert request.sampling.max_tokens == server.frontend.max_context - len(request.prompt_ids)
    assert byte_tokenizer().decode(request.prompt_ids) == "<|user|>Hi\n<|assistant|>"


def test_a_streamed_chat_is_the_whole_one_in_pieces(server: Live) -> None:
    chunks, joined = gather(server, stream_options={"include_usage": True})
    assert joined[0]["content"] == "Hello, world"
    assert joined[0]["finish"] == "stop"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])
    chunks, _ = gather(server)
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_every_parameter_reaches_the_engine(server: Live, stream: bool) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "presence_penalty": -1, "frequency_penalty": 1.5, "seed": 7, "stop": ["a", "b"],
        "max_completion_tokens": 9, "logit_bias": {"5": -100, "6": 2}, "logprobs": True, "top_logprobs": 3, "user": "me",
        "extra_body": {
            "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.2, "thinking_budget": 3, "ignore_eos": True,
            "stop_token_ids": [8], "chat_template_kwargs": {"enable_thinking": True},
        },
    }  # fmt: skip
    chat(server, **fields) if not stream else gather(server, **fields)
    request = server.frontend.asked[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 4, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (-1, 1.5, 1.2)
    assert (sampling.seed, sampling.stop, sampling.stop_token_ids, sampling.max_tokens) == (7, ("a", "b"), (8,), 9)
    assert (sampling.logit_bias, sampling.logprobs, sampling.thinking_budget) == ({5: -100, 6: 2}, 3, 3)
    assert sampling.ignore_eos
    assert request.thinking
    assert request.client == "me"


@pytest.mark.parametrize("off", [0, -1, None])
def test_top_k_can_be_switched_off_in_every_way(server: Live, off: int | None) -> None:
    chat(server, extra_body={"top_k": off})
    assert server.frontend.asked[0].sampling.top_k is None


def test_choices_differ_in_their_seed_alone(server: Live) -> None:
    server.frontend.script = lambda request: list(f"seed {request.sampling.seed}")
    answer = chat(server, n=3, seed=2**63 - 2)
    assert [choice.message.content for choice in answer.choices] == [f"seed {2**63 - 2}", f"seed {2**63 - 1}", "seed 0"]
    assert len({request.prompt_ids for request in server.frontend.asked}) == 1
    assert len({request.id for request in server.frontend.asked}) == 3
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(server.frontend.asked[0].prompt_ids)
    chunks, joined = gather(server, n=3, seed=-1, stream_options={"include_usage": True})
    assert [joined[i]["content"] for i in range(3)] == [f"seed {2**63 - 1}", "seed 0", "seed 1"]
    assert chunks[-1].usage.completion_tokens == sum(len(joined[i]["content"]) for i in range(3))
    server.frontend.asked.clear()
    chat(server), chat(server)
    assert server.frontend.asked[0].sampling.seed != server.frontend.asked[1].sampling.seed


def test_thinking_has_a_field_of_its_own(server: Live) -> None:
    server.frontend.script = "\nhm, é\n</think>\n\nIt is 2."
    on = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}
    message = chat(server, **on).choices[0].message
    assert (message.content, message.reasoning_content) == ("It is 2.", "hm, é")  # type: ignore[attr-defined]
    _, joined = gather(server, **on)
    assert (joined[0]["content"], joined[0]["reasoning"]) == ("It is 2.", "hm, é")
    server.frontend.script = "<think>a</think>b"
    message = chat(server).choices[0].message
    assert (message.content, message.reasoning_content) == ("b", "a")  # type: ignore[attr-defined]
    server.frontend.script = "just text</think>"
    message = chat(server).choices[0].message
    assert message.content == "just text</think>"
    assert not hasattr(message, "reasoning_content")


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ([((5, 6), "a b"), ((7, 99, 8, 9), "</think> c"), ((10,), "d")], 4),
        ([((5,), "a"), ((6,), "b")], 2),
        ([((99, 5, 6), "</think>a b")], 1),
    ],
)
def test_reasoning_tokens_end_with_the_closing_tag(outputs: list[tuple[tuple[int, ...], str]], expected: int) -> None:
    choice = ChatChoice(0, None, thinking=True, close_id=99, tools=None, parallel=True)
    for i, (ids, text) in enumerate(outputs):
        choice.collect(TokenOutput("x", i, ids, text))
    assert choice.reasoning_tokens == expected
    assert choice.completion_tokens == sum(len(ids) for ids, _ in outputs)


def test_reasoning_tokens_are_in_the_usage(server: Live) -> None:
    server.frontend.script = lambda request: ["a", " b", "</think>", "c", "d"]
    for stream in (False, True):
        on: Any = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}
        usage = (
            gather(server, stream_options={"include_usage": True}, **on)[0][-1].usage if stream else chat(server, **on).usage
        )
        assert usage is not None
        assert usage.completion_tokens_details.reasoning_tokens == 3


CALLS = 'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n{"name": "g"}\n</tool_call>'


def test_tool_calls(server: Live) -> None:
    server.frontend.script = CALLS
    choice = chat(server, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    calls = choice.message.tool_calls
    assert calls is not None
    assert [(c.type, c.function.name, c.function.arguments) for c in calls] == [  # type: ignore[union-attr]
        ("function", "f", '{"a": 1}'),
        ("function", "g", "{}"),
    ]
    assert calls[0].id != calls[1].id
    _, joined = gather(server, tools=TOOLS)
    assert joined[0]["finish"] == "tool_calls"
    assert joined[0]["content"] == "Let me see."
    assert [(i, name, arguments) for i, _, name, arguments in joined[0]["calls"]] == [(0, "f", '{"a": 1}'), (1, "g", "{}")]
    answer = {"role": "assistant", **choice.message.model_dump(exclude_unset=True)}
    chat(server, messages=[*USER, answer, {"role": "tool", "tool_call_id": calls[0].id, "content": "2"}], tools=TOOLS)


def test_only_one_call_where_one_was_asked_for(server: Live) -> None:
    server.frontend.script = CALLS
    choice = chat(server, tools=TOOLS, parallel_tool_calls=False).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert len(choice.message.tool_calls or ()) == 1
    assert len(server.frontend.closed) == 1
    _, joined = gather(server, tools=TOOLS, parallel_tool_calls=False)
    assert (len(joined[0]["calls"]), joined[0]["finish"]) == (1, "tool_calls")


def test_calls_are_text_where_no_tool_may_be_called(server: Live) -> None:
    server.frontend.script = CALLS
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = chat(server, **fields).choices[0]
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALLS, None, "stop")
    assert "tools:" not in byte_tokenizer().decode(server.frontend.asked[-1].prompt_ids)


def grammar(server: Live, **fields: Any) -> tuple[str, str] | None:
    server.frontend.asked.clear()
    chat(server, **fields)
    found = server.frontend.asked[0].sampling.grammar
    return None if found is None else (found.kind, found.text)


def test_formats_and_choices_of_tools_become_grammars(server: Live) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "string"}}}
    as_schema: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    assert grammar(server) is None
    assert grammar(server, response_format={"type": "text"}) is None
    assert grammar(server, response_format={"type": "json_object"}) == ("json_object", "")
    assert grammar(server, response_format=as_schema) == ("json_schema", json.dumps(schema))
    assert grammar(server, tools=TOOLS) is None
    kind, text = grammar(server, tools=TOOLS, tool_choice="required") or ("", "")
    assert kind == "lark"
    assert '"{\\"name\\": \\"f\\"' in text
    assert '"{\\"name\\": \\"g\\"' in text
    _, text = grammar(server, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "g"}}) or ("", "")
    assert '\\"g\\"' in text
    assert '\\"f\\"' not in text
    _, text = grammar(server, tools=TOOLS, response_format=as_schema) or ("", "")
    assert "other: %json" in text
    strict: Any = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    _, text = grammar(server, tools=strict) or ("", "")
    assert "TEXT: /" in text


def test_logprobs(server: Live) -> None:
    server.frontend.script = "ab"
    choice = chat(server, logprobs=True, top_logprobs=2).choices[0]
    assert choice.logprobs is not None
    entries = choice.logprobs.content
    assert entries is not None
    assert len(entries) == 2
    for entry in entries:
        assert entry.logprob == -0.5
        assert bytes(entry.bytes or ()).decode("utf-8", "replace") == entry.token
        assert [top.logprob for top in entry.top_logprobs] == [-0.5, -9999.0]
    _, joined = gather(server, logprobs=True, top_logprobs=2)
    assert joined[0]["logprobs"] == entries
    assert chat(server, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []  # type: ignore[union-attr,index]


def test_completions(server: Live) -> None:
    client = server.client
    answer = client.completions.create(model=MODEL, prompt="Hi", logprobs=1, seed=3)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason, answer.object) == ("Hello, world", "stop", "text_completion")
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [-0.5] * 12
    assert server.frontend.asked[0].sampling.max_tokens == 16
    streamed = list(client.completions.create(model=MODEL, prompt="Hi", stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in streamed[:-1]) == "Hello, world"
    assert streamed[-2].choices[0].finish_reason == "stop"
    assert streamed[-1].usage is not None
    assert streamed[-1].usage.completion_tokens == 12


def test_offsets_of_a_stream_are_those_of_the_whole(server: Live) -> None:
    whole = server.client.completions.create(model=MODEL, prompt="Hi", logprobs=1).choices[0].logprobs
    assert whole is not None
    streamed = server.client.completions.create(model=MODEL, prompt="Hi", logprobs=1, stream=True)
    offsets = [offset for c in streamed if c.choices[0].logprobs for offset in c.choices[0].logprobs.text_offset or ()]
    assert offsets == whole.text_offset == list(range(12))


def test_prompts_in_all_four_forms(server: Live) -> None:
    server.frontend.script = lambda request: list(str(request.prompt_ids))
    ids = byte_tokenizer().encode("Hi")
    for prompt in ("Hi", ["Hi"], ids, [ids]):
        answer = server.client.completions.create(model=MODEL, prompt=prompt, max_tokens=99)
        assert [choice.text for choice in answer.choices] == [str(tuple(ids))]
    answer = server.client.completions.create(model=MODEL, prompt=["Hi", "H"], n=2, seed=1, max_tokens=99)
    assert [choice.text for choice in answer.choices] == [str(tuple(ids))] * 2 + [str(tuple(ids[:1]))] * 2
    assert sorted(request.sampling.seed for request in server.frontend.asked[-4:]) == [1, 1, 2, 2]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3


def test_a_length_is_a_length(server: Live) -> None:
    assert chat(server, max_tokens=3).choices[0].finish_reason == "length"
    _, joined = gather(server, max_tokens=3)
    assert (joined[0]["content"], joined[0]["finish"]) == ("Hel", "length")


def test_answers_are_what_the_description_says(server: Live) -> None:
    server.frontend.script = CALLS
    body = {"model": MODEL, "messages": USER, "tools": TOOLS, "logprobs": True, "top_logprobs": 1, "n": 2}
    OurChat.model_validate_json(server.http.post("/v1/chat/completions", json=body).content, strict=True)
    body = {"model": MODEL, "prompt": ["a", "b"], "logprobs": 2}
    OurCompletion.model_validate_json(server.http.post("/v1/completions", json=body).content, strict=True)


def test_models(server: Live) -> None:
    assert [model.id for model in server.client.models.list()] == [MODEL]
    assert server.client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        server.client.chat.completions.create(model="other", messages=USER)
