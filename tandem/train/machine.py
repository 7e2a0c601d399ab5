"""What this machine's matrix products reach: the rate that a training step's speed is set against."""

from __future__ import annotations

import time

import torch

from tandem.spec.model import ModelSpec
from tandem.train.recipe import PrecisionPart
from tandem.train.trainee import head_product

_ROWS = 4096


def matmul_flops_per_s(spec: ModelSpec, part: PrecisionPart, device: torch.device, *, seconds: float = 0.1) -> float:
    """FLOP/s of products of this model's width, in the number format of its linears (bf16 where they are fp8)."""
    product = head_product(part)
    x = torch.randn(_ROWS, spec.hidden_size, device=device)
    weight = torch.randn(spec.hidden_size, 4 * spec.hidden_size, device=device)
    flops, best = 2.0 * x.numel() * weight.shape[1], 0.0
    until = time.perf_counter() + seconds
    while True:
        began = time.perf_counter()
        product(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        best = max(best, flops / (now - began))
        if now > until:
            return best
