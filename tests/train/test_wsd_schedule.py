"""The learning rate of every step, against exact fractions."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.train.recipe import OptimiserPart
from tandem.train.schedule import decay_begins, learning_rate, warmup_steps

PAPER = OptimiserPart()


def exact(step: int, steps: int, part: OptimiserPart) -> Fraction:
    high, low = Fraction(part.lr), Fraction(part.min_lr)
    warm, falling = round(part.warmup * steps), round(part.decay * steps)
    if step < warm:
        return high * (step + 1) / warm
    left = steps - 1 - step  # steps that come after this one
    if left < falling:
        return low + (high - low) * left / falling
    return high


@given(
    steps=st.integers(1, 400),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0, 0.5),
    lr=st.floats(1e-5, 1.0),
    share=st.floats(0, 1),
)
def test_every_step_is_exact(steps: int, warmup: float, decay: float, lr: float, share: float) -> None:
    part = OptimiserPart(lr=lr, min_lr=lr * share, warmup=warmup, decay=decay)
    for step in range(steps):
        assert learning_rate(step, steps, part) == pytest.approx(float(exact(step, steps, part)), rel=1e-12, abs=1e-18)


def test_the_papers_run() -> None:
    steps = 20 * 10**12 // (768 * 8192)
    begin = decay_begins(steps, PAPER)
    assert (steps - begin) / steps == pytest.approx(0.18, abs=1e-6)
    assert {learning_rate(step, steps, PAPER) for step in (warmup_steps(steps, PAPER), steps // 2, begin - 1)} == {4.5e-4}
    assert learning_rate(begin, steps, PAPER) < 4.5e-4
    assert learning_rate(steps - 1, steps, PAPER) == 4.5e-6


def test_a_constant_rate_stays_to_the_end() -> None:
    part = replace(PAPER, schedule="constant", lr=4.5e-6, warmup=0.0)
    assert {learning_rate(step, 100, part) for step in range(100)} == {4.5e-6}
    assert decay_begins(100, part) == 100
