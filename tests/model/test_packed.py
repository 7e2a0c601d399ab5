"""Documents packed into a row are documents alone: logits and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from specs import TOLERANCE, any_models, build, tokens
from torch import Tensor

from tandem.model.hybrid import Decoder
from tandem.model.mamba2 import Mamba2Mixer
from tandem.spec.errors import SpecError
from tandem.spec.mixers import MLP, Attention, Mamba2, Rope
from tandem.spec.model import ModelSpec

pytestmark = pytest.mark.usefixtures("arithmetic")
SEEDS = st.integers(0, 2**31)
EXAMPLES = settings(deadline=None, max_examples=8, derandomize=True, phases=[Phase.explicit, Phase.generate])
DOCUMENTS = st.lists(st.sampled_from([1, 1, 2, 3, 4, 5, 8, 13]), min_size=1, max_size=7)
CHUNKS = st.sampled_from([1, 2, 4, 5, 8, 64])
SPEC = ModelSpec(
    name="small",
    vocab_size=23,
    hidden_size=12,
    layers=(
        Mamba2(num_heads=4, head_dim=3, state_dim=5, groups=2),
        Attention(num_heads=4, num_kv_heads=2, head_dim=6, rope=Rope(theta=100.0)),
        MLP(ffn_size=16, gated=True),
        Mamba2(num_heads=2, head_dim=4, state_dim=3, groups=1, conv_kernel=5),
    ),
)


def rechunk(model: Decoder, chunk: int) -> Decoder:
    for module in model.modules():
        if isinstance(module, Mamba2Mixer):
            module.chunk = chunk
    return model


def numbered(lengths: list[int], ids: list[int] | None = None) -> Tensor:
    """Document numbers of one row; any numbers will do, as long as neighbours differ."""
    return torch.tensor([n for i, length in enumerate(lengths) for n in [ids[i % len(ids)] if ids else i] * length])


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


@EXAMPLES
@given(spec=any_models(), lengths=DOCUMENTS, ids=st.sampled_from([None, [7, 0], [3, -1, 5]]), chunk=CHUNKS, seed=SEEDS)
@torch.no_grad()
def test_packed_documents_are_documents_alone(
    spec: ModelSpec, lengths: list[int], ids: list[int] | None, chunk: int, seed: int
) -> None:
    """Two rows, cut at other places: the second holds the documents in reverse."""
    model = rechunk(build(spec, seed), chunk)
    rows = [lengths, lengths[::-1]]
    text = tokens(spec, 2, sum(lengths), seed)
    documents = torch.stack([numbered(row, ids) for row in rows])
    for numbers in (documents, documents.int()):
        packed = model(text, documents=numbers)
        for row, row_lengths in enumerate(rows):
            parts = text[row].split(row_lengths)
            alone = torch.cat([model(part[None])[0] for part in parts])
            assert difference(packed[row], alone) <= TOLERANCE


@pytest.mark.parametrize("chunk", [1, 4, 8, 64])
@pytest.mark.parametrize("lengths", [[4, 4, 8], [1] * 16, [8, 8], [7, 1, 8], [8, 1, 7], [16], [3, 1, 1, 1, 10]], ids=str)
@torch.no_grad()
def test_cuts_at_and_beside_chunk_boundaries(lengths: list[int], chunk: int) -> None:
    model = rechunk(build(SPEC), chunk)
    text = tokens(SPEC, 1, 16)
    alone = torch.cat([model(part, documents=None) for part in text.split(lengths, 1)], 1)
    assert difference(model(text, documents=numbered(lengths)[None]), alone) <= TOLERANCE


@EXAMPLES
@given(lengths=DOCUMENTS, padding=st.integers(1, 9), left=st.booleans(), seed=SEEDS)
@torch.no_grad()
def test_packed_and_padded(lengths: list[int], padding: int, left: bool, seed: int) -> None:
    model = rechunk(build(SPEC, seed), 4)
    time = sum(lengths)
    text = tokens(SPEC, 1, time + padding, seed)
    mask = torch.ones(1, time + padding, dtype=torch.int64)
    where = slice(padding, None) if left else slice(0, time)
    mask[:, slice(0, padding) if left else slice(time, None)] = 0
    documents = torch.full((1, time + padding), 99)
    documents[:, where] = numbered(lengths)
    found = model(text, attention_mask=mask, documents=documents)[:, where]
    assert difference(found, model(text[:, where], documents=documents[:, where])) <= TOLERANCE


def test_a_state_beside_documents_is_refused_and_stays_as_it_is() -> None:
    """Keys of all documents and the recurrent state of the last would be a state of nothing."""
    model, text = build(SPEC), tokens(SPEC, 1, 6)
    state = model.prefill(text)[1]
    before = state.to_bytes()
    with pytest.raises(SpecError, match="documents: a state holds one document a row"):
        model.hidden_states(text, documents=numbered([2, 4])[None], state=state)
    assert state.to_bytes() == before


@EXAMPLES
@given(lengths=DOCUMENTS, chunk=CHUNKS, seed=SEEDS)
def test_gradients_of_packed_documents_are_those_of_documents_alone(lengths: list[int], chunk: int, seed: int) -> None:
    model = rechunk(build(SPEC, seed), chunk)
    text = tokens(SPEC, 1, sum(lengths), seed)
    targets = tokens(SPEC, 1, sum(lengths), seed + 1)[0]

    def gradients(logits: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits[0], targets).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    found = gradients(model(text, documents=numbered(lengths)[None]))
    expected = gradients(torch.cat([model(part) for part in text.split(lengths, 1)], 1))
    largest = max(g.abs().max().item() for g in expected.values())
    for name, grad in expected.items():
        assert difference(found[name], grad) <= 1e-4 * max(grad.abs().max().item(), 0.1 * largest), name
