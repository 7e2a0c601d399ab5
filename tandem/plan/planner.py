"""`find_plan`: which deployment serves this traffic best within this GPU budget, and how sure that is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from tandem.perf.backend import ServingFits
from tandem.perf.efficiency import ROOFLINE
from tandem.perf.estimate import check_workers, perf_model
from tandem.plan.frontier import frontier_choices
from tandem.plan.option import MODES, Option, OptionMaker
from tandem.plan.search import Choice, Searched
from tandem.plan.space import BATCHES
from tandem.spec.design import Deployment, Mode, Precision
from tandem.spec.errors import SpecError
from tandem.spec.hardware import HardwareSpec
from tandem.spec.model import ModelSpec
from tandem.spec.units import require_int
from tandem.spec.workload import Slo, Workload

WORTH_SPLITTING = 1.05
"""Disaggregation must serve this many times as much as the best co-located deployment to be recommended: less is below what
any prediction here can tell apart, and two pools with a transfer between them are more to run."""

STEADY = "plans are for steady arrivals; what a fixed number of requests in flight feel here is told by `tandem estimate`"
"""Of a calibrated host, where the two were measured to differ (docs/adr/0018)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer: the best option of each mode, the recommended deployment, the frontier, and what would change it."""

    model: ModelSpec
    hardware: HardwareSpec
    gpus: int
    workload: Workload
    slo: Slo
    options: dict[Mode, Option]
    best: Option
    gain: float | None
    frontier: tuple[Option, ...]
    changes: tuple[dict[str, Any], ...]
    refused: dict[str, int]
    points_evaluated: int
    seconds: float
    fits: ServingFits | None = None
    """Serving fits that it was priced with; None for the shipped ones."""

    @property
    def recommended(self) -> Deployment:
        """The deployment to run."""
        return self.best.deployment

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know before trusting the numbers."""
        longest = max(i + o for i, o in zip(self.workload.isl, self.workload.osl, strict=True))
        limit = self.model.max_context
        beyond = f"sequences grow to {longest:,.0f} tokens, beyond the {limit:,} that {self.model.name} is published for"
        uncounted = f"not counted: {', '.join(self.model.omitted)}"
        notes = (*((beyond,) if longest > limit else ()), *((uncounted,) if self.model.omitted else ()))
        return (*notes, *((STEADY,) if self.hardware.fits_from == ROOFLINE else ()))

    @property
    def colocated(self) -> Option | None:
        """The better of in-flight batching and piggybacking, if either can serve."""
        shared = [self.options[m] for m in ("colocated", "piggybacked") if m in self.options]
        return max(shared, key=lambda o: o.tokens_per_s, default=None)

    @property
    def disaggregated(self) -> Option | None:
        """The rate-matched pair of pools, if one can serve."""
        return self.options.get("disaggregated")

    def to_json(self) -> dict[str, Any]:
        """The object that `tandem plan --json` prints."""
        shared, split = self.colocated, self.disaggregated
        return {
            "model": self.model.name,
            "hardware": self.hardware.name,
            "gpus": self.gpus,
            "workload": asdict(self.workload),
            "slo": asdict(self.slo),
            "colocated": shared.to_json() if shared else None,
            "disaggregated": split.to_json() if split else None,
            "recommended": self.recommended.to_json(),
            "gpus_for_load": None if self.workload.requests_per_s is None else self.best.gpus_for(self.workload.requests_per_s),
            "gain": self.gain,
            "frontier": [_frontier_json(o) for o in self.frontier],
            "changes": list(self.changes),
            "refused": self.refused,
            "notes": list(self.notes),
            "points_evaluated": self.points_evaluated,
            "seconds": self.seconds,
        }


def _frontier_json(option: Option) -> dict[str, Any]:
    d = option.deployment
    return {
        "mode": d.mode,
        "tokens_per_s_per_user": asdict(option.tokens_per_s_per_user),
        "tokens_per_s_per_gpu": asdict(option.tokens_per_s_per_gpu),
        "ttft_s": option.ttft_s.value,
        "gpus": d.gpus,
        "pools": [
            {"role": p.role, "parallelism": asdict(p.parallelism), "batch": p.batch, "replicas": p.replicas} for p in d.pools
        ],
    }


