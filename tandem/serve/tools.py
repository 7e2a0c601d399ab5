"""Tool calls in what a model writes: Nemotron Nano 2's `<TOOLCALL>[...]</TOOLCALL>` and `<tool_call>{...}</tool_call>`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tandem.serve.reasoning import SPACE, partial_suffix

_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{0,64}"
"""Between the parts of a JSON text. Bounded, or a weak model may write nothing else."""


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


def syntax_of(template: str | None) -> ToolSyntax | None:
    """The syntax that a chat template asks for; None where it is none of those known."""
    return next((syntax for syntax in (NANO2, HERMES) if syntax.open in (template or "")), None)


class ToolCall(NamedTuple):
    """A call: the tool's name, its arguments as the text of a JSON object."""

    name: str
    arguments: str


def read_calls(text: str, names: frozenset[str], *, many: bool) -> list[ToolCall] | None:
    """The calls in the JSON between two tags. None if it is malformed or calls a tool that the request does not name."""
    calls = []
    try:
        value = json.loads(text, parse_constant=_refuse)
        for item in value if many and isinstance(value, list) else [value]:
            if not isinstance(item, dict) or item.get("name") not in names:
                return None
            arguments = item.get("arguments", {})
            if isinstance(arguments, str):
                arguments = json.loads(arguments, parse_constant=_refuse)
            if not isinstance(arguments, dict):
                return None
            calls.append(ToolCall(item["name"], write_json(arguments)))
    except (ValueError, TypeError, RecursionError):
        return None
    return calls or None


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
    to be one is given as text. White space beside a call is dropped."""

    def __init__(self, syntax: ToolSyntax, names: Iterable[str]) -> None:
        self._syntax = syntax
        self._names = frozenset(names)
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
            found = read_calls(body, self._names, many=self._syntax.many)
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
        found = read_calls(body[:at], self._names, many=self._syntax.many)
        if found:
            calls.extend(found)
            self._called, self._held = True, ""
        else:
            self._give(self._held + self._syntax.open + body[:at] + close, content)
            self._held = ""
        return body[at + len(close) :]

    def _give(self, text: str, content: list[str]) -> None:
        if self._called and not self._given:
            text = text.lstrip(SPACE)
        if text:
            content.append(text)
            self._given = True


def tool_grammar(
    syntax: ToolSyntax,
    tools: Sequence[Mapping[str, Any]],
    *,
    tags: Mapping[str, int],
    parallel: bool,
    instead: Literal["text", "nothing"] | Mapping[str, Any] = "nothing",
) -> str:
    """A grammar (Lark, as llguidance reads it) of answers that call one of `tools`, each with `name` and `parameters`.

    `tags` holds the ids of tags that are special tokens, which text cannot spell. `instead` is what may come in place of
    calls, or before and after them if it is text: any text, nothing, or JSON of a schema.
    """

    def tag(text: str) -> str:
        return f"<[{tags[text]}]>" if text in tags else json.dumps(text)

    gap = json.dumps(syntax.gap) + " " if syntax.gap else ""
    many = ' (", " call)*' if parallel else ""
    body = f'{gap}"[" call{many} "]" {gap}{tag(syntax.close)}' if syntax.many else f"{gap}call {gap}{tag(syntax.close)}"
    rules = ["%llguidance {}"]
    if instead == "text":
        start, lazy = f"head {body}", "" if syntax.open in tags else "[lazy]"
        rules += [f"start: (block){'*' if parallel else '?'} TEXT", f"head{lazy}: TEXT {tag(syntax.open)}", "TEXT: /(.|\\n)*/"]
    else:
        start = f"{tag(syntax.open)} {body}"
        more = ' ("\\n" block)*' if parallel and not syntax.many else ""
        rules += [f"start: block{more}" if instead == "nothing" else f"start: block{more} | other"]
        if instead != "nothing":
            rules.append(f"other: %json {_schema(instead)}")
    rules += [f"block: {start}", "call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    for i, tool in enumerate(tools):
        name = json.dumps(f'{{"name": {json.dumps(tool["name"])}, "arguments": ')
        rules.append(f'call_{i}: {name} args_{i} "}}"')
        rules.append(f"args_{i}: %json {_schema(tool.get('parameters') or {'type': 'object'})}")
    return "\n".join(rules) + "\n"


def _schema(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": _WHITE_SPACE}})
