"""Small random models for the tests of engine and pools: a hybrid, a Transformer, a model without attention."""

from __future__ import annotations

from specs import build

from tandem.model.hybrid import Decoder, TokenIds
from tandem.spec.mixers import MLP, Attention, Mamba2, Mixer, Rope
from tandem.spec.model import ModelSpec

MAMBA = Mamba2(num_heads=4, head_dim=8, state_dim=8, groups=2, conv_kernel=4, conv_bias=True, proj_bias=False)
PLAIN = Attention(num_heads=4, num_kv_heads=2, head_dim=8)
ROTARY = Attention(num_heads=4, num_kv_heads=2, head_dim=8, rope=Rope(theta=10000.0))
LAYERS: dict[str, tuple[Mixer, ...]] = {
    "hybrid": (MAMBA, MLP(ffn_size=48, gated=False), PLAIN, MAMBA, MLP(ffn_size=48, gated=False)),
    "transformer": (ROTARY, MLP(ffn_size=48, gated=True), ROTARY, MLP(ffn_size=48, gated=True)),
    "recurrent": (MAMBA, MLP(ffn_size=48, gated=False), MAMBA),
}
KINDS = tuple(LAYERS)


def small_model(kind: str, *, vocabulary: int = 259, context: int = 512, seed: int = 0, eos: tuple[int, ...] = (2,)) -> Decoder:
    """A decoder whose logits are of order one; the vocabulary fits the toy tokenizer of bytes."""
    spec = ModelSpec(
        name=f"small-{kind}",
        vocab_size=vocabulary,
        hidden_size=32,
        tied_embeddings=False,
        layers=LAYERS[kind],
        max_context=context,
    )
    model = build(spec, seed).eval()
    model.token_ids = TokenIds(bos=1, eos=eos, pad=0)
    return model
