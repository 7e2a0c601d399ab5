"""Thoughts and tool calls are read the same from a stream, wherever it is cut."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandem.align.chat import answer_text
from tandem.align.parsers import (
    CLOSE,
    HERMES,
    NANO2,
    OPEN,
    SPACE,
    ReasoningParser,
    ToolCall,
    ToolParser,
    ToolSyntax,
    partial_suffix,
    read_calls,
)

TAGS = (OPEN, CLOSE, NANO2.open, NANO2.close, HERMES.open, HERMES.close)
GOOD = '{"name": "f", "arguments": {"a": "x</tool_call></TOOLCALL>\\"\\\\"}}'
bits = st.sampled_from(
    [*TAGS, GOOD, f"[{GOOD}]", "{}", "[", "]", '"', "\\", " ", "\n", "a", "<", "</", "<t", '{"name": "f"}', '{"name": "g"}']
)
texts = st.lists(bits, max_size=12).map("".join)


@st.composite
def cut(draw: st.DrawFn, source: st.SearchStrategy[str] = texts) -> tuple[str, list[str]]:
    text = draw(source)
    places = sorted(draw(st.sets(st.integers(0, len(text)), max_size=20)))
    return text, [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def split_thoughts(pieces: Sequence[str], *, thinking: bool) -> tuple[str, str]:
    parser = ReasoningParser(thinking=thinking)
    found = [*map(parser.feed, pieces), parser.finish()]
    return "".join(a for a, _ in found), "".join(b for _, b in found)


def take_calls(pieces: Sequence[str], syntax: ToolSyntax, names: Sequence[str] = ("f",)) -> tuple[str, list[ToolCall]]:
    parser = ToolParser(syntax, names)
    found = [*map(parser.feed, pieces), parser.finish()]
    return "".join(text for text, _ in found), [call for _, calls in found for call in calls]


@settings(deadline=None)
@given(cut(), st.booleans())
@example(("\n a</think>b", ["\n a</th", "ink>b"]), True)
@example(("\n<think> a</think>b", ["\n<th", "ink> a<", "/think>b"]), False)
def test_cuts_do_not_change_thoughts(case: tuple[str, list[str]], thinking: bool) -> None:
    text, pieces = case
    assert split_thoughts(pieces, thinking=thinking) == split_thoughts([text], thinking=thinking)


@settings(deadline=None)
@given(cut(), st.booleans())
def test_thoughts_and_answer_are_what_stands_on_either_side_of_the_tag(case: tuple[str, list[str]], opened: bool) -> None:
    text, pieces = case
    starts = text.lstrip(SPACE).startswith(OPEN)
    reasoning, answer = split_thoughts(pieces, thinking=opened)
    if not opened and not starts:
        assert (reasoning, answer) == ("", text)
        return
    inside = text if opened else text.lstrip(SPACE)[len(OPEN) :]
    thoughts, closed, rest = inside.partition(CLOSE)
    assert reasoning == thoughts.strip(SPACE)
    assert answer == rest.lstrip(SPACE)
    assert closed or not answer


@settings(deadline=None)
@given(cut(), st.sampled_from([NANO2, HERMES]))
@example((f"a\n{HERMES.open}{GOOD}{HERMES.close}", []), HERMES)
def test_cuts_do_not_change_calls(case: tuple[str, list[str]], syntax: ToolSyntax) -> None:
    text, pieces = case
    assert take_calls(pieces or [text], syntax) == take_calls([text], syntax)


@settings(deadline=None)
@given(cut(), st.sampled_from([NANO2, HERMES]))
def test_without_calls_the_text_is_untouched(case: tuple[str, list[str]], syntax: ToolSyntax) -> None:
    text, pieces = case
    content, calls = take_calls(pieces, syntax)
    if not calls:
        assert content == text
    assert take_calls(pieces, syntax, names=()) == (text, [])


@settings(deadline=None)
@given(st.text("<think/>ab", max_size=20), st.sampled_from(TAGS))
def test_partial_suffix_by_brute_force(text: str, tag: str) -> None:
    lengths = [n for n in range(len(tag)) if text.endswith(tag[:n])]
    assert partial_suffix(text, tag) == max(lengths)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
call_lists = st.lists(
    st.tuples(st.sampled_from(["f", "get_b-2"]), st.dictionaries(st.text(), json_values)), min_size=1, max_size=3
)
plain = st.text().filter(lambda t: not any(tag in t for tag in TAGS)).map(str.strip)


@settings(deadline=None)
@given(calls=call_lists, content=plain, reasoning=plain, data=st.data())
def test_what_nano2_writes_is_read_back(
    calls: list[tuple[str, dict[str, object]]], content: str, reasoning: str, data: st.DataObject
) -> None:
    as_messages = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    text = answer_text({"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": as_messages})
    _, pieces = data.draw(cut(st.just(text)))
    thoughts, answer = split_thoughts(pieces, thinking=True)
    found, read = take_calls([answer], NANO2, ["f", "get_b-2"])
    assert thoughts.strip() == reasoning
    assert found.strip() == content
    assert [(call.name, json.loads(call.arguments)) for call in read] == calls


@settings(deadline=None)
@given(calls=call_lists, data=st.data())
def test_calls_in_tags_of_their_own_are_read_back(calls: list[tuple[str, dict[str, object]]], data: st.DataObject) -> None:
    written = [f"{HERMES.open}\n{json.dumps({'name': n, 'arguments': a})}\n{HERMES.close}" for n, a in calls]
    _, pieces = data.draw(cut(st.just("Let me see.\n" + "\n".join(written))))
    content, read = take_calls(pieces, HERMES, ["f", "get_b-2"])
    assert content == "Let me see."
    assert [(call.name, json.loads(call.arguments)) for call in read] == calls


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        '{"name": "f", "arguments": {}',
        '{"name": "unknown", "arguments": {}}',
        '{"name": ["f"], "arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "no json"}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": 1e999}}',
        '{"name": "f", "arguments": {"a": ' + "[" * 5000 + "]" * 5000 + "}}",
        '{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}",
        "[]",
        '[{"name": "f", "arguments": {}}, 5]',
    ],
)
@pytest.mark.parametrize("syntax", [NANO2, HERMES])
def test_what_is_no_call_is_text(body: str, syntax: ToolSyntax) -> None:
    with pytest.raises(ValueError, match=r"^(is|has|holds|calls) "):
        read_calls(body, frozenset("f"), many=True)
    text = f"x {syntax.open}{body}{syntax.close} y"
    assert take_calls(list(text), syntax) == (text, [])


def test_arguments_as_text_and_lone_surrogates_become_json_in_utf8() -> None:
    calls = read_calls('{"name": "f", "arguments": "{\\"a\\": 1}"}', frozenset("f"), many=False)
    assert calls == [ToolCall("f", '{"a": 1}')]
    calls = read_calls('{"name": "f", "arguments": {"a": "\\ud800é"}}', frozenset("f"), many=False)
    calls[0].arguments.encode()
    assert json.loads(calls[0].arguments) == {"a": "\ud800é"}


def test_space_around_calls_is_dropped_and_a_missing_end_tag_forgiven() -> None:
    text = f" a \n\n{HERMES.open}{GOOD}{HERMES.close}\n\n{HERMES.open}{GOOD}"
    content, calls = take_calls(list(text), HERMES)
    assert content == " a"
    assert len(calls) == 2
    content, calls = take_calls([f"{HERMES.open}{GOOD}{HERMES.close}\n then"], HERMES)
    assert (content, len(calls)) == ("then", 1)
