"""What the explorer's page asks: the catalogue, and the plan for where its sliders stand, both as plain JSON."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

from tandem.explore.measured import measured_rows
from tandem.perf.efficiency import ROOFLINE
from tandem.perf.estimate import perf_model
from tandem.perf.host import ENGINE
from tandem.plan.planner import Plan, find_plan
from tandem.report.text import change_sentences, plan_sentences
from tandem.spec.catalog import hardware_names, load_hardware, load_spec, model_names, read_json, released_names
from tandem.spec.design import BACKENDS
from tandem.spec.errors import SpecError, TandemError
from tandem.spec.hardware import HardwareSpec
from tandem.spec.local import host_file, is_host
from tandem.spec.model import ModelSpec
from tandem.spec.units import require_int, require_number
from tandem.spec.workload import MAX_TOKENS, Slo, Workload

MAX_GPUS = 4096
ROUGH_STRIDE = 4
"""A rough answer prices every fourth batch size: steps of 12 % in place of 3 %."""
GRID_ISL, GRID_OSL = (512, 2048, 8192, 32_768), (128, 512, 2048, 8192)
"""Lengths that a page which is exported as one file can answer."""
GRID_TPOT_S = (None, 0.01, 0.02, 0.05, 0.1)
"""Bounds that it can answer."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """Where the sliders stand."""

    model: str
    hardware: str
    gpus: int
    isl: int
    osl: int
    ttft_s: float | None = None
    tpot_s: float | None = None
    backend: str | None = None
    """None: vLLM, and Tandem's engine on a machine that was measured."""
    budget_usd_per_hour: float | None = None
    """GPUs that it does not pay for are left out of `gpus`."""
    rough: bool = False
    """A first look, where the whole answer takes too long to follow a slider."""

    def __post_init__(self) -> None:
        require_int("gpus", self.gpus, high=MAX_GPUS)
        require_int("isl", self.isl, high=MAX_TOKENS)
        require_int("osl", self.osl, low=2, high=MAX_TOKENS)
        Slo(ttft_s=self.ttft_s, tpot_s=self.tpot_s)
        if self.budget_usd_per_hour is not None:
            require_number("budget_usd_per_hour", self.budget_usd_per_hour, high=1e9)


def model_choices() -> tuple[str, ...]:
    """Models of the catalogue, and those trained here whose folders are there."""
    return (*model_names(), *released_names())


def hardware_choices() -> tuple[str, ...]:
    """GPUs of the catalogue, and this machine as it was measured."""
    try:
        measured = read_json(host_file())
    except SpecError:
        return hardware_names()
    return (*hardware_names(), *(name for name in measured if is_host(name)))


def catalogue() -> dict[str, Any]:
    """Models and GPUs to choose from, a GPU with the backends that are modelled on it; what cannot be read is left out."""
    models, hardware = [], []
    for name in model_choices():
        with suppress(TandemError):  # a folder of a release that is not whole
            models.append(_model_row(load_spec(name)) | {"name": name})
    for name in hardware_choices():
        with suppress(TandemError):  # a calibration of this machine that another version wrote
            hardware.append(_hardware_row(load_hardware(name)) | {"name": name})
    return {"models": models, "hardware": hardware}


def _model_row(spec: ModelSpec) -> dict[str, Any]:
    return {"name": spec.name, "parameters": spec.parameters, "family": spec.family, "max_context": spec.max_context}


def _hardware_row(gpu: HardwareSpec) -> dict[str, Any]:
    return {
        "name": gpu.name,
        "title": gpu.title,
        "memory_bytes": gpu.memory_bytes,
        "price_per_hour_usd": _price(gpu),
        "backends": [ENGINE] if gpu.fits_from == ROOFLINE else list(BACKENDS),
    }


def _price(gpu: HardwareSpec) -> float | None:
    """USD an hour of one GPU; None of this machine, whose specification holds a token price."""
    return None if is_host(gpu.name) else gpu.price_per_hour_usd


def _paid_gpus(gpu: HardwareSpec, budget_usd_per_hour: float) -> int:
    """How many GPUs a budget pays for. Raises SpecError where that is none, or where nobody knows."""
    price, said = _price(gpu), f"budget_usd_per_hour={budget_usd_per_hour:g}"
    if price is None:
        raise SpecError(f"{said}: {gpu.name} has no price; leave the budget out")
    paid = math.floor(budget_usd_per_hour / price * (1 + 1e-9))  # three times a price pay for three
    if paid < 1:
        raise SpecError(f"{said}: one {gpu.name} costs {price:g} USD an hour")
    return paid


def answer(query: Query) -> dict[str, Any]:
    """The plan, and why in sentences; or `error`, one line that says what would do."""
    try:
        return _answer(query)
    except TandemError as wrong:
        return {"error": str(wrong)}


