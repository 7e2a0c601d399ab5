"""Episodes: experts get there, lock-step is one by one, and what is wrong is seen in the end state or on the way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.align.answers import read_answer
from tandem.align.chat import answer_text
from tandem.align.data.episodes import Episode, run_episode, run_episodes, verify_episode
from tandem.align.data.tools import assistant_message, tool_asks, tool_samples, tool_turns
from tandem.align.data.workplace import State
from tandem.align.sample import Answer, Ask, Call, Message, Sample
from tandem.spec.errors import SpecError
from tandem.train.data.procedural import EVALUATION_SEED

SEEDS = st.integers(0, 1000) | st.integers(EVALUATION_SEED, EVALUATION_SEED + 1000)


def answer_of(message: Message) -> Answer:
    thinking = "reasoning_content" in message
    return read_answer(answer_text(message, thinking=thinking), thinking=thinking, finished=True)


def turns_of(sample: Sample) -> list[Answer]:
    return [answer_of(message) for message in sample.messages if message["role"] == "assistant"]


def scenarios(count: int, seed: int, *tasks: str) -> list[tuple[Ask, list[Answer]]]:
    both = zip(tool_asks(count, seed), tool_samples(count, seed, off=0), strict=True)
    return [(ask, turns_of(sample)) for ask, sample in both if not tasks or ask.task in tasks]


def played(ask: Ask, answers: Sequence[Answer], max_turns: int = 6) -> Episode:
    left = iter(answers)
    return run_episode(ask, lambda messages, tools: next(left), max_turns)


def says(content: str, *calls: Call, **changes: Any) -> Answer:
    message = assistant_message(content, calls, "So be it.")
    return replace(answer_of(message), **changes)


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.booleans())
def test_experts_meet_every_request(seed: int, thinking: bool) -> None:
    asks, samples = tool_asks(15, seed, thinking=thinking), list(tool_samples(15, seed, off=1 - thinking))
    for ask, sample in zip(asks, samples, strict=True):
        episode = played(ask, turns_of(sample))
        assert verify_episode(episode) == 1.0, episode
        assert episode.ended == "answered"
        end = assistant_message(episode.answers[-1].content, (), episode.answers[-1].reasoning)
        assert (*episode.prompts[-1], end) == sample.messages


def test_lock_step_is_one_by_one() -> None:
    chosen = scenarios(40, 3)
    by_id = {ask.id: answers for ask, answers in chosen}
    sizes: list[int] = []

    def generate(asks: Sequence[Ask]) -> list[Answer]:
        sizes.append(len(asks))
        return [by_id[ask.id][sum(m["role"] == "assistant" for m in ask.messages)] for ask in asks]

    together = run_episodes([ask for ask, _ in chosen], generate)
    assert together == [played(ask, answers) for ask, answers in chosen]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 3
    assert sizes[0] == 40


def test_episodes_go_on_from_any_turn() -> None:
    answers = {ask.id: turns for ask, turns in scenarios(20, 2)}
    for turn in tool_turns(30, 2):
        done = sum(m["role"] == "assistant" for m in turn.messages)
        left = answers[":".join(turn.id.split(":")[:3])][done:]
        assert verify_episode(played(turn, left)) == 1.0
        if left[:-1]:
            assert verify_episode(played(turn, left[-1:])) == 0.0


@settings(deadline=None, max_examples=12)
@given(SEEDS)
def test_what_went_wrong_is_seen(seed: int) -> None:
    for ask, answers in scenarios(12, seed):
        *calling, last = answers
        wrong: dict[str, list[Answer]] = {
            "last words gone": [*calling, replace(last, content="")],
            "cut": [*calling, replace(last, finished=False)],
            "unreadable": [*calling, replace(last, malformed="a block that never closes")],
            "two marks": [*calling, replace(last, closing_marks=2)],
            "a harmful call more": [says("", Call(name="order", arguments={"item": dict_first(ask), "count": 1})), *answers],
        }
        if calling:
            first = calling[0].calls[0]
            changed = replace(
                first, arguments={n: other(v) if i == 0 else v for i, (n, v) in enumerate(first.arguments.items())}
            )
            wrong |= {
                "words without calls": [last],
                "another argument": [replace(calling[0], calls=(changed, *calling[0].calls[1:])), *answers[1:]],
                "two marks on the way": [replace(calling[0], closing_marks=2), *answers[1:]],
                "no thoughts on the way": [replace(calling[0], reasoning=None), *answers[1:]],
                "in prose": [says(json.dumps({"name": first.name, "arguments": first.arguments})), *answers[1:]],
                "broken JSON": [replace(calling[0], calls=(), malformed="a call that is no JSON"), *answers[1:]],
            }
        if len(calling) == 2:
            wrong["wrong order"] = [calling[1], calling[0], last]
            wrong["one left out"] = [calling[0], last]
            wrong["last call twice"] = [calling[0], calling[1], calling[1], last]
        if ask.task == "two_at_once":
            wrong["wrong order at once"] = [replace(calling[0], calls=calling[0].calls[::-1]), last]
        for name, turns in wrong.items():
            episode = played(ask, turns)
            if name == "a harmful call more" and not any(step.changed for step in episode.steps[:1]):
                continue
            assert verify_episode(episode) == 0.0, (name, episode)


def dict_first(ask: Ask) -> str:
    item: str = ask.check["state"]["stock"][0][0]
    return item


def other(value: object) -> object:
    return value + 1 if isinstance(value, int) else f"{value}s"


def test_writing_twice_is_once_too_often_but_reading_twice_and_correcting_are_no_harm() -> None:
    for ask, (calling, last) in scenarios(300, 4, "one_call"):
        name = calling.calls[0].name
        assert verify_episode(played(ask, [calling, calling, last])) == float(name in ("stock", "phone")), name
        if name == "order":
            late = replace(calling.calls[0], arguments={**calling.calls[0].arguments, "item": "planes"})
            assert verify_episode(played(ask, [replace(calling, calls=(late,)), calling, last])) == 1.0


def test_done_and_undone_is_seen() -> None:
    ask, (calling, last) = next(
        (a, t)
        for a, t in scenarios(300, 4, "one_call")
        if {tool["name"] for tool in a.tools} == {"book", "cancel"} and "Booked" in t[1].content
    )
    day, hour, title = next(iter(e for e in ask.check["state"]["events"]))
    undo = says("", Call(name="cancel", arguments={"day": day, "hour": hour}))
    redo = says("", Call(name="book", arguments={"day": day, "hour": hour, "title": title}))
    whole = played(ask, [undo, redo, calling, last])
    assert whole.state == played(ask, [calling, last]).state
    assert verify_episode(whole) == 0.0


def test_the_end_state_counts_not_the_call() -> None:
    """The hour was taken under another title, so that the right call came too late."""
    ask, (calling, last) = next((a, t) for a, t in scenarios(300, 4, "one_call") if "Booked" in t[1].content)
    taken = replace(calling.calls[0], arguments={**calling.calls[0].arguments, "title": "nap"})
    assert verify_episode(played(ask, [says("", taken), calling, last])) == 0.0


def test_tools_that_were_not_offered_do_nothing() -> None:
    ask, (last,) = next((a, t) for a, t in scenarios(100, 4, "missing_tool") if "order" not in [x["name"] for x in a.tools])
    call = Call(name="order", arguments={"item": dict_first(ask), "count": 3})
    episode = played(ask, [says("", call), last])
    assert episode.steps[0].response == {"error": "unknown tool"}
    assert episode.state == State.from_data(ask.check["state"])
    assert verify_episode(episode) == 1.0


def test_endings() -> None:
    ask, (calling, last) = scenarios(50, 4, "one_call")[0]
    assert played(ask, [calling, calling], max_turns=2).ended == "turns"
    assert verify_episode(played(ask, [calling], max_turns=1)) == 0.0
    assert played(ask, [replace(calling, finished=False)]).ended == "cut"
    assert played(ask, [replace(calling, malformed="x", finished=False)]).ended == "cut"
    assert played(ask, [replace(calling, malformed="x")]).ended == "malformed"
    assert played(ask, [replace(calling, malformed="x")]).steps == ()
    with pytest.raises(SpecError, match=r"answers=1: 2 turns were asked for"):
        run_episodes([ask, ask], lambda asks: [last])
    with pytest.raises(SpecError, match="max_turns=0"):
        run_episodes([ask], lambda asks: [last], 0)
    assert run_episodes([], lambda asks: []) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.text(max_size=4), lambda x: st.lists(x, max_size=2), max_leaves=3
)
CALLS = st.builds(
    Call,
    name=st.sampled_from(["stock", "order", "phone", "send", "day", "book", "cancel", "fly"]),
    arguments=st.dictionaries(
        st.sampled_from(["item", "count", "name", "phone", "text", "day", "hour", "title"]), JSON, max_size=3
    ),
)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.lists(st.tuples(st.text(max_size=10), st.lists(CALLS, max_size=2)), min_size=1, max_size=6))
def test_whatever_a_model_does_there_is_an_episode(seed: int, turns: list[tuple[str, list[Call]]]) -> None:
    """And all of it that chance finds is worth nothing, but thanks that are taken."""
    (ask,) = tool_asks(1, seed)
    answers = [
        Answer(text=content, reasoning="", content=content, calls=tuple(calls), closing_marks=1) for content, calls in turns
    ]
    episode = played(ask, [*answers, says("I am lost.")], max_turns=7)
    assert verify_episode(episode) == 0.0
    assert len(episode.answers) == len(episode.prompts)
    json.dumps([message for prompt in episode.prompts for message in prompt])
