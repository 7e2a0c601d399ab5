"""Linear layers with int8 weights: half the bytes of 16-bit ones, at some accuracy, by choice only.

Symmetric, one fp32 scale per row and group of 64 columns. On the CPU inputs become 16-bit integers, so that the sums of a
group are exact and as fast as those of 8 bits; only the weights lose accuracy. A row's result does not depend on the batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from tandem.model.native.build import available
from tandem.model.native.products import GROUP, linear


class Int8Linear(nn.Module):
    """Stands in for an `nn.Linear` in inference; no gradients."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, of: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = of.in_features, of.out_features
        padded = functional.pad(of.weight.detach().float(), (0, -of.in_features % GROUP))
        groups = padded.unflatten(1, (-1, GROUP))
        scale = groups.abs().amax(-1) / 127
        safe = torch.where(scale > 0, scale, 1.0)
        self.register_buffer("weight", (groups / safe[..., None]).round().to(torch.int8).flatten(1))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if of.bias is None else of.bias.detach().clone())

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Scales stay fp32 whatever dtype a model is moved to; devices are followed."""
        super()._apply(fn, recurse)
        self.scale = self.scale.float()
        return self

    def dequantised(self) -> Float[Tensor, "rows cols"]:
        """The weights that the int8 numbers stand for, fp32."""
        wide = self.weight.unflatten(1, (-1, GROUP)).float() * self.scale[..., None]
        return wide.flatten(1)[:, : self.in_features]

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """x W^T + b in the dtype of x; inputs are rounded to 16 bits where the native path runs."""
        if x.device.type == "cpu" and available():
            return linear(x, self.weight, self.bias, scale=self.scale).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.dequantised().to(x.dtype), bias)


def quantise(model: nn.Module) -> nn.Module:
    """Replace every `nn.Linear` inside the model by an `Int8Linear`, in place; embeddings, norms and experts stay.

    A head tied to the embeddings gets int8 weights of its own.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
    return model
