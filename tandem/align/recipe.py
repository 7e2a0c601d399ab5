"""The settings of an alignment run: stages one after the other, each with what it learns from and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.align.data.draws import require_share
from tandem.align.dpo import DpoSettings
from tandem.align.grpo import GrpoSettings
from tandem.align.reward_model import RewardSettings
from tandem.align.sft import SftSettings
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int, require_number
from tandem.train.data.procedural import TASKS

_TAKEN = ("base", "final", "model", "tokenizer", "recipe.json", "metrics.json")
"""Names that a run's folder and its reports have besides those of stages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixPart:
    """Conversations that a stage of supervised fine-tuning learns from: how many of each kind."""

    reasoning: int = 0
    instructions: int = 0
    tools: int = 0
    no_think: float = 0.1
    """Share of every kind without thoughts (paper A: about a tenth)."""
    truncated: float = 0.0
    """Share of the reasoning ones whose thoughts are cut off, with the answer kept (paper A, stage 3: a twentieth of all)."""

    def __post_init__(self) -> None:
        for name in ("reasoning", "instructions", "tools"):
            require_int(name, getattr(self, name), low=0)
        require_share("no_think", self.no_think)
        require_share("truncated", self.truncated)
        if not self.reasoning + self.instructions + self.tools:
            raise SpecError("reasoning=0: the stage learns from nothing; state how many conversations of a kind")


