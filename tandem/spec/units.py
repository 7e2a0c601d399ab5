"""Bytes of a number format and the few constants that everything shares. SI seconds and bytes throughout."""

from __future__ import annotations

from typing import Final

from tandem.spec.errors import SpecError

GIB: Final = 1024**3

BITS: Final[dict[str, float]] = {
    "fp32": 32,
    "bf16": 16,
    "fp16": 16,
    "fp8": 8,
    # 4-bit values plus one 8-bit scale for every 16 (NVFP4) or 32 (MXFP4) of them, or 16-bit for every 32 (INT4).
    "fp4": 4 + 8 / 16,
    "mxfp4": 4 + 8 / 32,
    "int4": 4 + 16 / 32,
    # E4M3 weights in 128x128 blocks with one fp32 scale each (paper A section 2.4; DeepSeek-V3).
    "fp8_block": 8 + 32 / (128 * 128),
    "int8": 8,
}
"""Stored bits of one value, scales included."""


def itemsize(dtype: str) -> float:
    """Bytes of one stored value of `dtype`, its share of the scales included."""
    try:
        return BITS[dtype] / 8
    except KeyError:
        raise SpecError(f"dtype={dtype!r}: unknown; use one of {', '.join(BITS)}") from None


def require_int(field: str, value: object, *, low: int = 1, high: int = 10**9) -> int:
    """`value` as an int within [low, high], or a SpecError that names `field`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise SpecError(f"{field}={value!r}: must be a whole number from {low:,} to {high:,}")
    return value


def require_number(field: str, value: object, *, low: float = 0.0, high: float = 1e30) -> float:
    """`value` as a float in (low, high], or a SpecError that names `field`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
        raise SpecError(f"{field}={value!r}: must be a number above {low:g} and at most {high:g}")
    return float(value)
