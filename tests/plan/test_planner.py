"""What a plan promises: the bounds, the budget, the best of its space, and numbers that agree with one another."""

from __future__ import annotations

import itertools
import json
from functools import cache

import pytest

import tandem
from tandem.perf.estimate import perf_model
from tandem.plan.option import MATCHED_LOW, Option
from tandem.plan.planner import WORTH_SPLITTING, Plan, find_plan
from tandem.plan.rates import TOLERANCE
from tandem.plan.search import PAPER_TTFT_CUTOFF_S
from tandem.spec.design import Deployment
from tandem.spec.errors import NoPlanError, SpecError
from tandem.spec.workload import Slo, Workload, read_trace

TIE = 0.999**2
"""Rates within a thousandth count as equal and the smaller deployment wins, once in a mode and once among modes."""
CASES = [
    ("nvidia/NVIDIA-Nemotron-Nano-9B-v2", "h100-sxm", 8, "8192/1024", Slo(ttft_s=2.0, tpot_s=0.03)),
    ("nvidia/NVIDIA-Nemotron-Nano-9B-v2", "h100-sxm", 32, "trace", Slo(ttft_s=2.0, tpot_s=0.03, percentile=90.0)),
    ("meta-llama/Meta-Llama-3.1-70B", "h100-sxm", 32, "trace", Slo(ttft_s=2.0, tpot_s=0.03)),
    ("meta-llama/Meta-Llama-3.1-70B", "h100-sxm", 16, "4096/512", Slo(tpot_s=0.02)),
    ("deepseek-ai/DeepSeek-R1", "h200-sxm", 64, "16384/2048", Slo()),
    ("deepseek-ai/DeepSeek-R1", "h200-sxm", 64, "4096/1024", Slo(ttft_s=3.0, tpot_s=0.04)),
    ("openai/gpt-oss-120b", "b200-sxm", 16, "8192/1024", Slo(ttft_s=1.0, tpot_s=0.01)),
    ("Qwen/Qwen3-8B", "a10g", 3, "1024/128", Slo(ttft_s=5.0)),
]
IDS = [f"{model.rpartition('/')[2]} {gpus} {hardware} {traffic}" for model, hardware, gpus, traffic, _ in CASES]
every_case = pytest.mark.parametrize("case", range(len(CASES)), ids=IDS)


def workload_of(text: str) -> Workload:
    if text == "trace":
        return read_trace("azure-conversation-2023").workload()
    isl, osl = text.split("/")
    return Workload.fixed(int(isl), int(osl))


@cache
def plan_of(case: int) -> Plan:
    model, hardware, gpus, traffic, slo = CASES[case]
    return find_plan(model=model, hardware=hardware, gpus=gpus, workload=workload_of(traffic), slo=slo)


def splits(plan: Plan) -> list[Option]:
    """Every disaggregated option of a plan: the best one and those of the frontier."""
    best = [plan.disaggregated] if plan.disaggregated else []
    return best + [o for o in plan.frontier if o.deployment.mode == "disaggregated"]


@every_case
def test_every_option_meets_the_objective_within_the_budget(case: int) -> None:
    plan = plan_of(case)
    for option in plan.options.values():
        assert option.deployment.gpus <= plan.gpus
        assert option.ttft_s.value <= (plan.slo.ttft_s or PAPER_TTFT_CUTOFF_S)
        assert option.tpot_s.value <= (plan.slo.tpot_s or float("inf"))
        for pool in option.memory.values():
            held = sum(size for name, size in pool.items() if name != "usable_bytes")
            assert held <= pool["usable_bytes"] * (1 + 1e-9)


@every_case
def test_the_recommended_deployment_is_the_best_of_all_modes_and_of_the_frontier(case: int) -> None:
    plan = plan_of(case)
    assert plan.recommended == plan.best.deployment
    assert plan.best in plan.options.values()
    fitting = [o for o in plan.frontier if o.tpot_s.value <= (plan.slo.tpot_s or float("inf"))]
    for option in (*plan.options.values(), *fitting):
        # Pools are split only for a gain that is worth it; within that, and only then, a split deployment may be faster.
        allowed = WORTH_SPLITTING if option.deployment.mode == "disaggregated" else 1.0
        assert plan.best.tokens_per_s * allowed >= option.tokens_per_s * TIE, option.deployment
    if plan.best is plan.disaggregated and plan.gain is not None:
        assert plan.gain > WORTH_SPLITTING


@every_case
def test_the_gain_compares_the_best_disaggregated_with_the_best_colocated(case: int) -> None:
    plan = plan_of(case)
    if plan.colocated and plan.disaggregated:
        assert plan.gain == pytest.approx(plan.disaggregated.tokens_per_s / plan.colocated.tokens_per_s)
    else:
        assert plan.gain is None


