"""Tool calls on the server: which syntax a template asks for, and grammars that keep a model to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tandem.align.parsers import HERMES, NANO2, ToolSyntax

_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{0,64}"
"""Between the parts of a JSON text. Bounded, or a weak model may write nothing else."""


def syntax_of(template: str | None) -> ToolSyntax | None:
    """The syntax that a chat template asks for; None where it is none of those known."""
    return next((syntax for syntax in (NANO2, HERMES) if syntax.open in (template or "")), None)


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
