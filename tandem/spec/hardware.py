"""What a GPU is, as far as serving goes: peaks, memory, links and price, each number with its source.

Peaks are dense tensor-core rates; sparsity is never counted. Links are per GPU and one direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from tandem.spec.errors import SpecError
from tandem.spec.units import require_int, require_number

PEAK_DTYPES: Final = ("bf16", "fp16", "fp8", "fp4", "int8", "fp32")
"""Number formats that a GPU may state a peak for."""

# Where a GPU lacks a format, values are widened on chip and multiplied in the next format of the row.
_FALLBACK: Final[dict[str, tuple[str, ...]]] = {
    "fp32": ("fp32",),
    "bf16": ("bf16",),
    "fp16": ("fp16", "bf16"),
    "int8": ("int8", "bf16"),
    "fp8": ("fp8", "bf16"),
    "fp8_block": ("fp8", "bf16"),
    "fp4": ("fp4", "fp8", "bf16"),
    "mxfp4": ("fp4", "fp8", "bf16"),
    "int4": ("fp4", "fp8", "bf16"),
}
_TEXTS: Final = ("name", "title", "vendor", "generation", "fits_from")


@dataclass(frozen=True, kw_only=True, slots=True)
class HardwareSpec:
    """One GPU and the system it usually sits in.

    `scale_up_gpus` GPUs share the fast link (NVLink, Infinity Fabric, or PCIe in a box without either). `fits_from`
    names the GPU whose measured operator efficiencies price this one, its own name where it was measured itself.
    `sources` says for every number where it is from.
    """

    name: str
    title: str
    vendor: str
    generation: str
    memory_bytes: int
    """What the driver reports, not what the box says."""
    memory_bytes_per_s: float
    usable_memory_fraction: float
    """Share of the memory that a serving engine takes, vLLM's `gpu_memory_utilization`."""
    peak_flops: Mapping[str, float] = field(hash=False)
    """Dense FLOP/s by number format; bf16 is always there."""
    scale_up_gpus: int
    scale_up_bytes_per_s: float
    scale_out_bytes_per_s: float
    price_per_hour_usd: float
    fits_from: str
    bandwidth_efficiency: float | None = None
    """Calibrated share of `memory_bytes_per_s` that replaces the one of the fits; None: use the fits."""
    sources: Mapping[str, str] = field(hash=False)

    def __post_init__(self) -> None:
        for text in _TEXTS:
            if not isinstance(getattr(self, text), str) or not getattr(self, text):
                raise SpecError(f"{text}={getattr(self, text)!r}: must be a text that is not empty")
        require_int("memory_bytes", self.memory_bytes, high=10**13)
        require_int("scale_up_gpus", self.scale_up_gpus, high=100_000)
        for number in ("memory_bytes_per_s", "scale_up_bytes_per_s", "scale_out_bytes_per_s", "price_per_hour_usd"):
            require_number(number, getattr(self, number))
        require_number("usable_memory_fraction", self.usable_memory_fraction, high=1.0)
        if self.bandwidth_efficiency is not None:
            require_number("bandwidth_efficiency", self.bandwidth_efficiency, high=1.0)
        self._check_peaks()
        self._check_sources()

    def _check_peaks(self) -> None:
        if not isinstance(self.peak_flops, Mapping) or "bf16" not in self.peak_flops:
            raise SpecError(f"peak_flops={self.peak_flops!r}: must give FLOP/s for bf16 at least")
        for dtype, value in self.peak_flops.items():
            if dtype not in PEAK_DTYPES:
                raise SpecError(f"peak_flops.{dtype}: unknown; use {', '.join(PEAK_DTYPES)}")
            require_number(f"peak_flops.{dtype}", value)
        object.__setattr__(self, "peak_flops", dict(self.peak_flops))

    def _check_sources(self) -> None:
        numbers = {f.name for f in fields(self) if f.name not in (*_TEXTS, "sources")}
        if self.bandwidth_efficiency is None:
            numbers.remove("bandwidth_efficiency")
        given = self.sources if isinstance(self.sources, Mapping) else {}
        missing = sorted(n for n in numbers if not isinstance(given.get(n), str) or not given[n].strip())
        if missing:
            raise SpecError(f"sources.{missing[0]}: missing; say in a text where the number is from")
        unknown = sorted(set(given) - numbers)
        if unknown:
            raise SpecError(f"sources.{unknown[0]}: unknown; sources has {', '.join(sorted(numbers))}")
        object.__setattr__(self, "sources", dict(self.sources))

    @property
    def usable_memory_bytes(self) -> int:
        """Bytes that weights, cache, state and workspace may fill together."""
        return int(self.memory_bytes * self.usable_memory_fraction)

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s of a matmul in `dtype`; a format that the GPU lacks runs at the peak of the next wider one.

        Raises SpecError for a format that tensor cores do not multiply.
        """
        for known in _FALLBACK.get(dtype, ()):
            if known in self.peak_flops:
                return float(self.peak_flops[known])
        formats = ", ".join(name for name in _FALLBACK if name != "fp32" or name in self.peak_flops)
        raise SpecError(f"dtype={dtype!r}: has no peak; use one of {formats}")

    def link_bytes_per_s(self, gpus: int) -> float:
        """Bytes/s that each of `gpus` GPUs can send: scale-up where all of them fit its domain, else scale-out."""
        require_int("gpus", gpus)
        return self.scale_up_bytes_per_s if gpus <= self.scale_up_gpus else self.scale_out_bytes_per_s

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `read_hardware` reads back."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**data, "peak_flops": dict(self.peak_flops), "sources": dict(self.sources)}


def read_hardware(data: object) -> HardwareSpec:
    """A GPU from the mapping of a YAML or JSON file.

    Raises SpecError that names a field which is unknown, missing or impossible. Numbers may be written as 3e12, which
    YAML takes for text.
    """
    if not isinstance(data, dict):
        raise SpecError(f"hardware={type(data).__name__}: must be a mapping of fields")
    known = {f.name for f in fields(HardwareSpec)}
    unknown = sorted(str(k) for k in data if k not in known)
    if unknown:
        raise SpecError(f"{unknown[0]}: unknown hardware field; it has {', '.join(sorted(known))}")
    missing = sorted(known - set(data) - {"bandwidth_efficiency"})
    if missing:
        raise SpecError(f"{missing[0]}: missing from the hardware specification")
    values = {k: v if k in _TEXTS or k == "sources" else _number(v) for k, v in data.items()}
    if isinstance(data["peak_flops"], dict):
        values["peak_flops"] = {str(k): _number(v) for k, v in data["peak_flops"].items()}
    return HardwareSpec(**values)


def _number(value: Any) -> Any:
    """A text such as `3e12` as a number; everything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
