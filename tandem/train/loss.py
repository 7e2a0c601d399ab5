"""Cross-entropy of the tokens that are learned, a piece of them at a time, so that the logits of all are never in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tandem.model.hybrid import Decoder
from tandem.train.data.packing import IGNORED

_PIECE_NUMBERS = 2**24
"""Logits that are held at once."""
_ROWS = 256
"""Learned tokens are made up to a multiple of this: oneDNN keeps compiled code and memory for every shape that it has met."""

Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""a @ b of two fp32 matrices, as fp32, its operands rounded as the recipe says."""


class Trainee(nn.Module):
    """A decoder whose forward pass is its loss: what is sharded, compiled and trained."""

    def __init__(self, decoder: Decoder, product: Product) -> None:
        super().__init__()
        self.decoder = decoder
        self.product = product

    def forward(
        self, input_ids: Int[Tensor, "b t"], labels: Int[Tensor, "b t"], documents: Int[Tensor, "b t"]
    ) -> Float[Tensor, ""]:
        """Sum of the negative log-likelihoods (nats) of all labels but `IGNORED`, fp32.

        The head runs on the learned tokens only, which with masked prompts are often half of all.
        """
        hidden = self.decoder.hidden_states(input_ids, documents=documents)
        learned = labels.flatten() != IGNORED
        return summed_nll(hidden.flatten(0, 1)[learned], self.decoder.lm_head.weight, labels.flatten()[learned], self.product)


def summed_nll(
    hidden: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], labels: Int[Tensor, " n"], product: Product
) -> Float[Tensor, ""]:
    """Sum of -log softmax(hidden W^T)[label], fp32; the gradients of both are computed on the way, once."""
    more = -len(labels) % _ROWS  # rows of zeros that are left out again
    padded = functional.pad(hidden, (0, 0, 0, more)), weight, functional.pad(labels, (0, more), value=IGNORED)
    total: Tensor = _SummedNll.apply(*padded, product, torch.is_grad_enabled())
    return total


class _SummedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, product: Product, wanted: bool) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
        rows = max(1, _PIECE_NUMBERS // weight.shape[0])
        for begin in range(0, len(labels), rows):
            piece, wished = hidden[begin : begin + rows], labels[begin : begin + rows]
            left_out, wished = wished == IGNORED, wished.clamp(min=0)
            log_p = functional.log_softmax(product(piece, weight.t()), 1)
            total -= log_p.gather(1, wished[:, None])[:, 0].masked_fill_(left_out, 0.0).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            grad = log_p.exp_()
            grad[torch.arange(len(wished), device=grad.device), wished] -= 1.0
            grad.masked_fill_(left_out[:, None], 0.0)
            grad_hidden[begin : begin + rows] = product(grad, weight)
            grad_weight += product(grad.t(), piece)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad, None, None, None
