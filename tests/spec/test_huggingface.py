from __future__ import annotations

import copy
import json
from contextlib import suppress
from importlib import resources
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.spec.errors import SpecError
from tandem.spec.huggingface import native_precision, read_config
from tandem.spec.model import MLA, MLP, Attention, GatedDeltaNet, Mamba2, Mixer, ModelSpec, MoE, Rope, SparseIndex

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}
FILES = sorted(f.name for f in (resources.files("tandem.spec") / "data" / "models").iterdir() if f.name.endswith(".json"))


def published(organisation_and_name: str) -> dict[str, Any]:
    file = resources.files("tandem.spec") / "data" / "models" / f"{organisation_and_name}_config.json"
    return json.loads(file.read_text(encoding="utf-8"))


def read(config: dict[str, Any]) -> ModelSpec:
    return read_config(config, name="test")


def windows(spec: ModelSpec) -> list[int | None]:
    return [m.window for m in spec.layers if isinstance(m, Attention)]


def test_a_block_becomes_two_layers_of_one_mixer() -> None:
    spec = read(LLAMA)
    assert (
        spec.layers
        == (Attention(num_heads=4, num_kv_heads=2, head_dim=8, rope=Rope(theta=10000.0)), MLP(ffn_size=48, gated=True)) * 4
    )
    assert (spec.vocab_size, spec.hidden_size, spec.max_context) == (96, 32, 64)
    assert not spec.tied_embeddings


def test_the_input_is_left_alone() -> None:
    config = published("Qwen--Qwen3.5-27B")
    before = copy.deepcopy(config)
    read(config)
    assert config == before


@pytest.mark.parametrize("field", [k for k in LLAMA if k not in ("architectures", "model_type", "hidden_act")])
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(SpecError, match=rf"^{field}: missing"):
        read({k: v for k, v in LLAMA.items() if k != field})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": None}, "model_type=None"),
        ({"model_type": "gemma4"}, "model_type='gemma4': not supported; supported are .*llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures='LlamaForSequenceClassification'"),
        ({"hidden_size": "32"}, "hidden_size='32'"),
        ({"hidden_size": 32.0}, "hidden_size=32.0"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"mlp_bias": "yes"}, "mlp_bias='yes'"),
        ({"hidden_act": "relu2"}, "hidden_act='relu2'"),
        ({"quantization_config": "fp8"}, "quantization_config='fp8'"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quant_method='hqq'"),
        ({"attention_multiplier": 0.5}, "attention_multiplier=0.5: unknown for model_type llama"),
        ({"sliding_window": 8}, "sliding_window=8: unknown"),
    ],
)
def test_a_bad_field_is_named_with_its_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        read({**LLAMA, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [None, [], "llama"])
def test_a_config_is_an_object(config: Any) -> None:
    with pytest.raises(SpecError, match="JSON object"):
        read(config)


@given(
    st.text(min_size=1).map(lambda text: "x_" + text),
    st.one_of(st.just(True), st.integers(), st.floats(), st.text(min_size=1)),
)
def test_an_unknown_field_with_a_value_is_refused(field: str, value: object) -> None:
    with pytest.raises(SpecError, match="might change the arithmetic"):
        read({**LLAMA, field: value})


@given(st.text(min_size=1).map(lambda text: "x_" + text), st.sampled_from([None, False, "", [], {}]))
def test_an_unknown_field_without_a_value_changes_nothing(field: str, value: object) -> None:
    assert read({**LLAMA, field: value}) == read(LLAMA)


@pytest.mark.parametrize("file", FILES)
def test_every_published_file_refuses_an_addition(file: str) -> None:
    config = published(file.removesuffix("_config.json"))
    for holder in (config, config.get("text_config", config)):
        holder["use_new_feature"] = 7
        with pytest.raises(SpecError, match=r"use_new_feature|deepseek_v4"):
            read(config)
        del holder["use_new_feature"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@given(st.sampled_from(FILES), st.data())
def test_nothing_but_a_spec_error_comes_out_of_a_spoiled_file(file: str, data: st.DataObject) -> None:
    """Any field of a published configuration may turn into any JSON value, down to the quantisation groups."""
    config = published(file.removesuffix("_config.json"))
    holder = config
    field = data.draw(st.sampled_from(sorted(holder)))
    while isinstance(holder[field], dict) and holder[field] and data.draw(st.booleans()):
        holder = holder[field]
        field = data.draw(st.sampled_from(sorted(holder)))
    holder[field] = data.draw(json_values)
    with suppress(SpecError):
        assert read(config).parameters > 0


@given(json_values)
def test_nothing_but_a_spec_error_comes_out_of_a_spoiled_specification(value: object) -> None:
    good = read(LLAMA).to_json()
    for spoiled in (value, {**good, "layers": value}, {**good, "layers": [value]}, {**good, "omitted": value}):
        with suppress(SpecError):
            ModelSpec.from_json(spoiled)  # type: ignore[arg-type]


def test_deepseek_v4_says_what_is_missing() -> None:
    with pytest.raises(SpecError, match="compressed attention and hyper-connections are not modelled"):
        read(published("deepseek-ai--DeepSeek-V4-Pro"))


def test_nemotron_h_reads_both_spellings_of_its_pattern() -> None:
    config = published("nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16")
    words = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
    listed = {k: v for k, v in config.items() if k != "hybrid_override_pattern"}
    listed["layers_block_type"] = [words[letter] for letter in config["hybrid_override_pattern"]]
    assert read(listed) == read(config)
    listed["layers_block_type"][0] = "moe"
    with pytest.raises(SpecError, match="contradicts"):
        read({**listed, "hybrid_override_pattern": config["hybrid_override_pattern"]})


@pytest.mark.parametrize(("pattern", "layers"), [("MX", 2), ("", 0), (7, 1), ("M*-", 4)])
def test_nemotron_h_refuses_a_bad_pattern(pattern: object, layers: int) -> None:
    config = published("nvidia--NVIDIA-Nemotron-Nano-9B-v2")
    with pytest.raises(SpecError, match="hybrid_override_pattern"):
        read({**config, "hybrid_override_pattern": pattern, "num_hidden_layers": layers})


def test_nemotron_h_reads_latent_experts() -> None:
    spec = read(published("nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-FP8"))
    moe = next(m for m in spec.layers if isinstance(m, MoE))
    assert (moe.latent_size, moe.gated, moe.shared_ffn_size, moe.num_experts, moe.top_k) == (1024, False, 5376, 512, 22)
    assert spec.omitted == ("multi-token prediction",)
    assert spec.native_precision == "fp8"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [None] * 4),
        ({"sliding_window": 8, "max_window_layers": 2}, [None] * 4),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, [None, None, None, 8]),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            [None, 8, None, 8],
        ),
    ],
)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwen_windows(model_type: str, change: dict[str, Any], expected: list[int | None]) -> None:
    assert windows(read({**LLAMA, "model_type": model_type, **change})) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"layer_types": ["sliding_attention"] * 4},
        {"use_sliding_window": True, "sliding_window": 8},
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 3},
        {"layer_types": ["mystery_attention"] * 4},
        {"layer_types": "full_attention"},
    ],
)
def test_qwen_refuses_half_a_window(change: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"layer_types|max_window_layers"):
        read({**LLAMA, "model_type": "qwen2", **change})


