"""A small simulated workplace: phone numbers, a stock of goods, a calendar, messages, and seven functions that use them.

What a model did is judged by the state that its calls leave behind, not by its words (WorkBench's idea). A call never raises:
what is wrong with it is its response, `{"error": ..}`, and then the state stays. Names and texts are short, as tools are read
by models of a few hundred tokens' context.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, TypeAlias

from tandem.align.sample import Call, Tool
from tandem.spec.errors import SpecError

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday")
HOURS = range(9, 18)
"""Hours that an event may begin at; each lasts one."""
MOST_ORDERED = 99

Response: TypeAlias = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """Everything that calls read and change. Equal states are equal objects: entries are sorted, messages as they were sent.

    Raises SpecError where entries are not sorted or one is there twice.
    """

    phones: tuple[tuple[str, int], ...] = ()
    """Name, number."""
    stock: tuple[tuple[str, int], ...] = ()
    """Item, pieces."""
    events: tuple[tuple[str, int, str], ...] = ()
    """Day, hour, title."""
    messages: tuple[tuple[int, str], ...] = ()
    """Number that it was sent to, text."""

    def __post_init__(self) -> None:
        for name, key in (("phones", 1), ("stock", 1), ("events", 2)):
            keys = [entry[:key] for entry in getattr(self, name)]
            if any(first >= second for first, second in pairwise(keys)):
                raise SpecError(f"{name}={getattr(self, name)!r}: entries must be sorted, each there once")

    def to_data(self) -> dict[str, Any]:
        """Lists and dictionaries that JSON can say."""
        return {field.name: [list(entry) for entry in getattr(self, field.name)] for field in fields(self)}

    @classmethod
    def from_data(cls, data: Mapping[str, Sequence[Sequence[Any]]]) -> State:
        """What `to_data` gave."""
        return cls(**{name: tuple(tuple(entry) for entry in entries) for name, entries in data.items()})


def _stock(state: State, item: str) -> tuple[State, Response]:
    count = dict(state.stock).get(item)
    return state, {"error": "unknown item"} if count is None else {"count": count}


def _order(state: State, item: str, count: int) -> tuple[State, Response]:
    stock = dict(state.stock)
    if item not in stock:
        return state, {"error": "unknown item"}
    if not 1 <= count <= MOST_ORDERED:
        return state, {"error": "bad count"}
    stock[item] += count
    return replace(state, stock=tuple(stock.items())), {"done": True}


def _phone(state: State, name: str) -> tuple[State, Response]:
    number = dict(state.phones).get(name)
    return state, {"error": "unknown name"} if number is None else {"phone": number}


def _send(state: State, phone: int, text: str) -> tuple[State, Response]:
    if phone not in dict(state.phones).values():
        return state, {"error": "unknown phone"}
    if not text.strip():
        return state, {"error": "no text"}
    return replace(state, messages=(*state.messages, (phone, text))), {"done": True}


def _day(state: State, day: str) -> tuple[State, Response]:
    if day not in DAYS:
        return state, {"error": "unknown day"}
    return state, {"busy": [hour for other, hour, _ in state.events if other == day]}


def _book(state: State, day: str, hour: int, title: str) -> tuple[State, Response]:
    if day not in DAYS or hour not in HOURS:
        return state, {"error": "unknown day" if day not in DAYS else "closed"}
    if not title.strip():
        return state, {"error": "no title"}
    if any((other, at) == (day, hour) for other, at, _ in state.events):
        return state, {"error": "busy"}
    return replace(state, events=tuple(sorted((*state.events, (day, hour, title))))), {"done": True}


def _cancel(state: State, day: str, hour: int) -> tuple[State, Response]:
    titles = [title for other, at, title in state.events if (other, at) == (day, hour)]
    if not titles:
        return state, {"error": "nothing there"}
    return replace(state, events=tuple(e for e in state.events if e[:2] != (day, hour))), {"cancelled": titles[0]}


_TYPES: Mapping[str, type] = {"string": str, "integer": int}
_FUNCTIONS: Mapping[str, tuple[Callable[..., tuple[State, Response]], str, Mapping[str, str]]] = {
    "stock": (_stock, "Count an item", {"item": "string"}),
    "order": (_order, "Order an item", {"item": "string", "count": "integer"}),
    "phone": (_phone, "Find a phone", {"name": "string"}),
    "send": (_send, "Send a text", {"phone": "integer", "text": "string"}),
    "day": (_day, "List busy hours", {"day": "string"}),
    "book": (_book, "Book an hour", {"day": "string", "hour": "integer", "title": "string"}),
    "cancel": (_cancel, "Cancel an hour", {"day": "string", "hour": "integer"}),
}


def _describe(name: str) -> Tool:
    _, description, types = _FUNCTIONS[name]
    properties = {argument: {"type": kind} for argument, kind in types.items()}
    return {
        "name": name,
        "description": description,
        "parameters": {"type": "object", "properties": properties, "required": list(types)},
    }


WRITING = frozenset({"order", "send", "book", "cancel"})
"""The functions that change something; the others only read."""
TOOLS: Mapping[str, Tool] = MappingProxyType({name: _describe(name) for name in _FUNCTIONS})
"""The functions by name, described as models are told: `name`, `description`, `parameters` (a JSON schema)."""


def apply(call: Call, state: State) -> tuple[State, Response]:
    """The state after a call, and its response: `{"error": ..}` for an unknown function and for arguments that are missing,
    surplus, of another type (true is no integer) or out of place."""
    if call.name not in _FUNCTIONS:
        return state, {"error": "unknown tool"}
    function, _, types = _FUNCTIONS[call.name]
    missing = [name for name in types if name not in call.arguments]
    if missing:
        return state, {"error": f"{missing[0]} is missing"}
    if len(call.arguments) > len(types):
        return state, {"error": "too many arguments"}
    for name, kind in types.items():
        if type(call.arguments[name]) is not _TYPES[kind]:
            return state, {"error": f"{name} must be {'an' if kind == 'integer' else 'a'} {kind}"}
    return function(state, **call.arguments)


def response_text(response: Response) -> str:
    """A response as models read it: JSON in one line."""
    return json.dumps(response)
