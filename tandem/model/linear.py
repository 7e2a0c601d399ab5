"""Linear layers whose weights may be stored in fewer bits than the numbers that pass through them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class Linear(nn.Linear):
    """`nn.Linear` that computes in the dtype of its input, whatever the dtype of its weights.

    On CPUs activations stay fp32 while weights may be 16-bit: 16-bit arithmetic is slow on most of them, but reading half
    the bytes is what decoding is limited by (benchmarks/model.py).
    """

    def reset_parameters(self) -> None:
        """Nothing: `initialise` or a checkpoint fills the weights. On the meta device torch's own draw costs 2 s of imports."""

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch rows"]:
        """x W^T + b in the dtype of x."""
        if self.weight.dtype != x.dtype and x.device.type == "cpu" and not torch.is_grad_enabled():
            from tandem.model import native

            if native.available():
                return native.linear(x, self.weight, self.bias).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.weight.to(x.dtype), bias)