@dataclass(frozen=True, kw_only=True, slots=True)
class SftPart:
    """Supervised fine-tuning."""

    data: MixPart
    train: SftSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class AsksPart:
    """Questions that a model is to answer by itself: how many of each kind."""

    reasoning: int = 0
    instructions: int = 0
    tools: int = 0
    no_think: float = 0.0
    """Share of every kind that is asked without thinking."""

    def __post_init__(self) -> None:
        for name in ("reasoning", "instructions", "tools"):
            require_int(name, getattr(self, name), low=0)
        require_share("no_think", self.no_think)
        if not self.reasoning + self.instructions + self.tools:
            raise SpecError("reasoning=0: nothing is asked; state how many questions of a kind")


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoPart:
    """Reinforcement learning: the reward is the verifier's, or where `reward_model` names a stage, that of its model."""

    asks: AsksPart
    train: GrpoSettings
    reward_model: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PairsPart:
    """On-policy preferences: answers are sampled, verified, and paired."""

    asks: AsksPart
    samples: int = 8
    """Answers to each question."""
    per_ask: int = 2
    """Most pairs of one question."""
    temperature: float = 1.0
    max_tokens: int = 256

    def __post_init__(self) -> None:
        require_int("samples", self.samples, low=2)
        require_int("per_ask", self.per_ask)
        require_number("temperature", self.temperature, high=100.0)
        require_int("max_tokens", self.max_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class DpoPart:
    """Direct preference optimisation in rounds, each on answers of the model as the last one left it."""

    pairs: PairsPart
    train: DpoSettings
    rounds: int = 2

    def __post_init__(self) -> None:
        require_int("rounds", self.rounds)


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModelPart:
    """A reward model learns from pairs of the model's answers. The model itself stays as it is."""

    pairs: PairsPart
    train: RewardSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class MergePart:
    """w = (1 - a) first + a second, with the best a of a sweep (paper A: 0.1 to 0.9, about a half)."""

    first: str
    second: str
    """Names of stages."""
    asks: AsksPart
    """What each merge is judged by: another draw than that of evaluation."""
    alphas: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    temperature: float = 0.2
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if self.first == self.second:
            raise SpecError(f"second={self.second!r}: is the first as well; name another stage")
        require_number("temperature", self.temperature, high=100.0)
        require_int("max_tokens", self.max_tokens)
        if not self.alphas:
            raise SpecError("alphas=[]: must hold one at least")
        for alpha in self.alphas:
            require_share("alphas", alpha)


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePart:
    """One stage: exactly one of the ways to learn."""

    after: str | None = None
    """The stage whose model this one goes on from; None: the last one before it that left a model."""
    sft: SftPart | None = None
    grpo: GrpoPart | None = None
    dpo: DpoPart | None = None
    reward_model: RewardModelPart | None = None
    merge: MergePart | None = None

    def __post_init__(self) -> None:
        if sum(part is not None for part in self.parts.values()) != 1:
            raise SpecError(f"stage: states {[n for n, p in self.parts.items() if p]}, must be one of {', '.join(self.parts)}")

    @property
    def parts(self) -> dict[str, Any]:
        """The ways to learn by name; all but one are None."""
        return {name: getattr(self, name) for name in ("sft", "grpo", "dpo", "reward_model", "merge")}

    @property
    def kind(self) -> str:
        """Which one it is."""
        return next(name for name, part in self.parts.items() if part is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatePart:
    """What is asked after every stage, greedy, of held-out questions."""

    problems: int = 100
    """Of each task, with and without thinking; as many instructions and requests to tools."""
    budgets: tuple[int, ...] = ()
    """Thinking budgets of the curve, asked for after the last stage."""
    max_tokens: int = 256

    def __post_init__(self) -> None:
        require_int("evaluate.problems", self.problems)
        require_int("evaluate.max_tokens", self.max_tokens)
        for budget in self.budgets:
            require_int("evaluate.budgets", budget, low=0)
        if len(set(self.budgets)) < len(self.budgets):  # said here, not after all stages
            raise SpecError(f"evaluate.budgets={list(self.budgets)}: names one twice; name each once")


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignRecipe:
    """A complete alignment: from a base checkpoint to one that follows the chat format."""

    name: str
    about: str = ""
    base: str
    """A released model's name or a checkpoint folder."""
    seed: int = 0
    tasks: tuple[str, ...]
    """Procedural tasks of all reasoning questions."""
    stages: dict[str, StagePart]
    """By name, in order."""
    evaluate: EvaluatePart = field(default_factory=EvaluatePart)
    plan_only: str | None = None
    """Why the recipe cannot be run here; None: it can."""

    def __post_init__(self) -> None:
        require_int("seed", self.seed, low=0, high=10**8)
        if not self.tasks:
            raise SpecError("tasks=[]: name one at least")
        for task in self.tasks:
            if task not in TASKS:
                raise SpecError(f"tasks={task!r}: not known; {', '.join(TASKS)} are")
        if not self.stages:
            raise SpecError("stages={}: name one at least")
        earlier: dict[str, StagePart] = {}
        for name, stage in self.stages.items():
            if not name or Path(name).name != name or name.startswith(".") or name in _TAKEN:
                raise SpecError(f"stages: {name!r} must be a name that a folder may have, and none of {', '.join(_TAKEN)}")
            for field_name, named, wanted in _references(stage):
                if named not in earlier or (earlier[named].kind == "reward_model") != (wanted == "reward_model"):
                    known = [n for n, s in earlier.items() if (s.kind == "reward_model") == (wanted == "reward_model")]
                    may = ", ".join(known) or "none"
                    raise SpecError(
                        f"stages.{name}.{field_name}={named!r}: must be a {wanted} stage before it; there are {may}"
                    )
            earlier[name] = stage
        if all(stage.kind == "reward_model" for stage in self.stages.values()):
            raise SpecError("stages: none of them leaves a model; state one that does")

    @property
    def context(self) -> int:
        """Tokens of the longest conversation that a stage learns from, which the aligned model takes in."""
        return max((stage.sft.train.length for stage in self.stages.values() if stage.sft is not None), default=1)

    @property
    def last(self) -> str:
        """The stage whose model is the aligned one."""
        return next(name for name, stage in reversed(self.stages.items()) if stage.kind != "reward_model")

    def before(self, name: str) -> str | None:
        """The stage whose model a stage goes on from, the first one of a merge; None: the base."""
        stage = self.stages[name]
        if stage.merge is not None:
            return stage.merge.first
        if stage.after is not None:
            return stage.after
        earlier = list(self.stages)[: list(self.stages).index(name)]
        return next((n for n in reversed(earlier) if self.stages[n].kind != "reward_model"), None)


def _references(stage: StagePart) -> list[tuple[str, str, str]]:
    """Stages that a stage names: the field, the name, what it must be."""
    found = [("after", stage.after, "model's")]
    if stage.grpo is not None:
        found.append(("grpo.reward_model", stage.grpo.reward_model, "reward_model"))
    if stage.merge is not None:
        found += [("merge.first", stage.merge.first, "model's"), ("merge.second", stage.merge.second, "model's")]
    return [(where, named, wanted) for where, named, wanted in found if named is not None]
