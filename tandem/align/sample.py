"""Conversations as plain data: what is learned from, what is asked, what a model answered.

Messages are dictionaries as in OpenAI's interface: `role` (system, user, assistant, tool), `content`, and of an assistant
`reasoning_content` (its thoughts) and `tool_calls` (each with `function`: `name` and `arguments`, a dictionary). Tools are
described as there too (`name`, `description`, `parameters`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A conversation to learn from: the assistant's turns since the last user message are learned, nothing else."""

    kind: str
    """What it teaches: reasoning, reasoning-off, truncated, tools, instructions."""
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    thinking: bool = True
    """Whether the last turn thinks; without, its block is empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A conversation to go on with, and what the answer is verified by."""

    id: str
    kind: str
    """Whose verifier reads the answer: reasoning, instructions, tools."""
    task: str
    """Within the kind: a procedural task's name, a constraint's, a scenario's."""
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    thinking: bool = True
    check: Mapping[str, Any] = field(default_factory=dict)
    """What the verifier needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A tool's call that a model wrote."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A model's turn, read."""

    text: str
    """As it was written after the prompt, special tokens left out, closing mark included."""
    reasoning: str | None
    """Inside the thinking block; None where the block was empty from the beginning."""
    content: str
    """After the block, calls left out."""
    calls: tuple[Call, ...] = ()
    closing_marks: int = 0
    """`</think>` in the text, the one of an empty block in the prompt left out."""
    finished: bool = True
    """Whether the turn was ended by its end mark, not by a limit."""
    malformed: str | None = None
    """What could not be read, in one line: a call that is no JSON, a block that never closes."""
    hidden: bool = False
    """Whether it holds tokens that the text leaves out, so that the text is not all that was written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two answers to one question (texts after the prompt), the first one better."""

    ask: Ask
    chosen: str
    rejected: str


Verifier = Callable[[Ask, Answer], float]
"""What an answer is worth, 0 to 1; 0 for whatever is malformed or has the form without the substance."""


def pair_from_json(data: Mapping[str, Any]) -> Pair:
    """The pair of which `dataclasses.asdict` made plain data."""
    ask = {**data["ask"], "messages": tuple(data["ask"]["messages"]), "tools": tuple(data["ask"]["tools"])}
    return Pair(ask=Ask(**ask), chosen=data["chosen"], rejected=data["rejected"])
