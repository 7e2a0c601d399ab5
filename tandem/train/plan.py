"""What a recipe's run would take, without running it: parameters, FLOPs, memory of a rank, time, and when what happens.

Arithmetic for GPUs (`tandem.perf.training*`), so that a run of any size can be planned on a laptop without torch. On this
machine's CPU a pass of the model is measured, which takes some seconds.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from tandem.perf.training import LinearFormat, LinearFormats, StepFlops, TrainingStep, step_flops
from tandem.perf.training_memory import RankMemory, rank_memory
from tandem.perf.training_time import CpuRates, StepSeconds, cpu_step_seconds, estimate_of, gpu_step_seconds
from tandem.spec.catalog import load_hardware
from tandem.spec.design import Estimate, Evidence
from tandem.spec.errors import SpecError
from tandem.spec.hardware import HardwareSpec
from tandem.spec.model import ModelSpec
from tandem.train.build import model_spec
from tandem.train.recipe import PrecisionPart, Recipe
from tandem.train.schedule import decay_begins, warmup_steps

CPU = "cpu"
"""Name of this machine where a plan names its hardware."""
MEASURED_PARAMETERS = 100_000_000
"""Weights of a model up to which a pass is measured on a CPU; beyond, two rates say how long it takes."""
_PASS_S, _PASS_TOKENS = 1.5, 2**14
_FORMATS: dict[str, LinearFormat] = {"fp32": "fp32", "bf16": "bf16", "fp8-block": "fp8_block", "fp8-tensor": "fp8"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedPhase:
    """A blend and the step, from 0, that holds its first sequence."""

    begins_step: int
    weights: dict[str, float]
    """Shares of sequences by source; they add up to 1."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a run takes. Bytes are those of one rank, seconds those of the whole run."""

    name: str
    model: str
    parameters: int
    active_parameters: int
    """Weights that one token uses: all, but for routed experts that it is not sent to."""
    tokens: int
    """That the recipe asks for; FLOPs and seconds are of whole steps."""
    tokens_per_step: int
    steps: int
    flops: float
    """Of the whole run, forward and backward, nothing computed twice."""
    hardware_flops: float
    """With what recompute and attention's backward kernels compute once more."""
    flops_by_layer: dict[str, float]
    """`flops` by kind of layer; `head` beside them."""
    bytes_per_rank: RankMemory
    bytes_available: int
    """Of a rank; on a GPU the share of its memory that Tandem fills elsewhere, too."""
    seconds: Estimate
    seconds_per_step: StepSeconds
    mfu: float
    """`flops` over `seconds` and what all ranks' peak in bf16 would do (fp32 where the linears are; on a CPU, the products
    measured)."""
    hardware: str
    gpus: int
    phases: tuple[PlannedPhase, ...]
    warmup_steps: int
    decay_begins_step: int
    """`steps` where the learning rate does not decay."""
    linears: int
    """Linear layers, the head not among them."""
    fp8_linears: int
    kept_linears: tuple[str, ...]
    """Those that stay in bf16 where others are FP8."""
    plan_only: str | None
    """Why the recipe cannot be run here; None: it can."""

    @property
    def fits(self) -> bool:
        """Whether a rank's memory is large enough."""
        return self.bytes_per_rank.total <= self.bytes_available

    @property
    def largest_part(self) -> str:
        """The part of `bytes_per_rank` that takes most: what to make smaller where a run does not fit."""
        parts = self.bytes_per_rank.to_json()
        del parts["total"]
        return max(parts, key=parts.__getitem__)

    def to_json(self) -> dict[str, Any]:
        """The object that `tandem train RECIPE --plan --json` prints."""
        data = asdict(self)
        data["bytes_per_rank"] = self.bytes_per_rank.to_json()
        data["phases"] = [asdict(phase) for phase in self.phases]
        data["kept_linears"] = list(self.kept_linears)
        return {**data, "fits": self.fits, "largest_part": self.largest_part}


