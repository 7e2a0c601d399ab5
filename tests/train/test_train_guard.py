"""Losses that must not be learned from."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.train.guard import Guard
from tandem.train.recipe import GuardPart

PART = GuardPart(window=5, spike=1.0)


@given(losses=st.lists(st.floats(2.0, 2.9), min_size=5, max_size=30))
def test_usual_losses_pass(losses: list[float]) -> None:
    guard = Guard(PART)
    assert [guard.refuses(loss, 1.0) for loss in losses] == [None] * len(losses)
    assert guard.losses == losses[-5:]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_what_is_no_number_is_refused_from_the_first_step(loss: float, norm: float) -> None:
    guard = Guard(PART)
    why = guard.refuses(loss, norm)
    assert why is not None
    assert "is not a number" in why
    assert guard.losses == []


def test_a_spike_is_refused_and_does_not_move_what_is_usual() -> None:
    guard = Guard(PART, [2.0] * 5)
    for _ in range(20):
        assert "spike over 2, the median of 5 steps" in str(guard.refuses(3.01, 1.0))
    assert guard.refuses(2.99, 1.0) is None


def test_before_the_window_is_full_losses_may_fall_from_anywhere() -> None:
    guard = Guard(PART)
    assert [guard.refuses(loss, 1.0) for loss in (9.0, 2.0, 8.0, 3.0)] == [None] * 4
