"""What a serving backend adds to the kernels: host time, what graphs hide, and how prefill disturbs decode.

    TPOT = step + sequence * b + launch * T0 + work * T1 + prefill * (b - 1) / (OSL - 1) * T_prefill

T0 and T1 are the decode step's fixed and remaining kernel seconds, b the sequences of an attention group.

Five coefficients for each (backend, GPU generation), fitted on the calibration rows of the measured silicon samples
(`tandem calibrate serving`) and shipped with the spread of what they leave unexplained.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources

from tandem.spec.design import Evidence
from tandem.spec.errors import SpecError
from tandem.spec.model import ModelSpec, MoE


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendFit:
    """Coefficients of one (backend, generation, family), the 10th and 90th percentile of measured / predicted, and the
    largest batch of an attention group and prompt among the rows: beyond twice these a prediction is `transferred`."""

    backend: str
    generation: str
    family: str
    num_rows: int
    step_s: float
    sequence_s: float
    launch_scale: float
    work_scale: float
    prefill_scale: float
    sequences_max: float
    isl_max: float
    tpot_p10: float
    tpot_p90: float
    ttft_p10: float
    ttft_p90: float

    def __post_init__(self) -> None:
        for field in ("step_s", "sequence_s", "launch_scale", "work_scale", "prefill_scale"):
            if getattr(self, field) < 0:
                raise SpecError(f"{field}={getattr(self, field)}: must be >= 0")


KERNELS_ONLY = BackendFit(
    backend="kernels",
    generation="any",
    family="any",
    num_rows=0,
    step_s=0.0,
    sequence_s=0.0,
    launch_scale=1.0,
    work_scale=1.0,
    prefill_scale=1.0,
    sequences_max=0.0,
    isl_max=0.0,
    tpot_p10=0.5,
    tpot_p90=2.0,
    ttft_p10=0.5,
    ttft_p90=2.0,
)
"""No serving software at all: kernels back to back. Its interval is a guess of a factor of two, and evidence says so."""


def parse_backends(text: str) -> list[BackendFit]:
    """Fits from the CSV text that `tandem calibrate serving --out` writes; lines starting with # are provenance."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    names = ("backend", "generation", "family")
    return [
        BackendFit(
            backend=row["backend"],
            generation=row["generation"],
            family=row["family"],
            num_rows=int(row["num_rows"]),
            **{k: float(v) for k, v in row.items() if k not in (*names, "num_rows")},
        )
        for row in csv.DictReader(lines)
    ]


@cache
def load_backends() -> tuple[BackendFit, ...]:
    """The fits that ship with Tandem."""
    source = resources.files("tandem.perf") / "data" / "backend_fits.csv"
    return tuple(parse_backends(source.read_text(encoding="utf-8")))


def find_backend(backend: str, generation: str, model: ModelSpec) -> tuple[BackendFit, Evidence]:
    """The fit of this backend on this generation and model family, else its nearest relative, marked `transferred`.

    A hybrid without experts takes after dense models: the measured linear-attention rows are all of a large MoE.
    """
    rows = [f for f in load_backends() if f.backend == backend]
    if not rows:
        return KERNELS_ONLY, "roofline"
    has_experts = any(isinstance(m, MoE) for m, _ in model.mixers)
    relatives = {"hybrid": ("hybrid", "moe", "dense"), "mla": ("mla", "moe", "dense"), "moe": ("moe", "mla", "dense")}
    families = relatives.get(model.family, ("dense", "moe", "mla")) if has_experts else ("dense", "hybrid", "moe")
    for family in families:
        related = [f for f in rows if f.family == family]
        if related:
            best = max(related, key=lambda f: (f.generation == generation, f.num_rows))
            own = best.generation == generation and family == model.family
            return best, "calibrated" if own else "transferred"
    return max(rows, key=lambda f: f.num_rows), "transferred"
