"""The exported prediction is for the load that the exported benchmark makes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from export_cases import CASES, plan_of, pool

from tandem.perf.backend import load_serving_fits
from tandem.perf.estimate import Instances, estimate, estimate_disaggregated
from tandem.plan.export.expected import expect
from tandem.plan.export.folder import export_files
from tandem.plan.export.job import make_job
from tandem.plan.planner import Plan, find_plan
from tandem.spec.design import Pool
from tandem.spec.workload import Slo, read_trace

SPLIT = ["dense split", "experts split", "experts fp4 on a rack", "hybrid split", "windows split"]


def instances(it: Pool) -> Instances:
    return Instances(parallelism=it.parallelism, batch=it.batch, replicas=it.replicas)


def predicted(plan: Plan) -> dict[str, object]:
    return json.loads(export_files(plan)["benchmark/predicted.json"])


@pytest.mark.parametrize("case", SPLIT)
def test_pools_are_predicted_as_a_closed_loop_of_the_benchmarks_requests(case: str) -> None:
    plan = plan_of(case)
    d, found = plan.recommended, predicted(plan)
    concurrency = make_job(plan).concurrency
    assert f"CONCURRENCY:-{concurrency}}}" in export_files(plan)["benchmark/run.sh"]
    assert found["concurrency"] == concurrency
    direct = estimate_disaggregated(
        model=plan.model, hardware=plan.hardware, isl=2048, osl=256, prefill=instances(d.prefill), decode=instances(d.decode),
        concurrency=concurrency, precision=d.precision, backend=d.backend,
    )  # fmt: skip
    for metric in ("ttft_s", "tpot_s", "tokens_per_s_per_gpu"):
        assert found[metric] == asdict(getattr(direct, metric)), metric
    assert found["plan"]["ttft_s"] == asdict(plan.best.ttft_s)


@pytest.mark.parametrize("case", ["dense", "experts"])
def test_one_pool_is_predicted_as_a_closed_loop_of_its_full_batches(case: str) -> None:
    plan = plan_of(case)
    d, found = plan.recommended, predicted(plan)
    direct = estimate(
        model=plan.model, hardware=plan.hardware, isl=2048, osl=256, concurrency=d.colocated.batch * d.colocated.replicas,
        parallelism=d.colocated.parallelism, gpus=d.gpus, precision=d.precision, backend=d.backend,
    )  # fmt: skip
    for metric in ("ttft_s", "tpot_s", "tokens_per_s_per_gpu"):
        assert found[metric] == asdict(getattr(direct, metric)), metric


@pytest.mark.parametrize("case", CASES)
def test_requests_in_flight_are_those_of_littles_law_or_the_plan_says_that_they_are_not(case: str) -> None:
    plan = plan_of(case)
    job = make_job(plan)
    e = job.expected
    uncounted = case in ("dense piggybacked", "hybrid", "dense pipelines")
    assert e.closed_loop is not uncounted
    if uncounted:
        assert e.how.startswith("the plan's steady state")
        assert "burst is not in TTFT" in e.how
        assert (e.ttft_s, e.tpot_s) == (plan.best.ttft_s, plan.best.tpot_s)
    elif job.split:
        in_flight = e.requests_per_s * (e.ttft_s.value + e.tpot_s.value * 255)
        assert in_flight == pytest.approx(job.concurrency, rel=1e-6)
    assert e.how in export_files(plan)["README.md"]


def test_the_queue_of_the_requests_in_flight_is_in_ttft() -> None:
    for case in ("experts", "dense split"):
        plan = plan_of(case)
        assert make_job(plan).expected.ttft_s.value > 1.2 * expect(plan, 4).ttft_s.value, case


def test_a_trace_is_predicted_at_its_mean_lengths_and_says_so() -> None:
    trace = read_trace("azure-conversation-2023").workload()
    plan = find_plan(model="Qwen/Qwen3-8B", hardware="h100-sxm", gpus=2, workload=trace)
    deployment = replace(plan.recommended, colocated=None, prefill=pool("prefill", 2, 1), decode=pool("decode", 64, 1))
    plan = replace(plan, best=replace(plan.best, deployment=deployment))
    found = predicted(plan)
    isl, osl = round(trace.mean_isl), round(trace.mean_osl)
    assert f"at the traffic's mean lengths {isl}/{osl}" in found["how"]
    d = plan.recommended
    direct = estimate_disaggregated(
        model=plan.model, hardware=plan.hardware, isl=isl, osl=osl, prefill=instances(d.prefill), decode=instances(d.decode),
        concurrency=make_job(plan).concurrency, precision=d.precision, backend=d.backend,
    )  # fmt: skip
    assert found["ttft_s"] == asdict(direct.ttft_s)


def test_a_plan_under_other_fits_is_predicted_under_them() -> None:
    shipped = plan_of("dense split")
    fits = replace(load_serving_fits(), groups={})
    plan = find_plan(
        model=shipped.model, hardware=shipped.hardware, gpus=8, workload=shipped.workload, slo=Slo(), backend="vllm", fits=fits
    )
    assert make_job(plan).expected.tpot_s.evidence == "roofline"
    assert make_job(shipped).expected.tpot_s.evidence != "roofline"
