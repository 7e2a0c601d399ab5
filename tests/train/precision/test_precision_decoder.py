"""Which linears of a decoder are converted, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tandem
from tandem.model.hybrid import Decoder
from tandem.model.linear import Linear
from tandem.spec.catalog import load_spec
from tandem.spec.errors import SpecError
from tandem.spec.mixers import MLP, Attention, Mamba2, Mixer, MoE
from tandem.spec.model import ModelSpec
from tandem.train.fp8 import BLOCKWISE, CURRENT_SCALING
from tandem.train.precision import Bf16Linear, Fp8Linear, apply_precision, layer_linears
from tandem.train.recipe import PrecisionPart

MIXERS: dict[str, Mixer] = {
    "M": Mamba2(num_heads=4, head_dim=8, state_dim=8, groups=2, conv_kernel=4, conv_bias=True, proj_bias=False),
    "*": Attention(num_heads=4, num_kv_heads=2, head_dim=8),
    "-": MLP(ffn_size=48, gated=False),
    "G": MLP(ffn_size=48, gated=True),
    "E": MoE(
        num_experts=4,
        top_k=2,
        ffn_size=16,
        gated=False,
        shared_ffn_size=16,
        latent_size=8,
        router_bias=True,
        score="sigmoid",
        normalise=True,
    ),
}


def spec(pattern: str, *, tied: bool = False) -> ModelSpec:
    layers = tuple(MIXERS[letter] for letter in pattern)
    return ModelSpec(name="tiny", hidden_size=32, vocab_size=64, layers=layers, norm_eps=1e-5, tied_embeddings=tied)


def kinds(model: Decoder) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules() if isinstance(module, Linear)}


def loss(model: Decoder) -> Tensor:
    ids = torch.randint(0, 64, (3, 50), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(50) > 30).long().expand(3, 50)
    return torch.nn.functional.cross_entropy(model(ids, documents=documents)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_first_and_last_two_layers_of_the_12b_stay_in_bf16() -> None:
    """Its script: --num-layers-at-start-in-bf16 2 --num-layers-at-end-in-bf16 2, layers of one mixer with two linears each."""
    model = Decoder(load_spec("nemotron-nano-12b-v2"), dtype=torch.bfloat16, device="meta")
    converted = apply_precision(model, PrecisionPart(linears="fp8-block"))
    found = kinds(model)
    assert {name for name, kind in found.items() if kind is Fp8Linear} == set(converted)
    assert {name for name, kind in found.items() if kind is Bf16Linear} == {
        "backbone.layers.0.mixer.in_proj",
        "backbone.layers.0.mixer.out_proj",
        "backbone.layers.1.mixer.up_proj",
        "backbone.layers.1.mixer.down_proj",
        "backbone.layers.60.mixer.in_proj",
        "backbone.layers.60.mixer.out_proj",
        "backbone.layers.61.mixer.up_proj",
        "backbone.layers.61.mixer.down_proj",
        "lm_head",
    }
    assert len(converted) == 2 * 28 + 2 * 28 + 4 * 6 - 8


def test_order_of_execution() -> None:
    """As forward hooks see it."""
    model = Decoder(spec("M*-GE"))
    seen: list[str] = []
    for name in layer_linears(model):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    model(torch.zeros(1, 4, dtype=torch.long))
    assert seen == layer_linears(model)
    assert len(seen) == 2 + 4 + 2 + 3 + 4


@pytest.mark.parametrize(
    ("first", "last", "left"), [(0, 0, 8), (1, 2, 5), (4, 4, 0), (8, 0, 0), (9, 9, 0), (0, 8, 0), (6, 4, 0)]
)
def test_what_is_kept(first: int, last: int, left: int) -> None:
    model = Decoder(spec("M-*"))
    names = layer_linears(model)
    chosen = apply_precision(model, PrecisionPart(linears="fp8-block", keep_first=first, keep_last=last))
    assert chosen == names[first : first + left]
    assert all((kind is Fp8Linear) == (name in chosen) for name, kind in kinds(model).items())


def test_every_setting_and_back_again() -> None:
    model = Decoder(spec("M*-"), seed=1)
    exact = loss(model).item()
    names = [*layer_linears(model), "lm_head"]
    part = PrecisionPart(linears="fp8-tensor", keep_first=0, keep_last=0)
    assert apply_precision(model, part) == names[:-1]
    assert all(module.recipe is CURRENT_SCALING for module in model.modules() if isinstance(module, Fp8Linear))
    assert apply_precision(model, replace(part, linears="fp8-block")) == names[:-1]
    assert all(module.recipe is BLOCKWISE for module in model.modules() if isinstance(module, Fp8Linear))
    assert apply_precision(model, replace(part, linears="bf16")) == names
    assert set(kinds(model).values()) == {Bf16Linear}
    assert apply_precision(model, replace(part, linears="fp32")) == []
    assert set(kinds(model).values()) == {Linear}
    assert loss(model).item() == exact


@pytest.mark.parametrize("linears", ["bf16", "fp8-block", "fp8-tensor"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_and_checkpoints_do_not_change(linears: str, tied: bool, tmp_path: Path) -> None:
    model = Decoder(spec("M*-G", tied=tied), seed=1)
    before = dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    apply_precision(model, PrecisionPart(linears=linears, keep_first=0, keep_last=0))
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert not any(module.training for module in model.modules())
    assert (model.lm_head.weight is model.backbone.embeddings.weight) == tied
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    tandem.save_model(model, tmp_path / "saved")
    saved = tandem.load_model(str(tmp_path / "saved"), dtype="float32")
    assert all(torch.equal(value, state[name]) for name, value in saved.state_dict().items())


@pytest.mark.parametrize(("linears", "limit"), [("bf16", 0.01), ("fp8-block", 0.1), ("fp8-tensor", 0.15)])
def test_training_with_every_kind_of_layer(linears: str, limit: float) -> None:
    """Gradients of the whole model, packed documents and all, are near the exact ones and not the same."""
    model = Decoder(spec("M*-GE"), seed=1)
    loss(model).backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    apply_precision(model, PrecisionPart(linears=linears, keep_first=0, keep_last=0))
    loss(model).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert 0 < float((grads - exact).norm() / exact.norm()) < limit


def test_generation_decodes_in_the_same_numbers_as_a_whole_pass() -> None:
    model = Decoder(spec("M*-"), seed=1)
    apply_precision(model, PrecisionPart(linears="bf16"))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        whole = model(ids)
    _, state = model.prefill(ids[:, :-1])
    logits, _ = model.decode(ids[:, -1], state)
    assert torch.allclose(logits, whole[:, -1], atol=2e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"linears": "fp4"}, "precision.linears='fp4': must be one of fp32, bf16, fp8-block, fp8-tensor"),
        ({"keep_first": -1}, "precision.keep_first=-1"),
        ({"keep_last": True}, "precision.keep_last=True"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        PrecisionPart(**fields)
