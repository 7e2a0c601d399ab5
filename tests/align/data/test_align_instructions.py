"""Instructions: every sample does what it is told, is right, and its thoughts lead to its answer."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.align.data.constraints import KINDS, fits, stages
from tandem.align.data.instructions import COPY, constraints_of, instruction_asks, instruction_samples
from tandem.align.data.reasoning import HELD_OUT
from tandem.align.sample import Answer, Ask, Sample
from tandem.align.verify import verify
from tandem.spec.errors import SpecError
from tandem.train.data.procedural import EVALUATION_SEED, evaluation_problems
from tandem.train.needles import EVALUATION_KEYS, TRAINING_KEYS

NANO = ("chain_sum", "leg_counting", "letter_counting", "number_sorting", "spell_backward", "recall")


def written(message: dict[str, str], *, thinking: bool) -> Answer:
    thoughts = message.get("reasoning_content")
    assert (thoughts is not None) == thinking
    text = f"{thoughts}\n</think>\n\n{message['content']}" if thinking else message["content"]
    return Answer(text=text, reasoning=thoughts, content=message["content"], closing_marks=int(thinking))


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    return list(instruction_asks(NANO, 1500, 3))


def test_the_answer_with_all_forms_is_worth_one(asks: list[Ask]) -> None:
    for ask in asks:
        constraints = constraints_of(ask.check)
        assert fits(constraints, ask.check["answer"])
        content = stages(constraints, ask.check["answer"])[-1]
        assert verify(ask, Answer(text="", reasoning="so", content=content, closing_marks=1)) == 1.0
        assert ask.task == "+".join(constraint.kind for constraint in constraints)


def test_the_message_names_question_and_every_demand(asks: list[Ask]) -> None:
    for ask in asks:
        (message,) = ask.messages
        assert ask.check["question"] in message["content"]
        for constraint in constraints_of(ask.check):
            assert any(constraint.describe(variant) in message["content"] for variant in (0, 1))


def test_every_kind_and_every_amount_is_asked_for(asks: list[Ask]) -> None:
    kinds = Counter(kind for ask in asks for kind in ask.task.split("+"))
    assert set(kinds) == set(KINDS)
    assert {ask.task.count("+") for ask in asks} == {0, 1, 2}
    assert sum(ask.check["task"] == COPY for ask in asks) / len(asks) == pytest.approx(0.3, abs=0.04)
    assert {ask.check["task"] for ask in asks} == {COPY, *NANO}


def test_samples_are_worth_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample has no check; the instruction it is made of has, so it is taken on its way."""
    from tandem.align.data import instructions

    checks = []
    made = instructions._made

    def noting(*arguments: object) -> object:
        for instruction in made(*arguments):  # type: ignore[arg-type]
            checks.append(instruction.check)
            yield instruction

    monkeypatch.setattr(instructions, "_made", noting)
    samples = list(instruction_samples(NANO, 800, 11))
    assert len(checks) == len(samples) == 800
    assert sum(not sample.thinking for sample in samples) / 800 == pytest.approx(0.1, abs=0.04)
    for sample, check in zip(samples, checks, strict=True):
        ask = Ask(id="0", kind="instructions", task="", messages=sample.messages[:-1], thinking=sample.thinking, check=check)
        assert verify(ask, written(dict(sample.messages[-1]), thinking=sample.thinking)) == 1.0
        if sample.thinking:
            thoughts = sample.messages[-1]["reasoning_content"].split("\n")
            before_last = stages(constraints_of(check), check["answer"])[-2]
            assert thoughts[-len(before_last.split("\n")) :] == before_last.split("\n")
            if check["task"] != COPY:
                assert "\n".join(thoughts) != check["answer"]


def test_nothing_that_is_evaluated_is_trained_on() -> None:
    held_out = {problem.question for task in NANO for problem in evaluation_problems(task, HELD_OUT)}
    trained = list(instruction_asks(NANO, 1500, 0))
    asked = list(instruction_asks(NANO, 900, EVALUATION_SEED))
    assert {ask.check["question"] for ask in asked if ask.check["task"] != COPY} <= held_out
    for ask in trained:
        if ask.check["task"] == COPY:
            assert set(ask.check["answer"].lower().split(", ")) <= set(TRAINING_KEYS)
        else:
            assert ask.check["question"] not in held_out
    for ask in asked:
        if ask.check["task"] == COPY:
            assert set(ask.check["answer"].lower().split(", ")) <= set(EVALUATION_KEYS)
    for sample in instruction_samples(NANO, 1500, 0, copies=0.0):
        assert not any(question in sample.messages[-2]["content"] for question in _long(held_out))


def _long(questions: set[str]) -> list[str]:
    """Of `4 + 1 =` nobody can say whether it is part of another question."""
    return [question for question in questions if len(question) > 40][:300]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, EVALUATION_SEED - 1), few=st.integers(0, 15), more=st.integers(15, 40))
def test_same_seed_same_and_fewer_are_the_beginning(seed: int, few: int, more: int) -> None:
    def samples(count: int) -> list[Sample]:
        return list(instruction_samples(NANO[:2], count, seed))

    assert samples(few) == samples(more)[:few]
    assert list(instruction_asks(NANO[:2], few, seed)) == list(instruction_asks(NANO[:2], more, seed))[:few]


def test_checks_are_plain_data(asks: list[Ask]) -> None:
    for ask in asks[:200]:
        again = json.loads(json.dumps(ask.check))
        assert constraints_of(again) == constraints_of(ask.check)


def test_most_is_kept_to() -> None:
    assert {ask.task.count("+") for ask in instruction_asks(NANO, 200, 0, most=1)} == {0}
    assert all(ask.check["task"] == COPY for ask in instruction_asks(NANO, 50, 0, copies=1.0))
    assert not any(ask.thinking for ask in instruction_asks(NANO, 5, 0, thinking=False))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"tasks": ["sums"]}, "task='sums': not known"),
        ({"seed": EVALUATION_SEED}, "are for evaluation"),
        ({"count": -1}, "count=-1"),
        ({"off": 2}, "off=2: must be a share"),
        ({"copies": -1}, "copies=-1"),
        ({"most": 0}, "most=0"),
    ],
)
def test_bad_arguments_are_refused_at_once(wrong: dict[str, object], why: str) -> None:
    arguments = {"tasks": NANO, "count": 1, "seed": 0} | wrong
    with pytest.raises(SpecError, match=why):
        instruction_samples(**arguments)  # type: ignore[arg-type]


def test_more_held_out_problems_than_there_are() -> None:
    with pytest.raises(SpecError, match="count=500: the held-out problems of 1 tasks do not reach"):
        list(instruction_asks(["gcd"], 500, EVALUATION_SEED, copies=0.0))
