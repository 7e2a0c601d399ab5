"""Drawing against a slow reference in whole numbers, and against the probabilities that it stands for."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

from tandem.engine.draw import draw, draw_rows, uniform

Row = NDArray[np.float32]


def slow(row: Row, number: int, temperature: float, top_k: int | None, top_p: float, min_p: float) -> int:
    below = (row - row.max()) * np.float32(1 / temperature)
    weights = [int(w) for w in np.rint(np.exp(below) * np.float32(2**35))]
    order = sorted(range(len(row)), key=lambda i: (-below[i], i))[:top_k]
    least, kept, mass = Fraction(top_p) * sum(weights[i] for i in order), [], 0
    for i in order:
        if mass >= least:
            break
        kept.append(i)
        mass += weights[i]
    kept = [i for i in kept if weights[i] >= np.float32(min_p) * np.float32(2**35)]
    left = sum(weights[i] for i in kept) * number >> 64
    for i in kept:
        if left < weights[i]:
            return i
        left -= weights[i]
    raise AssertionError("the number is not below 2^64")


numbers = st.integers(0, 2**64 - 1)
rules = {
    "temperature": st.sampled_from([0.01, 0.3, 0.7, 1.0, 1.5, 30.0]),
    "top_k": st.none() | st.integers(1, 400),
    "top_p": st.sampled_from([1.0, 0.999999, 0.95, 0.5, 0.1, 1e-9]),
    "min_p": st.sampled_from([0.0, 1e-9, 1e-4, 0.05, 0.5, 1.0]),
}


@st.composite
def rows(draw_from: st.DrawFn) -> Row:
    """Flat, steep and stepped (many ties), with some tokens that cannot be drawn."""
    rng = np.random.default_rng(draw_from(st.integers(0, 2**32)))
    size, spread = draw_from(st.sampled_from([1, 2, 17, 300, 3000])), draw_from(st.sampled_from([0.0, 0.01, 1.0, 5.0, 40.0]))
    row = rng.normal(0, spread, size)
    if draw_from(st.booleans()):
        row = np.round(row)
    if draw_from(st.booleans()):
        row[rng.random(size) < 0.5] = -np.inf
        row[rng.integers(size)] = draw_from(st.sampled_from([-3.0, 0.0, 8.0]))
    return row.astype(np.float32)


@settings(max_examples=400, deadline=None)
@given(row=rows(), number=numbers | st.sampled_from([0, 2**64 - 1]), **rules)
def test_draw_is_the_slow_reference(
    row: Row, number: int, temperature: float, top_k: int | None, top_p: float, min_p: float
) -> None:
    top_k = None if top_k is None else min(top_k, len(row))
    drawn = draw(row, number=number, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert drawn == slow(row, number, temperature, top_k, top_p, min_p)
    assert row[drawn] > -np.inf


@settings(max_examples=150, deadline=None)
@given(
    some=st.lists(st.tuples(rows(), numbers | st.sampled_from([0, 2**64 - 1]), rules["temperature"]), min_size=1, max_size=6)
)
def test_rows_that_are_drawn_together_are_drawn_as_alone(some: list[tuple[Row, int, float]]) -> None:
    size = min(len(row) for row, _, _ in some)
    cut = [np.where(np.isfinite(row[:size].max()), row[:size], np.float32(0.0)) for row, _, _ in some]
    found = draw_rows(np.stack(cut), numbers=[number for _, number, _ in some], temperatures=[heat for _, _, heat in some])
    assert found == [draw(row, number=n, temperature=t) for row, (_, n, t) in zip(cut, some, strict=True)]


def test_a_number_at_the_edge_of_a_tokens_mass_draws_the_next() -> None:
    edges = [i << 62 for i in range(4)]
    assert draw_rows(np.zeros((4, 4), dtype=np.float32), numbers=edges, temperatures=[1.0] * 4) == [0, 1, 2, 3]
    assert [draw(np.zeros(4, dtype=np.float32), number=edge, temperature=1.0) for edge in edges] == [0, 1, 2, 3]


@pytest.mark.parametrize("spread", [0.1, 2.0, 6.0])
def test_a_whole_vocabulary(spread: float) -> None:
    """The head, the bins beyond it and rows without a short head all meet the reference."""
    row = np.random.default_rng(1).normal(0, spread, 49152).astype(np.float32)
    for i in range(6):
        for top_k, top_p in ((None, 1.0), (None, 0.97), (20_000, 0.9), (40, 1.0)):
            number = uniform(3, i)
            assert draw(row, number=number, temperature=0.9, top_k=top_k, top_p=top_p) == slow(
                row, number, 0.9, top_k, top_p, 0
            )


@pytest.mark.parametrize("min_p", [0.0, 1e-6, 1e-4, 1e-3, 0.01])
def test_the_last_token_that_is_kept_can_be_drawn(min_p: float) -> None:
    row = np.random.default_rng(2).normal(0, 4, 3000).astype(np.float32)
    last = 2**64 - 1
    for top_k, top_p in ((None, 1.0), (None, 0.9999), (1500, 1.0), (1500, 0.9)):
        assert draw(row, number=last, temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p) == slow(
            row, last, 1.0, top_k, top_p, min_p
        )


def test_top_p_keeps_no_more_than_it_needs() -> None:
    """Of four equal tokens two hold one half exactly."""
    row = np.zeros(4, dtype=np.float32)
    assert {draw(row, number=uniform(0, i), temperature=1.0, top_p=0.5) for i in range(50)} == {0, 1}
    assert {draw(row, number=uniform(0, i), temperature=1.0, top_p=0.51) for i in range(50)} == {0, 1, 2}


def reference_probabilities(row: Row, temperature: float, top_k: int | None, top_p: float, min_p: float) -> NDArray[np.float64]:
    scaled = row.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = order[:top_k]
    mass = np.cumsum(p[kept]) / p[kept].sum()
    kept = kept[: int(np.searchsorted(mass, top_p)) + 1]
    kept = kept[p[kept] >= min_p * p.max()]
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, None, 1.0, 0.0), (0.7, 8, 1.0, 0.0), (1.3, None, 0.8, 0.0), (1.0, None, 1.0, 0.1), (0.9, 12, 0.9, 0.05)],
)
def test_tokens_come_as_often_as_they_should(temperature: float, top_k: int | None, top_p: float, min_p: float) -> None:
    row = np.random.default_rng(0).normal(0, 1.5, 24).astype(np.float32)
    expected = reference_probabilities(row, temperature, top_k, top_p, min_p)
    tries = 6000
    drawn = [
        draw(row, number=uniform(11, i), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p) for i in range(tries)
    ]
    counts = np.bincount(drawn, minlength=len(row))
    assert not counts[expected == 0].any()
    often = expected * tries >= 5
    observed, wanted = counts[often], expected[often] * tries
    if often.sum() < (expected > 0).sum():
        observed, wanted = np.append(observed, counts[~often].sum()), np.append(wanted, tries - wanted.sum())
    assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4


def test_numbers_are_uniform_and_unrelated() -> None:
    numbers = np.array([[uniform(seed, i) / 2**64 for i in range(100)] for seed in range(100)])
    bins = np.histogram(numbers, bins=64, range=(0, 1))[0]
    assert chisquare(bins).pvalue > 1e-4
    for shifted in (np.roll(numbers, 1, axis=0), np.roll(numbers, 1, axis=1)):
        assert abs(np.corrcoef(numbers.ravel(), shifted.ravel())[0, 1]) < 5 / math.sqrt(numbers.size)
    assert len(np.unique(numbers)) == numbers.size


def test_numbers_do_not_change_between_versions() -> None:
    """A request that moves to another machine, perhaps of a later version, goes on with the same numbers."""
    assert [uniform(0, 0), uniform(0, 1), uniform(1, 0), uniform(2**63 - 1, 7)] == EXPECTED


EXPECTED = [14064357905213993380, 12706949211605362168, 17967553737876683215, 1005428015693107692]


def test_logits_as_far_apart_as_floats_go_are_drawn_without_a_warning() -> None:
    """The largest of a coldest row, however many of its tokens are kept: numpy's overflow would be an error here."""
    row = np.array([-3e38, 0.0, -1e30, -5.0, -np.inf], dtype=np.float32)
    for temperature in (1e-30, 1e-3, 1.0):
        for top_k in (None, 1, 2, 4):
            assert draw(row, number=2**63, temperature=temperature, top_k=top_k, top_p=0.5) == 1