def plan_run(
    recipe: Recipe,
    hardware: str | HardwareSpec | None = None,
    gpus: int | None = None,
    *,
    rates: CpuRates | None = None,
) -> TrainingPlan:
    """What `recipe` takes on `gpus` of `hardware`; both default to what the recipe says, without either to this machine's CPU.

    On a CPU two rates are measured, and of models up to `MEASURED_PARAMETERS` a pass of the loop's own model, which then says
    how long a step takes; `rates` replaces both. A run that does not fit is no error (`fits` says so). Raises SpecError for
    settings that do not go together, one line that names the field.
    """
    spec = model_spec(recipe)
    gpu = _hardware(hardware if hardware is not None else recipe.hardware)
    step = training_step(recipe, gpus, device="cpu" if gpu is None else "gpu")
    step.check(spec)
    flops, steps = step_flops(spec, step), recipe.batch.steps
    evidence: Evidence = "roofline"
    if gpu is None:
        known, rates = rates is not None, rates or measure_cpu(spec, recipe.precision)
        parts = cpu_step_seconds(spec, step, rates)
        if not known and spec.parameters <= MEASURED_PARAMETERS:
            parts, evidence = parts.measured(measure_pass_s(spec, recipe, step.micro) * step.sequences), "calibrated"
        peak = compute_peak = rates.matmul_flops_per_s / step.gpus  # ranks share the machine
        available = _physical_bytes() // step.gpus
    else:
        parts = gpu_step_seconds(spec, step, gpu)
        peak = gpu.peak("fp32" if step.formats.linears == "fp32" else "bf16")
        compute_peak = gpu.peak(step.formats.linears)
        available = gpu.usable_memory_bytes
    each = estimate_of(parts, spec, step, compute_peak, evidence)
    formats = step.formats.of(spec)
    fp8 = [shape for shape, kind in formats if kind in ("fp8_block", "fp8")]
    return TrainingPlan(
        name=recipe.name,
        model=spec.name,
        parameters=spec.parameters,
        active_parameters=spec.active_parameters,
        tokens=recipe.batch.tokens,
        tokens_per_step=recipe.batch.tokens_per_step,
        steps=steps,
        flops=flops.model * steps,
        hardware_flops=flops.hardware * steps,
        flops_by_layer=_by_layer(flops, steps),
        bytes_per_rank=rank_memory(spec, step),
        bytes_available=available,
        seconds=Estimate(value=each.value * steps, low=each.low * steps, high=each.high * steps, evidence=each.evidence),
        seconds_per_step=parts,
        mfu=flops.model / (each.value * peak * step.gpus),
        hardware=CPU if gpu is None else gpu.name,
        gpus=step.gpus,
        phases=_phases(recipe),
        warmup_steps=warmup_steps(steps, recipe.optimiser),
        decay_begins_step=decay_begins(steps, recipe.optimiser),
        linears=len(formats),
        fp8_linears=len(fp8),
        kept_linears=tuple(shape.path for shape, kind in formats if kind == "bf16") if fp8 else (),
        plan_only=recipe.plan_only,
    )


def training_step(recipe: Recipe, gpus: int | None = None, *, device: str = "gpu") -> TrainingStep:
    """The recipe's step as `tandem.perf` counts it. Raises SpecError where batch and ranks do not divide."""
    batch, spread, numbers = recipe.batch, recipe.parallel, recipe.precision
    ranks = spread.gpus if gpus is None else gpus
    group = spread.tp * spread.cp
    if ranks < group:
        raise SpecError(f"gpus={ranks}: must be a multiple of parallel.tp x parallel.cp = {group}")
    groups = ranks // group
    if batch.sequences < groups:
        raise SpecError(
            f"batch.sequences={batch.sequences}: fewer than {groups} groups of ranks; use fewer gpus or a larger tp"
        )
    return TrainingStep(
        sequence_length=batch.sequence_length,
        sequences=batch.sequences,
        micro=batch.sequences // groups if batch.micro is None else batch.micro,
        gpus=ranks,
        tp=spread.tp,
        cp=spread.cp,
        recompute=spread.recompute,
        formats=LinearFormats(linears=_FORMATS[numbers.linears], keep_first=numbers.keep_first, keep_last=numbers.keep_last),
        device="cpu" if device == "cpu" else "gpu",
    )


def measure_cpu(spec: ModelSpec, part: PrecisionPart) -> CpuRates:
    """FLOP/s of products of this model's width in its linears' format, and bytes/s of copying memory, on this machine."""
    import torch

    from tandem.train.machine import matmul_flops_per_s

    source = torch.ones(2**24)
    target, best = torch.empty_like(source), 0.0
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        best = max(best, 2.0 * source.nbytes / (time.perf_counter() - began))
    return CpuRates(matmul_flops_per_s(spec, part, torch.device("cpu"), seconds=0.5), best)


def measure_pass_s(spec: ModelSpec, recipe: Recipe, micro: int) -> float:
    """Seconds a sequence of forward and backward pass on this machine, by the loop's own model, not compiled.

    A pass has `micro` sequences, or as many as hold `_PASS_TOKENS`; of those that fit in `_PASS_S` after a first one that is
    not counted, the median.
    """
    import torch

    from tandem.model.hybrid import Decoder
    from tandem.train.ranks import Ranks
    from tandem.train.trainee import make_trainee

    length = recipe.batch.sequence_length
    rows = min(micro, max(1, _PASS_TOKENS // length))
    model = make_trainee(Decoder(spec, seed=recipe.seed), replace(recipe, compile=False), Ranks())
    ids = (torch.arange(rows * length) % spec.vocab_size).view(rows, length)
    documents = torch.zeros_like(ids)
    taken: list[float] = []
    while len(taken) < 2 or sum(taken[1:]) < _PASS_S:
        began = time.perf_counter()
        model(ids, ids, documents).backward()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:]) / rows


def _hardware(found: str | HardwareSpec | None) -> HardwareSpec | None:
    if isinstance(found, str):
        return None if found == CPU else load_hardware(found)
    return found


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _by_layer(flops: StepFlops, steps: int) -> dict[str, float]:
    return {name: 3.0 * part.total * steps for name, part in flops.by_layer.items()}


def _phases(recipe: Recipe) -> tuple[PlannedPhase, ...]:
    """As the token stream switches: at the sequence nearest to the share, which need not be a step's first."""
    sequences = recipe.batch.sequences
    found, begin = [], 0
    for phase in recipe.data.phases:
        total = sum(phase.weights.values())
        weights = {name: share / total for name, share in phase.weights.items()}
        found.append(PlannedPhase(begins_step=begin // sequences, weights=weights))
        begin = math.floor(phase.until * recipe.batch.steps * sequences + 0.5)
    return tuple(found)
