"""Losses of the tokens that are learned, a piece of them at a time, so that the logits of all are never in memory."""

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
PieceLoss: TypeAlias = Callable[[slice, Tensor, bool], tuple[Tensor, Tensor | None]]
"""Of some rows: which, their log-probabilities [n, v] (to be overwritten), whether the gradient is wanted. The loss, and its
gradient in the logits."""


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

    def nll(rows: slice, log_p: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        wished = labels[rows]
        at = torch.arange(len(wished), device=wished.device)
        loss = -log_p[: len(wished)].gather(1, wished[:, None]).sum()
        if not wanted:
            return loss, None
        grad = log_p.exp_()
        grad[at, wished] -= 1.0
        return loss, grad

    return summed_loss(hidden, weight, nll, product)


def summed_loss(
    hidden: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], piece_loss: PieceLoss, product: Product
) -> Float[Tensor, ""]:
    """The sum of a loss of log softmax(hidden W^T) over all rows, fp32; the gradients of both are computed on the way, once."""
    total: Tensor = _SummedLoss.apply(hidden, weight, piece_loss, product, torch.is_grad_enabled())
    return total


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, piece_loss: PieceLoss, product: Product, wanted: bool) -> Tensor:
        count = len(hidden)
        hidden = functional.pad(hidden, (0, 0, 0, -count % _ROWS))  # rows of zeros that are left out again
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
        rows = max(1, _PIECE_NUMBERS // weight.shape[0])
        for begin in range(0, len(hidden), rows):
            piece = hidden[begin : begin + rows]
            log_p = functional.log_softmax(product(piece, weight.t()), 1)
            loss, grad = piece_loss(slice(begin, min(begin + rows, count)), log_p, wanted)
            total += loss
            if grad is None or grad_hidden is None or grad_weight is None:
                continue
            grad[max(0, count - begin) :] = 0.0
            grad_hidden[begin : begin + rows] = product(grad, weight)
            grad_weight += product(grad.t(), piece)
        ctx.save_for_backward(None if grad_hidden is None else grad_hidden[:count], grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad, None, None, None
