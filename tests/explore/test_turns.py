"""Who is planned for next: one at a time, and nothing that its own page has moved on from while it waited."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock

import pytest

from tandem.explore.turns import MAX_VISITS, Turns

DEADLINE_S = 30.0


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


class Planner:
    """Plans that are their own names; `planned` has those that were begun."""

    def __init__(self) -> None:
        self.planned: list[str] = []
        self._busy = Lock()

    def plan(self, name: str, meanwhile: Callable[[], object] = lambda: None) -> Callable[[], str]:
        def work() -> str:
            assert self._busy.acquire(blocking=False), "two plans at a time"
            try:
                self.planned.append(name)
                meanwhile()
                return name
            finally:
                self._busy.release()

        return work


def test_what_a_later_move_overtakes_is_not_begun_and_another_page_is_answered(pool: ThreadPoolExecutor) -> None:
    turns, planner, begun, free = Turns(), Planner(), Event(), Event()

    def long() -> None:
        begun.set()
        assert free.wait(DEADLINE_S)

    first = pool.submit(turns.take, "a", 1, planner.plan("a1", long))
    assert begun.wait(DEADLINE_S)
    other = pool.submit(turns.take, "b", 1, planner.plan("b1"))
    moves = [pool.submit(turns.take, "a", move, planner.plan(f"a{move}")) for move in (2, 3, 4, 5)]
    beside = pool.submit(turns.take, "a", 5, planner.plan("a5, the model beside"))
    assert [move.result(DEADLINE_S) for move in moves[:3]] == [None] * 3  # at once, while the first is being planned
    assert planner.planned == ["a1"]
    free.set()
    assert first.result(DEADLINE_S) == "a1"  # what has begun is brought to its end
    assert (moves[3].result(DEADLINE_S), beside.result(DEADLINE_S)) == ("a5", "a5, the model beside")
    assert other.result(DEADLINE_S) == "b1"
    assert sorted(planner.planned) == ["a1", "a5", "a5, the model beside", "b1"]


def test_only_what_was_overtaken_goes_without_an_answer(pool: ThreadPoolExecutor) -> None:
    turns, planner, drawn = Turns(), Planner(), random.Random(0)
    asks = [(drawn.choice(["a", "b", "c", ""]), move) for move in range(300)]
    futures = [pool.submit(turns.take, visit, move, planner.plan(f"{visit}{move}")) for visit, move in asks]
    found = [future.result(DEADLINE_S) for future in futures]
    last = dict(asks)
    for (visit, move), answer in zip(asks, found, strict=True):
        assert answer in ((f"{visit}{move}",) if visit == "" or move == last[visit] else (f"{visit}{move}", None))
    assert sorted(planner.planned) == sorted(answer for answer in found if answer is not None)


def test_an_old_move_that_comes_late_is_not_begun() -> None:
    turns = Turns()
    assert turns.take("a", 2, lambda: "new") == "new"
    assert turns.take("a", 1, lambda: "old") is None
    assert turns.take("", 2, lambda: "new") == "new"
    assert turns.take("", 1, lambda: "old") == "old"


def test_a_plan_that_fails_leaves_its_turn() -> None:
    def wrong() -> None:
        raise ValueError("none")

    turns = Turns()
    with pytest.raises(ValueError, match="none"):
        turns.take("a", 1, wrong)
    assert turns.take("b", 1, lambda: "next") == "next"


def test_only_so_many_pages_are_remembered() -> None:
    turns = Turns()
    for number in range(MAX_VISITS + 10):
        assert turns.take(str(number), 1, lambda: "answer") == "answer"
    assert turns.take(str(MAX_VISITS), 0, lambda: "answer") is None
    assert turns.take("0", 0, lambda: "answer") == "answer"  # forgotten, so answered
