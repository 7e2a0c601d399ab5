"""Products in C: exact to rounding for every format and shape, and the same bits whatever the batch and the threads."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tandem.model import native
from tandem.model.native import build
from tandem.spec.errors import SpecError

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler")
EXAMPLES = settings(deadline=None, max_examples=40)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


def weights(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """A weight of that format and its scales."""
    drawn = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) / cols**0.5
    if dtype != torch.int8:
        return drawn.to(dtype), None
    layer = nn.Linear(cols, rows, bias=False)
    layer.weight.data = drawn
    made = native.Int8Linear(layer)
    return made.weight, made.scale


def quantised(x: Tensor) -> Tensor:
    """What the inputs of an int8 product are rounded to: 16 bits, a scale per block of at most 16 groups of 64."""
    groups = -(-x.shape[-1] // 64)
    width = 64 * -(-groups // -(-groups // 16))
    blocks = nn.functional.pad(x.float(), (0, -x.shape[-1] % width)).unflatten(-1, (-1, width))
    scale = blocks.abs().amax(-1, keepdim=True) / 32767
    numbers = (blocks / torch.where(scale > 0, scale, 1.0)).round()
    return (numbers.double() * scale.double()).flatten(-2)[..., : 64 * groups]


def exact(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """The product in float64."""
    if scale is None:
        return x.double() @ weight.double().T
    wide = weight.unflatten(1, (-1, 64)).double() * scale.double()[..., None]
    return quantised(x) @ wide.flatten(1).T


@EXAMPLES
@given(
    m=st.integers(1, 20) | st.integers(90, 200),
    rows=st.integers(1, 40) | st.integers(120, 300),
    cols=st.integers(1, 150) | st.integers(500, 1100) | st.just(2200),
    dtype=st.sampled_from(DTYPES),
    bias=st.sampled_from([None, torch.float32, torch.float16, torch.bfloat16]),
    threads=st.integers(1, 3),
)
def test_linear_is_the_product(
    m: int, rows: int, cols: int, dtype: torch.dtype, bias: torch.dtype | None, threads: int
) -> None:
    weight, scale = weights(rows, cols, dtype)
    x = torch.randn(m, cols, generator=torch.Generator().manual_seed(1))
    offset = None if bias is None else torch.randn(rows).to(bias)
    y = native.linear(x, weight, offset, scale=scale, threads=threads)
    expected = exact(x, weight, scale) + (0 if offset is None else offset.double())
    # fp32: lanes add up to 64 terms each. int8: besides, an input half-way between two integers may round to either.
    tolerance = 3e-6 if scale is None else 1e-4 / cols**0.5 + 3e-6
    assert (y - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


@EXAMPLES
@given(
    m=st.integers(1, 40) | st.integers(95, 200),
    cols=st.sampled_from([31, 64, 700, 2100]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_a_row_has_the_same_bits_in_every_batch_and_on_every_number_of_threads(
    m: int, cols: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    weight, scale = weights(37, cols, dtype)
    x = torch.randn(m, cols, generator=torch.Generator().manual_seed(m))
    together = native.linear(x, weight, scale=scale, threads=data.draw(st.integers(1, 4)))
    row = data.draw(st.integers(0, m - 1))
    alone = native.linear(x[row : row + 1], weight, scale=scale, threads=1)
    assert torch.equal(together[row : row + 1], alone)


def test_inputs_of_zero_rows_and_of_zeros_are_fine() -> None:
    weight, scale = weights(5, 70, torch.int8)
    assert native.linear(torch.empty(0, 70), weight, scale=scale).shape == (0, 5)
    assert torch.equal(native.linear(torch.zeros(2, 3, 70), weight, scale=scale), torch.zeros(2, 3, 5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_spoils_its_row_and_no_other(dtype: torch.dtype, value: float) -> None:
    weight, scale = weights(6, 1100, dtype)
    x = torch.randn(11, 1100)
    clean = native.linear(x, weight, scale=scale)
    x[9, 1081] = value
    y = native.linear(x, weight, scale=scale)
    assert not y[9].isfinite().any()
    others = [i for i in range(11) if i != 9]
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize(
    ("weight", "scale", "message"),
    [
        (torch.zeros(8, 6).T, None, "contiguous"),
        (torch.zeros(6, 8, dtype=torch.float64), None, "float64"),
        (torch.zeros(6, 64, dtype=torch.int8), None, "scales"),
        (torch.zeros(6, 64), torch.ones(6, 1), "scales"),
        (torch.zeros(6, 64, dtype=torch.int8), torch.ones(6, 2), "does not fit"),
    ],
)
def test_weights_that_c_cannot_read_are_refused(weight: Tensor, scale: Tensor | None, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        native.linear(torch.zeros(1, weight.shape[1]), weight, scale=scale)


def test_exponential_and_silu_are_right_to_two_units_in_the_last_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    source = tmp_path / "functions.c"
    source.write_text(
        '#include "vec.h"\n'
        "void exponential(float *x, long n) { for (long i = 0; i < n; i += VW) vstore(x + i, vexp(vload(x + i))); }\n"
        "void silu(float *x, long n) { for (long i = 0; i < n; i += VW) vstore(x + i, vsilu(vload(x + i))); }\n"
    )
    library = build.load([source])
    assert isinstance(library, ctypes.CDLL)
    x = np.linspace(-87, 88.7, 1 << 20, dtype=np.float32)
    for function, reference, ulps in (
        (library.exponential, np.exp, 2),
        (library.silu, lambda v: v / (1 + np.exp(-v)), 4),
    ):
        y = x.copy()
        function(y.ctypes.data_as(ctypes.c_void_p), ctypes.c_long(len(y)))
        expected = reference(x.astype(np.float64))
        assert (np.abs(y - expected) <= ulps * np.spacing(np.abs(expected).astype(np.float32))).all()
    extreme = np.array([-np.inf, -1e4, -104, 1e4, np.inf, 0, 88.8, 200] * 2, dtype=np.float32)
    library.exponential(extreme.ctypes.data_as(ctypes.c_void_p), ctypes.c_long(16))
    assert np.isfinite(extreme).all()
    assert (extreme[:3] < 1e-44).all()
    assert extreme[5] == 1
