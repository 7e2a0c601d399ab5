"""The layers of each supported architecture, from its configuration fields.

Each function reads what its architecture needs and returns the layers, one mixer each. Where a field may be left
out, the default is that of the `transformers` configuration class of the same name (5.23); `tests/parity` compares the
counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tandem.spec._hf_fields import ROUTING, Fields, check_length, field_names
from tandem.spec._hf_parts import attention, gated_mlp, moe, sigmoid_routing
from tandem.spec.errors import SpecError
from tandem.spec.model import MLA, MLP, Attention, GatedDeltaNet, Mamba2, Mixer, MoE, SparseIndex

_FULL, _SLIDING, _CHUNKED, _LINEAR = "full_attention", "sliding_attention", "chunked_attention", "linear_attention"


class Architecture(NamedTuple):
    """How a model type is read, and which of its fields do not change the arithmetic."""

    layers: Callable[[Fields], tuple[Mixer, ...]]
    ignored: frozenset[str] = frozenset()
    norm_eps: float = 1e-6


def _interleave(mixers: list[Mixer], feed_forward: list[Mixer]) -> tuple[Mixer, ...]:
    return tuple(mixer for block in zip(mixers, feed_forward, strict=True) for mixer in block)


def _windows(f: Fields, *, first_is_full: bool = True) -> list[int | None]:
    """Qwen's sliding window of each layer: off by default; the first `max_window_layers` layers keep full attention."""
    n = f.size("num_hidden_layers")
    window, full_below = f.optional_size("sliding_window"), f.optional_size("max_window_layers", low=0)
    kinds = f.words("layer_types", (_FULL, _SLIDING))
    if not f.flag("use_sliding_window") or window is None:
        if kinds and _SLIDING in kinds:
            raise SpecError("layer_types holds 'sliding_attention': needs use_sliding_window and sliding_window")
        return [None] * n
    if kinds is not None:
        check_length("layer_types", kinds, n)
        return [window if kind == _SLIDING else None for kind in kinds]
    if not first_is_full:
        return [window] * n
    if full_below is None:
        raise SpecError("max_window_layers: missing from the configuration, needed with use_sliding_window")
    return [window if i >= full_below else None for i in range(n)]


def _llama(f: Fields) -> tuple[Mixer, ...]:
    n = f.size("num_hidden_layers")
    return (attention(f), gated_mlp(f, bias=f.flag("mlp_bias"))) * n


def _qwen2(f: Fields) -> tuple[Mixer, ...]:
    windows = _windows(f)
    return _interleave([attention(f, window=w, qkv_bias=True) for w in windows], [gated_mlp(f)] * len(windows))


def _qwen3(f: Fields) -> tuple[Mixer, ...]:
    windows = _windows(f)
    return _interleave([attention(f, window=w, qk_norm="head") for w in windows], [gated_mlp(f)] * len(windows))


def _mixtral(f: Fields) -> tuple[Mixer, ...]:
    window = f.optional_size("sliding_window")
    return (attention(f, window=window, qkv_bias=False), moe(f, "intermediate_size")) * f.size("num_hidden_layers")


def _qwen_feed_forward(f: Fields, *, shared: bool) -> list[Mixer]:
    """Sparse every `decoder_sparse_step` layers, except for those in `mlp_only_layers`."""
    n = f.size("num_hidden_layers")
    step, dense_only = f.optional_size("decoder_sparse_step") or 1, f.indices("mlp_only_layers") or []
    size = f.size("shared_expert_intermediate_size") if shared else 0
    sparse = moe(f, "moe_intermediate_size", shared=size, shared_gate=shared, normalise=f.flag("norm_topk_prob"))
    is_dense = [i in dense_only or bool((i + 1) % step) for i in range(n)]
    return [gated_mlp(f) if dense else sparse for dense in is_dense]


def _qwen3_moe(f: Fields) -> tuple[Mixer, ...]:
    f.require("shared_expert_intermediate_size", 0)
    windows = _windows(f, first_is_full=False)
    mixers: list[Mixer] = [attention(f, window=w, qk_norm="head") for w in windows]
    return _interleave(mixers, _qwen_feed_forward(f, shared=False))


