"""config.json of a model: which format can say it, and what stands in it.

A format can say a specification when reading back what would be written gives that specification. What none of the hub's
formats can say (Mamba-2 beside rotary attention, say) is written as `model_type: tandem` with the specification itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tandem.model.hybrid import TokenIds
from tandem.model.naming import Format
from tandem.spec.errors import SpecError
from tandem.spec.huggingface import read_config
from tandem.spec.mixers import MLP, Attention, Mamba2, Mixer, MoE
from tandem.spec.model import ModelSpec
from tandem.spec.units import require_int

_WORDS: dict[type[Mixer], str] = {Mamba2: "linear_attention", Attention: "full_attention", MLP: "mlp", MoE: "moe"}
_LETTERS: dict[type[Mixer], str] = {Mamba2: "M", Attention: "*", MLP: "-", MoE: "E"}
_CLASSES: dict[Format, str] = {
    "nemotron_h": "NemotronHForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "tandem": "TandemForCausalLM",
}


def read_token_ids(config: dict[str, Any], generation: dict[str, Any] | None = None) -> TokenIds:
    """From a config.json; what generation_config.json states goes before it, as in transformers' generate."""

    def stated(field: str) -> list[int]:
        value = (generation or {}).get(field)
        value = config.get(field) if value is None else value
        # Some old configurations say -1 where they mean none.
        given = [item for item in (value if isinstance(value, list) else [value]) if item is not None and item != -1]
        return [require_int(field, item, low=0) for item in given]

    bos, pad = stated("bos_token_id"), stated("pad_token_id")
    return TokenIds(bos=bos[0] if bos else None, eos=tuple(stated("eos_token_id")), pad=pad[0] if pad else None)


def token_fields(tokens: TokenIds) -> dict[str, Any]:
    """Fields of a config.json; one end is a number, several are a list. None is said, or transformers has its own ideas."""
    eos: int | list[int] | None = list(tokens.eos)
    if len(tokens.eos) < 2:
        eos = tokens.eos[0] if tokens.eos else None
    return {"bos_token_id": tokens.bos, "eos_token_id": eos, "pad_token_id": tokens.pad}


def hub_format(spec: ModelSpec) -> Format:
    """The format in which this model is saved: the hub's where one can say it, else `tandem`."""
    return _choose(spec)[0]


def write_config(spec: ModelSpec, tokens: TokenIds | None = None, *, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of a model. `dtype` is the weights' format as torch names it."""
    form, fields = _choose(spec)
    return {
        "model_type": form,
        "architectures": [_CLASSES[form]],
        "dtype": dtype,
        **fields,
        **token_fields(tokens or TokenIds()),
    }


def _choose(spec: ModelSpec) -> tuple[Format, dict[str, Any]]:
    blocks = _blocks(spec)
    candidates: tuple[tuple[Format, dict[str, Any] | None], ...] = (
        ("nemotron_h", _nemotron(spec)),
        ("llama", blocks),
        ("qwen3", blocks),
    )
    for form, fields in candidates:
        if fields is not None and _says(form, fields, spec):
            return form, fields
    return "tandem", {"spec": spec.to_json()}


def _says(form: Format, fields: dict[str, Any], spec: ModelSpec) -> bool:
    """Whether reading these fields gives this specification (what was left out of it, and its precision, aside)."""
    try:
        again = read_config({"model_type": form, **fields}, name=spec.name)
    except SpecError:
        return False
    return again == replace(spec, omitted=(), native_precision=again.native_precision)


def _common(spec: ModelSpec) -> dict[str, Any]:
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "max_position_embeddings": spec.max_context,
        "tie_word_embeddings": spec.tied_embeddings,
    }


def _nemotron(spec: ModelSpec) -> dict[str, Any] | None:
    """Nemotron-H: one mixer of each kind, in any order. transformers does not tie its embeddings, so neither may we."""
    kinds = [type(mixer) for mixer in spec.layers]
    if spec.tied_embeddings or set(kinds) - set(_WORDS):
        return None
    fields = {
        **_common(spec),
        "num_hidden_layers": len(kinds),
        "layers_block_type": [_WORDS[kind] for kind in kinds],
        "hybrid_override_pattern": "".join(_LETTERS[kind] for kind in kinds),
        "layer_norm_epsilon": spec.norm_eps,
        "mlp_hidden_act": "relu2",
        "attention_bias": False,
    }
    for mixer, _ in spec.mixers:
        fields |= _nemotron_fields(mixer)
    return fields


def _nemotron_fields(mixer: Mixer) -> dict[str, Any]:
    match mixer:
        case Mamba2():
            high = {"__float__": "Infinity"} if mixer.dt_max is None else mixer.dt_max  # transformers 5's spelling
            clamps = mixer.dt_min > 0 or mixer.dt_max is not None
            return {
                "mamba_num_heads": mixer.num_heads,
                "mamba_head_dim": mixer.head_dim,
                "ssm_state_size": mixer.state_dim,
                "n_groups": mixer.groups,
                "conv_kernel": mixer.conv_kernel,
                "use_conv_bias": mixer.conv_bias,
                "use_bias": mixer.proj_bias,
                "mamba_proj_bias": mixer.proj_bias,
                **({"time_step_limit": [mixer.dt_min, high]} if clamps else {}),
            }
        case Attention():
            return {
                "num_attention_heads": mixer.num_heads,
                "num_key_value_heads": mixer.num_kv_heads,
                "head_dim": mixer.head_dim,
            }
        case MLP():
            return {"intermediate_size": mixer.ffn_size, "mlp_bias": mixer.bias}
        case MoE():
            return {
                "n_routed_experts": mixer.num_experts,
                "num_experts_per_tok": mixer.top_k,
                "moe_intermediate_size": mixer.ffn_size,
                "moe_shared_expert_intermediate_size": mixer.shared_ffn_size,
                "n_shared_experts": 1,
                "moe_latent_size": mixer.latent_size,
                "norm_topk_prob": mixer.normalise,
                "routed_scaling_factor": mixer.score_scale,
                "n_group": mixer.groups,
                "topk_group": mixer.top_groups,
            }
    return {}


def _blocks(spec: ModelSpec) -> dict[str, Any] | None:
    """Llama or Qwen3: equal blocks of rotary attention and a gated MLP. Their difference, the query-key norm, is theirs."""
    attention, mlp = spec.layers[0], spec.layers[1 % len(spec.layers)]
    if not isinstance(attention, Attention) or not isinstance(mlp, MLP) or attention.rope is None:
        return None
    # transformers turns whole heads, and checks that Llama's heads divide its hidden size.
    if attention.rope.fraction != 1 or (attention.qk_norm == "none" and spec.hidden_size % attention.num_heads):
        return None
    rope = attention.rope
    parameters: dict[str, Any] = {
        "rope_type": "default" if rope.scaling == "none" else rope.scaling,
        "rope_theta": rope.theta,
    }
    if rope.scaling != "none":
        parameters["factor"] = rope.factor
    if rope.scaling == "llama3":
        parameters["low_freq_factor"] = rope.low_freq_factor
        parameters["high_freq_factor"] = rope.high_freq_factor
        parameters["original_max_position_embeddings"] = rope.original_max_context
    return {
        **_common(spec),
        "num_hidden_layers": len(spec.layers) // 2,
        "rms_norm_eps": spec.norm_eps,
        "hidden_act": "silu",
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.out_bias,
        "intermediate_size": mlp.ffn_size,
        "rope_parameters": parameters,
        **({"mlp_bias": True} if mlp.bias else {}),
    }