def test_gpt_oss_alternates_windows() -> None:
    spec = read(published("openai--gpt-oss-20b"))
    assert windows(spec) == [128, None] * 12
    assert spec.native_precision == "mxfp4"
    assert all(m.sinks and m.out_bias for m in spec.layers if isinstance(m, Attention))


def test_llama4_attends_in_chunks_but_every_fourth_layer() -> None:
    spec = read(published("meta-llama--Llama-4-Scout-17B-16E-Instruct"))
    assert windows(spec) == [8192, 8192, 8192, None] * 12
    assert [m.qk_norm for m in spec.layers if isinstance(m, Attention)] == (
        ["unweighted", "unweighted", "unweighted", "none"] * 12
    )
    assert spec.omitted == ("vision encoder",)


def test_qwen3_5_is_three_quarters_linear() -> None:
    spec = read(published("Qwen--Qwen3.5-35B-A3B"))
    kinds = [type(m) for m in spec.layers[::2]]
    assert kinds == [GatedDeltaNet, GatedDeltaNet, GatedDeltaNet, Attention] * 10
    assert spec.omitted == ("vision encoder", "multi-token prediction")
    assert all(m.output_gate for m in spec.layers if isinstance(m, Attention))


def test_deepseek_v32_has_an_index_and_v3_has_none() -> None:
    sparse, full = (read(published(f"deepseek-ai--DeepSeek-{v}")).layers[0] for v in ("V3.2", "R1"))
    assert isinstance(sparse, MLA)
    assert isinstance(full, MLA)
    assert sparse.index == SparseIndex(num_heads=64, head_dim=128, top_k=2048)
    assert full.index is None
    config = {k: v for k, v in published("deepseek-ai--DeepSeek-V3.2").items() if k != "index_topk"}
    with pytest.raises(SpecError, match="index_topk: missing"):
        read(config)


def test_shared_indexers_are_refused() -> None:
    config = published("zai-org--GLM-5")
    full = ["full"] * config["num_hidden_layers"]
    assert read({**config, "indexer_types": full}) == read(config)
    with pytest.raises(SpecError, match="indexer_types"):
        read({**config, "indexer_types": [*full[:-1], "shared"]})


def test_a_wrapper_needs_the_right_text_model() -> None:
    config = published("Qwen--Qwen3.5-27B")
    with pytest.raises(SpecError, match="text_config: missing"):
        read({**config, "text_config": None})
    with pytest.raises(SpecError, match=r"text_config\.model_type='llama'"):
        read({**config, "text_config": {**config["text_config"], "model_type": "llama"}})


