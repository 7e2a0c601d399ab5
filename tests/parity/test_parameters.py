"""Our parameter count against the model that transformers builds from the same config.json, on the meta device.

What is compared: every tensor that a checkpoint of the language model holds. That is the model's parameters, tied
weights once, plus the one buffer that checkpoints store, the router's `e_score_correction_bias` (one number an expert).
Of multimodal models the text part is built. Layers for multi-token prediction are left out on both sides: transformers
does not build them.

transformers 5.23 builds every model of the catalogue, so none is left out. It has no class for `kimi_k2`, whose
checkpoints name DeepSeek-V3's classes; those are built instead.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from tandem.spec.catalog import load_spec, model_names
from tandem.spec.huggingface import read_config

SAME_CLASSES = {"kimi_k2": "deepseek_v3"}
CHECKPOINT_BUFFERS = {"e_score_correction_bias"}


def checkpoint_numbers(config: dict[str, Any]) -> int:
    """Numbers in a checkpoint of the language model that `config` describes."""
    text = dict(config.get("text_config", config))
    for field in ("quantization_config", "auto_map"):
        text.pop(field, None)
    model_type = text.pop("model_type")
    built = CONFIG_MAPPING[SAME_CLASSES.get(model_type, model_type)].from_dict(text)
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(built)
        model.tie_weights()
    stored = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in stored}
    assert {name.rpartition(".")[2] for name in buffers} <= CHECKPOINT_BUFFERS
    return sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in buffers.values())


def catalogue_config(name: str) -> dict[str, Any]:
    file = resources.files("tandem.spec") / "data" / "models" / f"{name.replace('/', '--')}_config.json"
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", model_names())
def test_catalogue_model_has_the_parameters_of_its_tensors(name: str) -> None:
    assert load_spec(name).parameters == checkpoint_numbers(catalogue_config(name))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("nano-12b-v2", 12_310_001_152), ("nano-9b-v2", 8_888_227_328), ("nemotron-h-8b", 8_100_852_736)],
)
def test_paper_a_counts(name: str, parameters: int) -> None:
    """facts/paper-a.md section 1.1, computed there from the papers' tables."""
    assert load_spec(name).parameters == parameters


BLOCK = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DELTA = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_value_head_dim": 12,
}
SHARED = {"shared_expert_intermediate_size": 20}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
HYBRID = {
    "hybrid_override_pattern": "M*-EM",
    "num_hidden_layers": 5,
    "mamba_num_heads": 8,
    "mamba_head_dim": 12,
    "ssm_state_size": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "mlp_hidden_act": "relu2",
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
}
SMALL: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama without head_dim": {"model_type": "llama", "head_dim": None},
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"head_dim": None},
    "qwen3 with biases": {"model_type": "qwen3", "attention_bias": True},
    "qwen3_moe": {**EXPERTS, "mlp_only_layers": [1], "decoder_sparse_step": 1},
    "qwen3_moe every second layer": {"model_type": "qwen3_moe", **EXPERTS, "decoder_sparse_step": 2},
    "qwen3_next": {**EXPERTS, **DELTA, **SHARED},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**EXPERTS, **DELTA, **SHARED},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "deepseek_v3": LATENT,
    "deepseek_v3 without query rank": {"model_type": "deepseek_v3", **LATENT, "q_lora_rank": None},
    "deepseek_v32": {**LATENT, "index_n_heads": 3, "index_head_dim": 8, "index_topk": 16},
    "glm_moe_dsa": {**LATENT, "index_n_heads": 3, "index_head_dim": 8, "index_topk": 16},
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2, "attention_bias": True, "sliding_window": 8},
    "minimax_m2": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "llama4_text": {
        "num_local_experts": 6,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 56,
        "attention_chunk_size": 16,
    },
    "nemotron_h": HYBRID,
    "nemotron_h with latent experts": {"model_type": "nemotron_h", **HYBRID, "moe_latent_size": 10},
    "nemotron_h with biases": {
        "model_type": "nemotron_h",
        **HYBRID,
        "hybrid_override_pattern": "M*-M",
        "num_hidden_layers": 4,
        "use_bias": True,
        "mamba_proj_bias": True,
        "use_conv_bias": False,
        "mlp_bias": True,
    },
}


@pytest.mark.parametrize("kind", SMALL)
def test_every_switch_of_an_architecture_is_counted(kind: str) -> None:
    config = {**BLOCK, "model_type": kind, **SMALL[kind]}
    if config["model_type"] == "nemotron_h":
        config.pop("hidden_act")
    config = {field: value for field, value in config.items() if value is not None or field == "q_lora_rank"}
    assert read_config(config, name=kind).parameters == checkpoint_numbers(config)
