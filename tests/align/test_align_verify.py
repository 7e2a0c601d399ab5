"""What answers are worth: right ones 1, and 0 for everything that changes their meaning or only looks like one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.align.answers import read_answer
from tandem.align.data.constraints import Constraint, stages
from tandem.align.data.instructions import COPY, constraints_of, instruction_asks
from tandem.align.data.reasoning import reasoning_asks
from tandem.align.sample import Answer, Ask, Call
from tandem.align.verify import parts, right_content, verify
from tandem.spec.errors import SpecError
from tandem.train.data.procedural import EVALUATION_SEED, TASKS

ALL = tuple(TASKS)
NANO = ("chain_sum", "leg_counting", "letter_counting", "number_sorting", "spell_backward", "recall")
SEEDS = (*range(6), EVALUATION_SEED, EVALUATION_SEED + 1)
NUMBERS = " ".join(map(str, range(-20, 200)))
OTHER_DIGITS = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")


def answered(content: str, *, thinking: bool = True, thoughts: str = "I work it out.") -> Answer:
    """A finished turn as it is read, in form."""
    text = f"{thoughts}\n</think>\n\n{content}" if thinking else content
    return Answer(text=text, reasoning=thoughts if thinking else None, content=content, closing_marks=int(thinking))


def wrong_contents(right: str) -> Iterator[str]:
    """Texts that are not the answer, though they look like it or hold it."""
    yield from ("", " ", "\n", "0x10", "None", "</think>", "think", NUMBERS)
    yield from (
        f"{right} {right}",
        f"{right}\n{right}",
        f"{right}1",
        f"1{right}",
        f"{right} or so",
        f"not {right}",
        f"{right} 1 2 3",
    )
    yield from (f"The answer is {right}", f"{right}</think>", f"<think>{right}", f"</think>{right}", f"{right}_", f"({right})")
    yield from (f"{right}=", f"= {right}", f"{right}e0", f"{right}e1", f"{right}/1", f"{right},", f"\\boxed{{{right}}}")
    for i, letter in enumerate(right):
        if letter.isdigit():
            yield right[:i] + str((int(letter) + 1) % 10) + right[i + 1 :]
            yield right[:i] + letter.translate(OTHER_DIGITS) + right[i + 1 :]
            yield right[:i] + "_" + right[i:]
        elif letter.isalpha():
            yield right[:i] + ("b" if letter == "a" else "a") + right[i + 1 :]
            yield right[:i] + letter.swapcase() + right[i + 1 :]
        if i:
            yield right[:i]
            yield right[:i] + " " + right[i:]
    if right.lstrip("-").isdigit():
        yield str(int(right) + 1)
        yield str(int(right) - 1)
        yield f"{right}.5"
        yield f"−{right.lstrip('-')}"
        yield right[1:] if right.startswith("-") else f"-{right}"
    if right.startswith("["):
        yield right.replace("'", "")
        yield right.removeprefix("[")
        yield "[]"


def same_number(one: str, other: str) -> bool:
    """As Python reads them, in plain digits."""
    try:
        return one.isascii() and "_" not in one and "e" not in one and float(one) == float(other)
    except ValueError:
        return False


@cache
def asks_of(kind: str, seed: int) -> list[Ask]:
    return list(reasoning_asks(ALL, 240, seed) if kind == "reasoning" else instruction_asks(NANO, 240, seed))


def ask_at(place: tuple[str, int, int]) -> Ask:
    """Made in the test and not in its strategy, where libraries that are loaded for it must not touch `random`."""
    kind, seed, i = place
    return asks_of(kind, seed)[i]


some_asks = st.tuples(st.just("reasoning"), st.sampled_from(SEEDS), st.integers(0, 239))
some_instructions = st.tuples(st.just("instructions"), st.sampled_from(SEEDS), st.integers(0, 239))


@settings(max_examples=400, deadline=None)
@given(place=some_asks, thinking=st.booleans())
def test_reasoning_right_answers_are_worth_one_and_no_mutation_is(place: tuple[str, int, int], thinking: bool) -> None:
    ask = replace(ask_at(place), thinking=thinking)
    right = ask.check["answer"]
    assert verify(ask, answered(right, thinking=thinking)) == 1.0
    assert verify(ask, answered(f"\n{right} \n", thinking=thinking)) == 1.0
    for content in wrong_contents(right):
        if content.strip() == right or same_number(content, right):
            continue
        assert verify(ask, answered(content, thinking=thinking)) == 0.0, (right, content)
        assert parts(ask, answered(content, thinking=thinking))["substance"] == 0.0


def mutations_of_form(right: Answer, *, thinking: bool) -> dict[str, Answer]:
    """Turns with the right answer in them that are not as they were asked for."""
    found = {
        "unfinished": replace(right, finished=False),
        "malformed": replace(right, malformed="a call that is no JSON"),
        "a call": replace(right, calls=(Call(name="add", arguments={}),)),
        "one mark more": replace(right, closing_marks=right.closing_marks + 1),
        "in the thoughts only": replace(right, reasoning=f"{right.reasoning}\n{right.content}", content=""),
        "a call in the text": replace(right, content=f"<TOOLCALL>[]</TOOLCALL>{right.content}"),
        "an opening mark in the text": replace(right, content=f"<think>{right.content}"),
        "an end mark in the text": replace(right, content=f"{right.content}</s>"),
    }
    if thinking:
        found["no mark"] = replace(right, closing_marks=0)
        found["a mark, but no block"] = replace(right, reasoning=None)
        found["no thoughts"] = replace(right, reasoning=None, closing_marks=0, text=right.content)
        found["never closed"] = replace(right, closing_marks=0, content="", malformed="a block that never closes")
    else:
        found["thoughts"] = replace(right, reasoning="so", closing_marks=1)
        found["an open block"] = replace(right, reasoning="so")
    return found


@settings(max_examples=200, deadline=None)
@given(place=some_asks | some_instructions, thinking=st.booleans())
def test_right_answers_out_of_form_are_worth_nothing(place: tuple[str, int, int], thinking: bool) -> None:
    ask = replace(ask_at(place), thinking=thinking)
    content = ask.check["answer"]
    if ask.kind == "instructions":
        content = stages(constraints_of(ask.check), content)[-1]
    right = answered(content, thinking=thinking)
    assert verify(ask, right) == 1.0
    for name, answer in mutations_of_form(right, thinking=thinking).items():
        assert verify(ask, answer) == 0.0, name


@settings(max_examples=400, deadline=None)
@given(place=some_instructions)
def test_form_without_the_answer_gets_nothing(place: tuple[str, int, int]) -> None:
    ask = ask_at(place)
    constraints = constraints_of(ask.check)
    right = ask.check["answer"]
    good = stages(constraints, right)[-1]
    contents = [
        *(constraint.describe(variant) for constraint in constraints for variant in (0, 1)),
        " ".join(constraint.describe() for constraint in constraints),
        ask.messages[0]["content"],
        f"{ask.messages[0]['content']}\n{good}",
        f"{good}\n{good}",
        f"{good} {NUMBERS}",
        f"{NUMBERS} {good}",
        "",
    ]
    wrong = (content for content in wrong_contents(right) if not same_number(content, right))
    contents += [stages(constraints, content)[-1] for content in ("", "x", NUMBERS, *wrong)]
    for content in contents:
        if [line.rstrip() for line in content.strip().split("\n")] == good.split("\n"):
            continue
        assert verify(ask, answered(content)) == 0.0, (ask.task, right, content)


@settings(max_examples=300, deadline=None)
@given(place=some_instructions)
def test_the_answer_without_a_form_is_reported_in_parts(place: tuple[str, int, int]) -> None:
    ask = ask_at(place)
    constraints = constraints_of(ask.check)
    right = ask.check["answer"]
    assert verify(ask, answered(right)) == 0.0
    bare = parts(ask, answered(right))
    assert bare["substance"] == bare["finished"] == 1.0
    assert bare["format"] < 1.0
    for left_out in constraints:
        rest = [constraint for constraint in constraints if constraint is not left_out]
        answer = answered(stages(rest, right)[-1])
        found = parts(ask, answer)
        assert verify(ask, answer) == 0.0
        assert found["substance"] == 1.0, (ask.task, answer.content)
        assert found[f"constraint:{left_out.kind}"] == 0.0
        assert found["format"] == pytest.approx(sum(found[f"constraint:{c.kind}"] for c in constraints) / len(constraints))


@settings(max_examples=100, deadline=None)
@given(place=some_asks | some_instructions)
def test_texts_as_they_are_read(place: tuple[str, int, int]) -> None:
    """What the reader of answers makes of a text is what the verifier looks at."""
    ask = ask_at(place)
    content = ask.check["answer"]
    if ask.kind == "instructions":
        content = stages(constraints_of(ask.check), content)[-1]

    def worth(text: str, *, thinking: bool = True, finished: bool = True) -> float:
        return verify(replace(ask, thinking=thinking), read_answer(text, thinking=thinking, finished=finished))

    right = f"So it is.\n</think>\n\n{content}\n"
    assert worth(right) == worth(f"</think>{content}") == worth(content, thinking=False) == 1.0
    assert worth(right, finished=False) == 0.0
    reopened = f"<think>\n{right}"
    twice = (f"{content}\n</think>\n", f"{right}</think>", f"</think>{right}")
    for text in (content, f"So it is {content}", *twice, f"{right}<TOOLCALL>[]</TOOLCALL>", f"{right}<TOOLCALL>"):
        assert worth(text) == 0.0, text
    for text in (right, reopened, f"</think>{content}", f"{content}</think>"):
        assert worth(text, thinking=False) == 0.0, text


def ask_of(answer: str, *constraints: Constraint, task: str = COPY, kind: str = "instructions") -> Ask:
    check = {"task": task, "question": "?", "answer": answer, "entry": {}, "constraints": [c.plain() for c in constraints]}
    return Ask(id="0", kind=kind, task="", messages=({"role": "user", "content": "?"},), check=check)


@pytest.mark.parametrize(
    ("answer", "constraint", "content", "worth"),
    [
        ("ship", Constraint(kind="brackets"), "[ship]", 1.0),
        ("ship", Constraint(kind="brackets"), "sh[ip]", 0.0),
        ("ship", Constraint(kind="brackets"), "ship [ship]", 0.0),
        ("ship", Constraint(kind="brackets"), "[ship, boat]", 0.0),
        ("ship", Constraint(kind="upper"), "SHIP", 1.0),
        ("ship", Constraint(kind="upper"), "SHIPS", 0.0),
        ("ship", Constraint(kind="words", count=4), "The answer is ship", 1.0),
        ("ship", Constraint(kind="words", count=4), "boat sheep shop ship", 0.0),
        ("ship, boat", Constraint(kind="numbered", count=2), "1. ship\n2. boat", 1.0),
        ("ship, boat", Constraint(kind="numbered", count=2), "1. boat\n2. ship", 0.0),
        ("ship, boat", Constraint(kind="no-commas"), "ship boat", 1.0),
        ("ship, boat", Constraint(kind="no-commas"), "shipboat", 0.0),
        ("ship", Constraint(kind="json", value="answer"), '{"answer": "ship"}', 1.0),
        ("ship", Constraint(kind="json", value="answer"), '{"answer": "ship", "or": "boat"}', 0.0),
        ("ship", Constraint(kind="repeat", count=2), "ship\nship", 1.0),
        ("ship", Constraint(kind="repeat", count=2), "boat\nboat", 0.0),
        ("ship", Constraint(kind="keyword", value="blue", count=2), "blue ship blue", 1.0),
        ("ship", Constraint(kind="keyword", value="blue", count=2), "blue blue", 0.0),
        ("ship", Constraint(kind="title", value="Result"), "<<Result>>\nship", 1.0),
        ("ship", Constraint(kind="title", value="Result"), "<<Result>>\n<<Result>>\nship", 0.0),
    ],
)
def test_examples(answer: str, constraint: Constraint, content: str, worth: float) -> None:
    assert verify(ask_of(answer, constraint), answered(content)) == worth


@pytest.mark.parametrize(
    ("content", "right"),
    [
        ("1234", True), ("1,234", True), ("+1234", True), ("1234.0", True), ("1234.", True), (" 1234\n", True),
        ("12,34", False), ("1,23,4", False), ("1_234", False), ("1.234e3", False), ("1234.5", False), ("-1234", False),
        ("١٢٣٤", False), ("１２３４", False), ("1 234", False), ("1234 apples", False), ("0x4d2", False), ("Infinity", False),
    ],
)  # fmt: skip
def test_numbers_are_read_in_plain_digits_only(content: str, right: bool) -> None:
    ask = next(ask for ask in reasoning_asks(["recall"], 1, 0))
    assert right_content({**ask.check, "answer": "1234"}, content) == right


@settings(max_examples=300, deadline=None)
@given(place=some_asks | some_instructions, content=st.text(max_size=80), marks=st.integers(0, 3), finished=st.booleans())
def test_no_answer_is_too_odd(place: tuple[str, int, int], content: str, marks: int, finished: bool) -> None:
    ask = ask_at(place)
    answer = Answer(text=content, reasoning=content, content=content, closing_marks=marks, finished=finished)
    assert verify(ask, answer) in (0.0, 1.0)
    assert all(0.0 <= part <= 1.0 for part in parts(ask, answer).values())


def test_what_has_no_verifier_is_named() -> None:
    with pytest.raises(SpecError, match=r"ask\.kind='chat': has no verifier; reasoning, instructions, tools have one"):
        verify(ask_of("x", kind="chat"), answered("x"))