def _delta_net_or_attention(f: Fields) -> list[Mixer]:
    """Qwen3-Next and Qwen3.5: gated delta rule, with gated full attention every `full_attention_interval` layers."""
    n = f.size("num_hidden_layers")
    f.require("attn_output_gate", True)
    interval = f.optional_size("full_attention_interval") or 4
    kinds = f.words("layer_types", (_FULL, _LINEAR))
    if kinds is None:
        kinds = [_LINEAR if (i + 1) % interval else _FULL for i in range(n)]
    check_length("layer_types", kinds, n)
    linear = GatedDeltaNet(
        num_key_heads=f.size("linear_num_key_heads"),
        key_head_dim=f.size("linear_key_head_dim"),
        num_value_heads=f.size("linear_num_value_heads"),
        value_head_dim=f.size("linear_value_head_dim"),
        conv_kernel=f.size("linear_conv_kernel_dim"),
    )
    full = attention(f, qk_norm="head", output_gate=True)
    return [full if kind == _FULL else linear for kind in kinds]


def _qwen3_next(f: Fields) -> tuple[Mixer, ...]:
    return _interleave(_delta_net_or_attention(f), _qwen_feed_forward(f, shared=True))


def _qwen3_5(f: Fields) -> tuple[Mixer, ...]:
    f.require("mlp_only_layers", [])
    mixers = _delta_net_or_attention(f)
    return _interleave(mixers, [gated_mlp(f)] * len(mixers))


def _deepseek(f: Fields) -> tuple[Mixer, ...]:
    """DeepSeek-V3 and its kin: latent attention, dense layers first, then experts with a corrected router."""
    n = f.size("num_hidden_layers")
    f.require("attention_bias", False)
    f.require("mlp_bias", False)
    f.require("moe_layer_freq", 1)
    f.require("topk_method", "noaux_tc")
    index = None
    if f.get("index_topk") is not None:
        index = SparseIndex(num_heads=f.size("index_n_heads"), head_dim=f.size("index_head_dim"), top_k=f.size("index_topk"))
    elif f.model_type in ("deepseek_v32", "glm_moe_dsa"):
        raise SpecError(f"index_topk: missing from the configuration (model_type {f.model_type})")
    f.require("indexer_types", ["full"] * n)
    latent = MLA(
        num_heads=f.size("num_attention_heads"),
        q_lora_rank=f.optional_size("q_lora_rank"),
        kv_lora_rank=f.size("kv_lora_rank"),
        qk_nope_head_dim=f.size("qk_nope_head_dim"),
        qk_rope_head_dim=f.size("qk_rope_head_dim"),
        v_head_dim=f.size("v_head_dim"),
        index=index,
    )
    f.require("num_key_value_heads", latent.num_heads)
    f.require("qk_head_dim", latent.qk_head_dim)
    dense_layers = min(f.size("first_k_dense_replace", low=0), n)
    shared = f.size("n_shared_experts", low=0) * f.size("moe_intermediate_size")
    sparse = moe(f, "moe_intermediate_size", shared=shared, router_bias=True, **sigmoid_routing(f))
    return (latent, gated_mlp(f)) * dense_layers + (latent, sparse) * (n - dense_layers)


def _gpt_oss(f: Fields) -> tuple[Mixer, ...]:
    n, window = f.size("num_hidden_layers"), f.size("sliding_window")
    kinds = f.words("layer_types", (_FULL, _SLIDING)) or [_FULL if i % 2 else _SLIDING for i in range(n)]
    check_length("layer_types", kinds, n)
    experts = moe(f, "intermediate_size", bias=True, router_bias=True)
    f.require("attention_bias", True)
    return _interleave([attention(f, window=window if kind == _SLIDING else None, sinks=True) for kind in kinds], [experts] * n)


