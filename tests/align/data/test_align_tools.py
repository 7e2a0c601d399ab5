"""Scenarios and the verifier of single turns: experts pass, every change of meaning does not."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.align.answers import read_answer
from tandem.align.chat import answer_text, render
from tandem.align.data.scenarios import ITEMS, NAMES, SCENARIOS, is_held_out
from tandem.align.data.tools import due_calls, left_calls, tool_asks, tool_samples, tool_turns, verify_tools
from tandem.align.data.workplace import TOOLS, State, apply
from tandem.align.sample import Answer, Ask, Call, Message
from tandem.align.verify import verify
from tandem.spec.errors import SpecError
from tandem.train.data.procedural import EVALUATION_SEED

SEEDS = st.integers(0, 1000) | st.integers(EVALUATION_SEED, EVALUATION_SEED + 1000)


def answer_of(message: Message) -> Answer:
    """What an expert writes, read as a model's text is."""
    thinking = "reasoning_content" in message
    return read_answer(answer_text(message, thinking=thinking), thinking=thinking, finished=True)


def expert_turns(count: int, seed: int, *, thinking: bool = True) -> list[tuple[Ask, Answer]]:
    samples = tool_samples(count, seed, off=1 - thinking)
    answers = [answer_of(m) for sample in samples for m in sample.messages if m["role"] == "assistant"]
    return list(zip(islice(tool_turns(len(answers), seed, thinking=thinking), len(answers)), answers, strict=True))


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.booleans())
def test_experts_are_right_at_every_turn(seed: int, thinking: bool) -> None:
    for ask, answer in expert_turns(20, seed, thinking=thinking):
        assert verify_tools(ask, answer) == verify(ask, answer) == 1.0, (ask, answer)
        assert (answer.reasoning is not None) == thinking


def test_thinking_is_as_it_was_asked_for() -> None:
    for (ask, answer), (other, short) in zip(expert_turns(20, 1), expert_turns(20, 1, thinking=False), strict=True):
        assert (verify_tools(ask, answer), verify_tools(other, short)) == (1.0, 1.0)
        assert (verify_tools(ask, short), verify_tools(other, answer)) == (0.0, 0.0)


def test_reading_gives_what_was_rendered() -> None:
    for sample in tool_samples(100, 3, off=0.3):
        text = render(sample.messages, tools=sample.tools, enable_thinking=sample.thinking, add_generation_prompt=False)
        for message in sample.messages:
            if message["role"] == "assistant":
                read = answer_of(message)
                assert read.content == message["content"]
                assert read.reasoning == message.get("reasoning_content")
                calls = [{"function": {"name": c.name, "arguments": c.arguments}} for c in read.calls]
                assert calls == message.get("tool_calls", [])
                assert answer_text(message, thinking=sample.thinking) in text


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_responses_are_those_of_the_workplace_and_thoughts_are_true(seed: int) -> None:
    for sample, ask in zip(tool_samples(20, seed, off=0), tool_asks(20, seed), strict=True):
        state, seen, pending = State.from_data(ask.check["state"]), "", list[Call]()
        for message in sample.messages:
            if message["role"] == "tool":
                state, response = apply(pending.pop(0), state)
                assert json.loads(message["content"]) == response
                assert ("error" in response) == (ask.task == "failed_call")
            elif message["role"] == "assistant":
                thought = message["reasoning_content"]
                for left, right in re.findall(r"(\d+ [-+] \d+) = (\d+)", thought):
                    assert eval(left) == int(right)
                    seen += f" {right}"
                if "is free" not in thought:
                    assert set(re.findall(r"\d+", thought)) <= set(re.findall(r"\d+", seen)), (thought, seen)
                else:
                    busy = [int(hour) for hour in re.findall(r"(\d+) is busy", thought)]
                    hour = int(re.findall(r"(\d+) is free", thought)[0])
                    assert busy == list(range(9, hour))
                    assert f", {hour}," not in seen.replace("]", ",").replace("[", ", ")
                pending = [Call(**call["function"]) for call in message.get("tool_calls", ())]
                assert all(call.name in {tool["name"] for tool in sample.tools} for call in pending)
            seen += f" {message['content']} {message.get('tool_calls', '')}"


