"""Predictions carry an interval and what they rest on; impossible questions get one line that names field and value."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.perf.estimate import Draft, Instances, estimate, estimate_disaggregated
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.design import BACKENDS, Estimate, Parallelism
from tandem.spec.errors import SpecError

LLAMA = "meta-llama/Meta-Llama-3.1-8B"
NANO = "nvidia/NVIDIA-Nemotron-Nano-9B-v2"
GOOD: dict[str, Any] = {"model": LLAMA, "hardware": "h100-sxm", "isl": 1024, "osl": 256, "batch": 8}
MEASURED: dict[str, Any] = {
    "model": "meta-llama/Meta-Llama-3.1-70B", "hardware": "h100-sxm", "isl": 1024, "osl": 1024, "batch": 8,
    "parallelism": Parallelism(tp=4), "precision": "fp8", "backend": "vllm",
}  # fmt: skip
POOL = Instances(parallelism=Parallelism(), batch=8)


def ask(**changes: Any) -> dict[str, Any]:
    return {k: v for k, v in {**GOOD, **changes}.items() if v is not ...}


def check(found: Estimate) -> None:
    assert 0 < found.low <= found.value <= found.high < float("inf")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([LLAMA, NANO, "Qwen/Qwen3-30B-A3B", "openai/gpt-oss-20b"]),
    st.sampled_from(["h100-sxm", "h200-sxm", "b200-sxm", "l40s", "mi300x", "a100"]),
    st.sampled_from(BACKENDS),
    st.sampled_from(["colocated", "piggybacked"]),
    st.sampled_from(["fp8", "fp4", "fp8/fp8/bf16"]),
    st.integers(1, 4096),
    st.integers(2, 4096),
    st.integers(1, 600),
)
def test_intervals_are_ordered_and_agree(
    model: str, gpu: str, backend: str, mode: str, precision: str, isl: int, osl: int, batch: int
) -> None:
    found = estimate(model=model, hardware=gpu, backend=backend, mode=mode, precision=precision, isl=isl, osl=osl, batch=batch)
    for value in (found.ttft_s, found.tpot_s, found.tokens_per_s_per_gpu, found.tokens_per_s_per_user):
        check(value)
        assert value.evidence == found.evidence
    user, tpot = found.tokens_per_s_per_user, found.tpot_s
    assert (user.value, user.low, user.high) == pytest.approx((1 / tpot.value, 1 / tpot.high, 1 / tpot.low))
    used = sum(v for k, v in found.memory.items() if k != "usable_bytes")
    assert used <= found.memory["usable_bytes"] * (1 + 1e-12)
    assert found.max_batch >= 1


def test_evidence_says_what_a_prediction_rests_on() -> None:
    """Own curves and own rows: calibrated; a GPU or model nobody measured: transferred; no measured backend: roofline."""
    assert estimate(**MEASURED).evidence == "calibrated"
    assert estimate(**{**MEASURED, "hardware": "h200-sxm", "precision": "fp4"}).evidence == "transferred"
    assert estimate(**ask()).evidence == "transferred"
    assert estimate(**ask(hardware="a10g", batch=1)).evidence == "transferred"
    assert estimate(**ask(backend="tandem")).evidence == "roofline"
    assert estimate(**ask(hardware="a10g", backend="tandem", batch=1)).evidence == "roofline"
    assert estimate(**ask(model=NANO)).evidence == "transferred"  # a dense hybrid: only large linear MoEs were measured


@pytest.mark.parametrize(("field", "inside", "beyond"), [("isl", 16_000, 40_000), ("batch", 128, 129)])
def test_evidence_ends_at_twice_what_was_measured(field: str, inside: int, beyond: int) -> None:
    """vLLM, Llama-70B in FP8 on H100: rows reach 64 requests and 8,192 prompt tokens (serving_fits.yaml)."""
    base = {**MEASURED, "parallelism": Parallelism(tp=8), "osl": 64, "isl": 512}
    assert estimate(**{**base, field: inside}).evidence == "calibrated"
    assert estimate(**{**base, field: beyond}).evidence == "transferred"


def test_replicas_share_the_concurrency_and_keep_the_rate_of_a_gpu() -> None:
    single = estimate(**ask(batch=8))
    spread = estimate(**ask(batch=..., concurrency=32, gpus=4))
    assert spread.tokens_per_s_per_gpu == single.tokens_per_s_per_gpu
    assert spread.ttft_s == single.ttft_s
    uneven = estimate(**ask(batch=..., concurrency=33, gpus=4))
    assert uneven == estimate(**ask(batch=9))


def test_what_does_not_fit_waits() -> None:
    """A concurrency above the largest batch is served at the largest batch."""
    full = estimate(**ask(batch=..., concurrency=10**6))
    assert (full.batch, full.waiting) == (full.max_batch, 10**6 - full.max_batch)
    assert full.tpot_s == estimate(**ask(batch=full.max_batch)).tpot_s
    assert full.tpot_s.value > estimate(**ask(batch=full.max_batch - 1)).tpot_s.value


def test_disaggregated_requests_are_conserved_and_decode_is_never_outrun() -> None:
    """Little's law over both pools, and the rate that the decode pool alone would allow as a bound."""
    one = {"model": LLAMA, "hardware": "h100-sxm", "isl": 4096, "osl": 512, "concurrency": 16}
    found = estimate_disaggregated(**one, prefill=replace(POOL, batch=1), decode=replace(POOL, batch=16))
    rate = found.tokens_per_s_per_gpu.value * 2 / 512
    assert rate * (found.ttft_s.value + found.tpot_s.value * 511) == pytest.approx(16, rel=1e-4)
    assert rate <= 16 / (found.tpot_s.value * 511)
    more = estimate_disaggregated(**one, prefill=replace(POOL, batch=1, replicas=4), decode=replace(POOL, batch=16))
    assert more.ttft_s.value < found.ttft_s.value
    assert more.batch >= found.batch
    fewer = estimate_disaggregated(**one | {"concurrency": 4}, prefill=replace(POOL, batch=1), decode=replace(POOL, batch=16))
    assert fewer.tpot_s.value < found.tpot_s.value
    assert fewer.ttft_s.value < found.ttft_s.value