@every_case
def test_the_frontier_of_every_mode_rises_where_interactivity_falls(case: int) -> None:
    plan = plan_of(case)
    assert {o.deployment.mode for o in plan.frontier} >= set(plan.options)
    for mode in {o.deployment.mode for o in plan.frontier}:
        points = [o for o in plan.frontier if o.deployment.mode == mode]
        for left, right in itertools.pairwise(points):
            assert left.tokens_per_s_per_user.value > right.tokens_per_s_per_user.value
            assert left.tokens_per_s_per_gpu.value < right.tokens_per_s_per_gpu.value


@every_case
def test_intervals_are_ordered_and_agree_with_one_another(case: int) -> None:
    plan = plan_of(case)
    for o in (*plan.options.values(), *plan.frontier):
        for e in (o.ttft_s, o.tpot_s, o.tokens_per_s_per_gpu, o.tokens_per_s_per_user):
            assert 0 < e.low <= e.value <= e.high < float("inf")
        assert o.tokens_per_s_per_user.value == pytest.approx(1 / o.tpot_s.value)
        assert o.tokens_per_s_per_user.low == pytest.approx(1 / o.tpot_s.high)
        assert o.tokens_per_s == pytest.approx(o.requests_per_s * plan.workload.mean_osl)
        assert o.tokens_per_s_per_gpu.value == pytest.approx(o.tokens_per_s / o.deployment.gpus)


@every_case
def test_disaggregated_pools_are_balanced_and_the_slower_one_sets_the_rate(case: int) -> None:
    for o in splits(plan_of(case)):
        prefill, decode = o.deployment.prefill, o.deployment.decode
        assert prefill is not None
        assert decode is not None
        assert o.prefill_requests_per_s is not None
        assert o.decode_requests_per_s is not None
        pools = prefill.replicas * o.prefill_requests_per_s, decode.replicas * o.decode_requests_per_s
        assert o.requests_per_s == pytest.approx(min(pools))
        assert o.imbalance == pytest.approx(max(pools) / min(pools) - 1, abs=1e-9)
        assert prefill.gpus + decode.gpus == o.deployment.gpus
        assert o.deployment.gpus == sum(p.replicas * p.parallelism.gpus for p in (prefill, decode))


@every_case
def test_pools_out_of_balance_are_flagged_and_stay_off_the_frontier(case: int) -> None:
    from tandem.report.text import plan_sentences

    plan = plan_of(case)
    assert all(o.imbalance <= TOLERANCE for o in plan.frontier)
    flagged = any("balance within 3 %" in line for line in plan_sentences(plan))
    assert flagged == (plan.best.imbalance > TOLERANCE)


@every_case
def test_the_low_end_of_a_disaggregated_throughput_carries_the_matching_margin(case: int) -> None:
    plan = plan_of(case)
    for o in (*plan.options.values(), *plan.frontier):
        margin = MATCHED_LOW if o.deployment.mode == "disaggregated" else 1.0
        spread = o.tpot_s.value / o.tpot_s.high
        assert o.tokens_per_s_per_gpu.low == pytest.approx(margin * spread * o.tokens_per_s_per_gpu.value)
    assert MATCHED_LOW == 0.75


@every_case
def test_a_transfer_is_constant_state_plus_a_share_of_the_prompt_and_none_is_lost(case: int) -> None:
    plan = plan_of(case)
    tokens, windowed = round(plan.workload.mean_isl), "gpt-oss" in plan.model.name
    for o in splits(plan):
        t, prefill, decode = o.transfer, o.deployment.prefill, o.deployment.decode
        assert t is not None
        assert prefill is not None
        assert decode is not None
        whole = t["state_bytes_per_request"] + t["kv_bytes_per_token"] * tokens
        assert t["state_bytes_per_request"] == plan.model.state_bytes_per_sequence(state=o.deployment.precision.state)
        assert t["kv_bytes_per_token"] == plan.model.kv_bytes_per_token(kv=o.deployment.precision.kv)
        assert (t["bytes_per_request"] < whole) if windowed else (t["bytes_per_request"] == whole)
        # What leaves one pool enters the other; a pool whose GPUs hold copies counts each copy.
        for pool, side in ((prefill, "egress"), (decode, "ingress")):
            sent = t[f"{side}_bytes_per_s_per_gpu"] * pool.gpus
            assert sent >= o.requests_per_s * t["bytes_per_request"] * (1 - 1e-3)
            if pool.parallelism.tp == 1:
                assert sent == pytest.approx(o.requests_per_s * t["bytes_per_request"], rel=1e-3)
        assert t["exposed_s"] >= 0


CONTRACT_KEYS = {"colocated", "disaggregated", "recommended", "gain", "frontier", "points_evaluated", "seconds"}
"""What DESIGN section 11 names; the others carry the question and its explanations."""
PLAN_KEYS = CONTRACT_KEYS | {"model", "hardware", "gpus", "workload", "slo", "gpus_for_load", "changes", "refused", "notes"}
RATE_KEYS = {"tokens_per_s_per_gpu", "tokens_per_s_per_user", "tokens_per_s", "requests_per_s", "imbalance"}
OPTION_KEYS = RATE_KEYS | {"mode", "gpus", "ttft_s", "tpot_s", "memory", "time_by_class", "binds"}
SPLIT_KEYS = {"n_prefill", "n_decode", "prefill", "decode", "prefill_requests_per_s", "decode_requests_per_s", "transfer"}


