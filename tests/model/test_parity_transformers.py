"""The decoder against transformers' llama and qwen3: fp32, CPU, random weights, logits of order one (`specs.py`)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import specs
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from specs import TOLERANCE, build, tokens
from torch import Tensor
from transformers import PreTrainedModel

from tandem.model.hybrid import Decoder
from tandem.spec.model import ModelSpec

PEERS: dict[str, Callable[[Decoder], PreTrainedModel]] = {"llama": specs.llama, "qwen3": specs.qwen3}
LENGTHS = st.integers(1, 40)
SEEDS = st.integers(0, 2**31)
EXAMPLES = settings(deadline=None, max_examples=10, derandomize=True, phases=[Phase.explicit, Phase.generate])
both = pytest.mark.parametrize("architecture", PEERS)


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


@both
@EXAMPLES
@given(data=st.data(), time=LENGTHS, steps=st.integers(0, 5), seed=SEEDS)
@torch.no_grad()
def test_forward_and_decode(architecture: str, data: st.DataObject, time: int, steps: int, seed: int) -> None:
    spec: ModelSpec = data.draw(specs.transformers(architecture))
    model = build(spec, seed)
    peer = PEERS[architecture](model)
    ids = tokens(spec, 2, time + steps, seed)
    assert difference(model(ids), peer(ids).logits) <= TOLERANCE
    ours, state = model.prefill(ids[:, :time], logits_to_keep=0)
    out = peer(ids[:, :time], use_cache=True)
    assert difference(ours, out.logits) <= TOLERANCE
    for t in range(time, time + steps):
        ours, state = model.decode(ids[:, t : t + 1], state)
        out = peer(ids[:, t : t + 1], cache=out.cache, use_cache=True)
        assert difference(ours, out.logits) <= TOLERANCE


@both
@EXAMPLES
@given(data=st.data(), lengths=st.lists(LENGTHS, min_size=2, max_size=3), steps=st.integers(0, 4), seed=SEEDS)
@torch.no_grad()
def test_left_padding(architecture: str, data: st.DataObject, lengths: list[int], steps: int, seed: int) -> None:
    """Theirs is told the positions, ours finds them."""
    spec: ModelSpec = data.draw(specs.transformers(architecture))
    model = build(spec, seed)
    peer = PEERS[architecture](model)
    time = max(lengths)
    ids = tokens(spec, len(lengths), time, seed)
    mask = (torch.arange(time) >= time - torch.tensor(lengths)[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = peer(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    seen = mask.bool()
    assert difference(model(ids, attention_mask=mask)[seen], out.logits[seen]) <= TOLERANCE
    ours, state = model.prefill(ids, attention_mask=mask)
    assert difference(ours[:, -1], out.logits[:, -1]) <= TOLERANCE
    following = tokens(spec, len(lengths), steps, seed + 1)
    for t in range(steps):
        ours, state = model.decode(following[:, t], state)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        out = peer(
            following[:, t : t + 1],
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            cache=out.cache,
            use_cache=True,
        )
        assert difference(ours, out.logits[:, -1]) <= TOLERANCE


@both
@settings(EXAMPLES, max_examples=6)
@given(data=st.data(), time=st.integers(2, 20), seed=SEEDS)
def test_gradients(architecture: str, data: st.DataObject, time: int, seed: int) -> None:
    spec: ModelSpec = data.draw(specs.transformers(architecture))
    model = build(spec, seed)
    peer = PEERS[architecture](model)
    ids = tokens(spec, 2, time, seed)
    for logits in (model(ids), peer(ids).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = {name: p.grad for name, p in peer.named_parameters()}
    largest = max(g.abs().max().item() for g in expected.values())
    for name, p in model.named_parameters():
        theirs = expected[specs.their_name(name, specs.BLOCK_NAMES)]
        assert difference(p.grad, theirs) <= 1e-4 * max(theirs.abs().max().item(), 1e-2 * largest), name
