"""What a shape is for: throughput of one GPU at a fixed batch, or of the best deployment on a cluster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tandem.compress.objective import Cluster, FixedBatch, Objective, Prediction
from tandem.compress.shape import Shape, pruned_spec
from tandem.perf.estimate import estimate
from tandem.plan.planner import find_plan
from tandem.spec.catalog import load_spec
from tandem.spec.design import Deployment
from tandem.spec.errors import Infeasible, SpecError, TandemError
from tandem.spec.workload import Slo, Workload

MODEL = load_spec("nvidia/NVIDIA-Nemotron-Nano-9B-v2")
NARROW = pruned_spec(MODEL, Shape(hidden_size=3584, ffn_size=11_200))
BATCH = FixedBatch(hardware="a10g", batch=8, isl=8192, osl=16_384)
CLUSTER = Cluster(hardware="a10g", gpus=4, isl=2048, osl=512, ttft_s=5.0, tpot_s=0.1)


def test_a_fixed_batch_is_priced_as_estimate_prices_it() -> None:
    found = BATCH.predictor()(MODEL)
    wanted = estimate(model=MODEL, hardware="a10g", isl=8192, osl=16_384, batch=8)
    assert isinstance(found, Prediction)
    assert (found.tokens_per_s, found.tpot_s, found.ttft_s) == (wanted.tokens_per_s_per_gpu, wanted.tpot_s, wanted.ttft_s)
    assert found.deployment.colocated is not None
    assert (found.deployment.gpus, found.deployment.colocated.batch) == (1, 8)


def test_a_batch_beyond_memory_is_what_memory_holds() -> None:
    found = replace(BATCH, batch=100).predictor()(MODEL)
    assert isinstance(found, Prediction)
    assert found.deployment.colocated is not None
    assert 1 <= found.deployment.colocated.batch < 100


def test_a_cluster_is_priced_as_the_planner_prices_it_and_keeps_the_deployment() -> None:
    found = CLUSTER.predictor()(NARROW)
    plan = find_plan(model=NARROW, hardware="a10g", gpus=4, workload=Workload.fixed(2048, 512), slo=Slo(ttft_s=5.0, tpot_s=0.1))
    assert isinstance(found, Prediction)
    assert found.tokens_per_s.value == pytest.approx(plan.best.tokens_per_s)
    assert found.deployment == plan.recommended
    assert found.tpot_s.value <= 0.1
    assert Deployment.from_json(found.to_json()["deployment"]) == found.deployment


@pytest.mark.parametrize("objective", [BATCH, CLUSTER])
def test_a_narrower_model_is_faster(objective: FixedBatch | Cluster) -> None:
    predict = objective.predictor()
    wide, narrow = predict(MODEL), predict(NARROW)
    assert isinstance(wide, Prediction)
    assert isinstance(narrow, Prediction)
    assert narrow.tokens_per_s.value > wide.tokens_per_s.value


def test_a_model_that_cannot_be_served_is_an_answer_with_its_reason() -> None:
    teacher = load_spec("nvidia/NVIDIA-Nemotron-Nano-12B-v2")
    large = BATCH.predictor()(teacher)
    assert isinstance(large, Infeasible)
    assert "a10g offers" in large.reason
    late = replace(CLUSTER, tpot_s=1e-6).predictor()(NARROW)
    assert isinstance(late, Infeasible)
    assert late.reason


def test_a_bundled_trace_is_traffic() -> None:
    traced = replace(CLUSTER, isl=None, osl=None, trace="azure-code-2023")
    assert traced.workload().mean_isl > 1000
    with pytest.raises(TandemError, match="nosuch"):
        replace(traced, trace="nosuch.csv").predictor()


def test_the_kind_says_which_of_both_is_asked() -> None:
    both = Objective(fixed_batch=BATCH, cluster=CLUSTER)
    assert both.chosen == BATCH
    assert replace(both, kind="cluster").chosen == CLUSTER
    assert both.to_json()["hardware"] == "a10g"
    assert replace(both, kind="cluster").to_json()["gpus"] == 4


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (FixedBatch, {"batch": 0}, "objective.batch=0"),
        (FixedBatch, {"osl": 1}, "objective.osl=1"),
        (FixedBatch, {"backend": "tgi"}, "objective.backend='tgi': must be one of vllm"),
        (FixedBatch, {"precision": "q2"}, "precision='q2'"),
        (Cluster, {"gpus": 0}, "objective.gpus=0"),
        (Cluster, {"osl": None}, "objective.isl, objective.osl or objective.trace"),
        (Cluster, {"trace": "azure-code-2023"}, "objective.isl, objective.osl or objective.trace"),
        (Cluster, {"osl": None, "trace": "azure-code-2023"}, "objective.trace='azure-code-2023': has its own lengths"),
        (Cluster, {"tpot_s": 0.0}, "tpot_s=0.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(kind: type[FixedBatch | Cluster], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as refused:
        replace(BATCH if kind is FixedBatch else CLUSTER, **changes)
    assert str(refused.value).startswith(said)


def test_hardware_that_is_not_known_is_an_error_not_an_answer() -> None:
    for objective in (BATCH, CLUSTER):
        with pytest.raises(SpecError, match="hardware='h900'"):
            replace(objective, hardware="h900").predictor()
    with pytest.raises(SpecError, match=r"objective.kind='cluster': objective.cluster must be stated"):
        Objective(kind="cluster", fixed_batch=BATCH)
