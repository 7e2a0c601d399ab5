"""Heads of one Mamba group may change places with all that belongs to them; heads of different groups may not.

This is what pruning relies on: it keeps heads group by group (paper A, section 4.2).
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from specs import TOLERANCE, build, tokens
from torch import Tensor

from tandem.model.hybrid import Decoder
from tandem.model.mamba2 import Mamba2Mixer
from tandem.spec.mixers import Attention, Mamba2
from tandem.spec.model import ModelSpec

pytestmark = pytest.mark.usefixtures("arithmetic")
EXAMPLES = settings(deadline=None, max_examples=6, derandomize=True, phases=[Phase.explicit, Phase.generate])


def model_of(groups: int, ratio: int, head_dim: int, kernel: int) -> ModelSpec:
    mamba = Mamba2(num_heads=groups * ratio, head_dim=head_dim, state_dim=5, groups=groups, conv_kernel=kernel, proj_bias=True)
    attention = Attention(num_heads=2, num_kv_heads=1, head_dim=4)
    return ModelSpec(name="m", vocab_size=17, hidden_size=10, layers=(mamba, attention, mamba))


@torch.no_grad()
def permuted(model: Decoder, order: list[int]) -> Decoder:
    """A copy whose Mamba layers hold head `order[i]` at place i: rows z, x and dt, columns of the output, all per head."""
    model = copy.deepcopy(model)
    for mixer in model.modules():
        if not isinstance(mixer, Mamba2Mixer):
            continue
        m = mixer.m
        heads = torch.tensor(order)
        inner = (heads[:, None] * m.head_dim + torch.arange(m.head_dim)).flatten()
        b_and_c = torch.arange(m.d_inner, m.conv_width)
        conv = torch.cat([inner, b_and_c])
        rows = torch.cat([inner, m.d_inner + conv, m.d_inner + m.conv_width + heads])
        for tensor, index in (
            (mixer.in_proj.weight, rows),
            (mixer.in_proj.bias, rows),
            (mixer.conv1d.weight, conv),
            (mixer.conv1d.bias, conv),
            (mixer.A_log, heads),
            (mixer.D, heads),
            (mixer.dt_bias, heads),
            (mixer.norm.weight, inner),
        ):
            tensor.copy_(tensor[index])
        mixer.out_proj.weight.copy_(mixer.out_proj.weight[:, inner])
    return model


@torch.no_grad()
def all_logits(model: Decoder, ids: Tensor) -> Tensor:
    """Of a full pass, and of a prefill with decode steps."""
    logits, state = model.prefill(ids[:, :4], logits_to_keep=0)
    steps = [model.decode(ids[:, t : t + 1], state)[0] for t in range(4, ids.shape[1])]
    return torch.cat([model(ids), logits, *steps], 1)


@EXAMPLES
@given(
    groups=st.integers(1, 4),
    ratio=st.integers(2, 4),
    head_dim=st.integers(2, 6),
    kernel=st.integers(2, 5),
    random=st.randoms(use_true_random=False),
    seed=st.integers(0, 2**31),
)
def test_heads_may_change_places_within_their_group(
    groups: int, ratio: int, head_dim: int, kernel: int, random: object, seed: int
) -> None:
    spec = model_of(groups, ratio, head_dim, kernel)
    order = [g * ratio + i for g in range(groups) for i in random.sample(range(ratio), ratio)]
    model, ids = build(spec, seed), tokens(spec, 2, 11, seed)
    assert (all_logits(model, ids) - all_logits(permuted(model, order), ids)).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("order", [[2, 1, 0, 3], [2, 3, 0, 1], [0, 2, 1, 3]], ids=str)
def test_heads_of_different_groups_may_not(order: list[int]) -> None:
    spec = model_of(2, 2, 4, 4)
    model, ids = build(spec), tokens(spec, 2, 11)
    assert (all_logits(model, ids) - all_logits(permuted(model, order), ids)).abs().max().item() > 1e-2
