"""Tandem: which language model, deployed how, serves this traffic best within this budget.

    import tandem

    spec = tandem.load_spec("nvidia/NVIDIA-Nemotron-Nano-9B-v2")
    plan = tandem.find_plan(
        model=spec, hardware="h100-sxm", gpus=32,
        workload=tandem.Workload.fixed(8192, 1024), slo=tandem.Slo(ttft_s=2, tpot_s=0.03),
    )
    plan.recommended.to_json()

Names load when they are first used, so that importing the package costs next to nothing and never imports torch;
`load_model` and its kin need it (`pip install 'tandem-lm[model]'`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tandem._version import __version__

if TYPE_CHECKING:
    from tandem.engine.config import EngineConfig
    from tandem.engine.engine import Engine
    from tandem.engine.types import EngineRequest, Generation, Grammar, SamplingParams
    from tandem.model.hybrid import Decoder
    from tandem.model.load import load_model, save_model
    from tandem.model.state import SequenceState
    from tandem.perf.backend import ServingFits
    from tandem.perf.estimate import Draft, EstimateResult, Instances, estimate, estimate_disaggregated
    from tandem.perf.phases import PerfModel
    from tandem.plan.planner import Plan, find_plan
    from tandem.plan.rates import match_rates
    from tandem.sim.api import SimRun, simulate
    from tandem.spec.catalog import hardware_names, load_hardware, load_spec, model_names
    from tandem.spec.design import Deployment, Estimate, Parallelism, Pool, Precision
    from tandem.spec.errors import Infeasible, NoPlanError, SpecError, TandemError, TraceError
    from tandem.spec.hardware import HardwareSpec
    from tandem.spec.model import ModelSpec
    from tandem.spec.workload import Slo, Trace, Workload, read_trace

_HOME = {
    "engine.config": ("EngineConfig",),
    "engine.engine": ("Engine",),
    "engine.types": ("EngineRequest", "Generation", "Grammar", "SamplingParams"),
    "model.hybrid": ("Decoder",),
    "model.load": ("load_model", "save_model"),
    "model.state": ("SequenceState",),
    "perf.backend": ("ServingFits",),
    "perf.estimate": ("Draft", "EstimateResult", "Instances", "estimate", "estimate_disaggregated"),
    "perf.phases": ("PerfModel",),
    "plan.planner": ("Plan", "find_plan"),
    "plan.rates": ("match_rates",),
    "sim.api": ("SimRun", "simulate"),
    "spec.catalog": ("hardware_names", "load_hardware", "load_spec", "model_names"),
    "spec.design": ("Deployment", "Estimate", "Parallelism", "Pool", "Precision"),
    "spec.errors": ("Infeasible", "NoPlanError", "SpecError", "TandemError", "TraceError"),
    "spec.hardware": ("HardwareSpec",),
    "spec.model": ("ModelSpec",),
    "spec.workload": ("Slo", "Trace", "Workload", "read_trace"),
}
_MODULE_OF = {name: f"tandem.{module}" for module, names in _HOME.items() for name in names}

__all__ = [
    "Decoder",
    "Deployment",
    "Draft",
    "Engine",
    "EngineConfig",
    "EngineRequest",
    "Estimate",
    "EstimateResult",
    "Generation",
    "Grammar",
    "HardwareSpec",
    "Infeasible",
    "Instances",
    "ModelSpec",
    "NoPlanError",
    "Parallelism",
    "PerfModel",
    "Plan",
    "Pool",
    "Precision",
    "SamplingParams",
    "SequenceState",
    "ServingFits",
    "SimRun",
    "Slo",
    "SpecError",
    "TandemError",
    "Trace",
    "TraceError",
    "Workload",
    "__version__",
    "estimate",
    "estimate_disaggregated",
    "find_plan",
    "hardware_names",
    "load_hardware",
    "load_model",
    "load_spec",
    "match_rates",
    "model_names",
    "read_trace",
    "save_model",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tandem' has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        return getattr(import_module(_MODULE_OF[name]), name)
    except ModuleNotFoundError as missing:
        extra = {"model": "model", "engine": "serve"}.get(_MODULE_OF[name].split(".")[1])
        if extra is None or (missing.name or "").startswith("tandem"):
            raise
        raise ModuleNotFoundError(
            f"tandem.{name} needs the package {missing.name}: pip install 'tandem-lm[{extra}]'", name=missing.name
        ) from missing


def __dir__() -> list[str]:
    return sorted(__all__)
