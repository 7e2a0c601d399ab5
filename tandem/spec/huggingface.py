"""A `ModelSpec` from a Hugging Face config.json; what is not known and might change the arithmetic is refused.

Of a multimodal model the language model is read, and the vision encoder is named in `omitted`; so are layers that
predict further tokens. Quantisation sets `native_precision`, the format of the published weights.
"""

from __future__ import annotations

from typing import Any

from tandem.spec._hf_architectures import ARCHITECTURES
from tandem.spec._hf_fields import Fields, field_names
from tandem.spec.errors import SpecError
from tandem.spec.model import ModelSpec

# Multimodal wrapper -> model types its `text_config` may have, the first where it names none.
_WRAPPERS: dict[str, tuple[str, ...]] = {
    "qwen3_5": ("qwen3_5_text",),
    "qwen3_5_moe": ("qwen3_5_moe_text",),
    "kimi_k25": ("kimi_k2", "deepseek_v3"),
    "llama4": ("llama4_text",),
}
_WRAPPER_IGNORED = field_names(
    """
    boi_token_index eoi_token_index ignore_index image_token_id image_token_index media_placeholder_token_id text_config
    use_unified_vision_chunk video_placeholder video_token_id vision_config vision_end_token_id vision_start_token_id
    """
)
_NOT_MODELLED = {"deepseek_v4": "its compressed attention and hyper-connections are not modelled"}
_HEADS = ("ForCausalLM", "ForConditionalGeneration")
# Layers that predict further tokens. They are not counted, so their fields change nothing here.
_EXTRA_TOKEN_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
_EXTRA_TOKEN_IGNORED = field_names(
    "mtp_hybrid_override_pattern mtp_layers_block_type mtp_transformer_layers mtp_use_dedicated_embeddings use_mtp"
)


def read_config(config: dict[str, Any], *, name: str) -> ModelSpec:
    """The model that a config.json describes, under `name`.

    Raises SpecError for a model type that is not supported, a field that is missing or of the wrong kind, and a
    field that is not known and might change the arithmetic. The message names the field and its value.
    """
    if not isinstance(config, dict):
        raise SpecError(f"config={type(config).__name__}: must be the JSON object of a config.json")
    outer = Fields(config)
    _check_supported(outer)
    if outer.model_type in _WRAPPERS:
        return _read_wrapped(outer, name)
    return _read_text(outer, name=name, tied=outer.flag("tie_word_embeddings"), precision=native_precision(config))


def _check_supported(f: Fields) -> None:
    if f.model_type in _NOT_MODELLED:
        raise SpecError(f"model_type={f.model_type!r}: not supported, since {_NOT_MODELLED[f.model_type]}")
    if f.model_type not in ARCHITECTURES and f.model_type not in _WRAPPERS:
        known = ", ".join(sorted({*ARCHITECTURES, *_WRAPPERS}))
        raise SpecError(f"model_type={f.model_type!r}: not supported; supported are {known}")
    architectures = f.get("architectures") or []
    for architecture in architectures if isinstance(architectures, list) else [architectures]:
        if not str(architecture).endswith(_HEADS):
            raise SpecError(f"architectures={architecture!r}: must be a language model, named ...{' or ...'.join(_HEADS)}")


def _read_wrapped(outer: Fields, name: str) -> ModelSpec:
    text = outer.get("text_config")
    kinds = _WRAPPERS[outer.model_type]
    if not isinstance(text, dict):
        raise SpecError(f"text_config: missing from the configuration (model_type {outer.model_type})")
    inner = Fields({"model_type": kinds[0], **text})
    if inner.model_type not in kinds:
        raise SpecError(f"text_config.model_type={inner.model_type!r}: must be {' or '.join(kinds)} in {outer.model_type}")
    inner_tied = inner.flag("tie_word_embeddings")
    tied = outer.flag("tie_word_embeddings", default=inner_tied)
    outer_quantisation, inner_quantisation = outer.get("quantization_config"), inner.get("quantization_config")
    precision = native_precision({"quantization_config": outer_quantisation or inner_quantisation})
    outer.finish(_WRAPPER_IGNORED)
    return _read_text(inner, name=name, tied=tied, precision=precision, omitted=("vision encoder",))


def _read_text(f: Fields, *, name: str, tied: bool, precision: str, omitted: tuple[str, ...] = ()) -> ModelSpec:
    architecture = ARCHITECTURES[f.model_type]
    f.get("quantization_config")
    layers = architecture.layers(f)
    extra_token_layers = [f.optional_size(field, low=0) for field in _EXTRA_TOKEN_LAYERS]
    if any(extra_token_layers):
        omitted += ("multi-token prediction",)
    spec = ModelSpec(
        name=name,
        vocab_size=f.size("vocab_size"),
        hidden_size=f.size("hidden_size"),
        layers=layers,
        tied_embeddings=tied,
        max_context=f.size("max_position_embeddings"),
        norm_eps=f.number("layer_norm_epsilon", "rms_norm_eps", "norm_eps", default=architecture.norm_eps),
        native_precision=precision,
        omitted=omitted,
    )
    f.finish(architecture.ignored | _EXTRA_TOKEN_IGNORED)
    return spec


def native_precision(config: dict[str, Any]) -> str:
    """The weight format that `quantization_config` states, as a name of `tandem.spec.units.BITS`; bf16 without one."""
    quantisation = config.get("quantization_config")
    if not quantisation:
        return "bf16"
    if not isinstance(quantisation, dict):
        raise SpecError(f"quantization_config={quantisation!r}: must be an object")
    method = quantisation.get("quant_method", "modelopt" if "quant_algo" in quantisation else None)
    if not isinstance(method, str) or method not in _METHODS:
        raise SpecError(f"quantization_config.quant_method={method!r}: must be one of {', '.join(_METHODS)}")
    return _METHODS[method](quantisation)


def _fp8(quantisation: dict[str, Any]) -> str:
    return "fp8_block" if quantisation.get("weight_block_size") else "fp8"


def _modelopt(quantisation: dict[str, Any]) -> str:
    algorithm = quantisation.get("quant_algo")
    formats = {"FP8": "fp8", "NVFP4": "fp4", "FP8_PB_WO": "fp8_block"}
    if not isinstance(algorithm, str) or algorithm not in formats:
        raise SpecError(f"quantization_config.quant_algo={algorithm!r}: must be one of {', '.join(formats)}")
    return formats[algorithm]


def _compressed_tensors(quantisation: dict[str, Any]) -> str:
    """The one weight format of all groups: 4-bit whole numbers, or floating point of 8 or 4 bits."""
    groups = quantisation.get("config_groups")
    found: set[tuple[str, str, bool]] = set()
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            found.add((str(weights.get("num_bits")), str(weights.get("type")), weights.get("strategy") == "block"))
    packed = str(quantisation.get("format", ""))
    four_bit = "mxfp4" if packed.startswith("mxfp4") else "fp4"
    formats = {
        ("4", "int", False): "int4",
        ("8", "int", False): "int8",
        ("8", "float", False): "fp8",
        ("8", "float", True): "fp8_block",
        ("4", "float", False): four_bit,
    }
    if len(found) != 1 or not found <= set(formats):
        raise SpecError(f"quantization_config.config_groups={groups!r}: needs one weight format, int4, int8, fp8 or fp4")
    return formats[found.pop()]


_METHODS = {
    "fp8": _fp8,
    "mxfp4": lambda _: "mxfp4",
    "modelopt": _modelopt,
    "compressed-tensors": _compressed_tensors,
}
