"""What became of each problem, what that comes to, and whether one model is better than another on the same problems."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, comb, floor
from typing import Any

from tandem.spec.units import require_int
from tandem.train.evaluate import wilson_interval

ALL = "all"
"""The name of all tasks of a suite together."""
SIGNIFICANT = 0.05
"""Largest chance of naming any model better in a report where none is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """One answer to one problem, judged."""

    problem: str
    """The same for every model that is asked the same."""
    task: str
    question: str
    expected: str
    text: str
    """As the model wrote it."""
    worth: float
    """0 to 1; right is 1."""
    sample: int = 0
    one_mark: bool | None = None
    """Whether the thinking block was closed exactly once, or never where none was open; None: not looked at."""
    one_mark_unaided: bool | None = None
    """The same where nothing but the model keeps a second mark away; differs from `one_mark` at thinking budgets only."""
    finished: bool | None = None
    """Whether the model ended its answer itself."""
    forced: bool | None = None
    """Whether the thinking budget closed the block."""
    thinking_tokens: int | None = None
    answer_tokens: int | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    """What the worth is made of, for example format and substance."""

    @property
    def right(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.worth >= 1.0


Records = dict[tuple[str, str], list[Answered]]
"""Answers by suite and by how it was asked: with thinking on or off, at a budget, at a length."""


def shares(answers: Iterable[Answered]) -> dict[str, float]:
    """Share of right answers of each problem: 0 or 1 where it was asked once."""
    found: dict[str, list[bool]] = {}
    for answer in answers:
        found.setdefault(answer.problem, []).append(answer.right)
    return {problem: sum(right) / len(right) for problem, right in found.items()}


def score(answers: Sequence[Answered]) -> dict[str, Any]:
    """Accuracy with its 95 % interval, and means over the answers, as plain numbers; None where nothing is known.

    `count` is that of problems. With several answers to each, the accuracy is the mean of the problems' shares, and the
    interval is Wilson's for as many problems answered once: answers to one problem agree at best, so it is no narrower than it
    may be; a count of right ones that is not whole is rounded down for the lower end and up for the upper.
    """
    per_problem = shares(answers)
    count, correct = len(per_problem), round(sum(per_problem.values()), 9)
    require_int("answers", count)
    parts = {name: None for answer in answers for name in answer.parts}
    several = len(answers) > count
    return {
        "accuracy": correct / count,
        "low": wilson_interval(floor(correct), count)[0],
        "high": wilson_interval(ceil(correct), count)[1],
        "correct": int(correct) if correct == int(correct) else correct,
        "count": count,
        "any_right": sum(value > 0 for value in per_problem.values()) / count if several else None,
        "one_closing_mark": _mean(answer.one_mark for answer in answers),
        "one_closing_mark_unaided": _mean(answer.one_mark_unaided for answer in answers),
        "finished": _mean(answer.finished for answer in answers),
        "forced": _mean(answer.forced for answer in answers),
        "thinking_tokens": _mean(answer.thinking_tokens for answer in answers),
        "answer_tokens": _mean(answer.answer_tokens for answer in answers),
        "parts": {name: _mean(answer.parts.get(name) for answer in answers) for name in parts},
    }


def scores(answers: Sequence[Answered]) -> dict[str, dict[str, Any]]:
    """The score of all answers, and that of each task where there are several."""
    by_task = tasks_of(answers)
    return {name: score(some) for name, some in by_task.items()}


def tasks_of(answers: Sequence[Answered]) -> dict[str, list[Answered]]:
    """Answers by task in order of appearance, `all` before them; a lone task has no `all` beside it but is it."""
    found: dict[str, list[Answered]] = {ALL: list(answers)}
    for answer in answers:
        found.setdefault(answer.task, []).append(answer)
    return found


def _mean(values: Iterable[float | bool | None]) -> float | None:
    there = [float(value) for value in values if value is not None]
    return sum(there) / len(there) if there else None


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Chance of counts at least as far apart where both models are equally good: McNemar's exact test, two-sided.

    The counts are those of problems that only one of the two answers rightly; the others say nothing (McNemar 1947).
    """
    n = only_a + only_b
    return min(1.0, 2 * sum(comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two models on the problems that both were asked."""

    suite: str
    mode: str
    task: str
    a: str
    b: str
    count: int
    only_a: int
    """Problems of which `a` has the larger share of right answers."""
    only_b: int
    better: str | None = None
    """The model that the test names better; None where it does not tell them apart."""

    @property
    def p(self) -> float:
        """Of McNemar's test, before it is corrected for the number of tests."""
        return mcnemar_p(self.only_a, self.only_b)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        names = ("suite", "mode", "task", "a", "b", "count", "only_a", "only_b", "better")
        return {**{name: getattr(self, name) for name in names}, "p": self.p}


def compare(models: Mapping[str, Records]) -> list[Comparison]:
    """Every two models in every task that both were asked, with the better one named where the difference is no accident.

    All tests together name one better with a chance of 5 % where no model is (Holm 1979).
    """
    found = []
    names = list(models)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            for (suite, mode), answers in models[a].items():
                other = tasks_of(models[b].get((suite, mode), []))
                for task, some in tasks_of(answers).items():
                    if suite == "budgets" and task != ALL:
                        continue
                    one, two = shares(some), shares(other.get(task, []))
                    both = one.keys() & two.keys()
                    if both:
                        found.append(
                            Comparison(
                                suite=suite,
                                mode=mode,
                                task=task,
                                a=a,
                                b=b,
                                count=len(both),
                                only_a=sum(one[p] > two[p] for p in both),
                                only_b=sum(one[p] < two[p] for p in both),
                            )
                        )
    return _holm(found)


def _holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    from dataclasses import replace

    named = list(comparisons)
    order = sorted(range(len(named)), key=lambda i: named[i].p)
    for rank, i in enumerate(order):
        found = named[i]
        if found.p * (len(named) - rank) > SIGNIFICANT:
            break
        named[i] = replace(found, better=found.a if found.only_a > found.only_b else found.b)
    return named
