"""The decoder has the tensors that the specification counts and the hub names; it refuses what it would get wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from specs import any_models, build, hybrids, nemotron_h, tokens
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from tandem.model.hybrid import Decoder, check_supported
from tandem.spec.catalog import load_spec, model_names
from tandem.spec.errors import SpecError
from tandem.spec.mixers import MLA, MLP, Attention, GatedDeltaNet, Mamba2, Mixer, MoE, Rope
from tandem.spec.model import ModelSpec

EXAMPLES = settings(deadline=None, max_examples=20, derandomize=True, phases=[Phase.explicit, Phase.generate])


def supported(name: str) -> bool:
    try:
        check_supported(load_spec(name))
    except SpecError:
        return False
    return True


BUILDABLE = [name for name in model_names() if supported(name)]


def numbers(model: Decoder) -> int:
    """All of a state_dict, tied weights once."""
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    return sum(t.numel() for t in held.values())


def test_the_papers_models_and_both_peers_are_built() -> None:
    text = " ".join(BUILDABLE)
    for part in ("Nano-12B-v2", "Nano-9B-v2", "Nemotron-H-8B", "Nemotron-3-Nano-30B", "Llama-3", "Qwen3-8B"):
        assert part.casefold() in text.casefold(), part


@pytest.mark.parametrize("name", BUILDABLE)
def test_every_model_of_the_catalogue_has_the_parameters_of_its_specification(name: str) -> None:
    spec = load_spec(name)
    model = Decoder(spec, device="meta")
    assert all(t.is_meta for t in model.state_dict().values())
    assert numbers(model) == spec.parameters


@pytest.mark.parametrize("name", ["nano-12b-v2", "nano-9b-v2"])
def test_counts_of_paper_a(name: str) -> None:
    assert numbers(Decoder(load_spec(name), device="meta")) == {"nano-12b-v2": 12310001152, "nano-9b-v2": 8888227328}[name]


@pytest.mark.parametrize("name", [n for n in BUILDABLE if load_spec(n).family == "hybrid"])
def test_names_and_shapes_are_those_of_transformers_on_the_hub(name: str) -> None:
    """transformers says `model.` in memory and writes `backbone.`; it stacks experts as we do."""
    file = resources.files("tandem.spec") / "data" / "models" / f"{name.replace('/', '--')}_config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config", "model_type")}
    built = CONFIG_MAPPING[config["model_type"]].from_dict(kept)
    with torch.device("meta"), no_init_weights():
        theirs = AutoModelForCausalLM.from_config(built).state_dict()
    ours = Decoder(load_spec(name), device="meta").state_dict()
    expected = {key.replace("model.", "backbone.", 1): tuple(t.shape) for key, t in theirs.items() if "mtp" not in key}
    assert {key: tuple(t.shape) for key, t in ours.items()} == expected


@EXAMPLES
@given(spec=any_models(), tied=st.booleans())
def test_random_models_have_the_parameters_of_their_specification(spec: ModelSpec, tied: bool) -> None:
    spec = replace(spec, tied_embeddings=tied)
    assert numbers(Decoder(spec, device="meta")) == spec.parameters


def test_names_are_those_that_transformers_saves(tmp_path: Any) -> None:
    from safetensors import safe_open

    spec = hybrids_example()
    model = build(spec)
    nemotron_h(model).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    ours = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    single = {key: shape for key, shape in saved.items() if ".mixer.experts." not in key}
    assert single == {key: shape for key, shape in ours.items() if ".mixer.experts." not in key}
    for name in ("up_proj", "down_proj"):
        rows = [shape for key, shape in saved.items() if ".mixer.experts." in key and name in key]
        stacked = ours[f"backbone.layers.3.mixer.experts.{name}"]
        assert rows == [stacked[1:]] * stacked[0]


def hybrids_example() -> ModelSpec:
    return ModelSpec(
        name="m",
        vocab_size=19,
        hidden_size=8,
        layers=(
            Mamba2(num_heads=4, head_dim=3, state_dim=5, groups=2),
            Attention(num_heads=2, num_kv_heads=1, head_dim=4),
            MLP(ffn_size=9, gated=False),
            MoE(num_experts=4, top_k=2, ffn_size=7, gated=False, shared_ffn_size=6, latent_size=5, router_bias=True,
                score="sigmoid"),
        ),
    )  # fmt: skip


HEADS = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
EXPERTS = {"num_experts": 4, "top_k": 2, "ffn_size": 8}
REFUSED: list[tuple[Mixer, str]] = [
    (MLA(num_heads=2, q_lora_rank=None, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4), "MLA"),
    (GatedDeltaNet(num_key_heads=1, key_head_dim=4, num_value_heads=2, value_head_dim=4), "GatedDeltaNet"),
    (Attention(**HEADS, window=8), "window=8"),
    (Attention(**HEADS, sinks=True), "sinks=True"),
    (Attention(**HEADS, output_gate=True), "output_gate=True"),
    (Attention(**HEADS, qk_norm="full"), "qk_norm='full'"),
    (Attention(**HEADS, qk_norm="unweighted"), "qk_norm='unweighted'"),
    (Attention(**HEADS, rope=Rope(theta=1e4, scaling="yarn", factor=4.0)), "'yarn'"),
    (Attention(**HEADS, rope=Rope(theta=1e4, scaling="dynamic", factor=4.0)), "'dynamic'"),
    (Attention(**HEADS | {"head_dim": 5}, rope=Rope(theta=1e4)), "head_dim=5"),
    (Attention(**HEADS | {"head_dim": 6}, rope=Rope(theta=1e4, fraction=0.5)), "fraction=0.5"),
    (MoE(**EXPERTS, gated=False, router_bias=True), "score='softmax'"),
    (MoE(**EXPERTS, gated=True, router_bias=True, score="sigmoid"), "gated=True"),
    (MoE(**EXPERTS, gated=False, router_bias=True, score="sigmoid", bias=True), "bias=True"),
    (MoE(**EXPERTS, gated=False, router_bias=True, score="sigmoid", shared_ffn_size=4, shared_gate=True), "shared_gate=True"),
    (MoE(**EXPERTS, gated=False, score="sigmoid"), "router_bias=False"),
]


@pytest.mark.parametrize(("mixer", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_the_decoder_cannot_compute_is_refused_by_layer(mixer: Mixer, reason: str) -> None:
    spec = ModelSpec(name="odd", vocab_size=9, hidden_size=8, layers=(MLP(ffn_size=4, gated=True), mixer))
    with pytest.raises(SpecError) as error:
        Decoder(spec)
    text = str(error.value)
    assert text.startswith("layers[1] of odd: ")
    assert reason in text
    assert "\n" not in text


SPEC = hybrids_example()


@pytest.mark.parametrize("wrong", [-1, 19, 2**40])
def test_tokens_outside_of_the_vocabulary(wrong: int) -> None:
    model, ids = build(SPEC), tokens(SPEC, 2, 5)
    ids[1, 2] = wrong
    state = model.prefill(tokens(SPEC, 2, 3))[1]
    before = state.to_bytes()
    for call in (lambda: model(ids), lambda: model.prefill(ids), lambda: model.prefill(ids, state)):
        one_line(call, f"input_ids holds {wrong}: must be from 0 to 18")
    one_line(lambda: model.decode(ids[:, 2], state), f"next_ids holds {wrong}: must be from 0 to 18")
    assert state.to_bytes() == before


def test_prompts_and_states_that_do_not_fit() -> None:
    model = build(SPEC)
    ids = tokens(SPEC, 2, 5)
    _, state = model.prefill(ids)
    one_line(lambda: model.prefill(ids[:, :0]), "input_ids has shape (2, 0): needs at least one token")
    one_line(lambda: model(ids[:, :0]), "input_ids has shape (2, 0): needs at least one token")
    one_line(lambda: model.prefill(ids[:0]), "input_ids has shape (0, 5): needs at least one token")
    one_line(lambda: model.prefill(ids[:1], state), "state has 2 sequences: input_ids has 1 rows")
    one_line(lambda: model.decode(ids[:1, 0], state), "next_ids has 1 rows: the state has 2 sequences")
    one_line(lambda: model.decode(ids[:0, 0], model.new_state(0)), "next_ids has shape (0, 1): needs at least one token")


def one_line(call: Any, text: str) -> None:
    with pytest.raises(SpecError) as error:
        call()
    assert str(error.value) == text


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 2e-1)], ids=["fp16", "bf16"])
@torch.no_grad()
def test_16_bit_weights_cost_their_rounding_only(dtype: torch.dtype, tolerance: float) -> None:
    """Activations are fp32 on CPUs, so logits are those of the rounded weights to fp32's digits. CPUs that multiply bf16 in
    hardware round activations as well: there only the weights' own tolerance can be asked.

    Against the unrounded ones they move by what rounding every weight does to this model, whose logits are of order one:
    0.005 (fp16) and 0.1 (bf16, a third of it by A_log, D and dt_bias), measured; twice that is allowed.
    """
    layers = tuple(m for m in SPEC.layers if not isinstance(m, MoE))  # a choice of experts may flip with any rounding
    spec = replace(SPEC, layers=layers)
    exact, ids = build(spec), tokens(spec, 2, 17)
    short = Decoder(spec, dtype=dtype).eval()
    short.load_state_dict(exact.state_dict())
    rounded = build(spec)
    rounded.load_state_dict(short.state_dict())
    of_rounded = 1e-5 if short.state_dtype == torch.float32 else tolerance
    for logits in (short(ids), prefilled_and_decoded(short, ids)):
        assert logits.dtype == torch.float32
        assert (logits - exact(ids)).abs().max().item() <= tolerance
        assert (logits - rounded(ids)).abs().max().item() <= of_rounded


def prefilled_and_decoded(model: Decoder, ids: Tensor) -> Tensor:
    logits, state = model.prefill(ids[:, :9], logits_to_keep=0)
    return torch.cat([logits, *(model.decode(ids[:, t : t + 1], state)[0] for t in range(9, ids.shape[1]))], 1)


@EXAMPLES
@given(spec=hybrids(), seed=st.integers(0, 2**31))
def test_every_weight_gets_a_gradient(spec: ModelSpec, seed: int) -> None:
    model = build(spec, seed)
    model(tokens(spec, 2, 9, seed)).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
