"""How much each unit inside the layers matters, from one pass forward: neurons, channels, heads, experts (paper A section 4.2).

A unit's score is that of its activations: the mean of their absolute values over a sample, then the root of the sum of squares
over samples (the best pair in Minitron's table 13; ModelOpt computes the same).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from tandem.compress.calibration import Calibration, Scoring
from tandem.compress.layers import Layers
from tandem.compress.streams import rows_within, segments_of, streams_in
from tandem.model.attention import AttentionMixer
from tandem.model.ffn import Experts, MLPMixer, MoEMixer
from tandem.model.hybrid import Layer
from tandem.model.kernels import squared_relu
from tandem.model.mamba2 import Mamba2Mixer
from tandem.model.span import Span

_HIDDEN = "hidden"
_STREAM = "full"


@dataclass(frozen=True, kw_only=True)
class WidthScores:
    """Scores of every unit of a model, fp64; larger is more important."""

    hidden: Float[Tensor, "sites hidden"]
    """Embedding channels at every norm's output: one row a layer, and the final norm's."""
    ffn: dict[int, Float[Tensor, " neurons"]]
    """By layer: what goes into the last product of an MLP."""
    mamba: dict[int, Float[Tensor, "heads channels"]]
    """By layer: the x part of in_proj's output."""
    attention: dict[int, Float[Tensor, " heads"]]
    """By layer: each head's part of what goes into o_proj, as a length."""
    experts: dict[int, Float[Tensor, " experts"]]
    """By layer: length of what an expert adds to a token, its weight included; tokens that it does not see count as 0."""
    expert_ffn: dict[int, Float[Tensor, "experts neurons"]]
    """By layer: the same as `ffn` inside each routed expert, over the tokens that it sees."""


@torch.no_grad()
def score_width(layers: Layers, calibration: Calibration, *, scoring: Scoring | None = None) -> WidthScores:
    """One pass over all samples, a layer at a time. Raises SpecError for too little memory."""
    spec, scoring = layers.spec, scoring or Scoring()
    rows, spill = rows_within(
        spec,
        len(calibration),
        calibration.length,
        streams=1,
        held_bytes=layers.held_bytes,
        memory_bytes=scoring.memory_bytes,
    )
    scoring.claim("width", spec, calibration, rows)

    def score(begin: int, end: int) -> dict[str, Any]:
        return _chunk(layers, calibration.rows(begin, end), scoring.folder if spill else None)

    squares: dict[str, Tensor] = {}
    for chunk in scoring.chunks("width", len(calibration), rows, score):
        for name, values in chunk.items():
            held = torch.tensor(values, dtype=torch.float64)
            squares[name] = squares[name] + held if name in squares else held
    roots = {name: values.sqrt() for name, values in squares.items()}
    sites = [f"{_HIDDEN}.{i}" for i in range(len(spec.layers) + 1)]

    def by_layer(kind: str) -> dict[int, Tensor]:
        return {int(name.rpartition(".")[2]): values for name, values in roots.items() if name.startswith(f"{kind}.")}

    return WidthScores(
        hidden=torch.stack([roots[site] for site in sites]),
        ffn=by_layer("ffn"),
        mamba=by_layer("mamba"),
        attention=by_layer("attention"),
        experts=by_layer("experts"),
        expert_ffn=by_layer("expert_ffn"),
    )


def _chunk(layers: Layers, samples: Calibration, spill: Path | None) -> dict[str, Any]:
    """Sums of squares over samples, by kind and layer."""
    found: dict[str, Tensor] = {}
    span = Span(time=samples.length, device=torch.device("cpu"), segments=segments_of(samples.documents))
    with streams_in(spill) as streams:
        with layers.embeddings() as embeddings:
            streams[_STREAM] = embeddings(samples.input_ids).float()
        for i in range(len(layers.spec.layers)):
            with layers.layer(i) as layer, _watched(layer, i, samples.length, found):
                streams[_STREAM] = layer(streams[_STREAM], span)
        with layers.head() as (norm, _):
            found[f"{_HIDDEN}.{len(layers.spec.layers)}"] = _squares(norm(streams[_STREAM]))
    return {name: values.tolist() for name, values in found.items()}


def _squares(values: Float[Tensor, "rows time *unit"]) -> Float[Tensor, "*unit"]:
    """Mean of absolute values over each sample's tokens, squared and added over samples, fp64."""
    return values.abs().mean(1).double().square().sum(0)


@contextmanager
def _watched(layer: Layer, number: int, time: int, found: dict[str, Tensor]) -> Iterator[None]:
    """While this lasts a pass through the layer leaves its units' sums in `found`."""
    mixer = layer.mixer
    handles = [_after(layer.norm, lambda out: found.update({f"{_HIDDEN}.{number}": _squares(out)}))]
    if isinstance(mixer, MLPMixer):
        handles.append(_before(mixer.down_proj, lambda x: found.update({f"ffn.{number}": _squares(x)})))
    elif isinstance(mixer, Mamba2Mixer):
        m = mixer.m

        def heads(out: Tensor) -> None:
            x = out[..., m.d_inner : 2 * m.d_inner].unflatten(-1, (m.num_heads, m.head_dim))
            found[f"mamba.{number}"] = _squares(x)

        handles.append(_after(mixer.in_proj, heads))
    elif isinstance(mixer, MoEMixer):

        def experts(x: Tensor, chosen: Tensor, weights: Tensor) -> None:
            each, inside = _expert_squares(mixer.experts, x, chosen, weights, time)
            found[f"experts.{number}"], found[f"expert_ffn.{number}"] = each, inside

        handles.append(mixer.experts.register_forward_pre_hook(lambda _, given: experts(*given)))
    elif isinstance(mixer, AttentionMixer):
        width = mixer.m.head_dim

        def query_heads(x: Tensor) -> None:
            found[f"attention.{number}"] = _squares(x.unflatten(-1, (-1, width)).norm(dim=-1))

        handles.append(_before(mixer.o_proj, query_heads))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _after(module: nn.Module, see: Any) -> Any:
    return module.register_forward_hook(lambda _, given, out: see(out))


def _before(module: nn.Module, see: Any) -> Any:
    return module.register_forward_pre_hook(lambda _, given: see(given[0]))


def _expert_squares(
    experts: Experts,
    x: Float[Tensor, "tokens w"],
    chosen: Int[Tensor, "tokens k"],
    weights: Float[Tensor, "tokens k"],
    time: int,
) -> tuple[Float[Tensor, " experts"], Float[Tensor, "experts neurons"]]:
    """Sums of squares over samples of what each expert adds, and of its neurons."""
    rows = len(x) // time
    each, inside = [], []
    for expert in range(len(experts.up_proj)):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        up = squared_relu(functional.linear(x[token], experts.up_proj[expert].to(x.dtype)))
        added = functional.linear(up, experts.down_proj[expert].to(x.dtype)).norm(dim=-1) * weights[token, place]
        sample = token // time
        length = torch.zeros(rows, dtype=torch.float64).index_add(0, sample, added.abs().double())
        seen = torch.bincount(sample, minlength=rows).clamp(min=1)
        sums = torch.zeros(rows, up.shape[1], dtype=torch.float64).index_add(0, sample, up.abs().double())
        each.append((length / time).square().sum())
        inside.append((sums / seen[:, None]).square().sum(0))
    return torch.stack(each), torch.stack(inside)
