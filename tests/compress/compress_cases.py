"""Small models that tests of compression share."""

from __future__ import annotations

import torch

from tandem.compress.calibration import Calibration
from tandem.model.hybrid import Decoder
from tandem.spec.model import MLP, Attention, Mamba2, ModelSpec, MoE, Rope

MAMBA = Mamba2(num_heads=4, head_dim=8, state_dim=8, groups=2)
ATTENTION = Attention(num_heads=4, num_kv_heads=2, head_dim=8, rope=Rope(theta=1e4), qk_norm="head", qkv_bias=True)
MOE = MoE(num_experts=6, top_k=2, ffn_size=12, gated=False, shared_ffn_size=16, router_bias=True, score="sigmoid")
HYBRID = ModelSpec(
    name="hybrid",
    vocab_size=64,
    hidden_size=32,
    layers=(MAMBA, MLP(ffn_size=48, gated=False), ATTENTION, MLP(ffn_size=48, gated=False), MOE, MAMBA),
)
LLAMA = ModelSpec(
    name="llama",
    vocab_size=64,
    hidden_size=32,
    layers=(Attention(num_heads=4, num_kv_heads=2, head_dim=8, rope=Rope(theta=1e4)), MLP(ffn_size=48, gated=True)) * 2,
    tied_embeddings=True,
)


def samples(spec: ModelSpec, rows: int = 3, time: int = 24) -> Calibration:
    return Calibration.of_rows(torch.randint(0, spec.vocab_size, (rows, time + 1), generator=torch.Generator().manual_seed(5)))


def shaken(spec: ModelSpec, seed: int = 0) -> Decoder:
    """A decoder whose every tensor is random, norms and biases as well: a slice in the wrong place shows."""
    decoder = Decoder(spec, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [*decoder.parameters(), *decoder.buffers()]:
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return decoder
