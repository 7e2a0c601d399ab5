"""What a model writes, read as it comes: thoughts apart from the answer, tool calls apart from its text, tags cut anywhere.

Thoughts stand as `<think>thoughts</think>answer`. Calls stand as Nemotron Nano 2's `<TOOLCALL>[...]</TOOLCALL>` or as
`<tool_call>{...}</tool_call>`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"
SPACE = " \t\r\n"


def partial_suffix(text: str, tag: str) -> int:
    """Length of the longest end of `text` with which `tag` may begin, short of the whole tag."""
    last = text.rfind("<", max(0, len(text) - len(tag) + 1))
    while last >= 0:
        if tag.startswith(text[last:]):
            return len(text) - last
        last = text.rfind("<", max(0, len(text) - len(tag) + 1), last)
    return 0


class _Where(Enum):
    START = 0
    THINKING = 1
    CLOSED = 2
    ANSWER = 3


class ReasoningParser:
    """Splits the text of one output. White space around the thoughts and after the closing tag is dropped.

    `thinking`: the prompt has opened a block already. Otherwise one may begin with the output's first word and nowhere else.
    """

    def __init__(self, *, thinking: bool) -> None:
        self._where = _Where.THINKING if thinking else _Where.START
        self._held = ""
        self._begun = False

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends inside the block."""
        return self._where is _Where.THINKING

    def feed(self, text: str) -> tuple[str, str]:
        """Reasoning and answer that have become certain through `text`."""
        if self._where is _Where.ANSWER:
            return "", text
        text = self._held + text
        self._held = ""
        if self._where is _Where.START:
            word = text.lstrip(SPACE)
            if OPEN.startswith(word[: len(OPEN)]):
                if len(word) < len(OPEN):
                    self._held = text
                    return "", ""
                self._where, text = _Where.THINKING, word[len(OPEN) :]
            else:
                self._where = _Where.ANSWER
                return "", text
        reasoning = ""
        if self._where is _Where.THINKING:
            at = text.find(CLOSE)
            if at < 0:
                return self._thoughts(text, len(text) - partial_suffix(text, CLOSE)), ""
            reasoning = self._thoughts(text[:at], at)
            self._held, self._where, text = "", _Where.CLOSED, text[at + len(CLOSE) :]
        answer = text.lstrip(SPACE)
        if answer:
            self._where = _Where.ANSWER
        return reasoning, answer

    def finish(self) -> tuple[str, str]:
        """What was held back when the output ended."""
        held, self._held = self._held, ""
        if self._where is _Where.THINKING:
            return (held.rstrip(SPACE) if self._begun else held.strip(SPACE)), ""
        return "", held

    def _thoughts(self, text: str, end: int) -> str:
        if not self._begun:
            bare = text.lstrip(SPACE)
            end = max(0, end - (len(text) - len(bare)))
            text = bare
        given = text[:end].rstrip(SPACE)
        self._begun = self._begun or bool(given)
        self._held = text[len(given) :]
        return given


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolSyntax:
    """Between which tags calls stand: JSON objects of `name` and `arguments`, one or a list of them."""

    open: str
    close: str
    many: bool
    """One pair of tags holds a list of calls; else each call has its own pair."""
    gap: str
    """Between tags and JSON, as the template writes it."""


NANO2 = ToolSyntax(open="<TOOLCALL>", close="</TOOLCALL>", many=True, gap="")
HERMES = ToolSyntax(open="<tool_call>", close="</tool_call>", many=False, gap="\n")


class ToolCall(NamedTuple):
    """A call: the tool's name, its arguments as the text of a JSON object."""

    name: str
    arguments: str


def read_calls(text: str, names: frozenset[str] | None, *, many: bool) -> list[ToolCall]:
    """The calls in the JSON between two tags. Raises ValueError, which says why it is none.

    `names` are the tools that may be called; None for any. With `many` the JSON may be a list.
    """
    calls = []
    try:
        value = json.loads(text, parse_constant=_refuse)
        for item in value if many and isinstance(value, list) else [value]:
            name = item.get("name") if isinstance(item, dict) else None
            if not isinstance(name, str):
                raise _NoCall("is no object with a name")
            if names is not None and name not in names:
                raise _NoCall(f"calls {name[:60]!r}, which is no tool here")
            arguments = item.get("arguments", {})
            if isinstance(arguments, str):
                arguments = json.loads(arguments, parse_constant=_refuse)
            if not isinstance(arguments, dict):
                raise _NoCall("has arguments that are no object")
            calls.append(ToolCall(name, write_json(arguments)))
    except _NoCall:
        raise
    except (ValueError, RecursionError):
        raise _NoCall("is no JSON") from None
    if not calls:
        raise _NoCall("holds no call")
    return calls