def test_multi_token_prediction_pays_while_a_step_is_bound_by_weights() -> None:
    """At a small batch a step of four tokens costs little more than one of a single token and yields 2.5 of them at the
    default acceptance; without acceptance it only costs."""
    case = {"model": "deepseek-r1", "hardware": "b200-sxm", "isl": 1024, "osl": 1024, "batch": 4, "backend": "trtllm"}
    case["parallelism"] = Parallelism(tp=8)
    plain = estimate(**case).tpot_s.value
    drafted = estimate(**case, draft=Draft(tokens=3)).tpot_s.value
    assert 1.3 < plain / drafted < 1 + 0.7 + 0.7**2 + 0.7**3
    assert estimate(**case, draft=Draft(tokens=3, acceptance=0.0)).tpot_s.value > plain
    assert estimate(**case, draft=Draft(tokens=0)).tpot_s.value == plain


@pytest.mark.parametrize(
    ("draft", "text"),
    [
        (Draft(tokens=17), "draft_tokens=17: must be from 0 to 16"),
        (Draft(tokens=-1), "draft_tokens=-1"),
        (Draft(tokens=1, acceptance=1.0), "acceptance=1.0: must be at least 0 and below 1"),
        (Draft(tokens=2), "draft_tokens=2: meta-llama/Meta-Llama-3.1-8B was published without multi-token prediction"),
    ],
)
def test_impossible_drafts(draft: Draft, text: str) -> None:
    with pytest.raises(SpecError, match=text):
        estimate(**ask(), draft=draft)


