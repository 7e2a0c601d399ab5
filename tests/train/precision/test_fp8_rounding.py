"""Rounding to FP8 against a table of all 256 codes, built from what the bits mean, and against torch's own casts."""

from __future__ import annotations

import bisect
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tandem.train.fp8 import E4M3, E5M2, Fp8Format, round_to

BITS = {"e4m3": (4, 3, 7, E4M3), "e5m2": (5, 2, 15, E5M2)}


def finite_codes(exponent_bits: int, fraction_bits: int, bias: int, e4m3: bool) -> list[tuple[float, int]]:
    """All finite numbers without a sign and the codes that stand for them, in order."""
    found = []
    for code in range(128):
        exponent, fraction = code >> fraction_bits, code & ((1 << fraction_bits) - 1)
        whole = 2**fraction_bits
        if e4m3 and code == 127:  # its only NaN, and no infinity
            continue
        if not e4m3 and exponent == 2**exponent_bits - 1:
            continue
        hidden, power = (0, 1 - bias) if exponent == 0 else (1, exponent - bias)
        found.append((math.ldexp(hidden + fraction / whole, power), code))
    return sorted(found)


TABLES = {name: finite_codes(*fields[:3], name == "e4m3") for name, fields in BITS.items()}


def nearest(x: float, name: str) -> float:
    """The plain reference: the nearer neighbour in the table, of two equally near ones that with the even code."""
    table = TABLES[name]
    values = [value for value, _ in table]
    size = abs(x)
    if math.isnan(x):
        return x
    if size >= values[-1]:
        return math.copysign(values[-1], x)
    above = bisect.bisect_right(values, size)
    low, high = table[above - 1], table[above]
    down, up = size - low[0], high[0] - size  # exact: neighbours of an fp32 number in double precision
    takes_low = low[1] % 2 == 0 if down == up else down < up
    return math.copysign((low if takes_low else high)[0], x)


def bits_of(x: torch.Tensor) -> list[int]:
    return x.view(torch.int32).tolist()


@pytest.mark.parametrize("name", BITS)
def test_tables_are_those_of_torch(name: str) -> None:
    form: Fp8Format = BITS[name][3]
    codes = torch.tensor([code for _, code in TABLES[name]], dtype=torch.uint8)
    assert codes.view(form.dtype).double().tolist() == [value for value, _ in TABLES[name]]
    assert TABLES[name][-1][0] == form.largest == torch.finfo(form.dtype).max


@pytest.mark.parametrize("name", BITS)
def test_every_number_midpoint_and_neighbour(name: str) -> None:
    """All that can go wrong: the numbers themselves, ties between them, and the fp32 numbers next to both."""
    values = np.array([value for value, _ in TABLES[name]], dtype=np.float32)
    middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    points = np.concatenate([values, middles, values[-1:] * np.float32(1.03), values[-1:] * np.float32(3)])
    points = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))])
    points = np.concatenate([points, -points])
    form = BITS[name][3]
    rounded = round_to(torch.from_numpy(points), form)
    expected = torch.tensor([nearest(float(x), name) for x in points], dtype=torch.float32)
    assert bits_of(rounded) == bits_of(expected)
    inside = torch.from_numpy(points)[np.abs(points) <= form.largest]
    assert torch.equal(round_to(inside, form), inside.to(form.dtype).float())


@given(st.floats(width=32, allow_nan=False), st.sampled_from(list(BITS)))
def test_any_number(x: float, name: str) -> None:
    rounded = round_to(torch.tensor([x], dtype=torch.float32), BITS[name][3])
    assert bits_of(rounded) == bits_of(torch.tensor([nearest(x, name)], dtype=torch.float32))


@pytest.mark.parametrize("form", [E4M3, E5M2])
def test_what_is_no_number(form: Fp8Format) -> None:
    rounded = round_to(torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0]), form)
    assert rounded[:2].tolist() == [form.largest, -form.largest]
    assert rounded[2].isnan()
    assert bits_of(rounded[3:]) == [0, -(2**31)]
