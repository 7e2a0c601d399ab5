"""Cutting a model down to the units that stay: every tensor that a unit runs through is sliced, nothing else changes.

What is cut together is paper A's (section 4.2): a Mamba head or channel takes its rows of z, x and dt, its convolution, its
decay, its part of the gated norm and its columns of out_proj; B and C belong to the group and stay. An embedding channel runs
through the embedding, every norm, all products that read or write the residual stream, and the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from tandem.compress.keep import Kept, LayerUnits, Units
from tandem.compress.layers import checkpoint_folder
from tandem.compress.shape import pruned_spec
from tandem.model.checkpoint import Filling, placed_tensors, read_tensor, stored_dtype, write_parts
from tandem.model.config_out import hub_format
from tandem.model.hybrid import Decoder
from tandem.model.load import DEFAULT_SHARD_BYTES, new_checkpoint, token_ids_in
from tandem.model.naming import Stored, check_format, stored_tensors
from tandem.spec.catalog import load_spec, read_json
from tandem.spec.model import MLP, Attention, Mamba2, Mixer, ModelSpec, MoE

Axes: TypeAlias = tuple[Units | None, ...]
"""Of each axis of a tensor the indices that stay; None for all."""
_LAYERS = "backbone.layers."


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where a tensor of the pruned model comes from."""

    parameter: str
    """The teacher's name."""
    axes: Axes
    expert: int | None = None
    """The teacher's expert; None where the tensor is the whole parameter."""

    def of(self, tensor: Tensor) -> Tensor:
        """What stays of the teacher's tensor, in new memory."""
        for axis, units in enumerate(self.axes):
            if units is not None:
                tensor = tensor.index_select(axis, units)
        return tensor


def cut_of(teacher: ModelSpec, kept: Kept, stored: Stored) -> Cut:
    """Where a tensor of the pruned model comes from."""
    hidden = kept.hidden
    if not stored.parameter.startswith(_LAYERS):
        return Cut(parameter=stored.parameter, axes=(hidden,) if stored.parameter.endswith("norm_f.weight") else (None, hidden))
    number, rest = stored.parameter.removeprefix(_LAYERS).split(".", 1)
    layer = kept.shape.kept_layers(teacher)[int(number)]
    units, mixer = kept.units[layer], teacher.layers[layer]
    parameter = f"{_LAYERS}{layer}.{rest}"
    if rest == "norm.weight":
        return Cut(parameter=parameter, axes=(hidden,))
    name = rest.removeprefix("mixer.")
    if stored.expert is not None:
        assert isinstance(mixer, MoE)
        assert units.experts is not None
        assert units.expert_ffn is not None
        outside = hidden if mixer.latent_size is None else None
        inside = units.expert_ffn[stored.expert]
        axes = (outside, inside) if "down_proj" in name else (inside, outside)
        return Cut(parameter=parameter, axes=axes, expert=int(units.experts[stored.expert]))
    return Cut(parameter=parameter, axes=_AXES[type(mixer)](mixer, units, hidden, name))


def _mamba(m: Mamba2, units: LayerUnits, hidden: Units, name: str) -> Axes:
    assert units.heads is not None
    assert units.channels is not None
    inner = (units.heads[:, None] * m.head_dim + units.channels).flatten()
    shared = torch.arange(2 * m.groups * m.state_dim)
    conv = torch.cat([inner, m.d_inner + shared])
    rows = torch.cat([inner, m.d_inner + conv, m.d_inner + m.conv_width + units.heads])
    match name:
        case "in_proj.weight":
            return rows, hidden
        case "in_proj.bias":
            return (rows,)
        case "conv1d.weight":
            return conv, None, None
        case "conv1d.bias":
            return (conv,)
        case "norm.weight":
            return (inner,)
        case "out_proj.weight":
            return hidden, inner
        case "out_proj.bias":
            return (hidden,)
        case _:  # dt_bias, A_log, D
            return (units.heads,)


