"""What a compressed model is for: the throughput and latency that `tandem.perf` and `tandem.plan` predict of serving it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from tandem.perf.estimate import estimate, perf_model
from tandem.plan.planner import find_plan
from tandem.spec.catalog import load_hardware
from tandem.spec.design import BACKENDS, Deployment, Estimate, Parallelism, Pool, Precision
from tandem.spec.errors import Infeasible, NoPlanError, SpecError
from tandem.spec.model import ModelSpec
from tandem.spec.units import require_int
from tandem.spec.workload import MAX_TOKENS, Slo, Workload, read_trace

Kind: TypeAlias = Literal["fixed-batch", "cluster"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the best deployment of a model is predicted to do. Throughput is output tokens/s of all its GPUs."""

    tokens_per_s: Estimate
    ttft_s: Estimate
    tpot_s: Estimate
    deployment: Deployment

    def to_json(self) -> dict[str, Any]:
        """Its fields, with the deployment as `tandem serve --plan` reads it."""
        times = {name: asdict(getattr(self, name)) for name in ("tokens_per_s", "ttft_s", "tpot_s")}
        return {**times, "gpus": self.deployment.gpus, "deployment": self.deployment.to_json()}


Predict: TypeAlias = Callable[[ModelSpec], Prediction | Infeasible]
"""What serving a model is predicted to give, or why it cannot be served."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedBatch:
    """One GPU with a number of requests always in flight, as paper A measured its candidates (Table 10)."""

    hardware: str
    batch: int
    isl: int
    osl: int
    precision: str | None = None
    """Number formats; None: the model's own."""
    backend: str | None = None
    """None: vLLM, and Tandem's engine on a calibrated host."""

    def __post_init__(self) -> None:
        require_int("objective.batch", self.batch)
        require_int("objective.isl", self.isl, high=MAX_TOKENS)
        require_int("objective.osl", self.osl, low=2, high=MAX_TOKENS)
        _check(self.precision, self.backend)

    def predictor(self) -> Predict:
        """Throughput of a model at this batch, or at the largest that memory holds; Infeasible where not one sequence fits.

        Raises SpecError for hardware that is not known.
        """
        gpu = load_hardware(self.hardware)

        def predict(model: ModelSpec) -> Prediction | Infeasible:
            try:
                perf = perf_model(model, gpu, self.precision, self.backend)
                found = estimate(
                    model=model,
                    hardware=gpu,
                    isl=self.isl,
                    osl=self.osl,
                    batch=self.batch,
                    precision=perf.precision,
                    backend=perf.backend,
                )
            except SpecError as refused:
                return Infeasible(str(refused))
            pool = Pool(parallelism=Parallelism(), batch=found.batch)
            return Prediction(
                tokens_per_s=found.tokens_per_s_per_gpu,
                ttft_s=found.ttft_s,
                tpot_s=found.tpot_s,
                deployment=Deployment(
                    model=model.name, hardware=gpu.name, backend=perf.backend, precision=perf.precision, colocated=pool
                ),
            )

        return predict


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """A budget of GPUs that serves traffic under an SLO: the model is judged by the best deployment that it makes possible."""

    hardware: str
    gpus: int
    isl: int | None = None
    osl: int | None = None
    trace: str | None = None
    """A CSV of `arrival_s, isl, osl` or a bundled trace's name, instead of lengths."""
    ttft_s: float | None = None
    tpot_s: float | None = None
    percentile: float = 50.0
    precision: str | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        require_int("objective.gpus", self.gpus)
        if (self.trace is None) == (self.isl is None or self.osl is None):
            raise SpecError("objective.isl, objective.osl or objective.trace: give either both lengths or a trace")
        if self.trace is not None and (self.isl is not None or self.osl is not None):
            raise SpecError(f"objective.trace={self.trace!r}: has its own lengths; leave isl and osl out")
        _check(self.precision, self.backend)
        self.slo()

    def slo(self) -> Slo:
        """The latency that must be kept."""
        return Slo(ttft_s=self.ttft_s, tpot_s=self.tpot_s, percentile=self.percentile)

    def workload(self) -> Workload:
        """The traffic."""
        if self.trace is not None:
            return read_trace(self.trace).workload()
        assert self.isl is not None
        assert self.osl is not None
        return Workload.fixed(self.isl, self.osl)

    def predictor(self) -> Predict:
        """The recommended deployment of a model; Infeasible where none meets the SLO.

        Raises SpecError for hardware that is not known, TraceError for a trace that cannot be read.
        """
        gpu, workload, slo = load_hardware(self.hardware), self.workload(), self.slo()

        def predict(model: ModelSpec) -> Prediction | Infeasible:
            try:
                plan = find_plan(
                    model=model,
                    hardware=gpu,
                    gpus=self.gpus,
                    workload=workload,
                    slo=slo,
                    precision=self.precision,
                    backend=self.backend,
                )
            except NoPlanError as refused:
                return Infeasible(str(refused))
            best = plan.best
            return Prediction(
                tokens_per_s=_times(best.tokens_per_s_per_gpu, best.deployment.gpus),
                ttft_s=best.ttft_s,
                tpot_s=best.tpot_s,
                deployment=best.deployment,
            )

        return predict


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What candidates are judged by: `kind` says which of the two is asked."""

    kind: Kind = "fixed-batch"
    fixed_batch: FixedBatch | None = None
    cluster: Cluster | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("fixed-batch", "cluster"):
            raise SpecError(f"objective.kind={self.kind!r}: must be fixed-batch or cluster")
        if (self.fixed_batch if self.kind == "fixed-batch" else self.cluster) is None:
            part = self.kind.replace("-", "_")
            raise SpecError(f"objective.kind={self.kind!r}: objective.{part} must be stated (hardware, traffic)")

    @property
    def chosen(self) -> FixedBatch | Cluster:
        """The part that is asked."""
        chosen = self.fixed_batch if self.kind == "fixed-batch" else self.cluster
        assert chosen is not None
        return chosen

    def to_json(self) -> dict[str, Any]:
        """Kind and settings of the part that is asked."""
        return {"kind": self.kind, **asdict(self.chosen)}


def _times(rate: Estimate, factor: float) -> Estimate:
    return Estimate(value=rate.value * factor, low=rate.low * factor, high=rate.high * factor, evidence=rate.evidence)


def _check(precision: str | None, backend: str | None) -> None:
    if precision is not None:
        Precision.parse(precision)
    if backend is not None and backend not in BACKENDS:
        raise SpecError(f"objective.backend={backend!r}: must be one of {', '.join(BACKENDS)}")
