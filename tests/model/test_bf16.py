"""Activations in bf16, as on a CPU that multiplies it in hardware, and under autocast: every path runs and stays near fp32."""

from __future__ import annotations

import pytest
import torch
from specs import build, tokens
from torch import Tensor

from tandem.model import precision
from tandem.model.hybrid import Decoder
from tandem.spec.mixers import MLP, Attention, Mamba2, MoE, Rope
from tandem.spec.model import ModelSpec

LAYERS = {
    "mamba": Mamba2(num_heads=4, head_dim=8, state_dim=16, groups=2),
    "attention": Attention(num_heads=4, num_kv_heads=2, head_dim=8),
    "rotary": Attention(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm="head", rope=Rope(theta=100.0)),
    "mlp": MLP(ffn_size=64, gated=False),
    "gated": MLP(ffn_size=64, gated=True),
    "experts": MoE(num_experts=4, top_k=4, ffn_size=16, gated=False, shared_ffn_size=16, router_bias=True, score="sigmoid"),
}
NEAR = 0.25
"""Of logits with a standard deviation of one: bf16 has three digits, and the models have a layer or two."""


def spec_of(*names: str) -> ModelSpec:
    return ModelSpec(name="small", vocab_size=50, hidden_size=32, layers=tuple(LAYERS[name] for name in names))


SPECS = [*((name,) for name in LAYERS), ("mamba", "rotary", "gated")]


@pytest.fixture
def fast_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_fast_bf16", lambda: True)


def in_pieces(model: Decoder, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Logits of the last token, after a prefill, a second one from its state and three steps."""
    half = ids.shape[1] // 2
    _, state = model.prefill(ids[:, :half], attention_mask=None if mask is None else mask[:, :half])
    _, state = model.prefill(ids[:, half:-3], state)
    return [model.decode(ids[:, t], state)[0] for t in range(-3, 0)][-1]


def follows(model: Decoder, expected: Tensor, ids: Tensor) -> None:
    """Full pass, gradients, documents, and a state with equal and with ragged rows; the second row has no padding."""
    logits = model(ids)
    logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert (logits - expected).abs().max() < NEAR
        assert model(ids, documents=(torch.arange(ids.shape[1]) // 9).expand(2, -1)).isfinite().all()
        assert (in_pieces(model, ids, None) - expected[:, -1]).abs().max() < NEAR
        mask = torch.ones_like(ids)
        mask[0, :7] = 0
        assert (in_pieces(model, ids, mask)[1] - expected[1, -1]).abs().max() < NEAR


@pytest.mark.usefixtures("fast_bf16")
@pytest.mark.parametrize("names", SPECS, ids="-".join)
def test_weights_in_bf16_with_hardware_for_it(names: tuple[str, ...]) -> None:
    spec = spec_of(*names)
    ids = tokens(spec, 2, 40)
    with torch.no_grad():
        model = build(spec).to(torch.bfloat16)
        expected = build(spec)(ids)
    follows(model, expected, ids)
    held = model.prefill(ids)[1].layers[0]
    assert held is None or held.tensors[0].dtype == torch.bfloat16


@pytest.mark.parametrize("names", SPECS, ids="-".join)
def test_autocast(names: tuple[str, ...]) -> None:
    spec = spec_of(*names)
    ids, model = tokens(spec, 2, 40), build(spec)
    with torch.no_grad():
        expected = model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        follows(model, expected, ids)
