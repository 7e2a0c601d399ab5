"""Memory: published numbers, what sharding may and may not do, and a largest batch that is the largest.

Sources: facts/paper-a.md sections 0.2, 1.1, 1.4 and 4.1 (paper A, arXiv:2508.14444) and 4.6 (vLLM load memory).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.perf.costs import Layout
from tandem.perf.divide import refuse_parallelism
from tandem.perf.memory import MemoryModel, ModelMemory, inspect_model, total_weight_bytes
from tandem.spec.catalog import load_hardware, load_spec, model_names
from tandem.spec.design import Parallelism, Precision
from tandem.spec.errors import SpecError
from tandem.spec.model import MLA, MLP, Attention, GatedDeltaNet, Mamba2, ModelSpec, MoE
from tandem.spec.units import GIB

NANO_12B = "nvidia/NVIDIA-Nemotron-Nano-12B-v2"
NANO_9B = "nvidia/NVIDIA-Nemotron-Nano-9B-v2"
QWEN = "Qwen/Qwen3-8B"
SINGLE = Layout(1.0, 1.0, 1.0, 1.0, 1.0)


def loadable() -> list[str]:
    names = []
    for name in model_names():
        try:
            load_spec(name)
        except SpecError:
            continue
        names.append(name)
    return names


NAMES = loadable()


def layout_of(p: Parallelism) -> Layout:
    return Layout(*(float(x) for x in (p.tp, p.pp, p.ep, p.dp, p.cpp)))


@pytest.mark.parametrize(
    ("name", "parameters", "total_gib", "fits"),
    [(NANO_12B, 12_310_001_152, 26.07, False), (NANO_9B, 8_888_227_328, 18.69, True), (QWEN, None, 33.26, False)],
)
def test_128k_tokens_on_an_a10g(name: str, parameters: int | None, total_gib: float, fits: bool) -> None:
    """Paper A section 4.1: 22.06 GiB x 0.95 less 1.3 GiB for a vision encoder leave 19.66 GiB; only the 9B fits."""
    found = inspect_model(load_spec(name), context=131_072, batch=1, dtype="bf16")
    if parameters is not None:
        assert found["parameters"] == parameters
    assert found["total_bytes"] / GIB == pytest.approx(total_gib, abs=0.02)
    budget = load_hardware("a10g").usable_memory_bytes - 1.3 * GIB
    assert budget / GIB == pytest.approx(19.66, abs=0.01)
    assert (found["total_bytes"] <= budget) is fits


@pytest.mark.parametrize(
    ("name", "gib", "tolerance"),
    [
        (NANO_12B, 22.93, 0.005),
        (NANO_9B, 16.56, 0.005),
        ("nvidia/Nemotron-H-8B-Base-8K", 15.09, 0.005),
        ("nvidia/Nemotron-H-56B-Base-8K", 104.9, 0.05),
        ("nvidia/NVIDIA-Nemotron-3-Nano-4B", 7.4, 0.05),
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 58.9, 0.1),
        (QWEN, 15.26, 0.005),
    ],
)
def test_weights_of_the_config_table(name: str, gib: float, tolerance: float) -> None:
    """Section 1.1, column bf16 GiB: two bytes a parameter, to the last printed digit (vLLM's own load for the 30B)."""
    spec = load_spec(name)
    assert total_weight_bytes(spec, Precision()) == 2 * spec.parameters
    assert total_weight_bytes(spec, Precision()) / GIB == pytest.approx(gib, abs=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_weights_are_exactly_two_bytes_a_parameter(name: str) -> None:
    """Two ways to count: memory.py by what can be cut, mixers.py by what there is."""
    assert total_weight_bytes(load_spec(name), Precision()) == 2 * load_spec(name).parameters


def test_fp8_load_memory_of_the_9b() -> None:
    """Section 4.6: vLLM loads the 9B in FP8 into 9.6 GiB; embeddings, head, norms and convolutions stay in bf16."""
    fp8 = total_weight_bytes(load_spec(NANO_9B), Precision.parse("fp8")) / GIB
    assert fp8 == pytest.approx(9.6, rel=0.05)
    assert fp8 > 8_888_227_328 / GIB


def test_state_and_cache_of_the_9b() -> None:
    """Section 1.4: KV 4*2*8*128*2 B = 16 KiB a token; state 27*128*80*128*4 B = 0.132 GiB, plus 2 MiB of windows."""
    spec = load_spec(NANO_9B)
    assert spec.kv_bytes_per_token() == 16_384
    assert load_spec(NANO_12B).kv_bytes_per_token() == 24 * 1024
    assert load_spec(QWEN).kv_bytes_per_token() == 144 * 1024
    assert spec.ssm_bytes() == 27 * 128 * 80 * 128 * 4
    assert spec.ssm_bytes() / GIB == pytest.approx(0.132, abs=0.0005)
    assert spec.ssm_bytes(state="bf16") / GIB == pytest.approx(0.066, abs=0.0005)
    assert spec.conv_bytes() == 27 * (10_240 + 2 * 8 * 128) * 3 * 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("context", [1, 3000, 131_072])
def test_a_sequence_on_one_gpu_is_what_the_specification_says(name: str, context: int) -> None:
    spec, precision = load_spec(name), Precision()
    found = float(ModelMemory(spec, precision).sequence_bytes(SINGLE, float(context)))
    assert found == pytest.approx(spec.kv_bytes(context) + spec.state_bytes_per_sequence(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp4"])
def test_sharding_loses_no_weight_and_tp_lightens_every_gpu(name: str, precision: str) -> None:
    spec, q = load_spec(name), Precision.parse(precision)
    weights, last = ModelMemory(spec, q), np.inf
    total = total_weight_bytes(spec, q)
    for tp in (1, 2, 4, 8):
        for pp, dp, ep in ((1, 1, 1), (2, 1, 1), (1, 1, tp), (1, 4, 4 * tp), (4, 2, 1)):
            p = Parallelism(tp=tp, pp=pp, dp=dp, ep=ep)
            if not refuse_parallelism(spec, p):
                assert float(weights.weight_bytes(layout_of(p))) * p.gpus >= total * (1 - 1e-12), p
        each = float(weights.weight_bytes(layout_of(Parallelism(tp=tp))))
        assert each < last
        last = each


@pytest.mark.parametrize(
    "name", ["deepseek-ai/DeepSeek-R1", "Qwen/Qwen3-30B-A3B", "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8"]
)
def test_experts_are_spread_over_all_gpus_whole_or_in_slices(name: str) -> None:
    """Eight expert groups, four groups of two slices, or eight slices: each GPU holds an eighth of all routed weights."""
    spec = load_spec(name)
    memory = ModelMemory(spec, Precision())
    spread = [float(memory.weight_bytes(Layout(8.0, 1.0, ep, 1.0, 1.0))) for ep in (8.0, 4.0, 1.0)]
    assert spread == pytest.approx([spread[0]] * 3, rel=1e-12)
    bare = replace(spec, layers=tuple(m for m in spec.layers if not isinstance(m, MoE)))
    experts = [m for m in spec.layers if isinstance(m, MoE)]
    routed = sum(m.num_experts * m.expert_parameters(spec.hidden_size) for m in experts)
    always = sum(m.parameters(spec.hidden_size) + spec.hidden_size for m in experts) - routed
    rest = spread[0] - float(ModelMemory(bare, Precision()).weight_bytes(Layout(8.0, 1.0, 1.0, 1.0, 1.0)))
    assert 2 * (routed + always) / 8 <= rest <= 2 * (routed / 8 + always)


def test_the_fullest_stage_holds_whole_layers() -> None:
    """Seven layers on two stages are four and three, and one of embedding and head is on either end."""
    layer = MLP(ffn_size=64, gated=False)
    spec = ModelSpec(name="toy", vocab_size=100, hidden_size=16, layers=(layer,) * 7)
    one_layer, ends = layer.parameters(16) + 16, 100 * 16
    found = float(ModelMemory(spec, Precision()).weight_bytes(Layout(1.0, 2.0, 1.0, 1.0, 1.0)))
    assert found == pytest.approx(2 * (4 * one_layer + ends), abs=2 * 16)
    assert total_weight_bytes(spec, Precision()) == 2 * (7 * one_layer + 2 * ends + 16)


def test_kv_heads_are_copied_once_tp_exceeds_them() -> None:
    """Nemotron-3-Nano has two KV heads: eight GPUs hold four copies, so a GPU's share stops falling at tp=2."""
    memory = ModelMemory(load_spec("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"), Precision())

    def cache(tp: float) -> float:
        layout = Layout(tp, 1.0, 1.0, 1.0, 1.0)
        return float(memory.sequence_bytes(layout, 1000.0) - memory.sequence_bytes(layout, 0.0))

    assert cache(2.0) == cache(1.0) / 2
    assert cache(4.0) == cache(8.0) == cache(2.0)
    latent = ModelMemory(load_spec("deepseek-ai/DeepSeek-R1"), Precision())
    many = Layout(8.0, 1.0, 1.0, 1.0, 1.0)
    assert float(latent.sequence_bytes(many, 9.0)) == float(latent.sequence_bytes(SINGLE, 9.0)) == 61 * 576 * 2 * 9


def test_recurrent_state_is_cut_by_tp_and_pp_and_never_grows() -> None:
    spec = load_spec(NANO_9B)
    memory, s0 = ModelMemory(spec, Precision()), spec.state_bytes_per_sequence()
    for tp, pp in ((1, 1), (2, 1), (4, 2), (8, 4)):
        assert float(memory.sequence_bytes(Layout(tp, pp, 1.0, 1.0, 1.0), 0.0)) == pytest.approx(s0 / tp / pp)
    pure = ModelSpec(name="pure", vocab_size=8, hidden_size=8, layers=tuple(m for m in spec.layers if isinstance(m, Mamba2)))
    grown = ModelMemory(pure, Precision()).sequence_bytes(SINGLE, 1e6)
    assert float(grown) == float(ModelMemory(pure, Precision()).sequence_bytes(SINGLE, 0.0)) == s0


toy_layers = st.lists(
    st.one_of(
        st.builds(Attention, num_heads=st.just(8), num_kv_heads=st.sampled_from([1, 2, 8]), head_dim=st.just(128)),
        st.builds(Attention, num_heads=st.just(8), num_kv_heads=st.just(2), head_dim=st.just(64), window=st.integers(1, 9000)),
        st.builds(MLA, num_heads=st.just(8), q_lora_rank=st.none(), kv_lora_rank=st.just(512), qk_nope_head_dim=st.just(64),
                  qk_rope_head_dim=st.just(64), v_head_dim=st.just(64)),
        st.builds(Mamba2, num_heads=st.just(8), head_dim=st.just(64), state_dim=st.just(128), groups=st.sampled_from([1, 8])),
        st.builds(GatedDeltaNet, num_key_heads=st.just(8), key_head_dim=st.just(64), num_value_heads=st.just(16),
                  value_head_dim=st.just(128)),
        st.builds(MLP, ffn_size=st.sampled_from([4096, 65_536]), gated=st.booleans()),
    ), min_size=4, max_size=12)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(toy_layers, st.integers(1, 200_000), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2]), st.integers(1, 16_384))
def test_max_batch_is_the_largest_that_fits(layers: list[Attention], context: int, tp: int, pp: int, step: int) -> None:
    spec = ModelSpec(name="toy", vocab_size=32_000, hidden_size=2048, layers=tuple(layers))
    layout = Layout(float(tp), float(pp), 1.0, 1.0, 1.0)
    gpu = load_hardware("a10g")
    use = MemoryModel(spec, Precision(), gpu).use(layout, float(context), float(step))
    if float(use.sequence_bytes) < 1:
        return  # nothing but feed-forward layers: sequences are free

    def needed(batch: float) -> float:
        return float(use.weight_bytes + use.workspace_bytes + batch * use.sequence_bytes)

    best = float(use.max_batch(layout))
    assert best == int(best)
    if best > 0:
        assert needed(best) <= gpu.usable_memory_bytes * (1 + 1e-12)
    assert needed(best + 1) > gpu.usable_memory_bytes * (1 - 1e-12)


def test_attention_groups_each_hold_their_own_sequences() -> None:
    """dp groups hold dp times the sequences of one; experts are shared, so the weights of a GPU do not grow."""
    memory = MemoryModel(load_spec("deepseek-ai/DeepSeek-R1"), Precision.parse("fp4"), load_hardware("b200-sxm"))
    layout = Layout(1.0, 1.0, 8.0, 8.0, 1.0)
    use = memory.use(layout, 10_000.0)
    group = np.floor((use.usable_bytes - use.weight_bytes - use.workspace_bytes) / use.sequence_bytes)
    assert float(use.max_batch(layout)) == 8 * float(group) > 0


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([NANO_9B, QWEN]), st.integers(1, 100_000), st.integers(1, 50_000))
def test_longer_sequences_never_raise_the_batch(name: str, context: int, more: int) -> None:
    memory = MemoryModel(load_spec(name), Precision(), load_hardware("h100-sxm"))
    batches = memory.use(SINGLE, np.array([float(context), float(context + more)])).max_batch(SINGLE)
    assert batches[0] >= batches[1] >= 0


@pytest.mark.parametrize(
    ("field", "value"), [("context", 0), ("context", -1), ("context", 10**12), ("batch", 0), ("batch", True)]
)
def test_inspect_refuses_impossible_sizes(field: str, value: int) -> None:
    with pytest.raises(SpecError, match=f"{field}={value}"):
        inspect_model(load_spec(NANO_9B), **{"context": 1024, "batch": 1, field: value})
