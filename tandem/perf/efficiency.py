"""How close real kernels come to a GPU's peaks: one fitted curve for each (GPU, operation class, number format).

    time = t0 + ((F / (ec * P))^p + (B / (eb * W))^p)^(1/p)          (DESIGN section 4.2)

F, B from `ops`; P peak FLOP/s, W memory (or link) bytes/s; t0 launch and latency, ec and eb the reached shares, p how
sharply compute and memory overlap: 1 adds them, large p takes the larger. p is 1, 2 or 4, so that a curve costs square
roots and no powers (docs/adr/0002). `tandem calibrate ops` refits the table.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np

from tandem.perf.ops import NETWORK, OpClass, Result, Work
from tandem.spec.design import Evidence
from tandem.spec.errors import SpecError
from tandem.spec.hardware import HardwareSpec

SHARPNESS = (1, 2, 4)
ROOFLINE = "roofline"
"""In place of a GPU's name in `HardwareSpec.fits_from`: its peaks are what products reach, and the coefficients of the backend,
fitted on this machine, have all the rest (tandem.perf.host)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpFit:
    """One curve, with the number of measurements behind it and the spread of measured / predicted (10th, 90th percentile)."""

    system: str
    op: OpClass
    dtype: str
    num_rows: int
    t0_s: float
    compute_efficiency: float
    bandwidth_efficiency: float
    sharpness: int
    ratio_p10: float
    ratio_p90: float
    median_ape: float

    def __post_init__(self) -> None:
        if self.sharpness not in SHARPNESS:
            raise SpecError(f"sharpness={self.sharpness}: must be one of {SHARPNESS}")
        if not (self.t0_s >= 0 and 0 < self.compute_efficiency <= 1 and 0 < self.bandwidth_efficiency <= 1):
            raise SpecError(f"fit {self.system}/{self.op}/{self.dtype}: needs t0_s >= 0 and efficiencies in (0, 1]")


def overlap(compute_s: Result, memory_s: Result, sharpness: int) -> Result:
    """The p-norm of the two times for p in SHARPNESS: sum, Euclidean, or nearly the maximum."""
    if sharpness == 1:
        return compute_s + memory_s
    squares = compute_s * compute_s, memory_s * memory_s
    if sharpness == 2:
        return np.sqrt(squares[0] + squares[1])
    return np.sqrt(np.sqrt(squares[0] * squares[0] + squares[1] * squares[1]))


@dataclass(frozen=True, kw_only=True)
class OpTimer:
    """A curve bound to a GPU: seconds of one operation, from its work."""

    fit: OpFit
    flops_per_s: float
    bytes_per_s: float
    evidence: Evidence

    def work_s(self, work: Work, bytes_per_s: Result | None = None) -> Result:
        """Seconds beyond t0 for every design point; `bytes_per_s` overrides the link of a collective."""
        wire = self.bytes_per_s if bytes_per_s is None else bytes_per_s * self.fit.bandwidth_efficiency
        moved_s = np.asarray(work.moved_bytes) / wire
        if self.fit.op in NETWORK or self.fit.op == "memory":
            return moved_s
        return overlap(np.asarray(work.flops) / self.flops_per_s, moved_s, self.fit.sharpness)


@cache
def load_fits() -> dict[tuple[str, str, str], OpFit]:
    """The fits that ship with Tandem, by (system, op, dtype)."""
    source = resources.files("tandem.perf") / "data" / "op_fits.csv"
    return {(f.system, f.op, f.dtype): f for f in parse_fits(source.read_text(encoding="utf-8"))}


def parse_fits(text: str) -> list[OpFit]:
    """Fits from the CSV text that `tandem calibrate ops --out` writes; lines starting with # are provenance."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    fits = []
    for row in csv.DictReader(lines):
        numbers = {k: float(v) for k, v in row.items() if k not in ("system", "op", "dtype", "num_rows", "sharpness")}
        fits.append(
            OpFit(
                system=row["system"],
                op=row["op"],  # type: ignore[arg-type]
                dtype=row["dtype"],
                num_rows=int(row["num_rows"]),
                sharpness=int(row["sharpness"]),
                **numbers,
            )
        )
    return fits


# Where a format was not measured on a GPU, the next one in its row is asked; the last resort is bf16.
_FALLBACK = {
    "fp8": ("fp8", "fp8_block", "bf16"),
    "fp8_block": ("fp8_block", "fp8", "bf16"),
    "fp4": ("fp4", "fp8", "bf16"),
    "mxfp4": ("mxfp4", "fp4", "int4", "bf16"),
    "int4": ("int4", "mxfp4", "bf16"),
}
_REFERENCE = "h100-sxm"


def find_fit(hardware: HardwareSpec, op: OpClass, dtype: str) -> tuple[OpFit, Evidence]:
    """The nearest measured curve: this GPU's own, else that of the GPU it borrows from, else the reference GPU's."""
    if hardware.fits_from == ROOFLINE:
        return _roofline(op, dtype), "calibrated"
    fits = load_fits()
    for system in (hardware.name, hardware.fits_from, _REFERENCE):
        for candidate in _FALLBACK.get(dtype, (dtype, "bf16")):
            fit = fits.get((system, op, candidate))
            if fit is not None:
                own = system == hardware.name and candidate == dtype
                return fit, "calibrated" if own else "transferred"
    raise SpecError(f"op={op!r}, dtype={dtype!r}: no fit for {hardware.name} and none to borrow")


@cache
def _roofline(op: OpClass, dtype: str) -> OpFit:
    return OpFit(
        system=ROOFLINE, op=op, dtype=dtype, num_rows=0, t0_s=0.0, compute_efficiency=1.0, bandwidth_efficiency=1.0,
        sharpness=1, ratio_p10=1.0, ratio_p90=1.0, median_ape=0.0,
    )  # fmt: skip


def compute_dtype(op: OpClass, dtype: str) -> str:
    """The format whose peak bounds the arithmetic: weight-only formats and cache formats compute in bf16."""
    if dtype in ("int4", "mxfp4") or op.startswith(("attention", "mla", "scan", "conv")):
        return "bf16"
    return dtype


def bind(hardware: HardwareSpec, op: OpClass, dtype: str) -> OpTimer:
    """The curve of an operation on a GPU, ready to price work."""
    fit, evidence = find_fit(hardware, op, dtype)
    bandwidth = fit.bandwidth_efficiency if op in NETWORK else (hardware.bandwidth_efficiency or fit.bandwidth_efficiency)
    wire = hardware.scale_up_bytes_per_s if op in NETWORK else hardware.memory_bytes_per_s
    return OpTimer(
        fit=fit,
        flops_per_s=hardware.peak(compute_dtype(op, dtype)) * fit.compute_efficiency,
        bytes_per_s=wire * bandwidth,
        evidence=evidence,
    )
