"""This machine as a GPU: what its cores and memory reach, and what Tandem's engine makes of it, model by model.

    decode step = step + sequence*b + gemm*G + attention*A + other*O       (backend.py; b sequences)
    prefill     = prompt*(fixed*passes + P)

G, A, O and P are the work of the step by class on a plain roofline (ROOFLINE) with the measured FLOP/s and bytes/s; the
coefficients, none of them negative, are fitted to steps of the engine, each by its relative error. `tandem calibrate host`
measures and fits; `load_host` finds what it wrote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem.perf.backend import KERNELS_ONLY, PASS_TOKENS, PHYSICS, BackendFit, fingerprint
from tandem.perf.costs import Layout, StepLoad
from tandem.perf.step import StepPricer
from tandem.spec.catalog import read_json
from tandem.spec.design import Evidence, Precision
from tandem.spec.errors import SpecError
from tandem.spec.files import write_whole
from tandem.spec.hardware import HardwareSpec, read_hardware
from tandem.spec.local import host_file
from tandem.spec.model import ModelSpec

ONE = Layout(1.0, 1.0, 1.0, 1.0, 1.0)
ENGINE = "tandem"
"""The backend that a host's coefficients are of."""
MAX_BATCH = 32
"""Sequences that the engine decodes at once unless told otherwise, as tandem.engine.config has it."""
LEAST_SPREAD = 0.1
"""Intervals are at least so wide to either side: steps that were fitted are easier than steps that were not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRow:
    """One measured step: `batch` sequences that decode at `context` tokens, or one prompt of `isl` tokens (batch 0)."""

    batch: int
    context: int
    isl: int
    seconds: float

    @property
    def load(self) -> StepLoad:
        """The same for the performance model."""
        if self.batch:
            return StepLoad(decode_seqs=float(self.batch), context=float(self.context))
        return StepLoad(prefill_seqs=1.0, isl=float(self.isl))


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedRow:
    """What clients of a closed loop measured, means of its requests: `concurrency` in flight, prompts of `isl` and answers of
    `osl` tokens."""

    isl: int
    osl: int
    concurrency: int
    ttft_s: float
    tpot_s: float
    per_place: int = 8
    """Requests for each in flight: the fewer, the more the first ones weigh, which all start together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductRate:
    """FLOP/s of a product of `rows` rows with weights stored in a format."""

    weights: str
    rows: int
    flops_per_s: float


