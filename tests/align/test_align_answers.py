"""What a model wrote is read as the server reads it, and what cannot be read is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chat_cases import CONTROLS, arguments, calls, plain
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandem.align.answers import read_answer
from tandem.align.chat import answer_text
from tandem.align.parsers import NANO2, ReasoningParser, ToolParser
from tandem.align.sample import Call

CALL = '<TOOLCALL>[{"name": "f", "arguments": {"a": 1}}]</TOOLCALL>'
deep = '<TOOLCALL>{"name": "f", "arguments": ' + '{"a":' * 3000 + "1" + "}" * 3000 + "}</TOOLCALL>"
bits = st.sampled_from(
    [
        *CONTROLS,
        CALL,
        deep,
        '{"name": "f", "arguments": {}}',
        "[",
        "]",
        "{",
        '"',
        "\\",
        "NaN",
        "9" * 5000,
        "\ud800",
        "\\ud800",
        "\n",
        " ",
    ]
)
adversarial = st.lists(bits | st.text(max_size=3), max_size=8).map("".join)


def stripped(text: str) -> str:
    return text.strip(" \t\r\n")


@settings(deadline=None)
@given(content=plain, reasoning=plain, called=calls, thinking=st.booleans())
def test_what_the_template_writes_is_read_back(content: str, reasoning: str, called: list[Any], thinking: bool) -> None:
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": called}
    text = answer_text(message, thinking=thinking)
    answer = read_answer(text, thinking=thinking, finished=True)
    assert answer.reasoning == (stripped(reasoning.strip()) if thinking else None)
    assert answer.content == stripped(content.strip())
    assert [{"function": {"name": c.name, "arguments": c.arguments}} for c in answer.calls] == called
    assert (answer.closing_marks, answer.malformed, answer.text) == (int(thinking), None, text)


@settings(deadline=None, max_examples=300)
@given(text=adversarial, thinking=st.booleans(), finished=st.booleans())
@example(text=deep, thinking=False, finished=True)
@example(text="</think><TOOLCALL>", thinking=True, finished=False)
def test_any_text_can_be_read(text: str, thinking: bool, finished: bool) -> None:
    answer = read_answer(text, thinking=thinking, finished=finished)
    assert answer.text == text
    assert answer.finished is finished
    assert answer.closing_marks == text.count("</think>")
    assert (answer.reasoning is None) == (not thinking and not text.lstrip(" \t\r\n").startswith("<think>"))
    assert answer.malformed is None or ("\n" not in answer.malformed and len(answer.malformed) < 300)
    if answer.malformed is None:
        parser = ReasoningParser(thinking=thinking)
        fed, left = parser.feed(text), parser.finish()
        tools = ToolParser(NANO2, None)
        said, found = tools.feed(fed[1] + left[1])
        assert stripped(said + tools.finish()[0]) == answer.content
        assert [(c.name, json.loads(c.arguments)) for c in found] == [(c.name, c.arguments) for c in answer.calls]
        assert "</TOOLCALL>" not in answer.content


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "marks"),
    [
        ("a\n</think>\n\nb\n", "a", "b", 1),
        ("</think>b", "", "b", 1),
        ("a</think>b</think>c", "a", "b</think>c", 2),
        ("<think>a</think>b", "<think>a", "b", 1),
        ("a</think>", "a", "", 1),
    ],
)
def test_thoughts_and_marks(text: str, reasoning: str, content: str, marks: int) -> None:
    answer = read_answer(text, thinking=True, finished=True)
    assert (answer.reasoning, answer.content, answer.closing_marks, answer.malformed) == (reasoning, content, marks, None)


def test_without_a_block_there_are_no_thoughts_unless_one_is_opened() -> None:
    answer = read_answer("b\n", thinking=False, finished=True)
    assert (answer.reasoning, answer.content, answer.closing_marks) == (None, "b", 0)
    answer = read_answer("\n<think>a</think>b", thinking=False, finished=True)
    assert (answer.reasoning, answer.content, answer.closing_marks) == ("a", "b", 1)
    answer = read_answer("b <think>a</think>", thinking=False, finished=True)
    assert (answer.reasoning, answer.content, answer.closing_marks) == (None, "b <think>a</think>", 1)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("", "is no JSON"),
        ("[", "is no JSON"),
        ('[{"name": "f", "arguments": {"a": NaN}}]', "is no JSON"),
        ('[{"name": "f", "arguments": {"a": 1e999}}]', "is no JSON"),
        ('[{"name": "f", "arguments": "{"}]', "is no JSON"),
        ("[]", "holds no call"),
        ("[1]", "is no object with a name"),
        ('[{"name": 1, "arguments": {}}]', "is no object with a name"),
        ('{"arguments": {}}', "is no object with a name"),
        ('[{"name": "f", "arguments": [1]}]', "has arguments that are no object"),
        ('[{"name": "f", "arguments": {}}, {"name": "f", "arguments": 1}]', "has arguments that are no object"),
    ],
)
def test_a_malformed_call_is_named_and_stays_text(body: str, says: str) -> None:
    text = f"x <TOOLCALL>{body}</TOOLCALL> y"
    answer = read_answer(text, thinking=False, finished=True)
    assert (answer.calls, answer.content) == ((), text)
    assert answer.malformed is not None
    assert answer.malformed.startswith("<TOOLCALL>")
    assert answer.malformed.endswith(says)


def test_what_never_closes_is_named() -> None:
    answer = read_answer("a", thinking=True, finished=False)
    assert (answer.reasoning, answer.content, answer.malformed) == ("a", "", "<think> is never closed")
    answer = read_answer('a<TOOLCALL>[{"name": "f", "arguments": {}}]', thinking=False, finished=True)
    assert (answer.content, answer.calls, answer.malformed) == ("a", (), "<TOOLCALL> is never closed")
    answer = read_answer("a</TOOLCALL>", thinking=False, finished=True)
    assert (answer.content, answer.malformed) == ("a</TOOLCALL>", "</TOOLCALL> closes nothing")
    answer = read_answer(f"a{CALL}{CALL}<TOOLCALL>x</TOOLCALL>", thinking=False, finished=True)
    assert len(answer.calls) == 2
    assert answer.malformed == "<TOOLCALL>'x' is no JSON"


@given(arguments)
def test_calls_have_any_name_and_plain_arguments(given: dict[str, object]) -> None:
    body = json.dumps([{"name": "no tool here", "arguments": given}])
    answer = read_answer(f"</think><TOOLCALL>{body}</TOOLCALL>", thinking=True, finished=True)
    assert answer.calls == (Call(name="no tool here", arguments=given),)