def compressed(bits: int, kind: str, strategy: str = "group", packed: str = "pack-quantized") -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy}
    return {"quant_method": "compressed-tensors", "format": packed, "config_groups": {"group_0": {"weights": weights}}}


@pytest.mark.parametrize(
    ("quantisation", "precision"),
    [
        (None, "bf16"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "fp4"),
        ({"quant_algo": "FP8"}, "fp8"),
        (compressed(4, "int"), "int4"),
        (compressed(8, "float", "channel"), "fp8"),
        (compressed(8, "float", "block"), "fp8_block"),
        (compressed(4, "float", packed="nvfp4-pack-quantized"), "fp4"),
        (compressed(4, "float", packed="mxfp4-pack-quantized"), "mxfp4"),
    ],
)
def test_native_precision(quantisation: dict[str, Any] | None, precision: str) -> None:
    config = {**LLAMA, "quantization_config": quantisation}
    assert native_precision(config) == precision
    assert read(config).native_precision == precision


@pytest.mark.parametrize(
    "quantisation",
    [
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
        {"quant_method": "compressed-tensors"},
        compressed(3, "int"),
        {"weight_block_size": [128, 128]},
    ],
)
def test_a_number_format_that_is_not_known_is_refused(quantisation: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="quantization_config"):
        native_precision({"quantization_config": quantisation})


small = st.integers(1, 5)
attention = st.builds(
    lambda kv, ratio, **rest: Attention(num_heads=kv * ratio, num_kv_heads=kv, **rest),
    small,
    small,
    head_dim=small,
    window=st.none() | st.integers(1, 99),
    qk_norm=st.sampled_from(["none", "head", "full", "unweighted"]),
    qkv_bias=st.booleans(),
    out_bias=st.booleans(),
    output_gate=st.booleans(),
    sinks=st.booleans(),
)
latent = st.builds(
    MLA,
    num_heads=small,
    q_lora_rank=st.none() | small,
    kv_lora_rank=small,
    qk_nope_head_dim=small,
    qk_rope_head_dim=small,
    v_head_dim=small,
    index=st.none() | st.builds(SparseIndex, num_heads=small, head_dim=small, top_k=small),
)
mamba = st.builds(
    lambda groups, ratio, **rest: Mamba2(num_heads=groups * ratio, groups=groups, **rest),
    small,
    small,
    head_dim=small,
    state_dim=small,
    conv_bias=st.booleans(),
    proj_bias=st.booleans(),
)
delta = st.builds(
    lambda keys, ratio, **rest: GatedDeltaNet(num_key_heads=keys, num_value_heads=keys * ratio, **rest),
    small,
    small,
    key_head_dim=small,
    value_head_dim=small,
)
mlp = st.builds(MLP, ffn_size=small, gated=st.booleans(), bias=st.booleans())
moe = st.builds(
    lambda top_k, more, **rest: MoE(num_experts=top_k + more, top_k=top_k, **rest),
    small,
    st.integers(0, 5),
    ffn_size=small,
    gated=st.booleans(),
    shared_ffn_size=st.integers(0, 5),
    latent_size=st.none() | small,
    bias=st.booleans(),
    router_bias=st.booleans(),
    shared_gate=st.booleans(),
)
mixers: st.SearchStrategy[Mixer] = st.one_of(attention, latent, mamba, delta, mlp, moe)
specs = st.builds(
    ModelSpec,
    name=st.just("random"),
    vocab_size=small,
    hidden_size=small,
    layers=st.lists(mixers, min_size=1, max_size=6).map(tuple),
    tied_embeddings=st.booleans(),
    omitted=st.sampled_from([(), ("vision encoder",)]),
)


@given(specs)
def test_json_round_trip(spec: ModelSpec) -> None:
    again = ModelSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert again.parameters == spec.parameters


@given(specs)
def test_parameters_are_the_sum_over_layers(spec: ModelSpec) -> None:
    h, v = spec.hidden_size, spec.vocab_size
    tables = v * h if spec.tied_embeddings else 2 * v * h
    assert spec.parameters == tables + h + sum(m.parameters(h) + h for m in spec.layers)
    assert 0 < spec.active_parameters <= spec.parameters


@given(specs, mixers)
def test_one_more_layer_costs_what_it_holds(spec: ModelSpec, layer: Mixer) -> None:
    longer = ModelSpec.from_json({**spec.to_json(), "layers": spec.to_json()["layers"] + _one(layer)})
    assert longer.parameters - spec.parameters == layer.parameters(spec.hidden_size) + spec.hidden_size


def _one(layer: Mixer) -> list[dict[str, Any]]:
    return ModelSpec(name="one", vocab_size=1, hidden_size=1, layers=(layer,)).to_json()["layers"]
