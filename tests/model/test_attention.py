"""Attention by FlexAttention against the same attention with a mask; on a GPU, compiled, by the code that runs there."""

from __future__ import annotations

import pytest
import torch

from tandem.model.attention import attend, attend_documents
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
