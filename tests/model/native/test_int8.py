"""Int8 layers: how near they are, that they survive what modules go through, and that they replace every Linear."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tandem.model import native
from tandem.model.hybrid import Decoder
from tandem.spec.mixers import MLP, Attention
from tandem.spec.model import ModelSpec

SPEC = ModelSpec(
    name="small",
    vocab_size=61,
    hidden_size=96,
    layers=(Attention(num_heads=4, num_kv_heads=2, head_dim=24), MLP(ffn_size=200, gated=True)),
    tied_embeddings=True,
)


def test_weights_are_within_half_a_step_of_their_scale() -> None:
    layer = nn.Linear(100, 30)
    made = native.Int8Linear(layer)
    error = (made.dequantised() - layer.weight).abs()
    step = made.scale.repeat_interleave(64, 1)[:, :100]
    assert (error <= step * 0.5001).all()
    assert made.weight.shape == (30, 128)  # padded to whole groups


@pytest.mark.parametrize("native_path", [True, False])
def test_outputs_are_near_those_of_the_layer(native_path: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native_path:
        monkeypatch.setattr("tandem.model.native.int8.available", lambda: False)
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 64), torch.randn(5, 7, 256)
    ours, exact = native.Int8Linear(layer)(x), layer(x)
    assert ours.shape == exact.shape
    assert (ours - exact).norm() <= 0.008 * exact.norm()  # one rounding to 8 bits, some 0.6 % of a group's rms


def test_inputs_lose_next_to_nothing_even_beside_one_that_is_a_hundred_times_larger() -> None:
    torch.manual_seed(0)
    made, x = native.Int8Linear(nn.Linear(1024, 64, bias=False)), torch.randn(9, 1024)
    x[:, 7] *= 100
    exact = x @ made.dequantised().T
    assert (made(x) - exact).norm() <= 1e-3 * exact.norm()


def test_moving_a_model_keeps_scales_in_fp32() -> None:
    made = native.Int8Linear(nn.Linear(64, 8)).half()
    assert made.scale.dtype == torch.float32
    assert made.weight.dtype == torch.int8
    assert made.bias is not None
    assert made.bias.dtype == torch.float16


def test_quantising_replaces_every_linear_and_leaves_the_embeddings() -> None:
    model = Decoder(SPEC, dtype=torch.float16, seed=1)
    ids = torch.arange(12)[None]
    before = model(ids)
    embeddings = model.backbone.embeddings.weight.clone()
    assert native.quantise(model) is model
    assert not [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert torch.equal(model.backbone.embeddings.weight, embeddings)
    assert (model(ids) - before).norm() <= 0.02 * before.norm()
    copy = Decoder(SPEC, dtype=torch.float16, seed=2)
    native.quantise(copy).load_state_dict(model.state_dict())
    assert torch.equal(copy(ids), model(ids))