BAD: list[tuple[dict[str, Any], str, str]] = [
    (ask(isl=0), "isl", "0"),
    (ask(isl=-5), "isl", "-5"),
    (ask(isl=True), "isl", "True"),
    (ask(isl=10**12), "isl", str(10**12)),
    (ask(isl=1.5), "isl", "1.5"),
    (ask(osl=0), "osl", "0"),
    (ask(osl=1), "osl", "1"),
    (ask(parallelism=Parallelism(cpp=2)), "cpp", "2"),
    (ask(osl=-1), "osl", "-1"),
    (ask(osl=True), "osl", "True"),
    (ask(osl=10**12), "osl", str(10**12)),
    (ask(batch=0), "batch", "0"),
    (ask(batch=-1), "batch", "-1"),
    (ask(batch=True), "batch", "True"),
    (ask(batch=10**12), "batch", str(10**12)),
    (ask(batch="8"), "batch", "'8'"),
    (ask(batch=..., concurrency=0), "concurrency", "0"),
    (ask(batch=..., concurrency=10**12), "concurrency", str(10**12)),
    (ask(concurrency=4), "concurrency", "4"),
    (ask(batch=...), "batch", "None"),
    (ask(gpus=0), "gpus", "0"),
    (ask(gpus=True), "gpus", "True"),
    (ask(gpus=10**12), "gpus", str(10**12)),
    (ask(gpus=3, parallelism=Parallelism(tp=2)), "gpus", "3"),
    (ask(parallelism=Parallelism(tp=3)), "tp", "3"),
    (ask(parallelism=Parallelism(tp=64)), "tp", "64"),
    (ask(parallelism=Parallelism(pp=65)), "pp", "65"),
    (ask(parallelism=Parallelism(dp=2)), "dp", "2"),
    (ask(parallelism=Parallelism(tp=2, ep=2)), "ep", "2"),
    (ask(model=NANO, parallelism=Parallelism(tp=16)), "tp", "16"),
    (ask(model="no-such/model"), "model", "no-such/model"),
    (ask(model=""), "model", "''"),
    (ask(hardware="h9000"), "hardware", "h9000"),
    (ask(backend="llamacpp"), "backend", "llamacpp"),
    (ask(precision="fp3"), "precision", "fp3"),
    (ask(precision="bf16/fp8"), "precision", "bf16/fp8"),
    (ask(precision="bf16/bf16/fp99"), "precision.kv", "fp99"),
    (ask(mode="both"), "mode", "both"),
    (ask(mode="disaggregated"), "mode", "disaggregated"),
    (ask(model="meta-llama/Meta-Llama-3.1-405B"), "tp", "1"),
    (ask(hardware="a10g", isl=131_072, batch=1), "tp", "1"),
]


@pytest.mark.parametrize(("case", "field", "value"), BAD)
def test_a_bad_value_is_named_in_one_line(case: dict[str, Any], field: str, value: str) -> None:
    with pytest.raises(SpecError) as caught:
        estimate(**case)
    text = str(caught.value)
    assert "\n" not in text
    assert f"{field}={value}" in text or f"{field}='{value}'" in text


@pytest.mark.parametrize("field", ["tp", "pp", "ep", "dp", "cpp"])
@pytest.mark.parametrize("value", [0, -1, True, 10**12, 2.0, None])
def test_parallelism_refuses_what_is_no_count(field: str, value: Any) -> None:
    with pytest.raises(SpecError, match=f"^{field}="):
        Parallelism(**{field: value})


def test_parallelism_refuses_what_contradicts_itself() -> None:
    with pytest.raises(SpecError, match="ep=3: must divide tp\\*dp=4"):
        Parallelism(tp=4, ep=3)
    with pytest.raises(SpecError, match="cpp=2"):
        Parallelism(cpp=2, pp=2)


def test_too_big_a_model_says_how_much_it_needs() -> None:
    with pytest.raises(SpecError) as caught:
        estimate(**ask(model="Qwen/Qwen3-32B", hardware="l4"))
    said = re.search(r"needs ([\d,]+) B a GPU, l4 offers ([\d,]+) B", str(caught.value))
    assert said is not None
    needed, offered = (int(number.replace(",", "")) for number in said.groups())
    weights = 2 * load_spec("Qwen/Qwen3-32B").parameters
    assert weights < needed < 1.05 * weights
    assert offered == load_hardware("l4").usable_memory_bytes


def test_a_bad_pool_is_refused_in_a_disaggregated_estimate() -> None:
    one = {"model": LLAMA, "hardware": "h100-sxm", "isl": 1024, "osl": 128}
    odd = Instances(parallelism=Parallelism(tp=3), batch=4)
    for pools in ({"prefill": odd, "decode": POOL}, {"prefill": POOL, "decode": odd}):
        with pytest.raises(SpecError, match="tp=3"):
            estimate_disaggregated(**one, **pools)


