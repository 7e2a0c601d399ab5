"""Fresh weights as Nemotron-H begins (paper A; Megatron-LM's Mamba-2 for A, D and dt)."""

from __future__ import annotations

import math

import torch
from torch import nn

from tandem.model.ffn import Experts, Router
from tandem.model.mamba2 import Mamba2Mixer
from tandem.model.norm import GatedGroupNorm, RMSNorm
from tandem.spec.model import ModelSpec

STD = 0.02
_RESIDUAL = ("out_proj", "o_proj", "down_proj")
"""Projections that write to the residual stream: scaled down by the square root of the number of layers."""


@torch.no_grad()
def initialise(backbone: nn.Module, head: nn.Linear, spec: ModelSpec, seed: int) -> None:
    """Draw every weight from a generator of its own: normal of 0.02, dt log-uniform in [0.001, 0.1], A uniform in [1, 16]."""
    random = torch.Generator(device=head.weight.device).manual_seed(seed)
    shrink = 1 / math.sqrt(len(spec.layers))
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Linear):
            scale = shrink if name.rpartition(".")[2] in _RESIDUAL else 1.0
            module.weight.normal_(0, STD * scale, generator=random)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding | Router):
            module.weight.normal_(0, STD, generator=random)
        elif isinstance(module, Experts):
            module.up_proj.normal_(0, STD, generator=random)
            module.down_proj.normal_(0, STD * shrink, generator=random)
        elif isinstance(module, RMSNorm | GatedGroupNorm):
            module.weight.fill_(1)
        elif isinstance(module, Mamba2Mixer):
            _initialise_mamba(module, random)
    if not spec.tied_embeddings:
        head.weight.normal_(0, STD, generator=random)


def _initialise_mamba(mixer: Mamba2Mixer, random: torch.Generator) -> None:
    bound = 1 / math.sqrt(mixer.m.conv_kernel)
    mixer.conv1d.weight.uniform_(-bound, bound, generator=random)
    if mixer.conv1d.bias is not None:
        mixer.conv1d.bias.uniform_(-bound, bound, generator=random)
    mixer.D.fill_(1)
    mixer.A_log.uniform_(1, 16, generator=random).log_()
    dt = mixer.dt_bias.uniform_(math.log(1e-3), math.log(0.1), generator=random).exp_().clamp_(min=1e-4)
    dt.add_(torch.log(-torch.expm1(-dt)))  # the inverse of softplus
