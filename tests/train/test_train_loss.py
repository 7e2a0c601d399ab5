"""The loss against torch's own cross-entropy, in value and gradients, and packed documents against single ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tandem.model.hybrid import Decoder
from tandem.spec.model import MLP, Attention, Mamba2, ModelSpec
from tandem.train import loss
from tandem.train.data.packing import IGNORED
from tandem.train.loss import Trainee, summed_nll

MIXERS = {
    "M": Mamba2(num_heads=4, head_dim=8, state_dim=8, groups=2),
    "*": Attention(num_heads=4, num_kv_heads=2, head_dim=8),
    "-": MLP(ffn_size=48, gated=False),
}


def decoder(pattern: str = "M-M*-", vocab: int = 61) -> Decoder:
    return Decoder(ModelSpec(name="tiny", vocab_size=vocab, hidden_size=32, layers=tuple(MIXERS[c] for c in pattern)), seed=3)


@given(rows=st.integers(0, 40), vocab=st.integers(2, 90), piece=st.integers(1, 2000), scale=st.floats(0.1, 30.0))
@settings(max_examples=60, deadline=None)
def test_value_and_gradients_are_those_of_cross_entropy_however_it_is_cut(
    rows: int, vocab: int, piece: int, scale: float
) -> None:
    random = torch.Generator().manual_seed(rows * 97 + vocab)
    hidden = (scale * torch.randn(rows, 16, generator=random)).requires_grad_()
    weight = torch.randn(vocab, 16, generator=random).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=random)
    expected = functional.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    wanted = torch.autograd.grad(0.37 * expected, (hidden, weight))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "_PIECE_NUMBERS", piece)
        got = summed_nll(hidden, weight, labels, torch.mm)
        found = torch.autograd.grad(0.37 * got, (hidden, weight))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    for a, b in zip(found, wanted, strict=True):
        # Sums of numbers as large as the largest gradient, in another order.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 + 1e-5 * (float(b.abs().max()) if b.numel() else 0.0))


@pytest.mark.parametrize("pattern", ["M-M*-", "*-*-", "MM"])
def test_packed_documents_cost_what_they_cost_alone(pattern: str) -> None:
    """Packed = unpacked: neither attention nor convolution nor state sees another document."""
    model = Trainee(decoder(pattern), torch.mm)
    random = torch.Generator().manual_seed(1)
    lengths = [5, 70, 1, 24]
    texts = [torch.randint(0, 61, (n,), generator=random) for n in lengths]
    ids = torch.cat(texts)[None]
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    labels = torch.cat([torch.cat([text[1:], torch.tensor([IGNORED])]) for text in texts])[None]
    packed = model(ids, labels, documents)
    gradients = torch.autograd.grad(packed, list(model.parameters()))
    alone = torch.zeros(())
    for text in texts:
        learned = torch.cat([text[1:], torch.tensor([IGNORED])])[None]
        alone = alone + model(text[None], learned, torch.zeros_like(text)[None])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-3)
    for a, b in zip(gradients, torch.autograd.grad(alone, list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_what_is_not_learned_costs_nothing_and_teaches_nothing() -> None:
    model = Trainee(decoder(), torch.mm)
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(2))
    labels = torch.full_like(ids, IGNORED)
    nothing = model(ids, labels, torch.zeros_like(ids))
    assert nothing == 0
    nothing.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    labels[1, 3] = 7
    one = model(ids, labels, torch.zeros_like(ids))
    expected = -model.decoder(ids)[1, 3].log_softmax(-1)[7]
    torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)


def test_without_gradients_none_are_made() -> None:
    model = Trainee(decoder(), torch.mm)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with torch.no_grad():
        assert not model(ids, ids, ids).requires_grad
