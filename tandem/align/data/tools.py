"""Requests to the simulated workplace as samples and asks, and whether a model's turn is the right one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from random import Random
from typing import Any

from tandem.align.data.draws import require_share
from tandem.align.data.scenarios import ITEMS, NAMES, TITLES, Script, scripts
from tandem.align.data.workplace import DAYS, TOOLS, apply, response_text
from tandem.align.sample import Answer, Ask, Call, Message, Sample, Tool
from tandem.spec.units import require_int

_NUMBER = re.compile(r"[-−]?\d+(?:[.,]\d+)*")


def tool_samples(count: int, seed: int, *, off: float = 0.1) -> Iterator[Sample]:
    """Episodes by an expert, whole conversations; a share of `off` without thoughts. Fewer are the beginning of more.

    Thoughts are true: they say what a response said, and sums that hold. Raises SpecError for a share outside 0 to 1.
    """
    require_int("count", count, low=0)
    require_share("off", off)
    for id, _, script in islice(scripts(seed), count):
        thinking = Random(f"{id}:thinking").random() >= off
        yield Sample(kind="tools", messages=_conversation(script, thinking=thinking), tools=_offered(script), thinking=thinking)


def tool_asks(count: int, seed: int, *, thinking: bool = True) -> list[Ask]:
    """Requests as a user makes them, to be met in one turn or (`episodes`) in several; `seed` of at least `EVALUATION_SEED`
    for evaluation. The scenarios are those of `tool_samples` with the same seed."""
    require_int("count", count, low=0)
    return [_ask(id, kind, script, thinking=thinking) for id, kind, script in islice(scripts(seed), count)]


def tool_turns(count: int, seed: int, *, thinking: bool = True) -> Iterator[Ask]:
    """Asks at every turn of the scenarios of `tool_asks`, after an expert's turns before it: single turns to learn from."""
    require_int("count", count, low=0)
    return islice((turn for id, kind, script in scripts(seed) for turn in _turns(id, kind, script, thinking)), count)


def _turns(id: str, kind: str, script: Script, thinking: bool) -> Iterator[Ask]:
    ask = _ask(id, kind, script, thinking=thinking)
    messages = _conversation(script, thinking=thinking)
    for i, at in enumerate(at for at, message in enumerate(messages) if message["role"] == "assistant"):
        yield replace(ask, id=f"{id}:{i}" if i else id, messages=messages[:at])


def _ask(id: str, kind: str, script: Script, *, thinking: bool) -> Ask:
    check = {
        "state": script.state.to_data(),
        "turns": [[{"name": call.name, "arguments": dict(call.arguments)} for call in turn.calls] for turn in script.turns],
        "says": list(script.says),
        "may": list(script.may),
        "never": list(script.never),
        "asks": script.asks,
    }
    messages = ({"role": "user", "content": script.user},)
    return Ask(id=id, kind="tools", task=kind, messages=messages, tools=_offered(script), thinking=thinking, check=check)


def _offered(script: Script) -> tuple[Tool, ...]:
    return tuple(TOOLS[name] for name in script.tools)


def _conversation(script: Script, *, thinking: bool) -> tuple[Message, ...]:
    messages: list[Message] = [{"role": "user", "content": script.user}]
    state = script.state
    for turn in script.turns:
        messages.append(assistant_message(turn.content, turn.calls, turn.thought if thinking else None))
        for call in turn.calls:
            state, response = apply(call, state)
            messages.append({"role": "tool", "content": response_text(response)})
    return tuple(messages)


def assistant_message(content: str, calls: Sequence[Call], reasoning: str | None) -> Message:
    """A model's turn as a message."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [{"function": {"name": call.name, "arguments": dict(call.arguments)}} for call in calls]
    return message


def left_calls(ask: Ask) -> tuple[tuple[Call, ...], ...]:
    """The expert's calls that are still to be made, turn by turn.

    What the conversation has called already is done, as far as it was called in the expert's order.
    """
    called = [_read(call["function"]) for message in ask.messages for call in message.get("tool_calls") or ()]
    turns = [[_read(call) for call in turn] for turn in ask.check["turns"]]
    due = [(i, call) for i, turn in enumerate(turns) for call in turn]
    for call in called:
        if due and same_call(due[0][1], call):
            due = due[1:]
    return tuple(tuple(call for at, call in due if at == i) for i in sorted({at for at, _ in due}))


def due_calls(ask: Ask) -> tuple[Call, ...]:
    """The calls that are right in the next turn; none where the last words are due."""
    left = left_calls(ask)
    return left[0] if left else ()


def _read(function: Mapping[str, Any]) -> Call:
    return Call(name=function["name"], arguments=function["arguments"])


def same_call(expected: Call, call: Call) -> bool:
    """Whether a call is the expected one: name, arguments, and their types (12.0 and "12" are not 12, true is not 1)."""
    one, other = expected.arguments, call.arguments
    same = expected.name == call.name and one.keys() == other.keys()
    return same and all(type(one[name]) is type(other[name]) and one[name] == other[name] for name in one)


def well_formed(ask: Ask, answer: Answer) -> bool:
    """Whether a turn has the form: ended by its mark, readable, one closed block of thoughts if it was to think, else none."""
    thought = answer.reasoning is not None
    return answer.finished and answer.malformed is None and thought == ask.thinking and answer.closing_marks == int(thought)


def says_enough(ask: Ask, content: str) -> bool:
    """Whether the last words tell the user what is to be told, and nothing that is not so.

    All that `says` names must be there (`a|b`: one of them), nothing of `never`; every number and every name of the workplace
    must be one of those, one that the user said, or one of `may`. So a list of all possible answers is none. A question mark
    is there exactly where something had to be asked.
    """
    check, words = ask.check, _words(content)
    known = " ".join(str(message["content"]) for message in ask.messages if message["role"] == "user")
    known = f"{known} {' '.join(check['says'])} {' '.join(check['may'])}".replace("|", " ")
    names = set(words.split()) & _VOCABULARY
    return (
        all(any(_words(phrase) in words for phrase in needed.split("|")) for needed in check["says"])
        and not any(_words(phrase) in words for phrase in check["never"])
        and set(_NUMBER.findall(content)) <= set(_NUMBER.findall(known))
        and names <= set(_words(known).split())
        and ("?" in content) == check["asks"]
        and not any(mark in content for mark in "{}<>")
    )


def _words(text: str) -> str:
    """Words in lower case between single spaces, also at both ends: so `12` is not found in `112`."""
    found = re.findall(r"\w+", text.casefold())
    return f" {' '.join(found)} "


_VOCABULARY = frozenset(word.casefold() for word in (*ITEMS, *NAMES, *TITLES, *DAYS))


def verify_tools(ask: Ask, answer: Answer) -> float:
    """1 where one turn is exactly right, else 0.

    Where calls are due: these, in this order, names, arguments and types, nothing else beside them. Where none is: no call,
    and words that say enough.
    """
    if not well_formed(ask, answer):
        return 0.0
    due = due_calls(ask)
    if not due:
        return float(not answer.calls and says_enough(ask, answer.content))
    right = len(due) == len(answer.calls) and all(map(same_call, due, answer.calls))
    return float(right and not answer.content.strip())