@every_case
def test_the_json_of_a_plan_has_the_keys_of_the_contract_and_no_infinities(case: int) -> None:
    plan = plan_of(case)
    data = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert set(data) == PLAN_KEYS
    if plan.colocated:
        assert set(data["colocated"]) == OPTION_KEYS | {"colocated"}
    if plan.disaggregated:
        assert set(data["disaggregated"]) == OPTION_KEYS | SPLIT_KEYS
        assert data["disaggregated"]["n_prefill"] == data["disaggregated"]["prefill"]["replicas"]
        assert data["disaggregated"]["n_decode"] == data["disaggregated"]["decode"]["replicas"]
    for point in data["frontier"]:
        assert set(point) == {"mode", "tokens_per_s_per_user", "tokens_per_s_per_gpu", "ttft_s", "gpus", "pools"}
    for change in data["changes"]:
        assert set(change) == {"change", "recommended", "gain", "tokens_per_s"}
    assert data["points_evaluated"] > 0
    assert sum(data["refused"].values()) < data["points_evaluated"]


@every_case
def test_the_recommended_deployment_survives_json(case: int) -> None:
    plan = plan_of(case)
    text = json.dumps(plan.to_json()["recommended"], allow_nan=False)
    assert Deployment.from_json(json.loads(text)) == plan.recommended


@every_case
def test_what_would_change_is_what_a_new_plan_would_say(case: int) -> None:
    """The cheap answer, priced in the larger space, is never below the plan that is made from nothing."""
    plan = plan_of(case)
    model, hardware, gpus, traffic, slo = CASES[case]
    half = next(c for c in plan.changes if c["change"] == f"gpus={gpus // 2}")
    try:
        again = find_plan(model=model, hardware=hardware, gpus=gpus // 2, workload=workload_of(traffic), slo=slo)
    except NoPlanError:
        assert half["recommended"] is None
        return
    assert half["tokens_per_s"] == pytest.approx(again.best.tokens_per_s, rel=1e-6)
    assert half["recommended"] == again.recommended.mode


def test_an_objective_nobody_can_meet_is_refused_with_what_can_be_had() -> None:
    with pytest.raises(
        NoPlanError, match=r"^tpot_s=1e-06: no deployment of Qwen/Qwen3-8B on 2 x h100-sxm is faster than 0\.\d+ s; relax it"
    ):
        find_plan(model="qwen3-8b", hardware="h100", gpus=2, workload=Workload.fixed(512, 64), slo=Slo(tpot_s=1e-6))


def test_a_model_that_does_not_fit_is_refused_with_its_weight_bytes() -> None:
    bytes_of_weights = r"811,\d{3},\d{3},\d{3} B of weights"
    with pytest.raises(
        NoPlanError, match=rf"^gpus=2: .*405B on 2 x a10g does not fit: {bytes_of_weights} and [\d,]+ B for one sequence"
    ):
        find_plan(model="meta-llama-3.1-405b", hardware="a10g", gpus=2, workload=Workload.fixed(512, 64))


def test_a_refusal_for_the_default_cutoff_of_ttft_says_so() -> None:
    with pytest.raises(NoPlanError, match=r"\b10 s\b"):
        find_plan(model="qwen3-8b", hardware="a10g", gpus=2, workload=Workload.fixed(100_000, 200))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpus": 0}, "gpus=0"),
        ({"gpus": 2.0}, "gpus=2.0"),
        ({"backend": "tgi"}, "backend='tgi'"),
        ({"workload": Workload.fixed(512, 1)}, "osl=1"),
        ({"precision": "fp7"}, "precision='fp7'"),
        ({"hardware": "h900"}, "hardware='h900'"),
    ],
)
def test_a_request_that_cannot_be_is_refused_by_name(change: dict[str, object], message: str) -> None:
    request = {"model": "qwen3-8b", "hardware": "h100", "gpus": 2, "workload": Workload.fixed(512, 64)}
    with pytest.raises(SpecError, match=f"^{message}"):
        find_plan(**{**request, **change})  # type: ignore[arg-type]


def test_notes_warn_of_sequences_beyond_the_published_length() -> None:
    plan = tandem.find_plan(model="qwen3-8b", hardware="h100", gpus=1, workload=Workload.fixed(40_000, 2000))
    assert plan.notes == ("sequences grow to 42,000 tokens, beyond the 40,960 that Qwen/Qwen3-8B is published for",)


def test_precision_defaults_to_the_format_of_the_published_weights() -> None:
    plan = plan_of(4)
    native = perf_model("deepseek-ai/DeepSeek-R1", "h200-sxm", None, "vllm").precision
    assert plan.recommended.precision == native
    assert native.weights == "fp8_block"
