from __future__ import annotations

from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from tandem.evaluation.score import ALL, SIGNIFICANT, Answered, compare, mcnemar_p, score, scores, shares
from tandem.spec.errors import SpecError
from tandem.train.evaluate import wilson_interval

WORTHS = st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=4), min_size=1, max_size=30)


def answered(problem: str, worth: float, task: str = "t", sample: int = 0, **fields: object) -> Answered:
    return Answered(problem=problem, task=task, question="q", expected="e", text="x", worth=worth, sample=sample, **fields)


def several(worths: list[list[float]]) -> list[Answered]:
    return [answered(str(i), w, sample=k) for i, some in enumerate(worths) for k, w in enumerate(some)]


@given(WORTHS)
def test_accuracy_is_the_mean_of_the_problems_shares_within_its_interval(worths: list[list[float]]) -> None:
    found = score(several(worths))
    expected = sum(sum(w == 1.0 for w in some) / len(some) for some in worths) / len(worths)
    assert found["accuracy"] == pytest.approx(expected)
    assert found["count"] == len(worths)
    assert 0 <= found["low"] <= found["accuracy"] + 1e-9 <= found["high"] + 2e-9 <= 1 + 2e-9


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_with_one_answer_each_the_interval_is_wilsons(right: list[bool]) -> None:
    found = score([answered(str(i), float(r)) for i, r in enumerate(right)])
    assert (found["low"], found["high"]) == wilson_interval(sum(right), len(right))
    assert found["any_right"] is None


def test_answers_to_one_problem_narrow_nothing() -> None:
    once, often = score(several([[1.0], [0.0]])), score(several([[1.0] * 8, [0.0] * 8]))
    assert (once["low"], once["high"]) == (often["low"], often["high"])
    assert often["any_right"] == 0.5


def test_ends_of_an_interval_are_those_of_the_whole_counts_around_it() -> None:
    found = score(several([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    assert found["correct"] == 1.5
    assert found["low"] == wilson_interval(1, 3)[0]
    assert found["high"] == wilson_interval(2, 3)[1]


def test_half_right_is_not_right() -> None:
    assert score([answered("a", 0.5)])["accuracy"] == 0.0


def test_means_leave_out_what_is_not_known() -> None:
    found = score([answered("a", 1, one_mark=True, answer_tokens=4), answered("b", 0, one_mark=None, parts={"format": 1.0})])
    assert found["one_closing_mark"] == 1.0
    assert found["answer_tokens"] == 4.0
    assert found["thinking_tokens"] is None
    assert found["parts"] == {"format": 1.0}


def test_no_answers_have_no_score() -> None:
    with pytest.raises(SpecError):
        score([])


def test_scores_of_tasks_add_up_to_that_of_all() -> None:
    found = scores([answered("a", 1, "x"), answered("b", 0, "x"), answered("c", 1, "y")])
    assert list(found) == [ALL, "x", "y"]
    assert sum(found[task]["correct"] for task in ("x", "y")) == found[ALL]["correct"] == 2


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_exact_binomial_test(a: int, b: int) -> None:
    expected = binomtest(a, a + b).pvalue if a + b else 1.0
    assert mcnemar_p(a, b) == pytest.approx(expected)
    assert mcnemar_p(a, b) == mcnemar_p(b, a)


def records(right: list[int]) -> dict[tuple[str, str], list[Answered]]:
    return {("reasoning", "thinking on"): [answered(f"p{i}", float(r)) for i, r in enumerate(right)]}


def test_only_a_difference_beyond_accident_names_a_model_better() -> None:
    few = compare({"a": records([1, 1, 1, 0]), "b": records([0, 0, 1, 0])})
    assert [c.better for c in few] == [None, None]
    many = compare({"a": records([1] * 20), "b": records([0] * 20)})
    assert [c.better for c in many] == ["a", "a"]
    swapped = compare({"b": records([0] * 20), "a": records([1] * 20)})
    assert {c.better for c in swapped} == {"a"}


def test_problems_that_both_or_neither_solve_say_nothing() -> None:
    (found, _) = compare({"a": records([1, 1, 0, 0, 1]), "b": records([1, 1, 0, 0, 0])})
    assert (found.only_a, found.only_b, found.count, found.p) == (1, 0, 5, 1.0)


def test_models_that_were_asked_other_problems_are_not_compared() -> None:
    other = {("reasoning", "thinking on"): [answered("elsewhere", 1.0)]}
    assert compare({"a": records([1] * 20), "b": other}) == []
    assert compare({"a": records([1] * 20), "b": {("reasoning", "thinking off"): records([0] * 20).popitem()[1]}}) == []


@given(st.lists(st.integers(0, 12), min_size=1, max_size=12))
def test_better_models_are_those_of_holms_procedure(sizes: list[int]) -> None:
    """Brute force: ranks of p-values, the first that is too large stops all after it."""
    one = {("needles", str(i)): [answered(f"{i}:{j}", 1.0) for j in range(n + 1)] for i, n in enumerate(sizes)}
    two = {key: [answered(a.problem, 0.0) for a in some] for key, some in one.items()}
    found = compare({"a": one, "b": two})
    ps = sorted(comb(n + 1, 0) * 2 / 2 ** (n + 1) for n in sizes for _ in (ALL, "t"))
    rejected = next((i for i, p in enumerate(ps) if p * (len(ps) - i) > SIGNIFICANT), len(ps))
    assert sum(c.better is not None for c in found) == rejected
    assert not {c.p for c in found if c.better} & {c.p for c in found if c.better is None} or rejected in range(len(ps))


def test_shares_join_the_answers_to_one_problem() -> None:
    assert shares(several([[1.0, 0.0], [1.0]])) == {"0": 0.5, "1": 1.0}
