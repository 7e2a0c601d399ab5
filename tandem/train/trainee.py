"""The model of a run and its optimiser, made ready: number formats, recompute, sharding over ranks, compilation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tandem.model.hybrid import Decoder
from tandem.train.loss import Product, Trainee
from tandem.train.precision import apply_precision, multiply_bf16
from tandem.train.ranks import Ranks
from tandem.train.recipe import OptimiserPart, PrecisionPart, Recipe

_KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.mm.dtype,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
)
"""What selective recompute keeps: products and attention. All between them, the scan too, is made again."""

WithLoss = Callable[[Decoder, Product], nn.Module]
"""A decoder and how its head multiplies, as a module with the part `decoder` whose forward pass is the sum of its loss."""


def make_trainee(decoder: Decoder, recipe: Recipe, ranks: Ranks, with_loss: WithLoss = Trainee) -> nn.Module:
    """The decoder with its loss, as the recipe says; with several ranks each holds its share of every weight."""
    apply_precision(decoder, recipe.precision)
    backbone = decoder.backbone
    if recipe.parallel.recompute == "full":
        backbone.checkpoint = partial(checkpoint, use_reentrant=False)
    elif recipe.parallel.recompute == "selective":
        kept = partial(create_selective_checkpoint_contexts, list(_KEPT))
        backbone.checkpoint = partial(checkpoint, use_reentrant=False, context_fn=kept)
    model: nn.Module = with_loss(decoder, head_product(recipe.precision)).to(ranks.device)
    if ranks.world > 1:
        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        for layer in backbone.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if recipe.compile:
        model.compile()
    return model


def head_product(part: PrecisionPart) -> Product:
    """How the head multiplies: as the linears do, but in bf16 where they are fp8."""
    return torch.mm if part.linears == "fp32" else multiply_bf16


def make_optimiser(model: nn.Module, part: OptimiserPart) -> AdamW:
    """AdamW; weight decay acts on matrices only, not on norms, biases, convolutions and the scan's numbers a head."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if parameter.dim() > 1 and ".conv1d." not in name else free).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": part.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr=part.lr, betas=(part.beta1, part.beta2), fused=True)


def clip_gradients(model: nn.Module, limit: float) -> float:
    """Scale all gradients so that their norm over all ranks is at most `limit`; the norm that they had."""
    norm: Tensor = nn.utils.clip_grad_norm_(model.parameters(), limit)
    full = getattr(norm, "full_tensor", None)
    return float(norm if full is None else full())


def synchronise(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass sums gradients over ranks; those of earlier micro-batches wait."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