class _NoCall(ValueError):
    """Says in a few words what stands where a call should."""


def write_json(value: object) -> str:
    """JSON that is valid UTF-8: a lone surrogate stays the escape that it came as. Raises ValueError on infinities."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text) else json.dumps(value)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _inside_string(text: str) -> bool:
    quoted, at = False, 0
    while True:
        quote = text.find('"', at)
        if quote < 0:
            return quoted
        slashes = 0
        while quoted and text[quote - 1 - slashes : quote - slashes] == "\\":
            slashes += 1
        if slashes % 2 == 0:
            quoted = not quoted
        at = quote + 1


class ToolParser:
    """Takes calls out of the text of one answer. A call is given whole, when its closing tag has come; what turns out not
    to be one is given as text. White space beside a call is dropped. `names` are the tools there are; None for any."""

    def __init__(self, syntax: ToolSyntax, names: Iterable[str] | None) -> None:
        self.malformed: str | None = None
        """What was wrong with the first text that should have been a call, in one line."""
        self._syntax = syntax
        self._names = None if names is None else frozenset(names)
        self._held = ""
        self._body: list[str] | None = None
        self._tail = ""
        self._seen = 0
        self._given = False
        self._called = False

    def feed(self, text: str) -> tuple[str, list[ToolCall]]:
        """Text and calls that have become certain through `text`."""
        content: list[str] = []
        calls: list[ToolCall] = []
        while text or self._body is None:
            if self._body is None:
                text, self._held = self._held + text, ""
                at = text.find(self._syntax.open)
                end = len(text) - partial_suffix(text, self._syntax.open) if at < 0 else at
                given = text[:end].rstrip(SPACE)
                self._give(given, content)
                if at < 0:
                    self._held = text[len(given) :]
                    break
                self._held, self._body, self._tail, self._seen = text[len(given) : at], [], "", 0
                text = text[at + len(self._syntax.open) :]
            else:
                text = self._read_body(text, content, calls)
        return "".join(content), calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What was held back when the output ended; a call without its closing tag counts if its JSON is whole."""
        content: list[str] = []
        calls: list[ToolCall] = []
        if self._body is not None:
            body, self._body = "".join(self._body), None
            self.malformed = self.malformed or f"{self._syntax.open} is never closed"
            found = self._read_calls(body)
            if found:
                calls, self._called, self._held = found, True, ""
            else:
                self._give(self._held + self._syntax.open + body, content)
        elif self._held.strip(SPACE) or not self._called:
            self._give(self._held, content)
        self._held = ""
        return "".join(content), calls

    def _read_body(self, text: str, content: list[str], calls: list[ToolCall]) -> str:
        """Look for the end of the call; returns what follows it, nothing if it has not come."""
        close = self._syntax.close
        assert self._body is not None
        self._body.append(text)
        window = self._tail + text
        self._tail = window[-(len(close) - 1) :]
        if close not in window:
            return ""
        body = "".join(self._body)
        at = body.find(close, self._seen)
        while at >= 0 and _inside_string(body[:at]):
            self._seen = at + 1
            at = body.find(close, self._seen)
        if at < 0:
            self._body = [body]
            return ""
        self._body = None
        found = self._read_calls(body[:at])
        if found:
            calls.extend(found)
            self._called, self._held = True, ""
        else:
            self._give(self._held + self._syntax.open + body[:at] + close, content)
            self._held = ""
        return body[at + len(close) :]

    def _read_calls(self, body: str) -> list[ToolCall]:
        try:
            return read_calls(body, self._names, many=self._syntax.many)
        except ValueError as wrong:
            self.malformed = self.malformed or f"{self._syntax.open}{body[:40]!r} {wrong}"
            return []

    def _give(self, text: str, content: list[str]) -> None:
        if self._called and not self._given:
            text = text.lstrip(SPACE)
        if text:
            content.append(text)
            self._given = True
