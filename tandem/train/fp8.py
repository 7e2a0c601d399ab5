"""Numbers of eight bits with a scale for each block: how FP8 training rounds the operands of its products.

A tensor is cut into blocks; each block is divided by its own scale, largest magnitude / largest FP8 number, and rounded to the
nearest FP8 number (ties to even). The recipes are those of DeepSeek-V3 (arXiv 2412.19437, section 3.3), which paper A follows
(arXiv 2508.14444, section 2.4), and of Nemotron-H-56B (arXiv 2504.03624, section 2.3): one scale a tensor, gradients in E5M2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from tandem.spec.errors import SpecError
from tandem.train import fp8_native

BLOCK = 128
"""Side of a weight block and length of an activation tile."""
SMALLEST_SCALE = 2.0**-126
"""Scales are never below the smallest normal fp32 number, so that division by them is exact to fp32 rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Format:
    """A floating-point format of eight bits."""

    dtype: torch.dtype
    """What torch calls it."""
    digits: int
    """Significant binary digits, the hidden one included."""
    min_exponent: int
    """Of the smallest normal number, 2^min_exponent; below it numbers are evenly spaced."""
    largest: float
    """The largest finite number."""

    @property
    def shift(self) -> float:
        """Times a power of two, it is what rounds numbers between that power and the next when added and taken away again."""
        return 1.5 * 2.0 ** (24 - self.digits)


E4M3 = Fp8Format(dtype=torch.float8_e4m3fn, digits=4, min_exponent=-6, largest=448.0)
E5M2 = Fp8Format(dtype=torch.float8_e5m2, digits=3, min_exponent=-14, largest=57344.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Recipe:
    """Which operand of a linear's three products is rounded how."""

    scaling: Literal["block", "tensor"] = "block"
    """block: a scale for each 128x128 of the weight and each 1x128 of the others along the summed axis. tensor: one each."""
    gradients: Fp8Format = E4M3
    """Format of what comes from the layer above in the backward pass; inputs and weights are E4M3."""
    power_of_two: bool = False
    """Scales are rounded up to powers of two: a little less exact, but a scaled number has few enough digits for bf16."""


BLOCKWISE = Fp8Recipe()
"""Paper A: E4M3 everywhere, fp32 scales."""
CURRENT_SCALING = Fp8Recipe(scaling="tensor", gradients=E5M2)
"""Nemotron-H-56B: each tensor's scale from its own largest magnitude, gradients in E5M2."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """FP8 numbers, held in fp32, and the scales of their blocks.

    Block [i, j] covers rows i * block[0] onward and columns j * block[1] onward; the last blocks may be smaller.
    """

    values: Float[Tensor, "rows cols"]
    scales: Float[Tensor, "row_blocks col_blocks"]
    block: tuple[int, int]

    def dequantise(self) -> Float[Tensor, "rows cols"]:
        """values * scales in fp32. A block with a scale that is infinite or NaN is NaN throughout."""
        rows, cols = self.values.shape
        return self.values * _spread(self.scales, self.block, rows, cols)


def round_to(x: Float[Tensor, "*shape"], form: Fp8Format) -> Float[Tensor, "*shape"]:
    """The nearest number of the format to each fp32 number, as fp32; ties go to the even one.

    Magnitudes above the largest, infinity among them, become the largest; NaN stays NaN; the sign of zero is kept.
    """
    return _round_in_range(x.clamp(-form.largest, form.largest), form)


def _round_in_range(x: Tensor, form: Fp8Format) -> Tensor:
    """Adding a number whose last place is the format's last place rounds; taking it away again is exact."""
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^exponent of each number
    shift = power.clamp_min(2.0**form.min_exponent) * form.shift
    return torch.copysign((x + shift) - shift, x)


def scales_of(largest: Float[Tensor, "*blocks"], form: Fp8Format, *, power_of_two: bool = False) -> Float[Tensor, "*blocks"]:
    """Scale of blocks by their largest magnitudes: at least 2^-126, also of a block of zeros; inf and NaN stay what they are.

    Powers of two are rounded up, so that no number of a block comes to lie above the largest of the format.
    """
    scales = (largest / form.largest).clamp_min(SMALLEST_SCALE)
    if not power_of_two:
        return scales
    raised = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(scales.isfinite(), raised, scales)


def quantise(
    x: Float[Tensor, "rows cols"], block: tuple[int, int] | None, form: Fp8Format = E4M3, *, power_of_two: bool = False
) -> Quantised:
    """Blocks of an fp32 matrix, each divided by its scale (`scales_of`) and rounded to the format.

    `block` is rows by columns, None one block for all. Blocks at the ends of a matrix whose sides they do not divide are
    smaller. A block that holds an infinity or a NaN has that as its scale and is NaN after `dequantise`: overflow is never
    hidden by saturation. Raises SpecError for what is no fp32 matrix or an empty block.
    """
    values, scales, block = _quantise(x, block, form, power_of_two, multiply=False)
    return Quantised(values, scales, block)


def round_trip(
    x: Float[Tensor, "rows cols"], block: tuple[int, int] | None, form: Fp8Format = E4M3, *, power_of_two: bool = False
) -> Float[Tensor, "rows cols"]:
    """`quantise(...).dequantise()`, the same bits in one pass where there is a C compiler."""
    return _quantise(x, block, form, power_of_two, multiply=True)[0]


def _quantise(
    x: Tensor, block: tuple[int, int] | None, form: Fp8Format, power_of_two: bool, *, multiply: bool
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    if x.dim() != 2 or x.dtype != torch.float32:
        raise SpecError(f"x={x.dtype} of {x.dim()} axes: must be an fp32 matrix")
    if block is not None and min(block) < 1:
        raise SpecError(f"block={block}: must be of 1 row and 1 column or more")
    rows, cols = x.shape
    sides = (max(1, rows), max(1, cols)) if block is None else block
    if x.numel() == 0:
        return x.clone(), x.new_zeros(-(-rows // sides[0]), -(-cols // sides[1])), sides
    if fp8_native.usable(x):
        x = x.contiguous()
        given = scales_of(fp8_native.largest(x), form, power_of_two=power_of_two) if block is None else None
        cut = (1, cols) if block is None else block
        made = fp8_native.round_blocks(x, cut, form, power_of_two=power_of_two, multiply=multiply, given=given)
        return *made, sides
    scales = scales_of(_largest(x, sides), form, power_of_two=power_of_two)
    of_each = _spread(scales, sides, rows, cols)
    values = _round_in_range(x / of_each, form)
    return values * of_each if multiply else values, scales, sides


def _largest(x: Tensor, block: tuple[int, int]) -> Tensor:
    """Largest magnitude of each block."""
    rows, cols = x.shape
    height, width = block
    size = x.abs()
    down, across = -rows % height, -cols % width
    if down or across:
        size = functional.pad(size, (0, across, 0, down))
    if width > 1:
        size = size.unflatten(1, (-1, width)).amax(2)
    return size.unflatten(0, (-1, height)).amax(1) if height > 1 else size


def _spread(scales: Tensor, block: tuple[int, int], rows: int, cols: int) -> Tensor:
    """The scale of each number, or something that broadcasts to it."""
    if scales.numel() == 1:
        return scales
    if block[0] > 1:
        scales = scales.repeat_interleave(block[0], 0)[:rows]
    return scales.repeat_interleave(block[1], 1)[:, :cols] if block[1] > 1 else scales