def find_plan(
    *,
    model: str | ModelSpec,
    hardware: str | HardwareSpec,
    gpus: int,
    workload: Workload,
    slo: Slo | None = None,
    precision: str | Precision | None = None,
    backend: str | None = None,
    fits: ServingFits | None = None,
    batch_stride: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> Plan:
    """The best deployment of `model` on `gpus` x `hardware` for this traffic under the SLO.

    Precision defaults to the format of the model's published weights, the backend to vLLM (both to what was measured on a
    calibrated host), `fits` to the shipped ones. Throughput
    counts output tokens over all GPUs of the deployment. A `batch_stride` of n prices every n-th batch size only: a first
    look. Raises SpecError on impossible values and NoPlanError when no deployment can meet the request.
    """
    started = time.perf_counter()
    perf = perf_model(model, hardware, precision, backend, fits)
    require_int("gpus", gpus, high=16384)
    check_workers(perf, gpus)
    require_int("batch_stride", batch_stride, high=len(BATCHES))
    if workload.mean_osl < 2:
        raise SpecError(f"osl={workload.mean_osl:g}: planning needs at least 2 output tokens, or there is no decode to place")
    objective = slo or Slo()
    searched = Searched(perf, workload, gpus, objective.percentile, batch_stride).price_all(progress)
    progress("choosing")
    choices = searched.select(objective, gpus)
    if not choices:
        raise searched.explain_nothing(objective)
    maker = OptionMaker(searched)
    options = {mode: maker.option(choice) for mode, choice in choices.items()}
    best = options[_winner(choices)]
    frontier = maker.options([c for m in MODES for c in frontier_choices(searched, m, objective)])
    return Plan(
        model=perf.model,
        hardware=perf.hardware,
        gpus=gpus,
        workload=workload,
        slo=objective,
        options=options,
        best=best,
        gain=_gain(choices),
        frontier=tuple(frontier),
        changes=tuple(what_would_change(searched, objective, gpus)),
        refused=searched.refused,
        points_evaluated=searched.points_evaluated,
        seconds=time.perf_counter() - started,
        fits=fits,
    )


def _winner(choices: dict[Mode, Choice]) -> Mode:
    """The mode with the most requests/s, but disaggregation only where it gains more than WORTH_SPLITTING."""
    shared = max(
        (m for m in MODES if m in choices and m != "disaggregated"), key=lambda m: choices[m].requests_per_s, default=None
    )
    if shared is None:
        return "disaggregated"
    gain = _gain(choices)
    return "disaggregated" if gain is not None and gain > WORTH_SPLITTING else shared


def _gain(choices: dict[Mode, Choice]) -> float | None:
    """Requests/s of the disaggregated deployment over the best co-located one, both within the same budget."""
    shared = [choices[m].requests_per_s for m in ("colocated", "piggybacked") if m in choices]
    return choices["disaggregated"].requests_per_s / max(shared) if shared and "disaggregated" in choices else None


def what_would_change(searched: Searched, slo: Slo, gpus: int) -> list[dict[str, Any]]:
    """The recommendation under half and twice each bound, and under fewer GPUs; nothing is priced again."""
    cases: list[tuple[str, Slo, int]] = []
    for factor in (0.5, 2.0):
        if slo.tpot_s is not None:
            bound = slo.tpot_s * factor
            cases.append((f"tpot_s={bound:g}", Slo(ttft_s=slo.ttft_s, tpot_s=bound, percentile=slo.percentile), gpus))
        if slo.ttft_s is not None:
            bound = slo.ttft_s * factor
            cases.append((f"ttft_s={bound:g}", Slo(ttft_s=bound, tpot_s=slo.tpot_s, percentile=slo.percentile), gpus))
    if slo.tpot_s is None:
        cases += [
            (f"tpot_s={b:g}", Slo(ttft_s=slo.ttft_s, tpot_s=b, percentile=slo.percentile), gpus) for b in (0.05, 0.02, 0.01)
        ]
    cases += [(f"gpus={n}", slo, n) for n in (gpus // 2, gpus // 4) if n >= 1]
    rows = []
    for label, other, budget in cases:
        choices = searched.select(other, budget)
        row: dict[str, Any] = {"change": label, "recommended": None, "gain": None, "tokens_per_s": None}
        if choices:
            mode = _winner(choices)
            rate = choices[mode].requests_per_s * searched.workload.mean_osl
            row |= {"recommended": mode, "gain": _gain(choices), "tokens_per_s": rate}
        rows.append(row)
    return rows
