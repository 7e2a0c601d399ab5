"""The decoder against transformers' nemotron_h: fp32, CPU, random weights, logits of order one (`specs.py`).

Differences of theirs that are no part of the model, and what is done about them:
- its chunked path clamps dt at time_step_min, its decode path does not: no clamp here, see the test of the clamp by name;
- it zeroes padding before in_proj, whose bias then enters the convolution: with that bias, left padding changes its logits,
  so ours are compared with its logits without padding.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from specs import TOLERANCE, build, hybrids, nemotron_h, tokens, well_conditioned
from torch import Tensor

from tandem.spec.mixers import MLP, Attention, Mamba2, Mixer, MoE
from tandem.spec.model import ModelSpec

LENGTHS = st.integers(1, 29)
pytestmark = pytest.mark.usefixtures("arithmetic")
SEEDS = st.integers(0, 2**31)
EXAMPLES = settings(deadline=None, max_examples=12, derandomize=True, phases=[Phase.explicit, Phase.generate])
"""No shrinking: an example is small, and thousands of them take minutes."""


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def left_padded(spec: ModelSpec, lengths: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Random prompts of these lengths, right-aligned; what stands in the padding is random, too."""
    time = max(lengths)
    mask = torch.arange(time) >= time - torch.tensor(lengths)[:, None]
    return tokens(spec, len(lengths), time, seed), mask.long()


@EXAMPLES
@given(spec=hybrids(), batch=st.integers(1, 3), time=LENGTHS, chunk=st.integers(1, 12), seed=SEEDS)
@torch.no_grad()
def test_full_forward(spec: ModelSpec, batch: int, time: int, chunk: int, seed: int) -> None:
    model = build(spec, seed)
    ids = tokens(spec, batch, time, seed)
    assume(well_conditioned(model, ids))
    theirs = nemotron_h(model, chunk=chunk)(ids).logits
    assert theirs.std() < 10
    assert difference(model(ids), theirs) <= TOLERANCE


@EXAMPLES
@given(spec=hybrids(), batch=st.integers(1, 3), time=LENGTHS, steps=st.integers(1, 6), seed=SEEDS)
@torch.no_grad()
def test_prefill_and_decode(spec: ModelSpec, batch: int, time: int, steps: int, seed: int) -> None:
    model = build(spec, seed)
    peer = nemotron_h(model)
    ids = tokens(spec, batch, time + steps, seed)
    assume(well_conditioned(model, ids))
    ours, state = model.prefill(ids[:, :time])
    out = peer(ids[:, :time], use_cache=True)
    assert difference(ours[:, -1], out.logits[:, -1]) <= TOLERANCE
    for t in range(time, time + steps):
        ours, state = model.decode(ids[:, t], state)
        out = peer(ids[:, t : t + 1], cache=out.cache, use_cache=True)
        assert difference(ours, out.logits[:, -1]) <= TOLERANCE
    assert state.lengths.tolist() == [time + steps] * batch


@EXAMPLES
@given(spec=hybrids(biases=False), lengths=st.lists(LENGTHS, min_size=1, max_size=4), steps=st.integers(0, 4), seed=SEEDS)
@torch.no_grad()
def test_left_padding(spec: ModelSpec, lengths: list[int], steps: int, seed: int) -> None:
    model = build(spec, seed)
    peer = nemotron_h(model)
    ids, mask = left_padded(spec, lengths, seed)
    assume(well_conditioned(model, ids))
    out = peer(ids, attention_mask=mask, use_cache=True)
    seen = mask.bool()
    assert difference(model(ids, attention_mask=mask)[seen], out.logits[seen]) <= TOLERANCE
    ours, state = model.prefill(ids, attention_mask=mask)
    assert difference(ours[:, -1], out.logits[:, -1]) <= TOLERANCE
    following = tokens(spec, len(lengths), steps, seed + 1)
    for t in range(steps):
        ours, state = model.decode(following[:, t], state)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = mask.cumsum(1)[:, -1:] - 1
        out = peer(following[:, t : t + 1], attention_mask=mask, position_ids=positions, cache=out.cache, use_cache=True)
        assert difference(ours, out.logits[:, -1]) <= TOLERANCE
    assert state.lengths.tolist() == [length + steps for length in lengths]


