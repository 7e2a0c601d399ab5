"""Which layers a model misses least: each remaining one is left out in turn, and what that does to the output decides.

Nano 2's rule (paper A section 4.2): drop the layer without which the logits are nearest to the full model's in the mean
squared sense, and begin again with what is left. Beside it: the final hidden states' error, perplexity, and block influence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional

from tandem.compress.calibration import Calibration, Scoring
from tandem.compress.layers import Layers
from tandem.compress.space import Metric
from tandem.compress.streams import Streams, rows_within, segments_of, streams_in
from tandem.model.span import Span
from tandem.spec.errors import SpecError
from tandem.spec.model import Attention, ModelSpec
from tandem.spec.units import require_int
from tandem.train.data.packing import IGNORED

_FULL, _NOW = "full", "now"
_LARGEST = 700.0
"""Nats of which a double can hold the exponential."""
_PIECE = 256
"""Tokens whose logits are held at once."""


@dataclass(frozen=True, kw_only=True)
class LayerScore:
    """What leaving out one layer does, over all samples."""

    layer: int
    """Index in the teacher."""
    logit_mse: float
    """Mean square of the logits' change from the full model's."""
    relative_mse: float
    """The same over the mean square of the full model's logits."""
    hidden_mse: float
    """Mean square of the change of what goes into the head."""
    perplexity: float | None
    """Of the labelled tokens; None without any, and where it is beyond all numbers."""
    block_influence: float
    """1 - the mean cosine between what goes into the layer and what comes out, in the full model; leaves nothing out."""

    def of(self, metric: Metric) -> float:
        """The score by a metric's name; what is beyond all numbers is infinite."""
        found: float | None = getattr(self, metric.replace("-", "_"))
        return math.inf if found is None else found


@dataclass(frozen=True, kw_only=True)
class DepthScores:
    """The order in which layers go, and why."""

    metric: Metric
    order: tuple[int, ...]
    """Layers that were dropped, first to last."""
    rounds: tuple[tuple[LayerScore, ...], ...]
    """Of each round every candidate's score. A choice at once has one round."""
    perplexity: float | None
    """Of the full model."""

    def kept(self, layers: int, count: int | None = None) -> tuple[int, ...]:
        """Indices that remain of `layers` when the first `count` of the order (None: all) are gone."""
        gone = self.order if count is None else self.order[:count]
        return tuple(i for i in range(layers) if i not in gone)


def candidates_of(spec: ModelSpec, gone: Sequence[int], drop: int, attention: int | None) -> tuple[int, ...]:
    """Layers that may go next, so that `drop` are gone in the end and, where stated, `attention` attention layers remain."""
    left = [i for i in range(len(spec.layers)) if i not in gone]
    if attention is None:
        return tuple(left)
    surplus = sum(isinstance(spec.layers[i], Attention) for i in left) - attention
    if surplus <= 0:
        return tuple(i for i in left if not isinstance(spec.layers[i], Attention))
    if surplus >= drop - len(gone):
        return tuple(i for i in left if isinstance(spec.layers[i], Attention))
    return tuple(left)


@torch.no_grad()
def score_depth(
    layers: Layers,
    calibration: Calibration,
    *,
    drop: int,
    attention: int | None = None,
    metric: Metric = "logit-mse",
    greedy: bool = True,
    scoring: Scoring | None = None,
) -> DepthScores:
    """The order in which `drop` layers go, by forward passes alone.

    `attention` is the number of attention layers that remain at the end. `greedy` scores anew after each one; else the
    scores of the full model decide all (block influence always does). Raises SpecError for numbers that cannot be and for
    too little memory.
    """
    spec, scoring = layers.spec, scoring or Scoring()
    _check(spec, drop, attention, metric)
    greedy = greedy and metric != "block-influence"
    rows, spill = rows_within(
        spec,
        len(calibration),
        calibration.length,
        streams=len(spec.layers) + 2,
        held_bytes=layers.held_bytes,
        memory_bytes=scoring.memory_bytes,
    )
    scoring.claim("depth", spec, calibration, rows, drop=drop, attention=attention, metric=metric, greedy=greedy)
    order: list[int] = []
    rounds: list[tuple[LayerScore, ...]] = []
    full: float | None = None
    while len(order) < drop:
        if greedy or not rounds:
            tried = candidates_of(spec, order, drop, attention) if greedy else tuple(range(len(spec.layers)))

            def score(
                begin: int, end: int, gone: tuple[int, ...] = tuple(order), tried: tuple[int, ...] = tried
            ) -> dict[str, Any]:
                with streams_in(scoring.folder if spill else None) as streams:
                    return _chunk(layers, calibration.rows(begin, end), gone, tried, streams)

            found = _sum(list(scoring.chunks(f"round-{len(rounds)}", len(calibration), rows, score)))
            rounds.append(_scores(found, tried, calibration.learned))
            full = _perplexity(found["full_nll"], calibration.learned)
        allowed = candidates_of(spec, order, drop, attention)
        best = min((one for one in rounds[-1] if one.layer in allowed), key=lambda one: (one.of(metric), one.layer))
        order.append(best.layer)
    return DepthScores(metric=metric, order=tuple(order), rounds=tuple(rounds), perplexity=full)


