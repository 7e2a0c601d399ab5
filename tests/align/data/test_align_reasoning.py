"""Conversations about generated problems: true answers, shares as asked for, nothing of what is evaluated with."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.align.data.reasoning import (
    HELD_OUT,
    PHRASINGS,
    check_of,
    problem_of,
    problem_streams,
    reasoning_asks,
    reasoning_samples,
)
from tandem.align.sample import Sample
from tandem.spec.errors import SpecError
from tandem.train.data.procedural import EVALUATION_SEED, TASKS, Problem, evaluation_problems, verify

NANO = ("chain_sum", "leg_counting", "letter_counting", "number_sorting", "spell_backward", "recall")
ALL = tuple(TASKS)


def turns(sample: Sample) -> list[tuple[str, str, str | None]]:
    """Of each turn what was asked, answered and thought."""
    talk = [message for message in sample.messages if message["role"] != "system"]
    assert [message["role"] for message in talk] == ["user", "assistant"] * (len(talk) // 2)
    return [(q["content"], a["content"], a.get("reasoning_content")) for q, a in zip(talk[::2], talk[1::2], strict=True)]


def bare(text: str) -> str:
    """The question inside what a user said."""
    text = re.sub(r" /(no_)?think$", "", text)
    for phrasing in sorted(set(PHRASINGS), key=len, reverse=True):
        before, after = phrasing.split("{question}")
        if text.startswith(before) and text.endswith(after):
            return text.removeprefix(before).removesuffix(after)
    raise AssertionError(text)


@pytest.fixture(scope="module")
def known() -> dict[str, list[Problem]]:
    """The problems behind the samples of seed 5, by question, made without the code that makes samples."""
    found: dict[str, list[Problem]] = {}
    for stream in problem_streams(ALL, 5, purpose="reasoning-samples"):
        for problem in islice(stream, 400):
            found.setdefault(problem.question, []).append(problem)
    return found


def behind(known: dict[str, list[Problem]], said: str, thoughts: str | None) -> Problem:
    """Some questions are asked by two tasks, with other derivations."""
    return next(problem for problem in known[bare(said)] if problem.derivation.startswith(thoughts or ""))


@pytest.fixture(scope="module")
def some() -> list[Sample]:
    return list(reasoning_samples(ALL, 3000, 5, off=0.1, truncated=0.2, two_turns=0.1))


def test_every_answer_is_right_and_every_thought_is_the_derivation(some: list[Sample], known: dict[str, list[Problem]]) -> None:
    for sample in some[:1000]:
        asked = turns(sample)
        for i, (question, answer, thoughts) in enumerate(asked):
            problem = behind(known, question, thoughts)
            assert problem.question in question
            assert verify(problem.task, problem, f"</think>{answer}")
            if not sample.thinking:
                assert thoughts is None
            elif sample.kind == "truncated" and i + 1 == len(asked):
                assert thoughts
                assert len(thoughts) < len(problem.derivation) or len(problem.derivation) == 1
            else:
                assert thoughts == problem.derivation


def test_sums_are_right_by_another_way() -> None:
    for sample in reasoning_samples(["chain_sum"], 300, 0):
        for question, answer, _ in turns(sample):
            assert eval(bare(question).removesuffix("=")) == int(answer)


def test_shares_are_those_asked_for(some: list[Sample]) -> None:
    kinds = Counter(sample.kind for sample in some)
    assert kinds["reasoning-off"] / len(some) == pytest.approx(0.1, abs=0.02)
    assert kinds["truncated"] / len(some) == pytest.approx(0.2, abs=0.025)
    assert sum(len(turns(sample)) == 2 for sample in some) / len(some) == pytest.approx(0.1, abs=0.02)
    assert all(sample.thinking == (sample.kind != "reasoning-off") for sample in some)
    assert {sample.kind for sample in reasoning_samples(NANO, 300, 0, off=0.0, two_turns=0.0)} == {"reasoning"}
    assert {sample.kind for sample in reasoning_samples(NANO, 60, 0, off=0.0, truncated=1.0)} == {"truncated"}


def test_thoughts_are_cut_anywhere(known: dict[str, list[Problem]]) -> None:
    places = []
    for sample in reasoning_samples(ALL, 1000, 5, off=0.0, truncated=1.0, two_turns=0.0):
        ((question, _, thoughts),) = turns(sample)
        assert thoughts
        whole = behind(known, question, thoughts).derivation
        if len(whole) > 20:
            places.append(len(thoughts) / len(whole))
    tenths = Counter(int(10 * place) for place in places)
    assert set(tenths) == set(range(10))
    assert min(tenths.values()) > len(places) / 20


def test_switches_say_what_the_sample_does(some: list[Sample]) -> None:
    ways: Counter[tuple[bool, str]] = Counter()
    for sample in some:
        said = re.findall(
            r"/(?:no_)?think", "\n".join(m["content"] for m in sample.messages if m["role"] in ("system", "user"))
        )
        if said:
            assert (said[-1] == "/think") == sample.thinking
        ways[sample.thinking, "+".join(said)] += 1
    assert set(ways) == {
        (True, ""), (True, "/think"), (True, "/no_think+/think"), (False, ""), (False, "/no_think"),
    }  # fmt: skip
    assert ways[True, ""] > ways[True, "/think"]


def test_nothing_that_is_evaluated_is_trained_on() -> None:
    held_out = {problem.question for task in ALL for problem in evaluation_problems(task, HELD_OUT)}
    for sample in reasoning_samples(ALL, 4000, 1):
        assert not held_out & {bare(question) for question, _, _ in turns(sample)}
    assert not held_out & {ask.check["question"] for ask in reasoning_asks(ALL, 3000, 1)}
    for seed in (EVALUATION_SEED, EVALUATION_SEED + 3):
        asks = list(reasoning_asks(ALL, HELD_OUT * len(ALL), seed))
        assert {ask.check["question"] for ask in asks} == held_out
        assert len({ask.id for ask in asks}) == len(asks)


def test_evaluation_problems_come_in_their_order_and_later_seeds_in_another() -> None:
    first = [ask.check["question"] for ask in reasoning_asks(["gcd"], 50, EVALUATION_SEED)]
    assert first == [problem.question for problem in evaluation_problems("gcd", 50)]
    assert first != [ask.check["question"] for ask in reasoning_asks(["gcd"], 50, EVALUATION_SEED + 1)]


def test_more_held_out_problems_than_there_are() -> None:
    with pytest.raises(SpecError, match="count=801: only 800 problems are kept out of training"):
        reasoning_asks(["gcd", "recall"], 801, EVALUATION_SEED)


def test_asks_say_what_was_asked_and_keep_it_as_plain_data() -> None:
    for ask in reasoning_asks(ALL, 600, 2, thinking=False):
        assert ask.kind == "reasoning"
        assert not ask.thinking
        (message,) = ask.messages
        assert message["role"] == "user"
        assert bare(message["content"]) == ask.check["question"]
        again = json.loads(json.dumps(ask.check))
        problem = problem_of(again)
        assert problem.task == ask.task
        assert verify(ask.task, problem, f"</think>{problem.answer}")


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, EVALUATION_SEED - 1), few=st.integers(0, 15), more=st.integers(15, 40))
def test_same_seed_same_samples_and_fewer_are_the_beginning(seed: int, few: int, more: int) -> None:
    tasks = NANO[:3]
    many = list(reasoning_samples(tasks, more, seed, truncated=0.3))
    assert list(reasoning_samples(tasks, few, seed, truncated=0.3)) == many[:few]
    assert many != list(reasoning_samples(tasks, more, seed + 1 if seed + 1 < EVALUATION_SEED else 0, truncated=0.3))
    assert list(reasoning_asks(tasks, few, seed)) == list(reasoning_asks(tasks, more, seed))[:few]


def test_other_purposes_have_other_problems() -> None:
    one, other = (
        [problem.question for problem in islice(problem_streams(["recall"], 0, purpose=purpose)[0], 50)]
        for purpose in ("reasoning-samples", "reasoning-asks")
    )
    assert not set(one) & set(other)


def test_checks_hold_what_verification_needs() -> None:
    problem = evaluation_problems("leg_counting", 1)[0]
    assert problem_of(check_of(problem)).entry == problem.entry


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"tasks": []}, r"tasks=\[\]: name one or more of chain_sum"),
        ({"tasks": ["sums"]}, "task='sums': not known"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": EVALUATION_SEED}, "are for evaluation"),
        ({"count": -1}, "count=-1"),
        ({"off": 1.5}, "off=1.5: must be a share"),
        ({"off": 0.7, "truncated": 0.4}, "truncated=0.4: off=0.7 leaves no more than 0.3"),
        ({"two_turns": -0.1}, "two_turns=-0.1"),
    ],
)
def test_bad_arguments_are_refused_at_once(wrong: dict[str, object], why: str) -> None:
    arguments = {"tasks": NANO, "count": 1, "seed": 0} | wrong
    with pytest.raises(SpecError, match=why):
        reasoning_samples(**arguments)  # type: ignore[arg-type]