@pytest.mark.parametrize("field", ["batch", "replicas"])
@pytest.mark.parametrize("value", [0, -1, True, 2.5, 10**12])
def test_a_pool_refuses_what_is_no_count(field: str, value: Any) -> None:
    with pytest.raises(SpecError, match=f"^{field}="):
        Instances(**{"parallelism": Parallelism(), "batch": 4, field: value})


@pytest.mark.parametrize("value", [0, True, 2.5, 10**12])
def test_a_disaggregated_estimate_refuses_impossible_concurrency(value: Any) -> None:
    with pytest.raises(SpecError, match=r"^concurrency="):
        estimate_disaggregated(
            model=LLAMA, hardware="h100-sxm", isl=1024, osl=128, prefill=POOL, decode=POOL, concurrency=value
        )


def test_a_prefill_pool_that_cannot_hold_the_model_is_refused() -> None:
    with pytest.raises(SpecError, match=r"needs .* B a GPU"):
        estimate_disaggregated(
            model="meta-llama/Meta-Llama-3.1-405B",
            hardware="h100-sxm",
            isl=1024,
            osl=128,
            prefill=POOL,
            decode=Instances(parallelism=Parallelism(tp=8, pp=4), batch=4),
        )


R1_SGLANG = {
    "model": "deepseek-r1", "hardware": "h200-sxm", "backend": "sglang", "isl": 1024, "osl": 1024, "concurrency": 64,
    "parallelism": Parallelism(tp=8, ep=8),
}  # fmt: skip


@pytest.mark.parametrize(
    "beyond",
    [
        {"parallelism": Parallelism(tp=32, ep=32)},
        {"parallelism": Parallelism(tp=4, pp=2)},
        {"isl": 100_000},
        {"draft": Draft(tokens=3)},
        {"mode": "piggybacked"},
        {"concurrency": None, "requests_per_s": 1.0},
    ],
)
def test_beyond_what_was_measured_is_transferred_with_the_wider_interval(beyond: dict[str, Any]) -> None:
    """More GPUs, stages, tokens or drafts than the rows of this setting had, or another way of serving."""
    inside, outside = estimate(**R1_SGLANG), estimate(**R1_SGLANG | beyond)
    assert (inside.evidence, outside.evidence) == ("calibrated", "transferred")
    widths = [(e.tpot_s.high - e.tpot_s.low) / e.tpot_s.value for e in (inside, outside)]
    assert widths[1] > widths[0]


def test_pools_of_a_model_measured_only_together_are_transferred() -> None:
    one = {"model": "minimax-m2.5", "hardware": "b200-sxm", "backend": "vllm", "isl": 1024, "osl": 1024}
    pool = Instances(parallelism=Parallelism(tp=4), batch=16)
    assert estimate(**one, parallelism=Parallelism(tp=4), batch=16).evidence == "calibrated"
    assert estimate_disaggregated(**one, prefill=replace(pool, batch=1), decode=pool).evidence == "transferred"


def test_requests_beyond_the_decode_slots_wait_and_do_not_decode() -> None:
    one = {"model": LLAMA, "hardware": "h100-sxm", "isl": 1000, "osl": 1000}
    pools = {"prefill": replace(POOL, batch=1, replicas=4), "decode": replace(POOL, batch=64)}
    full, crowded = (estimate_disaggregated(**one, **pools, concurrency=n) for n in (64, 640))
    assert (full.waiting, crowded.waiting) == (0, 576)
    assert crowded.tokens_per_s_per_gpu.value <= 64 / crowded.tpot_s.value / 5 * 1000 / 999 * (1 + 1e-6)
    assert crowded.ttft_s.value > 5 * crowded.tpot_s.value * 999


def test_chunked_pipelines_are_left_to_the_planner() -> None:
    one = {"model": LLAMA, "hardware": "h100-sxm", "isl": 1000, "osl": 1000}
    with pytest.raises(SpecError, match="cpp=2: prompts in chunks are priced by find_plan only; use pp here"):
        estimate_disaggregated(**one, prefill=Instances(parallelism=Parallelism(cpp=2), batch=1), decode=POOL)