def test_second_calls_need_the_first_response() -> None:
    asks = [ask for ask in tool_asks(600, 5) if ask.task == "two_calls"]
    second = [(ask, calls) for ask in asks for calls in [[c for turn in ask.check["turns"] for c in turn][1:]] if calls]
    assert len(second) > 100
    for ask, (call,) in second:
        known = re.findall(r"\w+", ask.messages[0]["content"])
        assert any(isinstance(value, int) and str(value) not in known for value in call["arguments"].values())


def test_tools_fit_what_is_to_be_done() -> None:
    for ask in tool_asks(600, 6):
        names, called = [tool["name"] for tool in ask.tools], {c["name"] for turn in ask.check["turns"] for c in turn}
        assert len(set(names)) == len(names) > 0
        assert called <= set(names)
        assert all(tool == TOOLS[tool["name"]] for tool in ask.tools)
        counts = {"one_call": [1, 0], "two_at_once": [2, 0], "failed_call": [1, 0]}
        sizes = [len(turn) for turn in ask.check["turns"]]
        if ask.task == "two_calls":
            assert sizes in ([1, 1, 0], [1, 0])
        else:
            assert sizes == counts.get(ask.task, [0])


def test_every_kind_comes_in_its_share() -> None:
    found = Counter(ask.task for ask in tool_asks(2200, 7))
    for kind, share in SCENARIOS.items():
        assert found[kind] == pytest.approx(2200 * share / sum(SCENARIOS.values()), rel=0.3)


def test_same_seed_same_data_and_fewer_are_the_beginning_of_more() -> None:
    assert list(tool_samples(30, 8)) == list(tool_samples(50, 8))[:30]
    assert tool_asks(30, 8) == tool_asks(50, 8)[:30]
    assert list(tool_turns(30, 8)) == list(tool_turns(50, 8))[:30]
    assert tool_asks(30, 8) != tool_asks(30, 9)
    assert len({ask.id for ask in (*tool_asks(300, 8), *tool_asks(300, 9))}) == 600
    assert len({turn.id for turn in tool_turns(300, 8)}) == 300
    off = sum(not sample.thinking for sample in tool_samples(1000, 8, off=0.1))
    assert 60 < off < 140
    assert tool_asks(1, 8)[0].messages == next(iter(tool_samples(1, 8))).messages[:1]


def test_evaluated_texts_are_never_learned() -> None:
    learned = {sample.messages[0]["content"] for seed in range(3) for sample in tool_samples(1000, seed)}
    asked = {ask.messages[0]["content"] for seed in range(3) for ask in tool_asks(200, EVALUATION_SEED + seed)}
    assert not learned & asked
    assert len(asked) > 100
    assert not any(map(is_held_out, learned))
    assert {ask.task for ask in tool_asks(300, EVALUATION_SEED)} == set(SCENARIOS)


def test_asks_are_plain_data() -> None:
    for ask in tool_asks(50, 1):
        assert json.loads(json.dumps(ask.check)) == ask.check


Change = Callable[[Ask, Answer], Answer]


def with_first(answer: Answer, change: Callable[[Call], Call]) -> Answer:
    return replace(answer, calls=(change(answer.calls[0]), *answer.calls[1:]))


def other_value(value: object) -> object:
    return value + 1 if isinstance(value, int) else f"{value}s"


def argument(change: Callable[[object], object]) -> Change:
    def mutate(ask: Ask, answer: Answer) -> Answer:
        return with_first(
            answer,
            lambda c: replace(c, arguments={n: change(v) if i == 0 else v for i, (n, v) in enumerate(c.arguments.items())}),
        )

    return mutate


