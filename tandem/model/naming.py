"""Which tensors a decoder has, and what they are called in a checkpoint's files. Needs no torch.

The decoder's own names are those of Nemotron-H on the hub (`backbone.layers.N.mixer...`; paper A, section 1.3), except
that the experts of a layer are stacked in one tensor here and lie one by one in files. Llama and Qwen3 checkpoints name
blocks of two layers: block i is layer 2i (attention) and layer 2i + 1 (MLP) of the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from tandem.spec.errors import SpecError
from tandem.spec.model import MLP, Attention, Mamba2, Mixer, ModelSpec, MoE

Format: TypeAlias = Literal["nemotron_h", "llama", "qwen3", "tandem"]
"""`model_type` of a config.json: three that others read, and our own for what none of them can say."""
FORMATS: tuple[Format, ...] = get_args(Format)
Shape: TypeAlias = tuple[int, ...]

_ATTENTION = {name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
_MLP = {name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
_BLOCK_MODULES = _ATTENTION | _MLP
_BLOCK_ENDS = {
    "backbone.embeddings.weight": "model.embed_tokens.weight",
    "backbone.norm_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_GGUF_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_GGUF_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint: what it is called there, its shape, and what it is part of here."""

    name: str
    shape: Shape
    parameter: str
    """Name in the decoder's state_dict."""
    expert: int | None = None
    """Row of a stacked parameter; None where the tensor is the whole of it."""


def decoder_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Name and shape of every tensor of a decoder's state_dict, in its order; tied embeddings stand once, as embeddings."""
    h = spec.hidden_size
    shapes: dict[str, Shape] = {"backbone.embeddings.weight": (spec.vocab_size, h)}
    for i, mixer in enumerate(spec.layers):
        layer = f"backbone.layers.{i}."
        shapes[layer + "norm.weight"] = (h,)
        shapes |= {f"{layer}mixer.{name}": shape for name, shape in _mixer_shapes(mixer, h, i)}
    shapes["backbone.norm_f.weight"] = (h,)
    if not spec.tied_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, h)
    return shapes


def stored_tensors(spec: ModelSpec, form: Format) -> tuple[Stored, ...]:
    """Every tensor of a checkpoint of this model in that format, in the decoder's order."""
    found: list[Stored] = []
    for parameter, shape in decoder_shapes(spec).items():
        stem, _, leaf = parameter.rpartition(".experts.")
        if stem:
            found += (Stored(f"{stem}.experts.{k}.{leaf}.weight", shape[1:], parameter, k) for k in range(shape[0]))
        else:
            name = parameter if form in ("nemotron_h", "tandem") else _block_name(parameter)
            found.append(Stored(name, shape, parameter))
    return tuple(found)


def read_name(name: str, form: Format) -> str:
    """The name in our spelling: transformers 5 calls Nemotron-H's `backbone` `model` in memory."""
    if form in ("nemotron_h", "tandem") and name.startswith("model."):
        return "backbone." + name.removeprefix("model.")
    return name


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of a Llama checkpoint: `model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`."""
    module, _, leaf = name.rpartition(".")
    if module in _GGUF_ENDS:
        return f"{_GGUF_ENDS[module]}.{leaf}"
    number, module = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{number}.{_GGUF_MODULES[module]}.{leaf}"


def check_format(model_type: object) -> Format:
    """`model_type` as a format whose tensors are known, or a SpecError."""
    for form in FORMATS:
        if model_type == form:
            return form
    raise SpecError(f"model_type={model_type!r}: weights are read and written for {', '.join(FORMATS)}")


def _block_name(parameter: str) -> str:
    """Llama's name of a tensor: `backbone.layers.7.mixer.up_proj.weight` is `model.layers.3.mlp.up_proj.weight`."""
    if parameter in _BLOCK_ENDS:
        return _BLOCK_ENDS[parameter]
    number, rest = parameter.removeprefix("backbone.layers.").split(".", 1)
    block, second = divmod(int(number), 2)
    if rest == "norm.weight":
        module = "post_attention_layernorm.weight" if second else "input_layernorm.weight"
    else:
        name, leaf = rest.removeprefix("mixer.").split(".", 1)
        module = f"{_BLOCK_MODULES[name]}.{leaf}"
    return f"model.layers.{block}.{module}"


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _mixer_shapes(mixer: Mixer, h: int, layer: int) -> Iterator[tuple[str, Shape]]:
    match mixer:
        case Mamba2():
            yield from _mamba_shapes(mixer, h)
        case Attention():
            yield from _attention_shapes(mixer, h)
        case MLP():
            yield from _mlp_shapes("", h, mixer.ffn_size, mixer.gated, mixer.bias)
        case MoE():
            yield from _moe_shapes(mixer, h)
        case _:
            raise SpecError(f"layers[{layer}]={type(mixer).__name__}: the decoder has Mamba2, Attention, MLP and MoE")


def _mamba_shapes(m: Mamba2, h: int) -> Iterator[tuple[str, Shape]]:
    yield "dt_bias", (m.num_heads,)
    yield "A_log", (m.num_heads,)
    yield "D", (m.num_heads,)
    yield from _linear("in_proj", m.in_width, h, m.proj_bias)
    yield "conv1d.weight", (m.conv_width, 1, m.conv_kernel)
    if m.conv_bias:
        yield "conv1d.bias", (m.conv_width,)
    yield "norm.weight", (m.d_inner,)
    yield from _linear("out_proj", h, m.d_inner, m.proj_bias)


def _attention_shapes(m: Attention, h: int) -> Iterator[tuple[str, Shape]]:
    yield from _linear("q_proj", m.q_width, h, m.qkv_bias)
    for name in ("k_proj", "v_proj"):
        yield from _linear(name, m.num_kv_heads * m.head_dim, h, m.qkv_bias)
    yield from _linear("o_proj", h, m.num_heads * m.head_dim, m.out_bias)
    if m.qk_norm == "head":
        yield "q_norm.weight", (m.head_dim,)
        yield "k_norm.weight", (m.head_dim,)


def _mlp_shapes(prefix: str, h: int, width: int, gated: bool, bias: bool) -> Iterator[tuple[str, Shape]]:
    if gated:
        yield from _linear(prefix + "gate_proj", width, h, bias)
    yield from _linear(prefix + "up_proj", width, h, bias)
    yield from _linear(prefix + "down_proj", h, width, bias)


def _moe_shapes(m: MoE, h: int) -> Iterator[tuple[str, Shape]]:
    inner = m.expert_width(h)
    yield "gate.weight", (m.num_experts, h)
    if m.router_bias:
        yield "gate.e_score_correction_bias", (m.num_experts,)
    if m.gated:
        yield "experts.gate_proj", (m.num_experts, m.ffn_size, inner)
    yield "experts.up_proj", (m.num_experts, m.ffn_size, inner)
    yield "experts.down_proj", (m.num_experts, inner, m.ffn_size)
    if m.shared_ffn_size:
        yield from _mlp_shapes("shared_experts.", h, m.shared_ffn_size, m.gated, False)
    if m.latent_size:
        yield from _linear("fc1_latent_proj", m.latent_size, h)
        yield from _linear("fc2_latent_proj", h, m.latent_size)