@dataclass(frozen=True, kw_only=True)
class HostFit:
    """The engine's coefficients for one model in one format of weights."""

    model: str
    arch: str
    """`tandem.perf.backend.fingerprint`: models whose steps cost the same share it."""
    precision: Precision
    fit: BackendFit
    """Of one worker that prefills and decodes: as served where loops were measured (host_served.py), else the engine alone."""
    decode_ape: float
    """Median error of the fitted decode steps, as a share; `prefill_ape` that of prompts."""
    prefill_ape: float
    split: BackendFit | None = None
    """Of prefill and decode in workers of their own, where that was measured."""
    ttft_ape: float | None = None
    """Median error of the fitted loops of a server, where it was measured; `tpot_ape` likewise."""
    tpot_ape: float | None = None
    loops: tuple[ServedRow, ...] = ()
    """What was measured of a server with one worker, and `split_loops` of one with two."""
    split_loops: tuple[ServedRow, ...] = ()
    kinds: tuple[str, ...] = ()
    """Of layers, as `kinds_of` tells them: the likest model lends its coefficients to one that was not measured."""

    def to_json(self) -> dict[str, Any]:
        """What `_fit_from` reads."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class HostCalibration:
    """This machine with so many threads a worker."""

    hardware: HardwareSpec
    threads: int
    fits: tuple[HostFit, ...]
    products: tuple[ProductRate, ...] = ()
    """Of the machine, for people: fits have what a model's own products take."""

    def find(self, model: ModelSpec, weights: str, split: bool = False) -> tuple[BackendFit, Evidence]:
        """Coefficients for a model, in pools where `split`: `calibrated` where it was measured in this format, `transferred`
        from the likest that was measured in it, else from the likest of any; KERNELS_ONLY and `roofline` where nothing was.
        Pools that were not measured take what one worker does."""
        near = self._likest(model, [one for one in self.fits if one.precision.weights == weights] or self.fits)
        if near is None:
            return KERNELS_ONLY, "roofline"
        pools = near.split if split else None
        own = (near.arch, near.precision.weights) == (fingerprint(model), weights)
        return pools or near.fit, "calibrated" if own and (pools is not None or not split) else "transferred"

    def precision(self, model: ModelSpec) -> Precision | None:
        """The format that a model was measured in last, else that of the likest that was; None where nothing was."""
        near = self._likest(model, self.fits)
        return None if near is None else near.precision

    def _likest(self, model: ModelSpec, fits: Sequence[HostFit]) -> HostFit | None:
        """That of the model itself, else of the one that shares the most kinds of layers; of several the last."""
        arch, kinds = fingerprint(model), kinds_of(model)
        return max(reversed(fits), key=lambda one: (one.arch == arch, _alike(one.kinds, kinds)), default=None)

    def beside(self, known: HostCalibration | None) -> HostCalibration:
        """With what was known of other models and formats before it: fits to the same peaks."""
        if known is None or known.hardware != self.hardware:
            return self
        anew = {(fit.arch, fit.precision.weights) for fit in self.fits}
        kept = [fit for fit in known.fits if (fit.arch, fit.precision.weights) not in anew]
        return replace(self, fits=(*kept, *self.fits))

    def to_json(self) -> dict[str, Any]:
        """An object of the file."""
        return {
            "hardware": self.hardware.to_json(),
            "threads": self.threads,
            "products": [asdict(one) for one in self.products],
            "fits": [one.to_json() for one in self.fits],
        }


def kinds_of(model: ModelSpec) -> tuple[str, ...]:
    """The kinds of layers of a model, each once."""
    return tuple(sorted({type(mixer).__name__ for mixer, _ in model.mixers}))


def _alike(some: Sequence[str], others: Sequence[str]) -> float:
    """Share of the kinds of two models that both have."""
    return len({*some} & {*others}) / max(1, len({*some} | {*others}))


def fit_steps(model: ModelSpec, hardware: HardwareSpec, precision: Precision, rows: Sequence[StepRow]) -> HostFit:
    """Coefficients out of measured steps: of a batch, of a context and of a prompt at least two each.

    Raises SpecError for fewer.
    """
    from scipy.optimize import nnls

    pricer = StepPricer(model, hardware, precision)
    decode, prompts = [row for row in rows if row.batch], [row for row in rows if not row.batch]
    for name, values in (
        ("batches", {row.batch for row in decode}),
        ("contexts", {row.context for row in decode}),
        ("prompts", {row.isl for row in prompts}),
    ):
        if len(values) < 2:
            raise SpecError(f"rows: have {len(values)} {name}; two or more tell a fixed time from one that grows")

    def solved(columns: list[list[float]], measured: Sequence[StepRow]) -> tuple[list[float], NDArray[np.float64]]:
        seconds = np.array([row.seconds for row in measured])
        table = np.array(columns) / seconds[:, None]
        found = nnls(table, np.ones(len(seconds)))[0]
        return [float(value) for value in found], table @ found  # predicted over measured

    def classes(row: StepRow) -> tuple[float, float, float]:
        work = {name: float(value) for name, value in pricer.classes(ONE, row.load)[1].items()}
        return sum(work[name] for name in ("gemm", "quantised_gemm", "moe", "moe_compute")), work["attention"], work["other"]

    (step_s, sequence_s, gemm, attention, other), steps = solved([[1.0, row.batch, *classes(row)] for row in decode], decode)
    (fixed_s, prompt), prefills = solved([[math.ceil(row.isl / PASS_TOKENS), sum(classes(row))] for row in prompts], prompts)
    if not prompt:
        raise SpecError("rows: prompts take no longer when they are longer; measure on a quieter machine")
    intervals = {}
    for metric, ratios in (("tpot", steps), ("ttft", prefills)):
        low, high = np.percentile(1 / ratios, (10, 90))
        intervals[f"{metric}_p10"] = min(float(low), 1 - LEAST_SPREAD)
        intervals[f"{metric}_p90"] = max(float(high), 1 + LEAST_SPREAD)
    return HostFit(
        model=model.name,
        arch=fingerprint(model),
        kinds=kinds_of(model),
        precision=precision,
        fit=BackendFit(
            step_s=step_s,
            sequence_s=sequence_s,
            launch=0.0,
            gemm=gemm,
            quantised_gemm=gemm,
            moe=gemm,
            moe_compute=gemm,
            attention=attention,
            other=other,
            prefill=prompt,
            prompt=prompt,
            prompt_s=fixed_s / prompt,
            burst=PHYSICS.burst * prompt,
            host_s=0.0,
            num_rows=len(rows),
            sequences_max=max(row.batch for row in decode),
            isl_max=max(row.isl for row in prompts),
            gpus_max=1.0,
            **intervals,
        ),
        decode_ape=float(np.median(np.abs(steps - 1))),
        prefill_ape=float(np.median(np.abs(prefills - 1))),
    )