def in_prose(ask: Ask, answer: Answer) -> Answer:
    call = answer.calls[0]
    return replace(answer, calls=(), content=json.dumps([{"name": call.name, "arguments": call.arguments}]))


CALLING: dict[str, Change] = {
    "another value": argument(other_value),
    "another case": argument(lambda v: v.swapcase() if isinstance(v, str) else v + 1),
    "a float": argument(lambda v: float(v) if isinstance(v, int) else v.encode()),
    "a text": argument(lambda v: str(v) if isinstance(v, int) else [v]),
    "true": argument(lambda _: True),
    "null": argument(lambda _: None),
    "swapped names": lambda _, a: with_first(
        a,
        lambda c: replace(
            c, arguments=dict(zip(reversed(c.arguments), c.arguments.values(), strict=True)) if len(c.arguments) > 1 else {}
        ),
    ),
    "argument gone": lambda _, a: with_first(a, lambda c: replace(c, arguments=dict(list(c.arguments.items())[1:]))),
    "argument more": lambda _, a: with_first(a, lambda c: replace(c, arguments={**c.arguments, "x": 1})),
    "another tool": lambda _, a: with_first(a, lambda c: replace(c, name="stock" if c.name != "stock" else "order")),
    "capital tool": lambda _, a: with_first(a, lambda c: replace(c, name=c.name.upper())),
    "twice": lambda _, a: replace(a, calls=(*a.calls, a.calls[0])),
    "extra call": lambda _, a: replace(a, calls=(*a.calls, Call(name="day", arguments={"day": "monday"}))),
    "extra before": lambda _, a: replace(a, calls=(Call(name="day", arguments={"day": "sunday"}), *a.calls)),
    "no call": lambda _, a: replace(a, calls=()),
    "prose": in_prose,
    "words beside": lambda _, a: replace(a, content="There are 99 pens."),
}
FORM: dict[str, Change] = {
    "cut": lambda _, a: replace(a, finished=False),
    "malformed": lambda _, a: replace(a, malformed="a call that is no JSON"),
    "no mark": lambda _, a: replace(a, closing_marks=0),
    "two marks": lambda _, a: replace(a, closing_marks=2),
    "no thoughts": lambda _, a: replace(a, reasoning=None),
}


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_changed_calls_are_worth_nothing(seed: int) -> None:
    for ask, answer in expert_turns(10, seed):
        changes = {**FORM, **(CALLING if answer.calls else {})}
        for name, change in changes.items():
            assert verify_tools(ask, change(ask, answer)) == 0.0, (name, ask, answer)
        if len(answer.calls) == 2:
            assert verify_tools(ask, replace(answer, calls=answer.calls[::-1])) == float(answer.calls[0] == answer.calls[1])
            assert verify_tools(ask, replace(answer, calls=answer.calls[:1])) == 0.0
        reordered = [replace(c, arguments=dict(reversed(c.arguments.items()))) for c in answer.calls]
        assert verify_tools(ask, replace(answer, calls=tuple(reordered))) == 1.0


def number_changed(content: str, by: str) -> str:
    return re.sub(r"\d+", lambda found: f"{found[0]}{by}", content)


