"""Attention within packed documents, one by one and by FlexAttention, against the same attention with a mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.model.attention import attend, attend_documents, attend_each, document_lengths
from tandem.model.span import Span


def documents_differ_from_masked(device: str, *, compiled: bool) -> float:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 137, 16, device=device)
    k, v = (torch.randn(2, 2, 137, 16, device=device) for _ in range(2))
    segments = torch.tensor([[0] * 10 + [1] * 127, [0] * 130 + [1] * 2 + [2] * 5], device=device)
    span = Span(time=137, device=q.device, segments=segments)
    return float((attend_documents(q, k, v, segments, compiled=compiled) - attend(q, k, v, mask=span.mask(137))).abs().max())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_within_documents_is_masked_attention() -> None:
    assert documents_differ_from_masked("cpu", compiled=False) < 1e-6


@pytest.mark.gpu
def test_flex_attention_within_documents_is_masked_attention_on_a_gpu() -> None:
    assert documents_differ_from_masked("cuda", compiled=True) < 1e-3


@given(seed=st.integers(0, 999), rows=st.integers(1, 3), time=st.integers(1, 40), change=st.floats(0.0, 0.6))
@settings(max_examples=40, deadline=None)
def test_documents_one_by_one_are_documents_under_a_mask(seed: int, rows: int, time: int, change: float) -> None:
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(rows, time, heads, 8, generator=random).transpose(1, 2).requires_grad_() for heads in (4, 2, 2))
    segments = (torch.rand(rows, time, generator=random) < change).cumsum(1)
    mask = (segments[:, None, :, None] == segments[:, None, None, :]) & torch.ones(time, time, dtype=torch.bool).tril()
    lengths = document_lengths(segments)
    assert sum(lengths) == rows * time
    assert min(lengths) >= 1
    each, masked = attend_each(q, k, v, lengths), attend(q, k, v, mask=mask)
    torch.testing.assert_close(each, masked, rtol=1e-4, atol=1e-5)
    weights = torch.randn(each.shape, generator=random)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (each, masked)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