def _check(spec: ModelSpec, drop: int, attention: int | None, metric: Metric) -> None:
    count, there = len(spec.layers), sum(isinstance(layer, Attention) for layer in spec.layers)
    require_int("drop", drop, high=count - 1)
    if metric not in get_args(Metric):
        raise SpecError(f"metric={metric!r}: must be one of {', '.join(get_args(Metric))}")
    if attention is not None:
        low, high = max(0, there - drop), min(there, count - drop)
        require_int("attention", attention, low=low, high=high)


def _chunk(layers: Layers, samples: Calibration, gone: Sequence[int], tried: Sequence[int], streams: Streams) -> dict[str, Any]:
    """Sums over some samples: the full model's stream, that of what is left, and one without each candidate."""
    span = Span(time=samples.length, device=torch.device("cpu"), segments=segments_of(samples.documents))
    with layers.embeddings() as embeddings:
        streams[_FULL] = embeddings(samples.input_ids).float()
    if gone:
        streams[_NOW] = streams[_FULL]
    now = _NOW if gone else _FULL
    cosines = []
    for i in range(len(layers.spec.layers)):
        with layers.layer(i) as layer:
            passing = streams.names if i not in gone else (_FULL,)
            if i in tried:
                streams[str(i)] = streams[now]
            for name in passing:
                before = streams[name]
                after = layer(before, span)
                if name == _FULL:
                    cosines.append(float(functional.cosine_similarity(before, after, -1).double().sum()))
                streams[name] = after
    found = _compare(layers, samples, tried, streams)
    return {**found, "cosines": cosines, "tokens": samples.input_ids.numel()}


def _compare(layers: Layers, samples: Calibration, tried: Sequence[int], streams: Streams) -> dict[str, Any]:
    """Sums of squares between each stream's output and the full model's, and of negative log-likelihoods (nats).

    What a change d of the head's input does to the logits has the square d G d, G the head's weights times themselves: logits
    are made for labelled tokens only.
    """
    hidden, logits, nll = (dict.fromkeys(map(str, tried), 0.0) for _ in range(3))
    square = full_nll = 0.0
    labels = samples.labels.flatten()
    with layers.head() as (norm, head):
        gram = _gram(head.weight)
        for begin in range(0, len(labels), _PIECE):
            wanted = labels[begin : begin + _PIECE]
            known = wanted != IGNORED
            full = norm(streams[_FULL].flatten(0, 1)[begin : begin + _PIECE])
            square += float(((full @ gram) * full).double().sum())
            full_nll += _nll(head(full[known]), wanted[known])
            for name in hidden:
                own = norm(streams[name].flatten(0, 1)[begin : begin + _PIECE])
                change = own - full
                hidden[name] += float(change.square().double().sum())
                logits[name] += float(((change @ gram) * change).double().sum())
                nll[name] += _nll(head(own[known]), wanted[known])
    return {"hidden": hidden, "logits": logits, "nll": nll, "full_square": square, "full_nll": full_nll,
            "logits_a_token": layers.spec.vocab_size, "hidden_a_token": layers.spec.hidden_size}  # fmt: skip


def _gram(weight: Tensor) -> Tensor:
    """W^T W [hidden, hidden] in fp32, some rows of W at a time."""
    total = torch.zeros(weight.shape[1], weight.shape[1])
    for rows in torch.split(weight, _PIECE):
        total.addmm_(rows.float().T, rows.float())
    return total


def _nll(logits: Tensor, labels: Tensor) -> float:
    return float(functional.cross_entropy(logits.float(), labels, reduction="sum").double())


def _sum(chunks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Chunk by chunk, in order; what is said of a token is the same in all."""

    def add(a: Any, b: Any) -> Any:
        if isinstance(a, dict):
            return {name: add(a[name], b[name]) for name in a}
        return [x + y for x, y in zip(a, b, strict=True)] if isinstance(a, list) else a + b

    total = {name: value for name, value in chunks[0].items() if not name.endswith("_a_token")}
    for chunk in chunks[1:]:
        total = {name: add(value, chunk[name]) for name, value in total.items()}
    return {**chunks[0], **total}


def _scores(found: dict[str, Any], tried: Sequence[int], learned: int) -> tuple[LayerScore, ...]:
    tokens = found["tokens"]
    numbers = tokens * found["logits_a_token"]
    return tuple(
        LayerScore(
            layer=i,
            logit_mse=found["logits"][str(i)] / numbers,
            relative_mse=found["logits"][str(i)] / found["full_square"] if found["full_square"] else 0.0,
            hidden_mse=found["hidden"][str(i)] / (tokens * found["hidden_a_token"]),
            perplexity=_perplexity(found["nll"][str(i)], learned),
            block_influence=1 - found["cosines"][i] / tokens,
        )
        for i in tried
    )


def _perplexity(nll: float, learned: int) -> float | None:
    mean = nll / learned if learned else math.inf
    return math.exp(mean) if mean < _LARGEST else None
