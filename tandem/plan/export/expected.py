"""What an export's benchmark should measure: the closed-loop estimate at exactly the requests in flight that it keeps."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.perf.estimate import EstimateResult, Instances, estimate, estimate_disaggregated
from tandem.plan.planner import Plan
from tandem.spec.design import Estimate, Pool


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Means over the benchmark's requests, in seconds and output tokens a second; `how` says what they were estimated from."""

    ttft_s: Estimate
    tpot_s: Estimate
    tokens_per_s_per_gpu: Estimate
    requests_per_s: float
    closed_loop: bool
    how: str


def expect(plan: Plan, concurrency: int) -> Expected:
    """The recommended deployment with `concurrency` requests in flight; the plan's own steady state where no estimate counts
    a closed loop of that form."""
    deployment, w = plan.recommended, plan.workload
    refusal = _uncounted(plan)
    if refusal is not None:
        best = plan.best
        return Expected(
            ttft_s=best.ttft_s, tpot_s=best.tpot_s, tokens_per_s_per_gpu=best.tokens_per_s_per_gpu,
            requests_per_s=best.requests_per_s, closed_loop=False,
            how=f"the plan's steady state: {refusal}, so the queue of the first burst is not in TTFT",
        )  # fmt: skip
    isl, osl = round(w.mean_isl), max(2, round(w.mean_osl))
    found = _closed_loop(plan, isl, osl, concurrency)
    mean = "" if len(w.isl) == 1 else f" at the traffic's mean lengths {isl}/{osl}"
    return Expected(
        ttft_s=found.ttft_s, tpot_s=found.tpot_s, tokens_per_s_per_gpu=found.tokens_per_s_per_gpu,
        requests_per_s=found.tokens_per_s_per_gpu.value * deployment.gpus / osl, closed_loop=True,
        how=f"a closed loop of {concurrency} requests{mean}: TTFT includes their queue, above all that of the first burst",
    )  # fmt: skip


def _uncounted(plan: Plan) -> str | None:
    """Why no closed loop of the deployment can be estimated; None where it can."""
    d = plan.recommended
    if d.colocated is not None and d.colocated.chunk_tokens is not None:
        return "a closed loop is not estimated for prompts that ride with decode steps"
    if d.prefill is not None and d.prefill.parallelism.cpp > 1:
        return "a closed loop is not estimated for prompts whose chunks follow one another through pipeline stages"
    return None


def _closed_loop(plan: Plan, isl: int, osl: int, concurrency: int) -> EstimateResult:
    d = plan.recommended
    if d.colocated is not None:
        p = d.colocated
        return estimate(
            model=plan.model, hardware=plan.hardware, isl=isl, osl=osl, concurrency=concurrency, parallelism=p.parallelism,
            gpus=d.gpus, precision=d.precision, backend=d.backend, fits=plan.fits,
        )  # fmt: skip
    assert d.prefill is not None
    assert d.decode is not None
    return estimate_disaggregated(
        model=plan.model, hardware=plan.hardware, isl=isl, osl=osl, prefill=_instances(d.prefill), decode=_instances(d.decode),
        concurrency=concurrency, precision=d.precision, backend=d.backend, fits=plan.fits,
    )  # fmt: skip


def _instances(pool: Pool) -> Instances:
    return Instances(parallelism=pool.parallelism, batch=pool.batch, replicas=pool.replicas)
