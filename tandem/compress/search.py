"""Which shapes are worth training: depth first, then width, within a budget, judged by the deployment they make possible.

Paper A, section 4.3: enumerate what fits the budget, sort by memory, look at the largest few more closely. Tandem also asks
what each would do in deployment, and tells which lie on the frontier of quality against predicted throughput.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from tandem.compress.objective import Predict, Prediction
from tandem.compress.shape import Shape, common_sizes, pruned_spec, shape_name
from tandem.compress.space import MAX_SHAPES, Budget, Depth, Width, kept_layers
from tandem.plan.frontier import pareto_rows
from tandem.spec.errors import Infeasible, SpecError
from tandem.spec.model import MLA, Attention, ModelSpec
from tandem.spec.units import require_int

Quality: TypeAlias = Callable[[Shape, ModelSpec], float]
"""A number that is larger for a model from which more is expected; it is given the shape and the pruned model."""
By = Literal["total_bytes", "quality", "throughput"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which of the shapes that fit are looked at more closely."""

    take: int = 3
    by: By = "total_bytes"
    """The paper's rule is the largest; `quality` takes the best by the proxy, `throughput` the fastest."""
    predict: Literal["taken", "all"] = "all"
    """Shapes whose deployment is predicted: milliseconds each at a fixed batch, seconds on a large cluster."""

    def __post_init__(self) -> None:
        require_int("select.take", self.take)
        if self.by == "throughput" and self.predict == "taken":
            raise SpecError("select.predict='taken': must be all where select.by is throughput")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One shape, the model that it gives, and what is expected of it."""

    shape: Shape
    spec: ModelSpec
    total_bytes: int
    """At the budget's context and batch, overhead included."""
    quality: float
    prediction: Prediction | Infeasible | None = None
    """None: not asked."""
    loss: float | None = None
    """After a short distillation; None: not distilled."""
    on_frontier: bool = False
    """No other shape that was looked at is expected to be both better and faster."""

    def held(self, name: str) -> int:
        """What it takes of a limit: `total_bytes`, `parameters` or `active_parameters`."""
        held: int = self.total_bytes if name == "total_bytes" else getattr(self.spec, name)
        return held

    @property
    def tokens_per_s(self) -> float | None:
        """Predicted output tokens/s of the deployment; None where none was asked for or found."""
        return self.prediction.tokens_per_s.value if isinstance(self.prediction, Prediction) else None

    def to_json(self) -> dict[str, Any]:
        """Numbers of layers and sizes, bytes, prediction; `kept_layers` are indices of the teacher's layers."""
        found = self.prediction
        return {
            "layers": len(self.spec.layers),
            "attention_layers": sum(isinstance(mixer, (Attention, MLA)) for mixer in self.spec.layers),
            **common_sizes(self.spec),
            "parameters": self.spec.parameters,
            "active_parameters": self.spec.active_parameters,
            "total_bytes": self.total_bytes,
            "tokens_per_s": self.tokens_per_s,
            "quality": self.quality,
            "loss": self.loss,
            "on_frontier": self.on_frontier,
            "kept_layers": None if self.shape.layers is None else list(self.shape.layers),
            "prediction": found.to_json() if isinstance(found, Prediction) else None,
            "refused": found.reason if isinstance(found, Infeasible) else None,
        }


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found. Candidates come best first: by the loss where it is known of all, else by predicted throughput."""

    teacher: Candidate
    limits: dict[str, int]
    candidates: tuple[Candidate, ...]
    frontier: tuple[Candidate, ...]
    """Quality against predicted throughput among all shapes that a deployment was predicted for, the best quality first."""
    considered: int
    fitting: int
    refused: dict[str, int] = field(default_factory=dict)
    """Shapes that were left out, counted by why."""

    def to_json(self) -> dict[str, Any]:
        """The object that `tandem compress --plan --json` prints, without what the recipe says."""
        return {
            "teacher": self.teacher.to_json(),
            "limits": self.limits,
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "frontier": [candidate.to_json() for candidate in self.frontier],
            "considered": self.considered,
            "fitting": self.fitting,
            "refused": self.refused,
        }


def search_shapes(
    teacher: ModelSpec,
    *,
    budget: Budget,
    depth: Depth | None = None,
    width: Width | None = None,
    predict: Predict | None = None,
    selection: Selection | None = None,
    order: Sequence[int] = (),
    quality: Quality | None = None,
    losses: Mapping[Shape, float] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Found:
    """The shapes within the budget that are worth a closer look.

    `order` names the teacher's layers from the least important on (`Depth.order` where it is empty); `quality` is the proxy
    (by default the number of parameters), `losses` what short distillations of shapes came to, which then decide. `predict`
    is an objective's predictor. Raises SpecError where the teacher is within the budget already, where a size is above the
    teacher's, and where nothing fits: it names the least that can be had and what that leaves of the teacher.
    """
    if depth is None and width is None:
        raise SpecError("depth, width: the recipe states neither; state which layers or sizes may be cut")
    if budget.tokens_per_s is not None and predict is None:
        raise SpecError(f"budget.tokens_per_s={budget.tokens_per_s:g}: needs an objective that predicts it")
    search = _Search(teacher, budget, quality or parameters_kept, predict, losses or {}, progress)
    whole = search.teacher()
    selection = selection or Selection()
    fitting, considered = search.fitting(depth, width or Width(), order)
    everywhere = selection.predict == "all" or budget.tokens_per_s is not None
    if predict is not None and everywhere:
        fitting = search.predicted(fitting)
    key: dict[str, Callable[[Candidate], Any]] = {
        "total_bytes": lambda c: -c.total_bytes,
        "quality": lambda c: -c.quality,
        "throughput": lambda c: -(c.tokens_per_s or 0.0),
    }
    if selection.by == "throughput" and predict is None:
        raise SpecError("select.by='throughput': needs an objective that predicts it")
    ordered = sorted(fitting, key=key[selection.by])
    if predict is not None and not everywhere:
        ordered = search.predicted(ordered, selection.take)
    frontier = _frontier(ordered)
    ordered = [replace(c, on_frontier=any(c is f for f in frontier)) for c in ordered]
    return Found(
        teacher=whole,
        limits=search.limits,
        candidates=tuple(_best_first(ordered[: selection.take])),
        frontier=tuple(replace(c, on_frontier=True) for c in frontier),
        considered=considered,
        fitting=len(fitting),
        refused=dict(search.refused),
    )


def parameters_kept(shape: Shape, spec: ModelSpec) -> float:
    """The proxy of quality until importance is known: a larger model of the same family is the better one."""
    return float(spec.parameters)


def kept_importance(
    teacher: ModelSpec,
    scores: Mapping[str, Mapping[int, Sequence[float]]],
    *,
    layer_weights: Mapping[int, float] | None = None,
) -> Quality:
    """The proxy of quality from importance: the share of the units' scores that a shape keeps, at best 1.

    `scores` has for the name of a size (`ffn_size`, `mamba_heads`, ...) and a layer of the teacher one score a unit, none
    negative; a layer that left keeps none. Heads are ranked inside their groups, as they are cut. `layer_weights` say what a
    layer counts, by default all the same. Raises SpecError for scores that do not fit the teacher.
    """
    weights = {i: 1.0 if layer_weights is None else layer_weights.get(i, 0.0) for i in range(len(teacher.layers) + 1)}
    kept = {
        (size, layer): _kept_by_count(values, _groups(teacher, size, layer), f"{size}[{layer}]")
        for size, by_layer in scores.items()
        for layer, values in by_layer.items()
    }
    whole = sum(weights[layer] for _, layer in kept)
    if not whole > 0:
        raise SpecError("scores: have no weight; score one unit of one layer at least")

    def quality(shape: Shape, spec: ModelSpec) -> float:
        there = {*shape.kept_layers(teacher), len(teacher.layers)}
        sizes = {**common_sizes(teacher), **shape.sizes()}
        return sum(weights[at] * by[sizes[size] or len(by) - 1] for (size, at), by in kept.items() if at in there) / whole

    return quality


def _groups(teacher: ModelSpec, size: str, layer: int) -> int:
    if layer >= len(teacher.layers):
        return 1
    mixer = teacher.layers[layer]
    names = {"mamba_heads": "groups", "attention_heads": "num_kv_heads", "experts": "groups"}
    groups: int = getattr(mixer, names[size], 1) if size in names else 1
    return groups


def _kept_by_count(scores: Sequence[float], groups: int, where: str) -> list[float]:
    """For every number of units that stay, the share of the scores that the best of each group have."""
    values = np.asarray(scores, dtype=np.float64)
    if (
        values.ndim != 1
        or not len(values)
        or len(values) % groups
        or not np.all(values >= 0)
        or not np.all(np.isfinite(values))
    ):
        raise SpecError(f"scores.{where}: must be numbers of 0 or more, a multiple of {groups}")
    ranked = -np.sort(-values.reshape(groups, -1), axis=1)
    running = np.concatenate([[0.0], np.cumsum(ranked.sum(axis=0))])
    share = running / running[-1] if running[-1] > 0 else np.ones_like(running)
    return [float(np.interp(n / groups, np.arange(len(share)), share)) for n in range(len(values) + 1)]


def _best_first(taken: list[Candidate]) -> list[Candidate]:
    if taken and all(c.loss is not None for c in taken):
        return sorted(taken, key=lambda c: c.loss or 0.0)
    if all(c.tokens_per_s is not None for c in taken):
        return sorted(taken, key=lambda c: -(c.tokens_per_s or 0.0))
    return taken


def _frontier(candidates: Sequence[Candidate]) -> list[Candidate]:
    known = [c for c in candidates if c.tokens_per_s is not None]
    worth = [-c.loss if c.loss is not None else c.quality for c in known]
    if len({c.loss is None for c in known}) > 1:  # distilled and not: two scales
        worth = [c.quality for c in known]
    rows = pareto_rows(np.array(worth), np.array([c.tokens_per_s for c in known], dtype=np.float64))
    return [known[i] for i in rows.tolist()]


@dataclass
class _Search:
    spec: ModelSpec
    budget: Budget
    quality: Quality
    predict: Predict | None
    losses: Mapping[Shape, float]
    progress: Callable[[str], None]
    limits: dict[str, int] = field(init=False)
    refused: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.limits = self.budget.limits(self.spec)

    def teacher(self) -> Candidate:
        """The teacher as a candidate; SpecError where it is within the budget already."""
        held, found = self.budget.held(self.spec), self.predict and self.predict(self.spec)
        rate = found.tokens_per_s.value if isinstance(found, Prediction) else 0.0
        slow = self.budget.tokens_per_s is not None and rate < self.budget.tokens_per_s
        if not slow and self.budget.allows(self.spec):
            said = ", ".join(f"{name} {held[name]:,} of {limit:,}" for name, limit in self.limits.items())
            raise SpecError(
                f"budget: {self.spec.name} is within it already ({said or f'{rate:,.1f} tokens/s'}); nothing to prune"
            )
        whole = Shape()
        return Candidate(
            shape=whole,
            spec=self.spec,
            total_bytes=held["total_bytes"],
            quality=self.quality(whole, self.spec),
            prediction=found,
            loss=self.losses.get(whole),
        )

    def fitting(self, depth: Depth | None, width: Width, order: Sequence[int]) -> tuple[list[Candidate], int]:
        """Candidates within the limits, and how many shapes were looked at."""
        depths: list[tuple[int, ...] | None] = [None]
        if depth is not None:
            depths = [kept_layers(self.spec, count, depth, order) for count in dict.fromkeys(depth.layers)]
        if len(depths) * width.count > MAX_SHAPES:
            raise SpecError(f"width: has {len(depths) * width.count:,} shapes; must have at most {MAX_SHAPES:,}")
        if depth is not None and not depth.joint:
            depths.sort(key=lambda layers: self._depth_rank(Shape(layers=layers)))
        tried: list[Candidate] = []
        found: list[Candidate] = []
        for layers in depths:
            self.progress(f"shapes of {len(layers or self.spec.layers)} layers")
            here = [self._candidate(shape) for shape in width.shapes(self.spec, layers)]
            tried += here
            found += [c for c in here if self._within(c)]
            if found and depth is not None and not depth.joint:
                break
        if not found:
            raise self._nothing(tried)
        return found, len(tried)

    def predicted(self, candidates: Sequence[Candidate], most: int | None = None) -> list[Candidate]:
        """Those that can be served, and fast enough, at `most` so many, with their predictions."""
        found: list[Candidate] = []
        reason, fastest, least = "", 0.0, self.budget.tokens_per_s or 0.0
        for i, candidate in enumerate(candidates):
            if most is not None and len(found) == most:
                break
            self.progress(f"deployment of shape {i + 1} of {len(candidates)}")
            assert self.predict is not None
            priced = replace(candidate, prediction=self.predict(candidate.spec))
            rate = priced.tokens_per_s
            fastest = max(fastest, rate or 0.0)
            if isinstance(priced.prediction, Infeasible):
                self.refused["no deployment"] += 1
                reason = priced.prediction.reason
            elif rate is not None and rate < least:
                self.refused["tokens_per_s"] += 1
            else:
                found.append(priced)
        if not found and fastest:
            raise SpecError(
                f"budget.tokens_per_s={least:g}: the fastest shape that fits is predicted {fastest:,.1f}; "
                "ask for less or allow smaller shapes"
            )
        if not found:
            raise SpecError(f"objective: none of the {len(candidates)} shapes that fit can be served: {reason}")
        return found

    def _candidate(self, shape: Shape) -> Candidate:
        spec = pruned_spec(self.spec, shape, name=shape_name(self.spec, shape))
        held = self.budget.held(spec)["total_bytes"]
        return Candidate(
            shape=shape,
            spec=spec,
            total_bytes=held,
            quality=self.quality(shape, spec),
            loss=self.losses.get(shape),
        )

    def _depth_rank(self, shape: Shape) -> tuple[bool, float]:
        """Best first: by loss where the depth was distilled, else by the proxy."""
        loss = self.losses.get(shape)
        return (loss is None, -self.quality(shape, pruned_spec(self.spec, shape)) if loss is None else loss)

    def _within(self, candidate: Candidate) -> bool:
        over = [name for name, limit in self.limits.items() if candidate.held(name) > limit]
        if over:
            self.refused[over[0]] += 1
        return not over

    def _nothing(self, tried: Sequence[Candidate]) -> SpecError:
        """Which limit stands in the way, and the least that any shape reaches."""
        if not tried:
            return SpecError("width.ffn_multiple: gives no size up to the teacher's at any hidden size; state smaller ones")
        for name, limit in self.limits.items():
            least = tried[int(np.argmin([c.held(name) for c in tried]))]
            if least.held(name) > limit:
                sizes = ", ".join(f"{k} {v}" for k, v in {"layers": len(least.spec.layers), **least.shape.sizes()}.items())
                asked = "share" if name == "total_bytes" and self.budget.share is not None else name
                stated = getattr(self.budget, asked)
                left = least.spec.parameters / self.spec.parameters
                return SpecError(
                    f"budget.{asked}={stated}: allows {limit:,}; the least of {len(tried)} shapes is {least.held(name):,} "
                    f"({sizes}; {left:.0%} of the parameters left); allow more, or smaller sizes"
                )
        return SpecError("budget: each limit can be met, but no shape meets all; loosen one, or allow more shapes")
