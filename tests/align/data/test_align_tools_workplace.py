"""The simulated workplace: what each call does, that nothing raises, that wrong calls change nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.align.data.workplace import DAYS, TOOLS, WRITING, State, apply, response_text
from tandem.align.sample import Call
from tandem.spec.errors import SpecError

STATE = State(
    phones=(("Ann", 412), ("Bob", 733)),
    stock=(("cups", 0), ("pens", 12)),
    events=(("friday", 9, "tea"), ("monday", 9, "lunch"), ("monday", 11, "call")),
)


def done(name: str, /, **arguments: Any) -> tuple[State, dict[str, Any]]:
    return apply(Call(name=name, arguments=arguments), STATE)


def test_reading_changes_nothing() -> None:
    assert done("stock", item="pens") == (STATE, {"count": 12})
    assert done("phone", name="Bob") == (STATE, {"phone": 733})
    assert done("day", day="monday") == (STATE, {"busy": [9, 11]})
    assert done("day", day="tuesday") == (STATE, {"busy": []})


def test_writing_changes_one_thing() -> None:
    after, response = done("order", item="pens", count=8)
    assert (dict(after.stock), response) == ({"cups": 0, "pens": 20}, {"done": True})
    after, response = done("send", phone=412, text="come")
    assert (after.messages, response) == (((412, "come"),), {"done": True})
    after, response = done("book", day="monday", hour=10, title="tour")
    assert ("monday", 10, "tour") in after.events
    assert set(after.events) - {("monday", 10, "tour")} == set(STATE.events)
    assert apply(Call(name="cancel", arguments={"day": "monday", "hour": 10}), after) == (STATE, {"cancelled": "tour"})


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("fly", {}, "unknown tool"),
        ("stock", {}, "item is missing"),
        ("stock", {"item": "pens", "count": 3}, "too many arguments"),
        ("stock", {"item": "planes"}, "unknown item"),
        ("stock", {"name": "pens"}, "item is missing"),
        ("order", {"item": "pens", "count": True}, "count must be an integer"),
        ("order", {"item": "pens", "count": 3.0}, "count must be an integer"),
        ("order", {"item": "pens", "count": "3"}, "count must be an integer"),
        ("order", {"item": "pens", "count": 0}, "bad count"),
        ("order", {"item": "pens", "count": 100}, "bad count"),
        ("order", {"item": "planes", "count": 3}, "unknown item"),
        ("phone", {"name": "ann"}, "unknown name"),
        ("phone", {"name": 412}, "name must be a string"),
        ("send", {"phone": 1, "text": "come"}, "unknown phone"),
        ("send", {"phone": 412, "text": " "}, "no text"),
        ("day", {"day": "Monday"}, "unknown day"),
        ("book", {"day": "sunday", "hour": 9, "title": "tea"}, "unknown day"),
        ("book", {"day": "monday", "hour": 9, "title": "tea"}, "busy"),
        ("book", {"day": "monday", "hour": 8, "title": "tea"}, "closed"),
        ("book", {"day": "monday", "hour": 10, "title": ""}, "no title"),
        ("cancel", {"day": "monday", "hour": 10}, "nothing there"),
    ],
)
def test_what_is_wrong_is_said_and_changes_nothing(name: str, arguments: dict[str, Any], error: str) -> None:
    assert done(name, **arguments) == (STATE, {"error": error})


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.sampled_from(["pens", "Ann", "monday", 9, 412]),
    st.lists(st.integers(), max_size=2),
)
NAMES = st.sampled_from(["item", "count", "name", "phone", "text", "day", "hour", "title", "self", "state", "x"])


@given(st.sampled_from([*TOOLS, "", "apply"]), st.dictionaries(NAMES | st.text(max_size=3), VALUES, max_size=4))
def test_no_call_raises_and_errors_change_nothing(name: str, arguments: dict[str, Any]) -> None:
    after, response = apply(Call(name=name, arguments=arguments), STATE)
    assert json.loads(response_text(response)) == response
    assert "\n" not in response_text(response)
    if "error" in response or name not in WRITING:
        assert after == STATE


@given(st.lists(st.tuples(st.sampled_from(DAYS), st.integers(8, 18), st.booleans()), max_size=12))
def test_calendar_is_a_set_of_hours(steps: list[tuple[str, int, bool]]) -> None:
    """Against a dictionary."""
    state, hours = State(), dict[tuple[str, int], str]()
    for day, hour, books in steps:
        arguments = {"day": day, "hour": hour} | ({"title": "tea"} if books else {})
        state, _ = apply(Call(name="book" if books else "cancel", arguments=arguments), state)
        if books and 9 <= hour <= 17:
            hours.setdefault((day, hour), "tea")
        elif not books:
            hours.pop((day, hour), None)
    assert {event[:2]: event[2] for event in state.events} == hours
    assert State.from_data(json.loads(json.dumps(state.to_data()))) == state
    assert hash(State.from_data(state.to_data())) == hash(state)


def test_states_are_valid_from_birth() -> None:
    with pytest.raises(SpecError, match=r"stock=.*sorted"):
        State(stock=(("pens", 1), ("cups", 1)))
    with pytest.raises(SpecError, match=r"events=.*each there once"):
        State(events=(("monday", 9, "tea"), ("monday", 9, "lunch")))


def test_schemas_name_every_argument() -> None:
    for name, tool in TOOLS.items():
        assert tool["name"] == name
        schema = tool["parameters"]
        assert schema["type"] == "object"
        assert list(schema["properties"]) == schema["required"]
        _, response = apply(Call(name=name, arguments={}), STATE)
        assert response == {"error": f"{schema['required'][0]} is missing"}
