"""Small random models for the tests of the decoder, and the same models in transformers.

Weights are drawn so that every layer matters and logits are of order one: matrices with variance 1 / columns, norm weights
in [0.5, 1.5], steps and decays over several orders of magnitude. So an absolute difference is a relative one.

The Hugging Face side is built here from the fields of its own configuration, not by the code under test.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tandem.model.hybrid import Decoder
from tandem.spec.mixers import MLP, Attention, Mamba2, Mixer, MoE, Rope
from tandem.spec.model import ModelSpec

LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
TOLERANCE = 1e-5
_WRITERS = ("out_proj.weight", "o_proj.weight", "down_proj.weight", "down_proj")


@st.composite
def mambas(draw: st.DrawFn) -> Mamba2:
    """At least four numbers in each group of the norm: of one number it is the sign, which has no condition."""
    groups, ratio = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return Mamba2(
        num_heads=groups * ratio,
        head_dim=draw(st.integers(-(-4 // ratio), 7)),
        state_dim=draw(st.integers(1, 9)),
        groups=groups,
        conv_kernel=draw(st.integers(2, 5)),
        conv_bias=draw(st.booleans()),
        proj_bias=draw(st.booleans()),
    )


@st.composite
def attentions(draw: st.DrawFn, **fixed: Any) -> Attention:
    kv_heads = draw(st.integers(1, 3))
    return Attention(
        num_heads=kv_heads * draw(st.integers(1, 3)), num_kv_heads=kv_heads, head_dim=draw(st.integers(1, 9)), **fixed
    )


@st.composite
def moes(draw: st.DrawFn) -> MoE:
    """Experts in groups of at least two, as transformers needs them; the groups that are kept hold enough experts."""
    groups = draw(st.integers(1, 3))
    in_group = draw(st.integers(2, 4))
    top_groups = draw(st.integers(1, groups))
    return MoE(
        num_experts=groups * in_group,
        top_k=draw(st.integers(1, top_groups * in_group)),
        ffn_size=draw(st.integers(1, 9)),
        gated=False,
        shared_ffn_size=draw(st.integers(1, 9)),
        latent_size=draw(st.none() | st.integers(1, 9)),
        router_bias=True,
        score="sigmoid",
        normalise=draw(st.booleans()),
        score_scale=draw(st.sampled_from([1.0, 2.5])),
        groups=groups,
        top_groups=top_groups,
    )


@st.composite
def hybrids(draw: st.DrawFn, *, biases: bool = True) -> ModelSpec:
    """A Nemotron-H: any string of letters with at least one attention layer, one mixer of each kind.

    `biases` False: no bias in projections of Mamba layers, see `test_parity_nemotron_h.py` on padding.
    """
    pattern = draw(st.lists(st.sampled_from("M*-EM"), max_size=5))
    pattern.insert(draw(st.integers(0, len(pattern))), "*")
    mamba = draw(mambas())
    if not biases:
        mamba = Mamba2(**{**{f: getattr(mamba, f) for f in Mamba2.__slots__}, "proj_bias": False})
    kinds: dict[str, Mixer] = {
        "M": mamba,
        "*": draw(attentions()),
        # transformers has one field for the biases of MLPs and of shared experts; our experts have none
        "-": MLP(ffn_size=draw(st.integers(1, 17)), gated=False, bias="E" not in pattern and draw(st.booleans())),
        "E": draw(moes()),
    }
    return _spec(draw, tuple(kinds[letter] for letter in pattern), hidden=draw(st.integers(5, 21)))


@st.composite
def transformers(draw: st.DrawFn, architecture: str) -> ModelSpec:
    """Blocks of rotary attention and SwiGLU, as `llama` (three kinds of rotary scaling) or `qwen3` (query-key norm)."""
    kind = draw(st.sampled_from(["none", "linear", "llama3"]))
    scaling: dict[str, Any] = {} if kind == "none" else {"factor": draw(st.sampled_from([2.0, 8.0]))}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_context": draw(st.sampled_from([16, 64]))}
    rope = Rope(theta=draw(st.sampled_from([100.0, 10000.0, 500000.0])), scaling=kind, **scaling)
    bias = draw(st.booleans())
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    attention = Attention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 8)),
        rope=rope,
        qk_norm="head" if architecture == "qwen3" else "none",
        qkv_bias=bias,
        out_bias=bias,
    )
    mlp = MLP(ffn_size=draw(st.integers(1, 17)), gated=True, bias=architecture == "llama" and draw(st.booleans()))
    # A norm over one number is its sign, which has no condition: at least four.
    hidden = heads * draw(st.integers(-(-4 // heads), 5))
    return _spec(draw, (attention, mlp) * draw(st.integers(1, 3)), hidden=hidden)


@st.composite
def any_models(draw: st.DrawFn) -> ModelSpec:
    """What the decoder computes and transformers need not: any mixers together, each layer with its own sizes."""
    rope = st.none() | st.builds(Rope, theta=st.just(1000.0), fraction=st.sampled_from([0.5, 1.0]))
    rotary = st.builds(
        Attention,
        num_heads=st.sampled_from([2, 4]),
        num_kv_heads=st.sampled_from([1, 2]),
        head_dim=st.sampled_from([4, 8]),
        rope=rope,
        qk_norm=st.sampled_from(["none", "head"]),
        qkv_bias=st.booleans(),
        out_bias=st.booleans(),
    )
    mlp = st.builds(MLP, ffn_size=st.integers(1, 9), gated=st.booleans(), bias=st.booleans())
    layers = draw(st.lists(mambas() | rotary | mambas() | rotary | mlp | moes(), min_size=1, max_size=5))
    return _spec(draw, tuple(layers), hidden=draw(st.integers(2, 17)))


def _spec(draw: st.DrawFn, layers: tuple[Mixer, ...], *, hidden: int) -> ModelSpec:
    return ModelSpec(
        name="random",
        vocab_size=draw(st.integers(5, 60)),
        hidden_size=hidden,
        layers=layers,
        tied_embeddings=draw(st.booleans()),
        max_context=4096,
        norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
    )


def build(spec: ModelSpec, seed: int = 0) -> Decoder:
    """The decoder with weights that are far from its initial ones."""
    model = Decoder(spec)
    randomise(model, seed)
    return model.eval()


@torch.no_grad()
def randomise(model: Decoder, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        leaf = name.rpartition(".")[2]
        if "norm" in name.rpartition(".")[0].rpartition(".")[2]:
            tensor.uniform_(0.5, 1.5, generator=random)
        elif leaf == "A_log":  # decay rates from 0.02 to 30
            tensor.uniform_(-4, 3.4, generator=random)
        elif leaf == "dt_bias":  # steps from 0.0003 to 6; more is in test_scan.py
            tensor.uniform_(-8, 2, generator=random)
            tensor += 4 * (torch.rand(tensor.shape, generator=random) < 0.1)
        elif leaf == "D":  # away from zero: a norm group whose numbers all cancel has no condition
            tensor.uniform_(0.5, 1.5, generator=random)
        elif leaf in ("bias", "e_score_correction_bias"):
            tensor.normal_(0, 0.5, generator=random)
        else:
            share = 0.3 if name.endswith(_WRITERS) else 1.0
            tensor.normal_(0, share * tensor.shape[-1] ** -0.5, generator=random)


def tokens(spec: ModelSpec, batch: int, time: int, seed: int = 0) -> Tensor:
    return torch.randint(0, spec.vocab_size, (batch, time), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def well_conditioned(model: Decoder, ids: Tensor) -> bool:
    """Whether a change of the embeddings in their last fp32 digit stays there: else no two orders of sums agree to 1e-5.

    Now and then a random model amplifies it a thousandfold, by norms over few numbers that nearly cancel. One direction may
    miss that, so several are tried.
    """
    plain, nudged = model(ids), copy.deepcopy(model)
    weight = nudged.backbone.embeddings.weight
    kept = weight.clone()
    for seed in range(4):
        weight.copy_(kept * (1 + 1e-7 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))))
        if (plain - nudged(ids)).abs().max().item() > TOLERANCE / 4:
            return False
    return True


def nemotron_h(model: Decoder, *, chunk: int = 8, clamp: tuple[float, float] = (0.0, float("inf"))) -> PreTrainedModel:
    """The same model in transformers. Its chunked path clamps dt where its decode path does not; here only by `clamp`."""
    spec = model.spec
    kinds = {type(m): m for m in spec.layers}
    letters = {Mamba2: "M", Attention: "*", MLP: "-", MoE: "E"}
    fields: dict[str, Any] = {}
    match kinds.get(Mamba2):
        case Mamba2() as m:
            fields |= {
                "mamba_num_heads": m.num_heads,
                "mamba_head_dim": m.head_dim,
                "ssm_state_size": m.state_dim,
                "n_groups": m.groups,
                "conv_kernel": m.conv_kernel,
                "use_conv_bias": m.conv_bias,
                "use_bias": m.proj_bias,
            }
    match kinds.get(Attention):
        case Attention() as m:
            fields |= {"num_attention_heads": m.num_heads, "num_key_value_heads": m.num_kv_heads, "head_dim": m.head_dim}
    match kinds.get(MLP):
        case MLP() as m:
            fields |= {"intermediate_size": m.ffn_size, "mlp_bias": m.bias}
    match kinds.get(MoE):
        case MoE() as m:
            fields |= {
                "n_routed_experts": m.num_experts,
                "num_experts_per_tok": m.top_k,
                "moe_intermediate_size": m.ffn_size,
                "moe_shared_expert_intermediate_size": m.shared_ffn_size,
                "moe_latent_size": m.latent_size,
                "norm_topk_prob": m.normalise,
                "routed_scaling_factor": m.score_scale,
                "n_group": m.groups,
                "topk_group": m.top_groups,
            }
    config = NemotronHConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        layers_block_type=[LETTERS[letters[type(m)]] for m in spec.layers],
        layer_norm_epsilon=spec.norm_eps,
        chunk_size=chunk,
        attn_implementation="eager",
        experts_implementation="eager",  # their grouped product wants sizes that are multiples of 16 bytes
        **fields,
    )
    theirs = NemotronHForCausalLM(config)
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = clamp
    return _filled(theirs, model, {})


def llama(model: Decoder) -> PreTrainedModel:
    return _filled(LlamaForCausalLM(LlamaConfig(mlp_bias=_part(model, MLP).bias, **_block_fields(model))), model, BLOCK_NAMES)


def qwen3(model: Decoder) -> PreTrainedModel:
    theirs = Qwen3ForCausalLM(Qwen3Config(**_block_fields(model)))
    for layer in theirs.model.layers:  # its configuration has no bias for o_proj alone: `attention_bias` sets all four
        assert (layer.self_attn.o_proj.bias is None) == (not _part(model, Attention).out_bias)
    return _filled(theirs, model, BLOCK_NAMES)


def _part(model: Decoder, kind: type) -> Any:
    return next(m for m in model.spec.layers if isinstance(m, kind))


def _block_fields(model: Decoder) -> dict[str, Any]:
    spec, attention = model.spec, _part(model, Attention)
    rope = attention.rope
    parameters: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": "default" if rope.scaling == "none" else rope.scaling}
    if rope.scaling != "none":
        parameters["factor"] = rope.factor
    if rope.scaling == "llama3":
        parameters |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_context,
        }
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": _part(model, MLP).ffn_size,
        "num_hidden_layers": len(spec.layers) // 2,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.qkv_bias,
        "rms_norm_eps": spec.norm_eps,
        "max_position_embeddings": spec.max_context,
        "tie_word_embeddings": spec.tied_embeddings,
        "rope_parameters": parameters,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }


BLOCK_NAMES = {
    "backbone.embeddings.": "model.embed_tokens.",
    "backbone.norm_f.": "model.norm.",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


def their_name(name: str, block_names: dict[str, str]) -> str:
    """Our name of a weight as transformers has it in memory."""
    if not block_names or not name.startswith("backbone.layers."):
        for ours, theirs in block_names.items():
            name = name.replace(ours, theirs) if ours.startswith("backbone.") else name
        return name.replace("backbone.", "model.")
    _, _, number, rest = name.split(".", 3)
    block, second = divmod(int(number), 2)
    if rest == "norm.weight":
        rest = ("input_layernorm", "post_attention_layernorm")[second] + ".weight"
    else:
        module, leaf = rest.removeprefix("mixer.").split(".")
        rest = f"{block_names[module]}.{leaf}"
    return f"model.layers.{block}.{rest}"


def _filled(theirs: PreTrainedModel, model: Decoder, block_names: dict[str, str]) -> PreTrainedModel:
    """Their model with our weights; every name and shape must fit. Tied weights are one tensor there, too."""
    weights = {their_name(name, block_names): value.clone() for name, value in model.state_dict().items()}
    theirs.load_state_dict(weights, strict=True)
    if model.spec.tied_embeddings:
        head: nn.Linear = theirs.lm_head
        head.weight = theirs.get_input_embeddings().weight
    return theirs.eval()
