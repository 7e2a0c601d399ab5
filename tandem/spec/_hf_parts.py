"""The parts that architectures share, from configuration fields: attention, rotary embedding, feed-forward, routing."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack

from tandem.spec._hf_fields import Fields
from tandem.spec.errors import SpecError
from tandem.spec.model import MLP, Attention, MoE, Rope

QkNorm = Literal["none", "head", "full", "unweighted"]


class Routing(TypedDict, total=False):
    """Fields of `MoE` that say how experts are chosen and weighed."""

    score: Literal["softmax", "sigmoid"]
    normalise: bool
    score_scale: float
    groups: int
    top_groups: int


def sigmoid_routing(f: Fields) -> Routing:
    """DeepSeek-V3's router, which Nemotron-3 shares: sigmoid scores, a correction, groups of experts, a scale."""
    return {
        "score": "sigmoid",
        "normalise": f.flag("norm_topk_prob", default=True),
        "score_scale": f.number("routed_scaling_factor", default=1.0),
        "groups": f.optional_size("n_group") or 1,
        "top_groups": f.optional_size("topk_group") or 1,
    }


def read_rope(f: Fields, head_dim: int) -> Rope:
    """The rotary embedding, in the spelling of transformers 5 (`rope_parameters`) or the older one."""
    stated: dict[str, Any] = {}
    for field in ("rope_scaling", "rope_parameters"):
        value = f.get(field)
        if value is not None and not isinstance(value, dict):
            raise SpecError(f"{field}={value!r}: must be an object")
        stated |= value or {}
    kind = str(stated.get("rope_type", stated.get("type", "default")))
    fraction = stated.get("partial_rotary_factor", f.get("partial_rotary_factor"))
    if f.get("rotary_dim") is not None:
        fraction = f.size("rotary_dim") / head_dim
    scaling: dict[str, Any] = {}
    if kind == "llama3":
        scaling = {name: stated.get(name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        scaling["original_max_context"] = stated.get("original_max_position_embeddings")
    elif kind != "default":
        scaling = {"factor": stated.get("factor", 1.0)}
    return Rope(
        theta=stated.get("rope_theta", f.number("rope_theta", default=10000.0)),
        fraction=1.0 if fraction is None else fraction,
        scaling="none" if kind == "default" else kind,
        **scaling,
    )


def _head_dim(f: Fields) -> int:
    given = f.optional_size("head_dim")
    heads, h = f.size("num_attention_heads"), f.size("hidden_size")
    if given is None and h % heads:
        raise SpecError(f"num_attention_heads={heads}: must divide hidden_size={h} where head_dim is not given")
    return given or h // heads


def attention(
    f: Fields,
    *,
    window: int | None = None,
    chunked: bool = False,
    qk_norm: QkNorm = "none",
    qkv_bias: bool | None = None,
    output_gate: bool = False,
    sinks: bool = False,
    rotary: bool = True,
) -> Attention:
    """Grouped-query attention; `qkv_bias` where the architecture fixes it, else `attention_bias` sets both biases."""
    bias = f.flag("attention_bias") if qkv_bias is None else False
    heads, kv_heads = f.size("num_attention_heads"), f.size("num_key_value_heads")
    if heads % kv_heads:
        raise SpecError(f"num_key_value_heads={kv_heads}: must divide num_attention_heads={heads}")
    return Attention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_head_dim(f),
        rope=read_rope(f, _head_dim(f)) if rotary else None,
        window=window,
        chunked_window=chunked,
        qk_norm=qk_norm,
        qkv_bias=bias or bool(qkv_bias),
        out_bias=bias,
        output_gate=output_gate,
        sinks=sinks,
    )


def gated_mlp(f: Fields, ffn_field: str = "intermediate_size", *, bias: bool = False) -> MLP:
    f.require("hidden_act", "silu", "swiglu")
    return MLP(ffn_size=f.size(ffn_field), gated=True, bias=bias)


def moe(
    f: Fields,
    ffn_field: str,
    *,
    shared: int = 0,
    bias: bool = False,
    router_bias: bool = False,
    shared_gate: bool = False,
    **routing: Unpack[Routing],
) -> MoE:
    f.require("hidden_act", "silu", "swiglu")
    return MoE(
        num_experts=f.size("n_routed_experts", "num_local_experts", "num_experts"),
        top_k=f.size("num_experts_per_tok", "experts_per_token"),
        ffn_size=f.size(ffn_field),
        gated=True,
        shared_ffn_size=shared,
        bias=bias,
        router_bias=router_bias,
        shared_gate=shared_gate,
        **routing,
    )