def _minimax_m2(f: Fields) -> tuple[Mixer, ...]:
    n = f.size("num_hidden_layers")
    f.require("qk_norm_type", "per_layer")
    f.require("attn_type_list", [1] * n)
    mixer = attention(f, qk_norm="full" if f.flag("use_qk_norm", default=True) else "none", qkv_bias=False)
    experts = moe(
        f,
        "intermediate_size",
        shared=f.optional_size("shared_intermediate_size", low=0) or 0,
        router_bias=f.flag("use_routing_bias", default=True),
        score="sigmoid",
    )
    return (mixer, experts) * n


def _llama4(f: Fields) -> tuple[Mixer, ...]:
    """Chunked attention with rotary embedding; every fourth layer has neither. Its query-key norm has no weights."""
    n, chunk = f.size("num_hidden_layers"), f.optional_size("attention_chunk_size")
    every, interval = f.optional_size("interleave_moe_layer_step") or 1, f.optional_size("no_rope_layer_interval") or 4
    # 1 marks a layer WITH rotary embedding, whatever the name of the field says.
    rotary = f.indices("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(n)]
    check_length("no_rope_layers", rotary, n)
    kinds = f.words("layer_types", (_FULL, _CHUNKED)) or [_CHUNKED if r else _FULL for r in rotary]
    check_length("layer_types", kinds, n)
    sparse_layers = f.indices("moe_layers")
    if sparse_layers is None:
        sparse_layers = list(range(every - 1, n, every))
    norm = f.flag("use_qk_norm", default=True)
    sparse = moe(f, "intermediate_size", shared=f.size("intermediate_size"), score="sigmoid")
    mixers: list[Mixer] = []
    for kind, has_rotary in zip(kinds, rotary, strict=True):
        window = chunk if kind == _CHUNKED else None
        mixers.append(
            attention(
                f,
                window=window,
                chunked=window is not None,
                qk_norm="unweighted" if norm and has_rotary else "none",
                rotary=bool(has_rotary),
            )
        )
    dense = gated_mlp(f, "intermediate_size_mlp") if len(set(sparse_layers)) < n else sparse
    return _interleave(mixers, [sparse if i in sparse_layers else dense for i in range(n)])


# Words of `layers_block_type` in checkpoints and in transformers 5, and the letters of the older pattern.
_BLOCKS = {"mamba": "M", _LINEAR: "M", "attention": "*", _FULL: "*", "mlp": "-", "moe": "E"}


def _pattern(f: Fields) -> str:
    """Nemotron-H's layers as letters: M Mamba-2, * attention, - MLP, E experts."""
    text, words = f.get("hybrid_override_pattern"), f.words("layers_block_type", _BLOCKS)
    if words is None and text is None:
        raise SpecError("hybrid_override_pattern or layers_block_type: missing from the configuration")
    letters = "".join(_BLOCKS[word] for word in words) if words is not None else text
    if not isinstance(letters, str) or not letters or set(letters) - set("M*-E"):
        raise SpecError(f"hybrid_override_pattern={letters!r}: must be a text of the letters M * - E")
    if text is not None and text != letters:
        raise SpecError(f"hybrid_override_pattern={text!r}: contradicts layers_block_type, which reads {letters!r}")
    n = f.optional_size("num_hidden_layers")
    if n is not None:
        check_length("hybrid_override_pattern", letters, n)
    return letters


def _mamba2(f: Fields) -> Mixer:
    bias = f.flag("use_bias")
    f.require("mamba_proj_bias", bias)
    low, high = f.limits("time_step_limit", "mamba_dt_limit")
    return Mamba2(
        num_heads=f.size("mamba_num_heads"),
        head_dim=f.size("mamba_head_dim"),
        state_dim=f.size("ssm_state_size"),
        groups=f.size("n_groups", "mamba_n_groups"),
        conv_kernel=f.size("conv_kernel", "mamba_d_conv"),
        conv_bias=f.flag("use_conv_bias", "mamba_conv_bias", default=True),
        proj_bias=bias,
        dt_min=low,
        dt_max=high,
    )


def _nemotron_attention(f: Fields) -> Mixer:
    f.require("attention_bias", False)
    f.require("sliding_window")
    return Attention(
        num_heads=f.size("num_attention_heads"),
        num_kv_heads=f.size("num_key_value_heads"),
        head_dim=f.size("head_dim", "attention_head_dim"),
    )


def _nemotron_mlp(f: Fields) -> Mixer:
    f.require("mlp_hidden_act", "relu2")
    return MLP(ffn_size=f.size("intermediate_size"), gated=False, bias=f.flag("mlp_bias"))


def _nemotron_moe(f: Fields) -> Mixer:
    f.require("mlp_hidden_act", "relu2")
    f.require("mlp_bias", False)
    f.require("n_shared_experts", 1)
    return MoE(
        num_experts=f.size("n_routed_experts"),
        top_k=f.size("num_experts_per_tok"),
        ffn_size=f.size("moe_intermediate_size"),
        gated=False,
        shared_ffn_size=f.size("moe_shared_expert_intermediate_size"),
        latent_size=f.optional_size("moe_latent_size"),
        router_bias=True,
        **sigmoid_routing(f),
    )


_NEMOTRON_MIXERS: dict[str, Callable[[Fields], Mixer]] = {
    "M": _mamba2,
    "*": _nemotron_attention,
    "-": _nemotron_mlp,
    "E": _nemotron_moe,
}


def _nemotron_h(f: Fields) -> tuple[Mixer, ...]:
    pattern = _pattern(f)
    mixers = {letter: _NEMOTRON_MIXERS[letter](f) for letter in dict.fromkeys(pattern)}
    return tuple(mixers[letter] for letter in pattern)


# Sizes of layers that a pattern does not use stay in a Nemotron-H configuration, as does Mamba-2's initialisation.
_NEMOTRON_IGNORED = ROUTING | field_names(
    """
    attention_head_dim chunk_size conv_kernel expand head_dim intermediate_size mamba_chunk_size mamba_dt_init_floor
    mamba_dt_limit mamba_dt_max mamba_dt_min mamba_expand mamba_head_dim mamba_hidden_act mamba_num_heads
    mamba_ssm_cache_dtype mlp_hidden_act moe_intermediate_size moe_latent_size moe_shared_expert_intermediate_size
    moe_shared_expert_overlap n_groups n_routed_experts n_shared_experts num_attention_heads num_experts_per_tok
    num_key_value_heads rescale_prenorm_residual residual_in_fp32 ssm_state_size time_step_floor time_step_limit
    time_step_max time_step_min time_step_rank use_conv_bias use_mamba_kernels
    """
)
_DEEPSEEK = Architecture(_deepseek, ROUTING | {"head_dim", "indexer_rope_interleave"})
_QWEN3_5_IGNORED = frozenset({"mamba_ssm_dtype", "full_attention_interval"})

ARCHITECTURES: dict[str, Architecture] = {
    "nemotron_h": Architecture(_nemotron_h, _NEMOTRON_IGNORED, 1e-5),
    "llama": Architecture(_llama),
    "qwen2": Architecture(_qwen2),
    "qwen3": Architecture(_qwen3),
    "qwen3_moe": Architecture(_qwen3_moe, ROUTING | {"intermediate_size"}),
    "qwen3_next": Architecture(_qwen3_next, ROUTING | {"intermediate_size"}),
    "qwen3_5_text": Architecture(_qwen3_5, _QWEN3_5_IGNORED),
    "qwen3_5_moe_text": Architecture(_qwen3_next, _QWEN3_5_IGNORED | ROUTING | {"intermediate_size"}),
    "mixtral": Architecture(_mixtral, norm_eps=1e-5),
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK,
    "glm_moe_dsa": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,
    "gpt_oss": Architecture(_gpt_oss, frozenset({"initial_context_length", "swiglu_limit"}), 1e-5),
    "minimax_m2": Architecture(_minimax_m2, ROUTING),
    "llama4_text": Architecture(
        _llama4, frozenset({"attn_scale", "attn_temperature_tuning", "floor_scale", "intermediate_size_mlp"}), 1e-5
    ),
}