@EXAMPLES
@given(spec=hybrids(), lengths=st.lists(LENGTHS, min_size=2, max_size=4), seed=SEEDS)
@torch.no_grad()
def test_padding_is_as_if_it_were_not_there(spec: ModelSpec, lengths: list[int], seed: int) -> None:
    model = build(spec, seed)
    peer = nemotron_h(model)
    ids, mask = left_padded(spec, lengths, seed)
    assume(well_conditioned(model, ids))
    ours = model(ids, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = peer(ids[row : row + 1, -length:]).logits
        assert difference(ours[row : row + 1, -length:], alone) <= TOLERANCE


@EXAMPLES
@given(spec=hybrids(), time=LENGTHS, low=st.sampled_from([0.001, 0.03, 0.3]), high=st.sampled_from([2.0, None]), seed=SEEDS)
@torch.no_grad()
def test_the_clamp_by_name_is_theirs(spec: ModelSpec, time: int, low: float, high: float | None, seed: int) -> None:
    def clamped(m: Mixer) -> Mixer:
        return replace(m, dt_min=low, dt_max=high) if isinstance(m, Mamba2) else m

    spec = replace(spec, layers=tuple(clamped(m) for m in spec.layers))
    model = build(spec, seed)
    ids = tokens(spec, 2, time + 1, seed)
    assume(well_conditioned(model, ids))
    theirs = nemotron_h(model, clamp=(low, float("inf") if high is None else high))(ids).logits
    assert difference(model(ids), theirs) <= TOLERANCE
    _, state = model.prefill(ids[:, :-1])  # the step clamps as the scan does
    assert difference(model.decode(ids[:, -1], state)[0], theirs[:, -1]) <= TOLERANCE


def test_the_clamp_changes_something() -> None:
    layers = (Mamba2(num_heads=2, head_dim=4, state_dim=4, groups=1), Attention(num_heads=1, num_kv_heads=1, head_dim=4))
    spec = ModelSpec(name="m", vocab_size=11, hidden_size=8, layers=layers)
    free, ids = build(spec), tokens(spec, 1, 9)
    bound = build(replace(spec, layers=(replace(layers[0], dt_min=1.0, dt_max=2.0), layers[1])))
    assert difference(free(ids), bound(ids)) > 1e-2


WIDE = ModelSpec(
    name="wide",
    vocab_size=64,
    hidden_size=48,
    layers=(
        Mamba2(num_heads=6, head_dim=16, state_dim=16, groups=2),
        MLP(ffn_size=64, gated=False),
        Attention(num_heads=4, num_kv_heads=2, head_dim=16),
        MoE(num_experts=8, top_k=3, ffn_size=24, gated=False, shared_ffn_size=32, router_bias=True, score="sigmoid",
            score_scale=2.5),
    ) * 2,
)  # fmt: skip


@torch.no_grad()
def test_many_chunks() -> None:
    """Longer than several chunks of either side (64 here, 128 there), and a multiple of neither."""
    model = build(WIDE)
    ids = tokens(WIDE, 2, 300)
    assert difference(model(ids), nemotron_h(model, chunk=128)(ids).logits) <= TOLERANCE


@settings(EXAMPLES, max_examples=10)
@given(spec=hybrids(), time=st.integers(2, 20), seed=SEEDS)
def test_gradients(spec: ModelSpec, time: int, seed: int) -> None:
    """Of the mean cross-entropy, for every weight: within 1e-4 of its largest number, or 1e-6 of the largest of all."""
    model = build(spec, seed)
    peer = nemotron_h(model)
    ids = tokens(spec, 2, time, seed)
    assume(well_conditioned(model, ids))
    _loss(model(ids), ids).backward()
    _loss(peer(ids).logits, ids).backward()
    expected = {name: p.grad for name, p in peer.named_parameters()}
    largest = max(g.abs().max().item() for g in expected.values() if g is not None)
    for name, p in model.named_parameters():
        theirs = expected[name.replace("backbone.", "model.")]
        assert p.grad is not None, name
        scale = max(theirs.abs().max().item(), 1e-2 * largest)
        assert difference(p.grad, theirs) <= 1e-4 * scale, name


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(spec=hybrids(), lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4), chunk=st.integers(1, 64), seed=SEEDS)
@torch.no_grad()
def test_all_ways_of_running_a_model_deeper(spec: ModelSpec, lengths: list[int], chunk: int, seed: int) -> None:
    model = build(spec, seed)
    peer = nemotron_h(model, chunk=chunk)
    ids, mask = left_padded(spec, lengths, seed)
    assume(well_conditioned(model, ids))
    ours = model(ids, attention_mask=mask)
    last, _ = model.prefill(ids, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = peer(ids[row : row + 1, -length:]).logits
        assert difference(ours[row : row + 1, -length:], alone) <= TOLERANCE
        assert difference(last[row, -1], alone[0, -1]) <= TOLERANCE
