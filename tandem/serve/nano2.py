"""The chat format of Nemotron Nano 2 (paper A; `chat_template` of nvidia/NVIDIA-Nemotron-Nano-9B-v2), written and read.

    <SPECIAL_10>System
    {instructions, tools}

    <SPECIAL_11>User
    {question}
    <SPECIAL_11>Assistant
    <think>
    {thoughts}</think>

    {answer}<TOOLCALL>[{"name": .., "arguments": {..}}]</TOOLCALL>
    <SPECIAL_12>

Thinking is on by default, and then the model's turn begins with an open block; off, it begins with an empty one. The last
`/think` or `/no_think` in a system or user message decides; both are taken out of the text. Thoughts of earlier turns are
left out. Results of tools are a user's turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tandem.serve.reasoning import CLOSE, OPEN
from tandem.serve.tools import NANO2, write_json
from tandem.spec.errors import SpecError

SYSTEM, TURN, END = "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"
ON, OFF = "/think", "/no_think"
_TOOLS = """\
You can use the following tools to assist the user if required:
<AVAILABLE_TOOLS>[{tools}]</AVAILABLE_TOOLS>

If you decide to call any tool(s), use the following format:
<TOOLCALL>[{{"name": "tool_name1", "arguments": "tool_args1"}}, {{"name": "tool_name2", "arguments": "tool_args2"}}]</TOOLCALL>

The user will execute tool-calls and return responses from tool(s) in this format:
<TOOL_RESPONSE>[{{"tool_response1"}}, {{"tool_response2"}}]</TOOL_RESPONSE>

Based on the tool responses, you can call additional tools if needed, correct tool calls if any errors are found, or just \
respond to the user."""


def wants_thinking(messages: Iterable[Mapping[str, Any]], *, default: bool = True) -> bool:
    """What the last toggle in a system or user message says; `default` where there is none."""
    thinking = default
    for message in messages:
        if message["role"] in ("system", "user"):
            text = message.get("content") or ""
            on, off = text.rfind(ON), text.rfind(OFF)
            if on != off:
                thinking = on > off
    return thinking


def render(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """A conversation as text. Messages have `role`, `content` (text or None) and, of an assistant, `tool_calls`.

    `enable_thinking` False switches thinking off whatever the messages say. Raises SpecError for a role that the format
    has no place for.
    """
    thinking = enable_thinking is not False and wants_thinking(messages)
    first = 1 if messages and messages[0]["role"] == "system" else 0
    parts = [_plain(messages[0]["content"])] if first and _plain(messages[0]["content"]) else []
    if tools:
        parts.append(_TOOLS.format(tools=", ".join(_compact(tool.get("function", tool)) for tool in tools)))
    text = [f"{SYSTEM}System\n", "\n\n".join(parts), "\n\n"]
    results: list[str] = []
    for i, message in enumerate(messages[first:], first):
        role, content = message["role"], message.get("content")
        if role == "tool":
            results.append(content or "")
            if i + 1 == len(messages) or messages[i + 1]["role"] != "tool":
                text.append(f"{TURN}User\n<TOOL_RESPONSE>[{', '.join(results)}]</TOOL_RESPONSE>\n")
                results.clear()
        elif role == "user":
            text.append(f"{TURN}User\n{_plain(content)}\n")
        elif role == "assistant":
            text.append(f"{TURN}Assistant\n{answer_text(content, calls=message.get('tool_calls'))}\n{END}\n")
        else:
            raise SpecError(f"messages[{i}].role={role!r}: must be user, assistant or tool; system only comes first")
    if add_generation_prompt:
        text.append(f"{TURN}Assistant\n{OPEN}\n" if thinking else f"{TURN}Assistant\n{OPEN}{CLOSE}")
    return "".join(text)


def answer_text(content: str | None, *, reasoning: str | None = None, calls: Sequence[Mapping[str, Any]] | None = None) -> str:
    """What a model writes after the prompt: with `reasoning`, from inside the open block; without it, as in earlier turns."""
    answer = content or ""
    if reasoning is None and CLOSE in answer:
        answer = answer.split(CLOSE, 1)[1]
    parts = [answer.strip()] if answer.strip() else []
    if calls:
        parts.append(f"{NANO2.open}[{', '.join(_call(call.get('function', call)) for call in calls)}]{NANO2.close}")
    text = "\n\n".join(parts)
    return text if reasoning is None else f"{reasoning.strip()}\n{CLOSE}\n\n{text}"


def _plain(content: str | None) -> str:
    return (content or "").replace(OFF, "").replace(ON, "").strip()


def _call(function: Mapping[str, Any]) -> str:
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else write_json(arguments)
    return f'{{"name": {_compact(function["name"])}, "arguments": {text}}}'


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
