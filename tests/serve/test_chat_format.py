"""Conversations as text: Nano 2's own format, templates of checkpoints, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from fake_frontend import TEMPLATE, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from tandem.serve import nano2
from tandem.serve.chat import ChatTemplate
from tandem.serve.schemas import Message, Tool
from tandem.serve.tools import HERMES, NANO2
from tandem.spec.errors import SpecError

MESSAGES = TypeAdapter(list[Message])
TOOL = {"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def parsed(*messages: dict[str, Any]) -> list[Any]:
    return MESSAGES.validate_python(list(messages))


def test_nano2_whole_conversation() -> None:
    messages = [
        {"role": "system", "content": "Be brief. /no_think"},
        {"role": "user", "content": " What is f of 1? "},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nI ask.", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": '{"b": 3}'},
        {"role": "assistant", "content": "It is 2."},
        {"role": "user", "content": "Sure? /think"},
    ]
    text = nano2.render(messages, tools=[TOOL])
    assert text.startswith("<SPECIAL_10>System\nBe brief.\n\nYou can use the following tools")
    assert '<AVAILABLE_TOOLS>[{"name": "f", "description": "é", "parameters": {"type": "object"}}]</AVAILABLE_TOOLS>' in text
    assert text.endswith(
        "\n\n<SPECIAL_11>User\nWhat is f of 1?\n"
        '<SPECIAL_11>Assistant\nI ask.\n\n<TOOLCALL>[{"name": "f", "arguments": {"a": 1}}]</TOOLCALL>\n<SPECIAL_12>\n'
        '<SPECIAL_11>User\n<TOOL_RESPONSE>[2, {"b": 3}]</TOOL_RESPONSE>\n'
        "<SPECIAL_11>Assistant\nIt is 2.\n<SPECIAL_12>\n"
        "<SPECIAL_11>User\nSure?\n"
        "<SPECIAL_11>Assistant\n<think>\n"
    )


def test_nano2_without_system_and_without_thinking() -> None:
    text = nano2.render([{"role": "user", "content": "Hi /no_think"}])
    assert text == "<SPECIAL_10>System\n\n\n<SPECIAL_11>User\nHi\n<SPECIAL_11>Assistant\n<think></think>"
    assert nano2.render([{"role": "user", "content": "Hi"}], add_generation_prompt=False).endswith("User\nHi\n")


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["system", "user", "assistant"]), st.lists(st.sampled_from(["/think", "/no_think", "x"])))
    )
)
def test_the_last_toggle_of_a_system_or_user_message_wins(turns: list[tuple[str, list[str]]]) -> None:
    messages = [{"role": role, "content": " ".join(words)} for role, words in turns]
    said = [word for role, words in turns if role != "assistant" for word in words if word != "x"]
    assert nano2.wants_thinking(messages) == (not said or said[-1] == "/think")
    rest = [m if m["role"] != "system" else {**m, "role": "user"} for m in messages]
    text = nano2.render(rest)
    assert text.endswith("<think>\n" if nano2.wants_thinking(rest) else "<think></think>")
    assert nano2.render(rest, enable_thinking=False).endswith("<think></think>")
    visible = text.split("<SPECIAL_11>User")[1:]
    assert not any("/think" in part.split("<SPECIAL_11>")[0].replace("</think>", "") for part in visible)


def test_nano2_refuses_a_late_system_message() -> None:
    with pytest.raises(SpecError, match=r"messages\[1\]\.role='system'"):
        nano2.render([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}])


def test_checkpoints_without_a_template_get_nano2() -> None:
    template = ChatTemplate(byte_tokenizer(None))
    assert (template.format, template.syntax) == ("nano2", NANO2)
    prompt = template.prompt(parsed({"role": "user", "content": "Hi"}))
    assert prompt.thinking
    assert template.tokenizer.decode(prompt.ids).endswith("<think>\n")
    off = template.prompt(parsed({"role": "user", "content": "Hi"}), variables={"enable_thinking": False})
    assert not off.thinking
    with pytest.raises(SpecError, match="chat_format"):
        ChatTemplate(byte_tokenizer(None), "template")


def test_the_checkpoints_own_template_is_used() -> None:
    template = ChatTemplate(byte_tokenizer(TEMPLATE))
    assert (template.format, template.syntax) == ("template", HERMES)
    messages = parsed(
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    )
    prompt = template.prompt(messages, tools=[Tool.model_validate(TOOL)], variables={"enable_thinking": True})
    text = template.tokenizer.decode(prompt.ids)
    assert text.startswith("tools: [")
    assert "<|system|>ab\n<|user|>q\n<|assistant|>" in text
    assert '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n<|tool|>2\n' in text
    assert prompt.thinking
    assert ChatTemplate(byte_tokenizer(TEMPLATE), "nano2").syntax is NANO2


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token", "not a name", "self"])
def test_variables_cannot_replace_what_the_request_says(name: str) -> None:
    with pytest.raises(SpecError, match="chat_template_kwargs"):
        ChatTemplate(byte_tokenizer(TEMPLATE)).prompt(parsed({"role": "user", "content": "q"}), variables={name: 1})


def test_what_a_format_cannot_do_is_refused_by_name() -> None:
    plain = ChatTemplate(byte_tokenizer("{{ messages[0].content }}"))
    message = parsed({"role": "user", "content": "q"})
    with pytest.raises(SpecError, match=r"^tools: "):
        plain.prompt(message, tools=[Tool.model_validate(TOOL)])
    with pytest.raises(SpecError, match=r"chat_template_kwargs\.other: is not known"):
        ChatTemplate(byte_tokenizer(None)).prompt(message, variables={"other": 1})
    broken = parsed({"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[1]"}}]})
    with pytest.raises(SpecError, match=r"messages\[0\]\.tool_calls\[0\]\.function\.arguments='\[1\]'"):
        plain.prompt(broken)
    with pytest.raises(SpecError, match=r"^messages: the chat template fails"):
        ChatTemplate(byte_tokenizer("{{ 1 // 0 }}")).prompt(message)


def test_tags_that_are_special_tokens_are_known() -> None:
    assert ChatTemplate(byte_tokenizer(None)).tag_ids == {}
    template = ChatTemplate(byte_tokenizer(None, special=("<think>", "</think>"), plain=("<TOOLCALL>",)))
    ids = template.tokenizer.backend.token_to_id
    assert template.tag_ids == {"<think>": ids("<think>"), "</think>": ids("</think>")}
    assert template.close_id == ids("</think>")