WORDS: dict[str, Callable[[str], str]] = {
    "nothing": lambda _: "",
    "white space": lambda _: " \n",
    "another number": lambda text: number_changed(text, "1") if re.search(r"\d", text) else f"{text} 77",
    "sign": lambda text: re.sub(r"\b(?=\d)", "-", text) if re.search(r"\d", text) else f"{text} -7",
    "fraction": lambda text: number_changed(text, ".5") if re.search(r"\d", text) else f"{text} 0.5",
    "unicode digits": lambda text: text.translate({48 + i: 0xFF10 + i for i in range(10)}) + "１",
    "all numbers": lambda text: f"{text} {' '.join(map(str, range(100)))}",
    "all names": lambda text: f"{text} {' '.join(NAMES)}",
    "all items": lambda text: f"{text} {' '.join(ITEMS)}",
    "a call in it": lambda text: f'{text} {{"name": "stock", "arguments": {{}}}}',
    "a tag": lambda text: f"{text} <TOOLCALL>",
    "the other end": lambda text: text.rstrip("?") if "?" in text else f"{text}?",
}


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_changed_words_are_worth_nothing(seed: int) -> None:
    for ask, answer in expert_turns(10, seed):
        if answer.calls:
            continue
        for name, change in WORDS.items():
            assert verify_tools(ask, replace(answer, content=change(answer.content))) == 0.0, (name, ask, answer.content)
        call = Call(name=ask.tools[0]["name"], arguments={"item": "pens"})
        assert verify_tools(ask, replace(answer, calls=(call,))) == 0.0
        assert verify_tools(ask, replace(answer, calls=(call,), content="")) == 0.0
        moved = replace(answer, reasoning=f"{answer.reasoning} {answer.content}", content="It is so.")
        assert verify_tools(ask, moved) == 0.0


@settings(deadline=None, max_examples=20)
@given(SEEDS, SEEDS)
def test_answers_to_another_request_are_worth_nothing(seed: int, other: int) -> None:
    ours, theirs = expert_turns(12, seed), expert_turns(12, other)
    for (ask, answer), (_, foreign) in zip(ours, theirs, strict=False):
        if answer.calls or foreign.calls:
            assert verify_tools(ask, foreign) == float(answer.calls == foreign.calls)


def test_swapped_counts_are_wrong() -> None:
    ask, answer = next(
        (a, b)
        for a, b in expert_turns(300, 4)
        if a.task == "two_at_once" and b.content.startswith("There") and verify_tools(a, b)
    )
    first, second = re.findall(r"\d+", answer.content)
    assert first != second
    swapped = answer.content.replace(first, "x").replace(second, first).replace("x", second)
    assert verify_tools(ask, replace(answer, content=swapped)) == 0.0
    (one, other) = re.findall(r"\d+ (\w+)", answer.content)
    assert verify_tools(ask, replace(answer, content=f"{other}: {second}, {one}: {first}.")) == 1.0


def test_a_claim_is_no_refusal_and_a_refusal_is_no_claim() -> None:
    for ask, answer in expert_turns(100, 2):
        if ask.task in ("missing_tool", "missing_argument"):
            assert verify_tools(ask, replace(answer, content="Done.")) == 0.0
            assert verify_tools(ask, replace(answer, content=f"{answer.content} Done.")) == 0.0
        elif not answer.calls and ask.task != "failed_call":
            assert verify_tools(ask, replace(answer, content=f"I cannot. {answer.content}")) == 0.0
            assert verify_tools(ask, replace(answer, content="I have no tool for that.")) == 0.0


def test_what_was_called_is_no_longer_due() -> None:
    ask, *_ = (a for a, _ in expert_turns(100, 2) if a.task == "two_at_once")
    one, other = due_calls(ask)
    assert left_calls(ask) == ((one, other),)

    def after(*calls: Call) -> Ask:
        called = [{"function": {"name": c.name, "arguments": c.arguments}} for c in calls]
        return replace(ask, messages=(*ask.messages, {"role": "assistant", "content": "", "tool_calls": called}))

    assert due_calls(after(one)) == (other,)
    assert due_calls(after(other)) == (one, other)
    assert due_calls(after(Call(name="day", arguments={}), one, one, other)) == ()


def test_bad_settings_are_refused() -> None:
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(SpecError, match="off="):
            list(tool_samples(1, 0, off=share))
    with pytest.raises(SpecError, match="seed=-1"):
        tool_asks(1, -1)
    with pytest.raises(SpecError, match="count=-1"):
        tool_asks(-1, 1)