def _attention(m: Attention, units: LayerUnits, hidden: Units, name: str) -> Axes:
    assert units.heads is not None
    rows = (units.heads[:, None] * m.head_dim + torch.arange(m.head_dim)).flatten()
    match name:
        case "q_proj.weight":
            return rows, hidden
        case "q_proj.bias":
            return (rows,)
        case "k_proj.weight" | "v_proj.weight":
            return None, hidden
        case "o_proj.weight":
            return hidden, rows
        case "o_proj.bias":
            return (hidden,)
        case _:  # biases of keys and values, norms of queries and keys
            return (None,)


def _mlp(m: MLP, units: LayerUnits, hidden: Units, name: str) -> Axes:
    return _two_products(units.ffn, hidden, name)


def _two_products(neurons: Units | None, hidden: Units, name: str) -> Axes:
    if name.endswith(".bias"):
        return (hidden,) if "down_proj" in name else (neurons,)
    return (hidden, neurons) if "down_proj" in name else (neurons, hidden)


def _moe(m: MoE, units: LayerUnits, hidden: Units, name: str) -> Axes:
    match name:
        case "gate.weight":
            return units.experts, hidden
        case "gate.e_score_correction_bias":
            return (units.experts,)
        case "fc1_latent_proj.weight":
            return None, hidden
        case "fc2_latent_proj.weight":
            return hidden, None
        case _:  # the shared expert keeps its neurons
            return _two_products(None, hidden, name)


_AXES: dict[type[Mixer], Callable[..., Axes]] = {Mamba2: _mamba, Attention: _attention, MLP: _mlp, MoE: _moe}


def prune_decoder(decoder: Decoder, kept: Kept, *, name: str | None = None) -> Decoder:
    """A new decoder of what stays, in the teacher's formats; the teacher is not changed."""
    spec = pruned_spec(decoder.spec, kept.shape, name=name)
    student = Decoder(spec, device="meta", token_ids=decoder.token_ids)
    held = dict(decoder.named_parameters(remove_duplicate=False)) | dict(decoder.named_buffers())
    filling = Filling(student, None, decoder.device)
    for stored in stored_tensors(spec, "tandem"):
        cut = cut_of(decoder.spec, kept, stored)
        whole = held[cut.parameter].detach()
        part = cut.of(whole if cut.expert is None else whole[cut.expert])
        filling.destination(stored, part.dtype).copy_(part)
    if spec.tied_embeddings:
        student.lm_head.weight = student.backbone.embeddings.weight
    student.source = decoder.source
    return student.train(decoder.training)


def prune_folder(
    name_or_path: str | Path, kept: Kept, out: Path, *, name: str | None = None, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> ModelSpec:
    """Write the checkpoint of what stays, tensor by tensor: never more than one of the teacher's is in memory.

    `out` holds the whole checkpoint or nothing. Raises SpecError for what is no checkpoint folder of the model.
    """
    folder = checkpoint_folder(name_or_path)
    teacher = load_spec(folder)
    config = read_json(folder / "config.json")
    places = {
        (stored.parameter, stored.expert): place
        for place, stored in placed_tensors(teacher, check_format(config.get("model_type")), folder)
    }
    spec = pruned_spec(teacher, kept.shape, name=name)
    tensors = stored_tensors(spec, hub_format(spec))
    cuts = {stored: cut_of(teacher, kept, stored) for stored in tensors}
    dtypes = {stored: stored_dtype(places[cut.parameter, cut.expert]) for stored, cut in cuts.items()}

    def part(stored: Stored) -> Tensor:
        cut = cuts[stored]
        return cut.of(read_tensor(places[cut.parameter, cut.expert]))

    with new_checkpoint(out, spec, token_ids_in(folder), dtype=dtypes[tensors[0]], source=folder) as draft:
        write_parts(tensors, dtypes, part, draft, max_shard_bytes)
    return spec
