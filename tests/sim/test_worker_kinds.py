from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.perf.costs import Layout
from tandem.perf.estimate import perf_model
from tandem.perf.memory import DEFAULT_STEP_TOKENS
from tandem.perf.phases import PerfModel
from tandem.perf.pools import exposed_transfer_s
from tandem.sched.batch import Chunk
from tandem.sched.request import Request
from tandem.sim.build import config_of, decode_step_s, kind_of
from tandem.spec.design import Deployment, Parallelism, Pool
from tandem.spec.errors import SpecError
from tandem.spec.workload import Trace, Workload

TP1, TP2 = Parallelism(), Parallelism(tp=2)
CASES = {
    "full attention": ("llama-3.1-8b", "h100-sxm", TP1),
    "hybrid": ("nvidia/NVIDIA-Nemotron-Nano-9B-v2", "h100-sxm", TP1),
    "MLA": ("deepseek-r1", "h200-sxm", Parallelism(dp=16, ep=16)),
    "sliding window": ("gpt-oss-120b", "h200-sxm", TP2),
    "pipeline": ("qwen3-8b", "h100-sxm", Parallelism(tp=2, pp=2)),
}


def case(name: str) -> tuple[PerfModel, Parallelism, Layout]:
    model, hardware, parallelism = CASES[name]
    return perf_model(model, hardware, None, "vllm"), parallelism, Layout.of(parallelism)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(CASES)),
    batch=st.integers(1, 256),
    context=st.floats(300.0, 30_000.0),
    off=st.floats(0.5, 2.0),
)
def test_a_decode_step_of_the_table_is_that_of_the_model(name: str, batch: int, context: float, off: float) -> None:
    perf, parallelism, layout = case(name)
    times = kind_of(perf, Pool(parallelism=parallelism, batch=256), context=context * off).times
    direct = float(decode_step_s(perf, layout, np.array([float(batch)]), context)[0])
    assert times.decode_s(batch, batch * context) == pytest.approx(direct, rel=0.005)


def test_within_the_reach_of_a_window_a_decode_step_is_a_chord() -> None:
    perf, parallelism, layout = case("sliding window")
    times = kind_of(perf, Pool(parallelism=parallelism, batch=256)).times
    ratio = {
        context: times.decode_s(256, 256 * context) / float(decode_step_s(perf, layout, np.array([256.0]), context)[0])
        for context in (16.0, 64.0, 256.0)
    }
    assert 1.0 < ratio[64.0] < ratio[16.0] < 1.01
    assert ratio[256.0] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("prior", [0.0, 4096.0])
def test_a_chunk_of_the_usual_size_takes_what_the_model_says(name: str, prior: float) -> None:
    perf, parallelism, layout = case(name)
    times = kind_of(perf, Pool(parallelism=parallelism, batch=64, chunk_tokens=DEFAULT_STEP_TOKENS)).times
    isl = 2 * prior + DEFAULT_STEP_TOKENS
    chunks = isl / DEFAULT_STEP_TOKENS
    kernels_s = perf.prefill_kernels_s(layout, 1.0, isl, chunks, busy_groups=1 / parallelism.dp) / chunks
    direct = perf.prompt_cost * float(kernels_s) + perf.backend_fit.step_s + perf.backend_fit.sequence_s
    assert times.prefill_s(DEFAULT_STEP_TOKENS, int(prior)) == pytest.approx(direct, rel=1e-3)


