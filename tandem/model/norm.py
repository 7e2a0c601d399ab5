"""Root-mean-square norms: the one before every layer, and the gated one inside a Mamba-2 mixer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from tandem.model import kernels


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in fp32 and cast at the end (transformers' NemotronHRMSNorm)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        """Normalised x in the dtype of x."""
        wide = x.float()
        return kernels.rms_norm(wide, self.weight.float(), self.eps).to(x.dtype)


class GatedGroupNorm(nn.Module):
    """RMS norm over each group of y * silu(z): the gate comes before the norm (Mamba-2's norm_before_gate=False)."""

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups = groups
        self.eps = eps

    def forward(self, y: Float[Tensor, "*batch size"], gate: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        """Normalised y in the dtype of y; the weight multiplies after that cast."""
        gated = y.float() * functional.silu(gate.float())
        grouped = gated.unflatten(-1, (self.groups, -1))
        normed = functional.rms_norm(grouped, grouped.shape[-1:], None, self.eps)
        return self.weight.to(y.dtype) * normed.flatten(-2).to(y.dtype)
