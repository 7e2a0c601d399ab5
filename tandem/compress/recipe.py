"""The settings of a compression: the teacher, the budget, where to look, what for, and how the result is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tandem.compress.objective import Objective
from tandem.compress.search import Found, Quality, Selection, search_shapes
from tandem.compress.shape import Shape
from tandem.compress.space import Budget, Depth, Width
from tandem.spec.catalog import load_spec
from tandem.spec.errors import SpecError
from tandem.spec.model import ModelSpec
from tandem.spec.units import require_int, require_number
from tandem.train.recipe import LinearFormat

Cut = Literal["depth", "width"]
_TAKEN = ("model", "data", "teacher.json", "recipe.json", "metrics.json", "ranking")
"""Names inside a run's folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationPart:
    """Text that importance is scored on (paper A section 4.2: 1,024 samples of 8,192 tokens)."""

    samples: int = 1024
    length: int = 8192

    def __post_init__(self) -> None:
        require_int("calibration.samples", self.samples)
        require_int("calibration.length", self.length)


@dataclass(frozen=True, kw_only=True, slots=True)
class PostPart:
    """Conversations of post-training, as `tandem.align` makes them: how many of each kind."""

    tasks: tuple[str, ...]
    """Procedural tasks of the reasoning ones."""
    reasoning: int = 0
    instructions: int = 0
    tools: int = 0
    no_think: float = 0.1
    """Share without thoughts."""

    def __post_init__(self) -> None:
        for name in ("reasoning", "instructions", "tools"):
            require_int(f"data.post.{name}", getattr(self, name), low=0)
        if not self.reasoning + self.instructions + self.tools:
            raise SpecError("data.post.reasoning=0: there are no conversations; state how many of a kind, or leave post out")
        if not self.tasks:
            raise SpecError("data.post.tasks=[]: name one at least")
        if not 0 <= self.no_think <= 1:
            raise SpecError(f"data.post.no_think={self.no_think!r}: must be from 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataPart:
    """Text that is scored on and distilled on."""

    pretraining: str
    """A recipe of `tandem train`, whose sources and last blend are taken; the tokenizer is the teacher's."""
    changes: tuple[str, ...] = ()
    """Settings of that recipe to change, `field.path=value`."""
    post: PostPart | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DistilPart:
    """Logit distillation from the teacher: forward KL, temperature 1, nothing else (paper A section 3)."""

    tokens: int
    length: int
    rows: int
    """Sequences of `length` tokens in a step."""
    lr: float
    final_lr: float
    warmup_steps: int = 0
    micro: int | None = None
    """Sequences of one forward pass, a divisor of `rows`; None: all of a step."""
    linears: LinearFormat = "bf16"
    """Number format of the linears' products, as in training."""
    post_share: float = 0.7
    """Share of post-training data in the blend, where there are any; the rest is pre-training data (paper A: 70/30)."""
    top_k: int | None = None
    """The teacher's largest probabilities of each token, kept on disk for whoever reads the same batches; None: all, anew."""

    def __post_init__(self) -> None:
        require_int("tokens", self.tokens, high=10**15)
        require_int("length", self.length)
        require_int("rows", self.rows)
        require_number("lr", self.lr, high=10.0)
        require_number("final_lr", self.final_lr, high=self.lr)
        require_int("warmup_steps", self.warmup_steps, low=0)
        if not 0 <= self.post_share <= 1:
            raise SpecError(f"post_share={self.post_share!r}: must be from 0 to 1")
        if self.top_k is not None:
            require_int("top_k", self.top_k)
        if self.micro is not None and (require_int("micro", self.micro) > self.rows or self.rows % self.micro):
            raise SpecError(f"micro={self.micro}: must divide rows={self.rows}")
        if self.tokens < self.length * self.rows:
            raise SpecError(f"tokens={self.tokens}: must be one step at least, {self.length * self.rows:,}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatePart:
    """Held-out questions that the teacher and the model after every stage are asked (`tandem evaluate`)."""

    tasks: tuple[str, ...]
    problems: int = 100
    max_tokens: int = 256

    def __post_init__(self) -> None:
        require_int("evaluate.problems", self.problems)
        require_int("evaluate.max_tokens", self.max_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePart:
    """One stage: the model is cut, or distilled."""

    cut: Cut | None = None
    distil: DistilPart | None = None

    def __post_init__(self) -> None:
        if (self.cut is None) == (self.distil is None):
            raise SpecError("stage: must state one of cut (depth or width) and distil")


@dataclass(frozen=True, kw_only=True, slots=True)
class WithoutPart:
    """What is left out, to see what it is worth: for the study of compression."""

    groups: bool = False
    """Mamba heads are ranked all together instead of inside their group."""
    teacher: bool = False
    """Students learn the next token instead of the teacher's distribution."""
    weights: bool = False
    """What is cut begins anew, from random weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressRecipe:
    """A complete compression: from a teacher's checkpoint to a smaller one within a budget."""

    name: str
    about: str = ""
    teacher: str
    """A model's name or a checkpoint folder."""
    seed: int = 0
    budget: Budget
    depth: Depth | None = None
    width: Width | None = None
    objective: Objective | None = None
    select: Selection = field(default_factory=Selection)
    ranking: DistilPart | None = None
    """The short distillation that candidates are told apart by; None: the prediction decides."""
    calibration: CalibrationPart = field(default_factory=CalibrationPart)
    data: DataPart | None = None
    """None: for `--plan` only."""
    evaluate: EvaluatePart | None = None
    """None: nothing but the distance from the teacher on held-out text."""
    memory_bytes: int | None = None
    """Weights and hidden states that are held while layers and units are scored; beyond it they lie on disk. None: no bound."""
    stages: dict[str, StagePart] = field(default_factory=dict)
    """By name, in order."""
    without: WithoutPart = field(default_factory=WithoutPart)
    plan_only: str | None = None
    """Why the recipe cannot be run here; None: it can."""

    def __post_init__(self) -> None:
        require_int("seed", self.seed, low=0, high=10**8)
        if not self.teacher:
            raise SpecError("teacher='': name a model or a checkpoint folder")
        if self.depth is None and self.width is None:
            raise SpecError("depth, width: neither is stated; state which layers or sizes may be cut")
        if self.budget.tokens_per_s is not None and self.objective is None:
            raise SpecError(f"budget.tokens_per_s={self.budget.tokens_per_s:g}: needs an objective that predicts it")
        if self.select.by == "throughput" and self.objective is None:
            raise SpecError("select.by='throughput': needs an objective that predicts it")
        if self.memory_bytes is not None:
            require_int("memory_bytes", self.memory_bytes, high=10**15)
        for name, stage in self.stages.items():
            if not name or Path(name).name != name or name.startswith(".") or name in _TAKEN:
                raise SpecError(f"stages: {name!r} must be a name that a folder may have, and none of {', '.join(_TAKEN)}")
            if stage.cut is not None and getattr(self, stage.cut) is None:
                raise SpecError(f"stages.{name}.cut={stage.cut!r}: the recipe has no {stage.cut} to cut; state it")
        for cut in ("depth", "width"):
            named = [name for name, stage in self.stages.items() if stage.cut == cut]
            if len(named) > 1:
                raise SpecError(f"stages.{named[1]}.cut={cut!r}: {named[0]} cuts it already")


def search_recipe(
    recipe: CompressRecipe,
    *,
    teacher: ModelSpec | None = None,
    order: Sequence[int] = (),
    quality: Quality | None = None,
    losses: Mapping[Shape, float] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Found:
    """What a recipe's search finds: see `search_shapes`. `teacher` stands in for the recipe's where it was cut already.

    Raises SpecError where the teacher is not known, within the budget already, or no shape fits.
    """
    return search_shapes(
        load_spec(recipe.teacher) if teacher is None else teacher,
        budget=recipe.budget,
        depth=recipe.depth,
        width=recipe.width,
        predict=None if recipe.objective is None else recipe.objective.chosen.predictor(),
        selection=recipe.select,
        order=order,
        quality=quality,
        losses=losses,
        progress=progress,
    )


def plan_json(recipe: CompressRecipe, found: Found) -> dict[str, Any]:
    """The object that `tandem compress RECIPE --plan --json` prints: candidates best first, and what they were chosen by."""
    notes = []
    if recipe.depth is not None and not recipe.depth.order:
        notes.append("no importance is known yet: layers leave from the back, the first two and the last two stay")
    if all(c.loss is None for c in found.candidates):
        notes.append("nothing was distilled: quality is the number of parameters, and the order is that of the prediction")
    if recipe.plan_only is not None:
        notes.append(f"it can be planned, not run: {recipe.plan_only}")
    return {
        "name": recipe.name,
        "model": found.teacher.spec.name,
        "budget": asdict(recipe.budget),
        "objective": None if recipe.objective is None else recipe.objective.to_json(),
        "select": asdict(recipe.select),
        "stages": {name: asdict(stage) for name, stage in recipe.stages.items()},
        "tokens": sum(stage.distil.tokens for stage in recipe.stages.values() if stage.distil is not None),
        **found.to_json(),
        "notes": notes,
    }