def _answer(query: Query) -> dict[str, Any]:
    """Of names. Answers are kept, but for this machine's: it may be measured anew."""
    return (_planned if is_host(query.hardware) else _kept)(query)


def _planned(query: Query, model: ModelSpec | None = None, hardware: HardwareSpec | None = None) -> dict[str, Any]:
    """`model` and `hardware` stand for what the query names, where they come out of files."""
    gpu = hardware or load_hardware(query.hardware)
    paid = None if query.budget_usd_per_hour is None else _paid_gpus(gpu, query.budget_usd_per_hour)
    plan = find_plan(
        model=model or query.model,
        hardware=gpu,
        gpus=query.gpus if paid is None else min(query.gpus, paid),
        workload=Workload.fixed(query.isl, query.osl),
        slo=Slo(ttft_s=query.ttft_s, tpot_s=query.tpot_s),
        backend=query.backend,
        batch_stride=ROUGH_STRIDE if query.rough else 1,
    )
    found = _slim(plan) | {"rough": query.rough, "paid_gpus": paid}
    if paid is not None:
        told = f"{query.budget_usd_per_hour:,g} USD an hour pay for {paid:,} x {gpu.name} at {gpu.price_per_hour_usd:g}"
        found["why"].insert(1, f"{told}: planned within {plan.gpus:,} of {query.gpus:,} GPU{'s' * (query.gpus > 1)}")
    return found


@lru_cache(maxsize=256)
def _kept(query: Query) -> dict[str, Any]:
    return _planned(query)


def _slim(plan: Plan) -> dict[str, Any]:
    """What the page draws of a plan: every frontier point as numbers, and the best option with its memory and its time."""
    best, price = plan.best.to_json(), _price(plan.hardware)
    return {
        "model": plan.model.name,
        "hardware": plan.hardware.name,
        "gpus": plan.gpus,
        "recommended": plan.recommended.to_json(),
        "gain": plan.gain,
        "best": best,
        "usable_bytes": plan.hardware.usable_memory_bytes,
        "price_per_hour_usd": None if price is None else price * plan.recommended.gpus,
        "frontier": [
            {
                "mode": o.deployment.mode,
                "user": o.tokens_per_s_per_user.value,
                "gpu": o.tokens_per_s_per_gpu.value,
                "low": o.tokens_per_s_per_gpu.low,
                "high": o.tokens_per_s_per_gpu.high,
                "ttft_s": o.ttft_s.value,
                "what": _what(o.deployment.pools),
            }
            for o in plan.frontier
        ],
        "why": plan_sentences(plan),
        "changes": change_sentences(plan),
        "points": plan.points_evaluated,
        "seconds": plan.seconds,
    }


def _what(pools: Any) -> str:
    parts = []
    for pool in pools:
        sizes = ", ".join(f"{name} {size}" for name, size in _ways(pool.parallelism).items() if size > 1)
        parts.append(f"{pool.replicas} x {pool.role} of {pool.parallelism.gpus} GPU{'s' * (pool.parallelism.gpus > 1)}"
                     f"{f' ({sizes})' if sizes else ''}, batch {pool.batch}")  # fmt: skip
    return "; ".join(parts)


def _ways(parallelism: Any) -> dict[str, int]:
    """Ways of parallelism by name."""
    return {name: int(getattr(parallelism, name)) for name in ("tp", "pp", "ep", "dp", "cpp")}


def exported(query: Query, *, model: ModelSpec | None = None, hardware: HardwareSpec | None = None) -> dict[str, Any]:
    """Answers around a query that a page without a server can show, by the key that its sliders give. `model` and `hardware`
    stand for what the query names, where they come out of files."""
    perf = perf_model(model or query.model, hardware or query.hardware, None, query.backend)  # refuses before any is priced
    spec, gpu = perf.model, perf.hardware
    query = replace(query, model=spec.name, hardware=gpu.name, backend=perf.backend)
    found: dict[str, dict[str, Any]] = {}
    for isl, osl, tpot_s in product(GRID_ISL, GRID_OSL, GRID_TPOT_S):
        key = f"{isl}/{osl}/{'' if tpot_s is None else f'{tpot_s:g}'}"
        try:
            found[key] = _planned(replace(query, isl=isl, osl=osl, tpot_s=tpot_s), spec, gpu)
        except TandemError as wrong:
            found[key] = {"error": str(wrong)}
    return {
        "query": asdict(query),
        "isl": GRID_ISL,
        "osl": GRID_OSL,
        "tpot_s": GRID_TPOT_S,
        "catalogue": {"models": [_model_row(spec)], "hardware": [_hardware_row(gpu) | {"backends": [perf.backend]}]},
        "answers": found,
        "measured": measured_rows(),
    }