def load_host(name: str) -> HostCalibration | None:
    """The calibration of `host` or `host-N`; None where there is none. Raises SpecError for a file that is not one."""
    path = host_file()
    if not path.is_file():
        return None
    data = read_json(path)
    try:
        return None if name not in data else _calibration_from(data[name])
    except (KeyError, TypeError, ValueError, AttributeError) as wrong:
        raise SpecError(f"{path}: is no calibration of this version ({wrong}); run `tandem calibrate host` again") from None


def known_host(name: str) -> HostCalibration | None:
    """As `load_host`, and None where the file cannot be read: for whoever can do without."""
    try:
        return load_host(name)
    except SpecError:
        return None


def keep_host(found: Mapping[str, HostCalibration]) -> Path:
    """Write calibrations by name into the user's file, in place of those of the same names; where it lies."""
    path = host_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        data: dict[str, Any] = dict(read_json(path)) if path.is_file() else {}
    except SpecError:
        data = {}  # what cannot be read is made anew
    write_whole(path, json.dumps({**data, **{name: one.to_json() for name, one in found.items()}}, indent=1) + "\n")
    return path


def _calibration_from(data: Mapping[str, Any]) -> HostCalibration:
    return HostCalibration(
        hardware=read_hardware(data["hardware"]),
        threads=int(data["threads"]),
        products=tuple(ProductRate(**one) for one in data.get("products", ())),
        fits=tuple(_fit_from(one) for one in data["fits"]),
    )


def _fit_from(data: Mapping[str, Any]) -> HostFit:
    return HostFit(
        model=str(data["model"]),
        arch=str(data["arch"]),
        precision=Precision(**data["precision"]),
        fit=_coefficients(data["fit"]),
        decode_ape=float(data["decode_ape"]),
        prefill_ape=float(data["prefill_ape"]),
        split=None if data.get("split") is None else _coefficients(data["split"]),
        ttft_ape=data.get("ttft_ape"),
        tpot_ape=data.get("tpot_ape"),
        loops=tuple(ServedRow(**row) for row in data.get("loops", ())),
        split_loops=tuple(ServedRow(**row) for row in data.get("split_loops", ())),
        kinds=tuple(data.get("kinds", ())),
    )


def _coefficients(data: Mapping[str, Any]) -> BackendFit:
    known = {field.name for field in fields(BackendFit)}
    return BackendFit(**{name: value for name, value in data.items() if name in known})
