"""The shapes that a search looks at, and what they must stay within: depth, width, budget (paper A section 4.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from math import floor, prod
from typing import Literal, get_args

from tandem.compress.shape import Shape, total_bytes
from tandem.spec.design import Precision
from tandem.spec.errors import SpecError
from tandem.spec.model import MLA, MLP, Attention, ModelSpec
from tandem.spec.units import require_int, require_number

Metric = Literal["logit-mse", "hidden-mse", "perplexity", "block-influence"]
"""What a layer is missed by: see `tandem.compress.depth`."""
MAX_SHAPES = 100_000
"""Shapes that one search may look at: about a minute at 60 layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Depth:
    """How many layers stay; which ones is told by an order, the least important first."""

    layers: tuple[int, ...]
    """Numbers of layers to look at."""
    attention_layers: int | None = None
    """Attention layers among them; None: as the order has it."""
    order: tuple[int, ...] = ()
    """Indices of the teacher's layers, the first to leave first; none: `standin_order`, until importance is known."""
    block: int = 1
    """Layers that leave together; 2 keeps the blocks of a Transformer (attention, MLP) whole."""
    joint: bool = False
    """Every depth with every width, instead of the best depth first that some width fits the budget at."""
    metric: Metric = "logit-mse"
    """What decides which layers leave where they are scored (paper A: the logits' mean square error)."""
    greedy: bool = True
    """Whether layers are scored anew after each one that leaves."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise SpecError("depth.layers=[]: must name one number at least")
        for count in self.layers:
            require_int("depth.layers", count)
        for i in self.order:
            require_int("depth.order", i, low=0)
        if self.metric not in get_args(Metric):
            raise SpecError(f"depth.metric={self.metric!r}: must be one of {', '.join(get_args(Metric))}")
        if len(set(self.order)) < len(self.order):
            raise SpecError(f"depth.order={list(self.order)}: names a layer twice")
        require_int("depth.block", self.block)
        if self.attention_layers is not None:
            require_int("depth.attention_layers", self.attention_layers, low=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Width:
    """A grid of sizes: every combination is looked at. An axis that is left out stays as in the teacher."""

    hidden_size: tuple[int, ...] = ()
    ffn_size: tuple[int, ...] = ()
    ffn_multiple: tuple[float, ...] = ()
    """FFN sizes as multiples of the hidden size, instead of `ffn_size`; one above the teacher's size is left out."""
    mamba_heads: tuple[int, ...] = ()
    mamba_head_dim: tuple[int, ...] = ()
    attention_heads: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    expert_ffn_size: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for f in fields(self):
            for value in getattr(self, f.name):
                if f.name == "ffn_multiple":
                    require_number("width.ffn_multiple", value, high=1000.0)
                else:
                    require_int(f"width.{f.name}", value)
            if len(set(getattr(self, f.name))) < len(getattr(self, f.name)):
                raise SpecError(f"width.{f.name}={list(getattr(self, f.name))}: names a size twice")
        if self.ffn_size and self.ffn_multiple:
            raise SpecError("width.ffn_multiple: states the sizes that width.ffn_size does; leave one out")

    @property
    def count(self) -> int:
        """Combinations."""
        return prod(len(getattr(self, f.name)) or 1 for f in fields(self))

    def shapes(self, spec: ModelSpec, layers: tuple[int, ...] | None) -> Iterator[Shape]:
        """Every combination, with these layers of the teacher `spec`."""
        most = max((mixer.ffn_size for mixer, _ in spec.mixers if isinstance(mixer, MLP)), default=0)
        axes = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}
        for values in product(*axes.values()):
            sizes = dict(zip(axes, values, strict=True))
            if (multiple := sizes.pop("ffn_multiple", None)) is not None:
                sizes["ffn_size"] = round(multiple * sizes.get("hidden_size", spec.hidden_size))
                if sizes["ffn_size"] > most:
                    continue
            yield Shape(layers=layers, **sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a compressed model must stay within; at least one limit is stated, and all that are hold."""

    total_bytes: int | None = None
    """Weights, caches of `batch` sequences of `context` tokens, and overhead."""
    share: float | None = None
    """The same limit as a share of the teacher's bytes."""
    parameters: int | None = None
    active_parameters: int | None = None
    tokens_per_s: float | None = None
    """Least throughput that the objective predicts."""
    context: int = 131_072
    batch: int = 1
    overhead_bytes: int = 0
    """Activations and workspace, added to every model's bytes."""
    precision: str = "bf16"

    def __post_init__(self) -> None:
        for name in ("total_bytes", "parameters", "active_parameters"):
            if getattr(self, name) is not None:
                require_int(f"budget.{name}", getattr(self, name), high=10**15)
        if self.share is not None:
            require_number("budget.share", self.share, high=1.0)
        if self.tokens_per_s is not None:
            require_number("budget.tokens_per_s", self.tokens_per_s)
        require_int("budget.context", self.context)
        require_int("budget.batch", self.batch)
        require_int("budget.overhead_bytes", self.overhead_bytes, low=0, high=10**15)
        Precision.parse(self.precision)
        if self.total_bytes is not None and self.share is not None:
            raise SpecError(f"budget.share={self.share}: states the limit that budget.total_bytes does; leave one out")
        if all(value is None for value in self._stated().values()):
            raise SpecError(f"budget: states no limit; state one of {', '.join(self._stated())}")

    def _stated(self) -> dict[str, float | None]:
        names = ("total_bytes", "share", "parameters", "active_parameters", "tokens_per_s")
        return {name: getattr(self, name) for name in names}

    def held(self, spec: ModelSpec) -> dict[str, int]:
        """What a model takes, by the name of the limit."""
        held = total_bytes(
            spec,
            context=self.context,
            batch=self.batch,
            overhead_bytes=self.overhead_bytes,
            precision=self.precision,
        )
        return {"total_bytes": held, "parameters": spec.parameters, "active_parameters": spec.active_parameters}

    def allows(self, spec: ModelSpec) -> bool:
        """Whether a model is within the limits that are stated in numbers."""
        held = self.held(spec)
        return all(held[name] <= limit for name, limit in self.limits(spec).items())

    def limits(self, teacher: ModelSpec) -> dict[str, int]:
        """The largest that each may be, of those that are stated."""
        found = {name: getattr(self, name) for name in ("total_bytes", "parameters", "active_parameters")}
        if self.share is not None:
            found["total_bytes"] = floor(self.share * self.held(teacher)["total_bytes"])
        return {name: value for name, value in found.items() if value is not None}


def standin_order(spec: ModelSpec) -> tuple[int, ...]:
    """Layers from the back to the front, without the first two and the last two: for plans made before scores are known.

    Late layers matter least in most models, the ends most (Men et al. 2024, Gromov et al. 2024); it is no measurement.
    """
    return tuple(range(len(spec.layers) - 3, 1, -1))


def kept_layers(spec: ModelSpec, count: int, depth: Depth, order: Sequence[int] = ()) -> tuple[int, ...]:
    """The `count` layers that stay when layers leave in `order`, or in the depth's own, least important first.

    Where the number of attention layers is stated, the least important of them leave until so many are left, and the rest that
    leaves are others. Raises SpecError where the order does not name enough.
    """
    total = len(spec.layers)
    require_int("depth.layers", count, high=total)
    leaving = tuple(order) or depth.order or standin_order(spec)
    for i in leaving:
        require_int("depth.order", i, low=0, high=total - 1)
    attention = {i for i, mixer in enumerate(spec.layers) if isinstance(mixer, (Attention, MLA))}
    blocks = _blocks(leaving, total, depth.block)
    gone: set[int] = set()
    if depth.attention_layers is not None:
        for block in (b for b in blocks if b & attention):
            if len(attention - gone - block) >= depth.attention_layers:
                gone |= block
        blocks = [b for b in blocks if not b & attention]
    for block in blocks:
        if len(gone | block) <= total - count:
            gone |= block
    wrong = depth.attention_layers not in (None, len(attention - gone))
    if wrong or len(gone) != total - count:
        asked = "" if depth.attention_layers is None else f" with {depth.attention_layers} attention layers"
        raise SpecError(
            f"depth.layers={count}: cannot be had{asked} of the {total} layers of {spec.name}, {len(attention)} of them "
            f"attention, in blocks of {depth.block}; {len(leaving)} layers may leave, name more in depth.order or keep others"
        )
    return tuple(i for i in range(total) if i not in gone)


def _blocks(leaving: Sequence[int], total: int, size: int) -> list[set[int]]:
    """Sets of layers that leave together, in order; one leaves when the last of its layers would."""
    rank = {layer: place for place, layer in enumerate(leaving)}
    blocks = [set(range(i, min(i + size, total))) for i in range(0, total, size)]
    whole = [block for block in blocks if block <= rank.keys()]
    return sorted(whole, key=lambda block: max(rank[i] for i in block))
