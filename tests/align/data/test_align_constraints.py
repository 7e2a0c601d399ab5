"""Constraints on the form of an answer: what applies, holds; what is taken off, was put on; nothing holds for nothing."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tandem.align.data.constraints import (
    KINDS,
    Constraint,
    compatible,
    draw_constraints,
    fits,
    in_order,
    peeled,
    rewritten,
    stages,
)
from tandem.spec.errors import SpecError

QUESTION = "Which one is it, this or that?"
ANSWERS = ("25", "-7", "Vergi", "ship, Moon, king", "['65', '30', '9']", "ship", "the, Contact, the", "03", "1.5")
VALUES = {
    "keyword": ("blue", "lemon"),
    "begin": ("Sure", "Result"),
    "title": ("Answer", "Result"),
    "question": (QUESTION,),
    "end": ("Done.", "Is that clear?"),
    "mark": ("!", "?", "."),
    "separator": ("---", "===", "~~~"),
    "json": ("answer", "value"),
}
COUNTS = {"numbered": (3,), "bullets": (3,), "words": (2, 3, 4, 5, 6), "repeat": (2, 3, 4), "keyword": (1, 2, 3)}
EVERY = tuple(
    Constraint(kind=kind, value=value, count=count)
    for kind in KINDS
    for value in VALUES.get(kind, ("",))
    for count in COUNTS.get(kind, (0,))
)


def compatible_all(constraints: list[Constraint]) -> bool:
    return all(compatible(a.kind, b.kind) for a, b in combinations(constraints, 2))


some_constraints = st.lists(st.sampled_from(EVERY), min_size=1, max_size=3).filter(compatible_all)


@pytest.mark.parametrize("constraint", EVERY, ids=lambda c: f"{c.kind}-{c.value}-{c.count}")
def test_each_can_be_had_alone_and_is_not_there_by_itself(constraint: Constraint) -> None:
    fitting = [answer for answer in ANSWERS if fits([constraint], answer)]
    assert fitting
    for answer in fitting:
        text = constraint.apply(answer)
        assert constraint.holds(text)
        assert constraint.holds(f"\n {text}  ")
        assert not constraint.holds(answer)
        assert not constraint.holds("")


@settings(max_examples=600, deadline=None)
@given(constraints=some_constraints, answer=st.sampled_from(ANSWERS))
def test_what_is_compatible_holds_at_once_and_comes_off_again(constraints: list[Constraint], answer: str) -> None:
    assume(fits(constraints, answer))
    *before, text = stages(constraints, answer)
    assert before[0] == answer
    assert all(constraint.holds(text) for constraint in constraints)
    core = peeled(constraints, text)
    assert core in rewritten(constraints, answer)
    assert core.replace(",", "").casefold() == answer.replace(",", "").casefold() or {"numbered", "bullets"} & {
        constraint.kind for constraint in constraints
    }
    for left_out in constraints:
        rest = [constraint for constraint in constraints if constraint is not left_out]
        assert not left_out.holds(stages(rest, answer)[-1])


def test_the_table_of_what_stands_together_promises_nothing_that_cannot_be_had() -> None:
    for a, b in combinations(KINDS, 2):
        assert compatible(a, b) == compatible(b, a)
        if compatible(a, b):
            pairs = [(one, other) for one in EVERY if one.kind == a for other in EVERY if other.kind == b]
            assert any(fits(pair, answer) for pair in pairs for answer in ANSWERS), (a, b)
    assert not any(compatible(kind, kind) for kind in KINDS)


@settings(max_examples=300, deadline=None)
@given(
    constraint=st.sampled_from(EVERY), text=st.text(max_size=60) | st.sampled_from(["[", "**", '"', "1. ", "- ", "{}", "[[]]"])
)
def test_no_text_is_too_odd(constraint: Constraint, text: str) -> None:
    assert constraint.holds(text) in (True, False)
    assert isinstance(constraint.peel(text), str)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 10**9), answer=st.sampled_from(ANSWERS), most=st.integers(1, 3))
def test_drawn_ones_fit(seed: int, answer: str, most: int) -> None:
    drawn = draw_constraints(Random(seed), QUESTION, answer, most=most)
    assert 1 <= len(drawn) <= most
    assert fits(drawn, answer)
    assert drawn == draw_constraints(Random(seed), QUESTION, answer, most=most)
    assert all(Constraint(**constraint.plain()) == constraint for constraint in drawn)


def test_all_kinds_are_drawn() -> None:
    rng = Random(0)
    drawn = [c.kind for _ in range(200) for answer in ANSWERS for c in draw_constraints(rng, QUESTION, answer)]
    assert set(drawn) == set(KINDS)


def test_descriptions_name_what_is_wanted() -> None:
    for constraint in EVERY:
        said = {constraint.describe(variant) for variant in range(4)}
        assert len(said) == 2
        for sentence in said:
            assert "{" not in sentence
            assert "\n" not in sentence
            if constraint.count and constraint.kind != "words":
                assert str(constraint.count) in sentence
            if constraint.value and constraint.kind not in ("question", "mark"):
                assert constraint.value in sentence
    assert Constraint(kind="mark", value="!").describe() == "End with an exclamation mark."


def make(kind: str, value: str = "", count: int = 0) -> Constraint:
    return Constraint(kind=kind, value=value, count=count)


@pytest.mark.parametrize(
    ("constraint", "text"),
    [
        (make("brackets"), "[25"),
        (make("brackets"), "]25["),
        (make("brackets"), "[]"),
        (make("brackets"), "[25] [25]"),
        (make("bold"), "*25*"),
        (make("bold"), "****25"),
        (make("upper"), "VERGi"),
        (make("lower"), "Vergi"),
        (make("begin", "Sure"), "Surely 25"),
        (make("begin", "Sure"), "25 Sure"),
        (make("end", "Done."), "25 Done"),
        (make("end", "Done."), "Done. 25"),
        (make("mark", "!"), "!25"),
        (make("words", count=3), "It is the 25"),
        (make("words", count=3), "It 25"),
        (make("question", QUESTION), "Which one is it? 25"),
        (make("no-commas"), "a, b"),
        (make("numbered", count=3), "1. a\n2. b"),
        (make("numbered", count=3), "1. a\n3. b\n2. c"),
        (make("numbered", count=3), "1. a\n2. b\n3. c\n4. d"),
        (make("numbered", count=2), "1. a 2. b"),
        (make("numbered", count=2), "١. a\n٢. b"),
        (make("bullets", count=2), "- a - b"),
        (make("quotes"), '"25'),
        (make("quotes"), "'25'"),
        (make("quotes"), '""'),
        (make("keyword", "blue", 2), "25 blue"),
        (make("keyword", "blue", 2), "25 blue blue blue"),
        (make("keyword", "blue", 1), "25 bluebell"),
        (make("separator", "---"), "25 ---"),
        (make("separator", "---"), "---\n25"),
        (make("separator", "---"), "25\n---\n---"),
        (make("separator", "---"), "25\n----"),
        (make("title", "Result"), "Result\n25"),
        (make("title", "Result"), "25\n<<Result>>"),
        (make("repeat", count=3), "25\n25"),
        (make("repeat", count=3), "25\n25\n26"),
        (make("repeat", count=3), "25 25 25"),
        (make("json", "answer"), '{"answer": 25'),
        (make("json", "answer"), '{"answer": "25", "answer": "26"}'),
        (make("json", "answer"), '{"answer": "25", "other": 1}'),
        (make("json", "answer"), '{"result": "25"}'),
        (make("json", "answer"), '{"answer": ["25"]}'),
        (make("json", "answer"), '{"answer": true}'),
        (make("json", "answer"), '```{"answer": "25"}```'),
        (make("json", "answer"), "[" * 5000),
    ],
)
def test_near_misses_do_not_hold(constraint: Constraint, text: str) -> None:
    assert not constraint.holds(text)


@pytest.mark.parametrize(
    ("constraint", "text", "left"),
    [
        (make("brackets"), "2[5]", "2[5]"),
        (make("bold"), "**2** 5", "**2** 5"),
        (make("begin", "Sure"), "SURE, 25", "25"),
        (make("begin", "Sure"), "Sure-25", "Sure-25"),
        (make("end", "Done."), "25 DONE.", "25"),
        (make("end", "Done."), "25Done.", "25Done."),
        (make("keyword", "blue", 2), "Blue 25 blue", "25"),
        (make("keyword", "blue", 1), "2 blue 5", "2 blue 5"),
        (make("words", count=5), "So the answer is 25", "25"),
        (make("words", count=5), "24 26 27 28 25", "24 26 27 28 25"),
        (make("mark", "!"), "25!!", "25!"),
        (make("json", "answer"), '{"answer": 25}', "25"),
        (make("repeat", count=2), "25\n25", "25"),
        (make("question", QUESTION), f"{QUESTION.upper()}\n25", "25"),
    ],
)
def test_only_what_was_put_around_an_answer_is_taken_off(constraint: Constraint, text: str, left: str) -> None:
    assert constraint.peel(text) == left


@pytest.mark.parametrize("answer", ["['65', '30']", "65, 30"])
def test_points_are_the_items_of_either_list(answer: str) -> None:
    assert make("numbered", count=2).apply(answer) == "1. 65\n2. 30"
    assert make("bullets", count=2).apply(answer) == "- 65\n- 30"


def test_the_order_goes_from_the_inside_out() -> None:
    constraints = [make("quotes"), make("begin", "Sure"), make("brackets"), make("upper"), make("keyword", "blue", 1)]
    assert [constraint.kind for constraint in in_order(constraints)] == ["brackets", "keyword", "begin", "quotes", "upper"]
    assert stages(constraints, "vergi")[-1] == '"SURE: [VERGI] BLUE"'


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"kind": "rhyme"}, "constraint='rhyme': not known; no-commas, numbered"),
        ({"kind": "begin", "value": "Ahoy"}, "begin.value='Ahoy': must be one of Sure"),
        ({"kind": "repeat", "count": 1}, "repeat.count=1: must be a whole number from 2 to 4"),
        ({"kind": "keyword", "value": "blue"}, "keyword.count=0"),
    ],
)
def test_constraints_that_do_not_exist(arguments: dict[str, object], why: str) -> None:
    with pytest.raises(SpecError, match=why):
        Constraint(**arguments)  # type: ignore[arg-type]