def test_chunks_in_all_attention_groups_take_what_the_model_says_of_all() -> None:
    perf, parallelism, layout = case("MLA")
    times = kind_of(perf, Pool(parallelism=parallelism, batch=64, chunk_tokens=2048)).times
    chunks = [Chunk(Request(id=str(i), isl=2048, max_tokens=1, arrival_s=0.0), 2048) for i in range(parallelism.dp)]
    kernels_s = float(perf.prefill_kernels_s(layout, 1.0, 2048.0, 1.0, busy_groups=1.0))
    direct = perf.prompt_cost * kernels_s + perf.backend_fit.step_s + perf.backend_fit.sequence_s
    assert times.chunks_s(0, 0.0, chunks) == pytest.approx(direct, rel=0.005)
    assert times.chunks_s(0, 0.0, chunks[:1]) < 0.9 * direct


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(sorted(CASES)), batch=st.integers(1, 64), fewer=st.integers(1, 4000), more=st.integers(0, 4000))
def test_more_prompt_tokens_never_take_less(name: str, batch: int, fewer: int, more: int) -> None:
    perf, parallelism, _ = case(name)
    times = kind_of(perf, Pool(parallelism=parallelism, batch=64, chunk_tokens=2048)).times
    context = 1000.0 * batch
    few = times.mixed_step_s(batch, context, fewer, fewer * fewer / 2)
    many = times.mixed_step_s(batch, context, fewer + more, (fewer + more) ** 2 / 2)
    assert times.decode_s(batch, context) <= few <= many + 1e-12
    assert times.prefill_s(fewer, 0) <= times.prefill_s(fewer + more, 0) + 1e-12
    assert times.prefill_s(fewer, 0) <= times.prefill_s(fewer, more)


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(["full attention", "hybrid", "MLA", "pipeline"]), batch=st.integers(1, 128))
def test_blocks_fill_what_memory_leaves_and_no_more(name: str, batch: int) -> None:
    perf, parallelism, layout = case(name)
    kind = kind_of(perf, Pool(parallelism=parallelism, batch=batch, role="decode"))
    use = perf.memory.use(layout, 0.0, float(-(-batch // (parallelism.dp * parallelism.pp))))
    group_batch = -(-batch // parallelism.dp)
    per_token = float(perf.memory.sequence_bytes(layout, 1.0)) - float(use.sequence_bytes)

    def held(blocks: float) -> float:
        cached = blocks * kind.limits.block_size * per_token
        return float(use.weight_bytes) + float(use.workspace_bytes) + group_batch * float(use.sequence_bytes) + cached

    each = kind.blocks / parallelism.dp
    assert held(each) <= use.usable_bytes * (1 + 1e-9)
    assert held(each + 1) > use.usable_bytes * (1 - 1e-9)


def test_what_a_plan_calls_the_largest_batch_has_its_blocks() -> None:
    for name in ("full attention", "hybrid"):
        perf, parallelism, layout = case(name)
        batch = int(perf.memory.use(layout, 4096.0, 512.0).max_batch(layout))
        kind = kind_of(perf, Pool(parallelism=parallelism, batch=batch, role="decode"), context=4096.0)
        assert kind.blocks * kind.limits.block_size >= batch * 4096 * 0.999


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(["full attention", "hybrid", "MLA", "pipeline"]), tokens=st.integers(1, 100_000))
def test_a_state_on_its_way_is_as_large_and_as_slow_as_the_model_says(name: str, tokens: int) -> None:
    perf, parallelism, layout = case(name)
    times = kind_of(perf, Pool(parallelism=parallelism, batch=8, role="prefill")).times
    assert times.transfer_bytes(tokens) == pytest.approx(float(perf.memory.sequence_bytes(layout, float(tokens))), rel=1e-6)
    exposed = exposed_transfer_s(perf, layout, Workload.fixed(tokens, 1), np.array([times.prefill_s(tokens, 0)]))
    assert times.transfer_s(tokens) == pytest.approx(float(exposed[0]), rel=1e-6)


def test_chunked_pipeline_stages_divide_a_prompt_and_add_the_fill() -> None:
    perf = perf_model("llama-3.1-8b", "h100-sxm", None, "vllm")
    one = kind_of(perf, Pool(parallelism=TP1, batch=1, role="prefill", chunk_tokens=2048)).times
    four = kind_of(perf, Pool(parallelism=Parallelism(cpp=4), batch=1, role="prefill", chunk_tokens=2048)).times
    assert four.groups == one.groups == 1
    assert four.prefill_s(2048, 0) == pytest.approx(one.prefill_s(2048, 0) / 4, rel=0.05)  # stages also pass activations on
    assert four.first_token_s - one.first_token_s == pytest.approx(3 * four.prefill_s(2048, 0), rel=0.05)


def test_limits_are_those_that_were_planned() -> None:
    perf = perf_model("qwen3-8b", "h100-sxm", None, "vllm")
    chunked = kind_of(perf, Pool(parallelism=TP1, batch=48, chunk_tokens=1024)).limits
    assert (chunked.max_batch, chunked.step_tokens, chunked.pass_tokens) == (48, 1024, 1)
    grouped = kind_of(perf, Pool(parallelism=Parallelism(pp=2), batch=8, role="prefill", chunk_tokens=4096))
    assert grouped.limits.step_tokens == 8192
    assert grouped.limits.max_batch > 8
    assert grouped.times.groups == grouped.gpus == 2
    ours = kind_of(perf_model("qwen3-8b", "h100-sxm", None, "tandem"), Pool(parallelism=TP1, batch=8))
    assert ours.limits.pass_tokens == 256


def test_a_kind_costs_what_its_gpus_cost_and_starts_as_fast_as_its_weights() -> None:
    perf = perf_model("qwen3-8b", "h100-sxm", None, "vllm")
    one, two = (kind_of(perf, Pool(parallelism=p, batch=8)) for p in (TP1, TP2))
    assert two.price_per_hour_usd == 2 * one.price_per_hour_usd == 2 * perf.hardware.price_per_hour_usd
    assert 30.0 < two.start_up_s < one.start_up_s
    assert kind_of(perf, Pool(parallelism=TP1, batch=8), start_up_s=5.0).start_up_s == 5.0


def test_what_does_not_fit_is_refused() -> None:
    hybrid = perf_model("nvidia/NVIDIA-Nemotron-Nano-9B-v2", "h100-sxm", None, "vllm")
    with pytest.raises(SpecError, match=r"max_batch=2000: .*use more GPUs or fewer"):
        kind_of(hybrid, Pool(parallelism=TP1, batch=2000, role="decode"))
    large = perf_model("llama-3.1-70b", "h100-sxm", None, "vllm")
    with pytest.raises(SpecError, match="max_batch=1: "):
        kind_of(large, Pool(parallelism=TP1, batch=1))
    with pytest.raises(SpecError, match="tp"):
        kind_of(large, Pool(parallelism=Parallelism(tp=3), batch=1))


def test_a_deployment_becomes_its_pools() -> None:
    deployment = Deployment(
        model="qwen3-8b",
        hardware="h100-sxm",
        prefill=Pool(parallelism=TP1, batch=2, replicas=2, role="prefill"),
        decode=Pool(parallelism=TP2, batch=64, replicas=3, role="decode"),
    )
    config = config_of(deployment, window_s=10.0, start_up_s=40.0)
    assert [(g.role, g.count, g.kind.gpus, g.kind.start_up_s) for g in config.groups] == [
        ("prefill", 2, 1, 40.0),
        ("decode", 3, 2, 40.0),
    ]
    assert config.window_s == 10.0
    split = perf_model("qwen3-8b", "h100-sxm", None, "vllm")
    assert config.groups[1].kind.times.base_s[64] != kind_of(split, deployment.pools[1]).times.base_s[64]  # fit of split pools


def test_chords_are_laid_where_the_traffic_is() -> None:
    perf = perf_model("gpt-oss-120b", "h200-sxm", None, "vllm")
    pool = Pool(parallelism=TP2, batch=64, chunk_tokens=2048)
    deployment = Deployment(model="gpt-oss-120b", hardware="h200-sxm", precision=perf.precision, colocated=pool)
    tokens = np.full(4, 40, dtype=np.int64)
    short = Trace(name="short", arrival_s=np.arange(4.0), isl=tokens, osl=tokens // 2)
    direct = float(decode_step_s(perf, Layout.of(TP2), np.array([64.0]), 50.0)[0])
    near, far = (config_of(deployment, trace=t).groups[0].kind.times.decode_s(64, 64 * 50.0) for t in (short, None))
    assert near == pytest.approx(direct, rel=1e-5)
    assert abs(far - direct) > 100 * abs(near - direct)
