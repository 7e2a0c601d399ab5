"""Which units stay: the most important ones of each kind, in their old order, as many as a shape says."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tandem.compress.shape import Shape, pruned_spec
from tandem.compress.width import WidthScores
from tandem.spec.model import MLP, Attention, Mamba2, ModelSpec, MoE

Units: TypeAlias = Int[Tensor, " units"]


@dataclass(frozen=True, kw_only=True)
class LayerUnits:
    """What stays of one layer: indices into the teacher's axes, rising; those of other kinds of layers are not looked at."""

    ffn: Units | None = None
    """Neurons of an MLP."""
    heads: Units | None = None
    """Heads of a Mamba layer, or query heads of attention."""
    channels: Units | None = None
    """Channels of every Mamba head."""
    experts: Units | None = None
    expert_ffn: Int[Tensor, "experts neurons"] | None = None
    """Neurons of each expert that stays, in their order."""

    def to_json(self) -> dict[str, list[int]]:
        """The indices that are stated."""
        stated = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: units.tolist() for name, units in stated.items() if units is not None}


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What stays of a model: a shape with the units chosen."""

    shape: Shape
    hidden: Units
    units: dict[int, LayerUnits] = field(default_factory=dict)
    """By the teacher's layer."""


def choose(spec: ModelSpec, shape: Shape, scores: WidthScores, *, group_aware: bool = True) -> Kept:
    """The units of `spec` that a model of `shape` keeps.

    Mamba heads are ranked inside their group, so that each still reads its own B and C (paper A section 4.2); without
    `group_aware` all heads are ranked together, which the study of compression compares. Raises SpecError for a shape that
    cannot be.
    """
    student = pruned_spec(spec, shape)
    units = {}
    for i, mixer in zip(shape.kept_layers(spec), student.layers, strict=True):
        teacher = spec.layers[i]
        match mixer:
            case MLP():
                units[i] = LayerUnits(ffn=best(scores.ffn[i], mixer.ffn_size))
            case Mamba2():
                channels = best(scores.mamba[i].norm(dim=0), mixer.head_dim)
                heads = scores.mamba[i][:, channels].norm(dim=1)
                units[i] = LayerUnits(
                    channels=channels, heads=best_of_groups(heads, mixer.num_heads, mixer.groups if group_aware else 1)
                )
            case Attention():
                units[i] = LayerUnits(heads=best_of_groups(scores.attention[i], mixer.num_heads, mixer.num_kv_heads))
            case MoE():
                experts = best_of_groups(scores.experts[i], mixer.num_experts, mixer.groups)
                inside = [best(scores.expert_ffn[i][e], mixer.ffn_size) for e in experts.tolist()]
                units[i] = LayerUnits(experts=experts, expert_ffn=torch.stack(inside))
            case _:
                raise AssertionError(f"{type(teacher).__name__} has no units")
    return Kept(shape=shape, hidden=best(scores.hidden.sum(0), student.hidden_size), units=units)


def whole_layers(spec: ModelSpec, layers: tuple[int, ...]) -> Kept:
    """Some of the layers with all of their units."""
    units = {}
    for i in layers:
        match spec.layers[i]:
            case MLP(ffn_size=size):
                units[i] = LayerUnits(ffn=torch.arange(size))
            case Mamba2(num_heads=heads, head_dim=channels):
                units[i] = LayerUnits(heads=torch.arange(heads), channels=torch.arange(channels))
            case Attention(num_heads=heads):
                units[i] = LayerUnits(heads=torch.arange(heads))
            case MoE(num_experts=experts, ffn_size=size):
                units[i] = LayerUnits(experts=torch.arange(experts), expert_ffn=torch.arange(size).expand(experts, -1))
            case other:
                raise AssertionError(f"{type(other).__name__} has no units")
    return Kept(shape=Shape(layers=layers), hidden=torch.arange(spec.hidden_size), units=units)


def best(scores: Float[Tensor, " units"], count: int) -> Units:
    """Indices of the largest scores, rising; of equal ones the first stay."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def best_of_groups(scores: Float[Tensor, " units"], count: int, groups: int) -> Units:
    """The same inside each of `groups` runs of equal length, as many of each."""
    size = len(scores) // groups
    inside = [best(group, count // groups) + g * size for g, group in enumerate(scores.unflatten(0, (groups, size)))]
    return torch.cat(inside)
