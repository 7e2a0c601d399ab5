"""What the explorer's page asks: the catalogue, and the plan for where its sliders stand, both as plain JSON."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

from tandem.explore.measured import measured_rows
from tandem.perf.estimate import perf_model
from tandem.plan.planner import Plan, find_plan
from tandem.report.text import change_sentences, plan_sentences
from tandem.spec.catalog import hardware_names, load_hardware, load_spec, model_names
from tandem.spec.design import BACKENDS
from tandem.spec.errors import TandemError
from tandem.spec.local import host_file
from tandem.spec.units import require_int
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
    backend: str = "vllm"
    rough: bool = False
    """A first look, where the whole answer takes too long to follow a slider."""

    def __post_init__(self) -> None:
        require_int("gpus", self.gpus, high=MAX_GPUS)
        require_int("isl", self.isl, high=MAX_TOKENS)
        require_int("osl", self.osl, low=2, high=MAX_TOKENS)
        Slo(ttft_s=self.ttft_s, tpot_s=self.tpot_s)


def hardware_choices() -> tuple[str, ...]:
    """GPUs of the catalogue, and this machine where it was measured."""
    return (*hardware_names(), *(("host",) if host_file().is_file() else ()))


def catalogue() -> dict[str, Any]:
    """Models, GPUs and backends to choose from; names that cannot be read are left out."""
    models = []
    for name in model_names():
        spec = load_spec(name)
        models.append({"name": name, "parameters": spec.parameters, "family": spec.family, "max_context": spec.max_context})
    hardware = []
    for name in hardware_choices():
        try:
            gpu = load_hardware(name)
        except TandemError:
            continue  # a calibration of this machine that another version wrote
        row = {"name": name, "title": gpu.title, "memory_bytes": gpu.memory_bytes, "price_per_hour_usd": gpu.price_per_hour_usd}
        hardware.append(row)
    return {"models": models, "hardware": hardware, "backends": list(BACKENDS)}


def answer(query: Query) -> dict[str, Any]:
    """The plan, and why in sentences; or `error`, one line that says what would do."""
    try:
        return _answer(query)
    except TandemError as wrong:
        return {"error": str(wrong)}


@lru_cache(maxsize=256)
def _answer(query: Query) -> dict[str, Any]:
    plan = find_plan(
        model=query.model,
        hardware=query.hardware,
        gpus=query.gpus,
        workload=Workload.fixed(query.isl, query.osl),
        slo=Slo(ttft_s=query.ttft_s, tpot_s=query.tpot_s),
        backend=query.backend,
        batch_stride=ROUGH_STRIDE if query.rough else 1,
    )
    return _slim(plan) | {"rough": query.rough}


def _slim(plan: Plan) -> dict[str, Any]:
    """What the page draws of a plan: every frontier point as numbers, and the best option with its memory and its time."""
    best = plan.best.to_json()
    return {
        "recommended": plan.recommended.to_json(),
        "gain": plan.gain,
        "best": best,
        "usable_bytes": plan.hardware.usable_memory_bytes,
        "price_per_hour_usd": plan.hardware.price_per_hour_usd * plan.recommended.gpus,
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


def exported(query: Query) -> dict[str, Any]:
    """Answers around a query that a page without a server can show, by the key that its sliders give."""
    perf_model(query.model, query.hardware, None, query.backend)  # a name that is none is refused before any is priced
    found = {}
    for isl, osl, tpot_s in product(GRID_ISL, GRID_OSL, GRID_TPOT_S):
        asked = Query(
            model=query.model, hardware=query.hardware, gpus=query.gpus, isl=isl, osl=osl, ttft_s=query.ttft_s, tpot_s=tpot_s,
            backend=query.backend,
        )  # fmt: skip
        found[f"{isl}/{osl}/{'' if tpot_s is None else f'{tpot_s:g}'}"] = answer(asked)
    return {
        "query": {name: getattr(query, name) for name in query.__dataclass_fields__},
        "isl": GRID_ISL,
        "osl": GRID_OSL,
        "tpot_s": GRID_TPOT_S,
        "catalogue": catalogue(),
        "answers": found,
        "measured": measured_rows(),
    }
