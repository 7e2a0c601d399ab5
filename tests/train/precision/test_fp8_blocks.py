"""Blocks and their scales: plain loops over numpy scalars as reference, C and torch alike, and what the error is bound by."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tandem.spec.errors import SpecError
from tandem.train import fp8, fp8_native
from tandem.train.fp8 import BLOCK, E4M3, E5M2, SMALLEST_SCALE, Fp8Format, quantise, round_to, round_trip

BLOCKS = [(1, BLOCK), (BLOCK, 1), (BLOCK, BLOCK), (1, 3), (2, 1), (3, 5), None]
matrices = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@pytest.fixture(params=["c", "torch"])
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(fp8_native, "usable", lambda x: False)
    elif not fp8_native.usable(torch.zeros(1, 1)):
        pytest.skip("no C compiler")
    return request.param


def slow_scale(block: np.ndarray, form: Fp8Format, power_of_two: bool) -> np.float32:
    largest = max(np.float32(0), *(abs(x) for x in block.flatten()))
    scale = max(np.float32(largest / np.float32(form.largest)), np.float32(SMALLEST_SCALE))
    if power_of_two:
        digits, exponent = math.frexp(float(scale))  # digits in [1/2, 1)
        scale = np.float32(math.ldexp(1.0, exponent - 1 if digits == 0.5 else exponent))
    return scale


def slow_quantise(
    x: np.ndarray, block: tuple[int, int], form: Fp8Format, power_of_two: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers, scales and their products, one block after the other; `round_to` has a test of its own."""
    rows, cols = x.shape
    high, wide = block
    values, back = np.zeros_like(x), np.zeros_like(x)
    scales = np.zeros((-(-rows // high), -(-cols // wide)), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = np.s_[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
            scales[i, j] = slow_scale(x[here], form, power_of_two)
            values[here] = round_to(torch.from_numpy(x[here] / scales[i, j]), form).numpy()
            with np.errstate(over="ignore"):
                back[here] = values[here] * scales[i, j]
    return values, scales, back


def check(x: np.ndarray, block: tuple[int, int] | None, form: Fp8Format, power_of_two: bool) -> None:
    values, scales, back = slow_quantise(x, block or x.shape, form, power_of_two)
    q = quantise(torch.from_numpy(x), block, form, power_of_two=power_of_two)
    assert q.values.numpy().tobytes() == values.tobytes()
    assert q.scales.numpy().tobytes() == scales.tobytes()
    assert q.dequantise().numpy().tobytes() == back.tobytes()
    assert round_trip(torch.from_numpy(x), block, form, power_of_two=power_of_two).numpy().tobytes() == back.tobytes()


@given(x=matrices, block=st.sampled_from(BLOCKS), form=st.sampled_from([E4M3, E5M2]), power_of_two=st.booleans())
@settings(max_examples=80, deadline=None)
def test_same_bits_as_plain_loops(x: np.ndarray, block: tuple[int, int] | None, form: Fp8Format, power_of_two: bool) -> None:
    if fp8_native.usable(torch.zeros(1, 1)):
        check(x, block, form, power_of_two)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_native, "usable", lambda x: False)
        check(x, block, form, power_of_two)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("form", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(256, 128), (130, 257), (1, 300), (129, 1)])
def test_same_bits_at_real_sizes(code: str, shape: tuple[int, int], form: Fp8Format, power_of_two: bool) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 6, shape)).astype(np.float32)
    for block in ((1, BLOCK), (BLOCK, 1), (BLOCK, BLOCK), (7, 40), None):
        check(x, block, form, power_of_two)


@pytest.mark.parametrize("block", BLOCKS)
def test_rows_that_are_not_side_by_side(code: str, block: tuple[int, int] | None) -> None:
    x = torch.randn(70, 300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_trip(x.T, block), round_trip(x.T.contiguous(), block))


def test_scales_belong_to_their_blocks(code: str) -> None:
    """Ragged ends are blocks of their own: a size of 1000 there does not coarsen the block before."""
    x = torch.ones(130, 130)
    x[:, 128:] = 1000.0
    assert quantise(x, (1, BLOCK)).scales.shape == (130, 2)
    assert quantise(x, (BLOCK, 1)).scales.shape == (2, 130)
    assert quantise(x, (BLOCK, BLOCK)).scales.flatten().tolist() == pytest.approx([1 / 448, 1000 / 448] * 2)
    assert quantise(x, None).scales.tolist() == [[pytest.approx(1000 / 448)]]
    assert round_trip(x, (BLOCK, BLOCK)).sub(x).abs().max() <= 1e-4


def test_zeros_stay_zeros(code: str) -> None:
    q = quantise(torch.zeros(3, 200), (1, BLOCK))
    assert q.scales.unique().tolist() == [SMALLEST_SCALE]
    assert not q.dequantise().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_overflow_spoils_its_block_and_no_other(
    code: str, block: tuple[int, int] | None, power_of_two: bool, bad: float
) -> None:
    x = torch.randn(131, 140, generator=torch.Generator().manual_seed(0))
    clean = round_trip(x, block, power_of_two=power_of_two)
    x[5, 7] = bad
    spoiled = round_trip(x, block, power_of_two=power_of_two)
    high, wide = block or x.shape
    hit = torch.zeros_like(x, dtype=torch.bool)
    hit[5 // high * high : (5 // high + 1) * high, 7 // wide * wide : (7 // wide + 1) * wide] = True
    assert torch.equal(spoiled.isnan(), hit)
    assert torch.equal(spoiled[~hit], clean[~hit])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_round(code: str, shape: tuple[int, int]) -> None:
    for block in BLOCKS:
        assert round_trip(torch.zeros(shape), block).shape == shape


def test_what_is_refused() -> None:
    for x in (torch.zeros(3), torch.zeros(2, 2, dtype=torch.bfloat16)):
        with pytest.raises(SpecError, match="must be an fp32 matrix"):
            quantise(x, (1, BLOCK))
    with pytest.raises(SpecError, match=r"block=\(0, 1\)"):
        quantise(torch.zeros(2, 2), (0, 1))


@given(x=matrices, block=st.sampled_from(BLOCKS), form=st.sampled_from([E4M3, E5M2]), power_of_two=st.booleans())
@settings(max_examples=200, deadline=None)
def test_error_of_each_number(x: np.ndarray, block: tuple[int, int] | None, form: Fp8Format, power_of_two: bool) -> None:
    """Half a last place: 2^-digits of a normal number, half the even spacing times the scale of one below.

    The spacing below 2^min_exponent is 2^(min_exponent + 1 - digits). Division and multiplication round once each in fp32,
    2^-24 of the number, or 2^-150 where that is not normal.
    """
    assume(np.abs(x).max() < 2.0**127)  # rounded up, a larger one may be beyond fp32
    q = quantise(torch.from_numpy(x), block, form, power_of_two=power_of_two)
    scale = torch.ones(1, dtype=torch.float64) * fp8._spread(q.scales, q.block, *x.shape).double()
    exact = torch.from_numpy(x).double()
    half_place = torch.maximum(exact.abs() * 2.0**-form.digits, scale * 2.0 ** (form.min_exponent - form.digits))
    limit = half_place * (1 + 2.0**-22) + exact.abs() * 2.0**-22 + 2.0**-149
    assert bool(((q.dequantise().double() - exact).abs() <= limit).all())
    assert bool((q.values.abs() <= form.largest).all())
