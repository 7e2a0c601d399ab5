"""What is evaluated and how: suites, tasks, problems, thinking, budgets, sampling."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from tandem.align.data.draws import HELD_OUT
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int, require_number

SUITES = ("reasoning", "instructions", "tools", "needles", "lm-eval")
"""Procedural tasks, verifiable constraints, calls of tools, needles in prose, and lm-eval-harness."""
CHAT_SUITES = ("instructions", "tools")
"""Those that only a model with a chat template can be asked."""
THINKING = ("on", "off", "both")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """What every model of an evaluation is asked. The same settings ask the same questions with the same draws."""

    suites: tuple[str, ...] = ()
    """Of `SUITES`; empty: reasoning and needles, and instructions and tools where the model has a chat template."""
    tasks: tuple[str, ...] = ()
    """Procedural tasks and tasks of lm-eval; empty: all procedural ones, and lm-eval's that come with Tandem."""
    problems: int = 100
    """Of each task; of instructions, of requests to tools, and of needles at each length, of all kinds together."""
    budgets: tuple[int, ...] = ()
    """Thinking budgets, in tokens, at which the reasoning tasks are asked again."""
    thinking: str = "both"
    """on, off, or both: as far as the model's template has them."""
    samples: int = 1
    """Answers drawn for each problem."""
    temperature: float = 0.0
    seed: int = 0
    """Of draws, constraints, scenarios and needles. Problems of procedural tasks are those that training leaves out."""
    max_tokens: int = 256
    """Of an answer, its thinking included."""
    lengths: tuple[int, ...] = ()
    """Of prompts with needles, in tokens; empty: a quarter, a half and all of the model's context."""
    batch: int = 32
    """Requests that the engine serves at once."""

    def __post_init__(self) -> None:
        for name, known in (("suite", SUITES), ("thinking", THINKING)):
            for value in self.suites if name == "suite" else (self.thinking,):
                if value not in known:
                    raise SpecError(f"{name}={value!r}: must be one of {', '.join(known)}")
        for name, low, high in (("problems", 1, 10**6), ("samples", 1, 1024), ("max_tokens", 1, 10**6), ("batch", 1, 1 << 16)):
            require_int(name, getattr(self, name), low=low, high=high)
        require_int("seed", self.seed, low=0)
        if self.problems > HELD_OUT and (not self.suites or "reasoning" in self.suites):
            raise SpecError(f"problems={self.problems}: {HELD_OUT} of each task are kept out of training data; ask for no more")
        if "instructions" in self.suites and self.problems > HELD_OUT * len(self.reasoning_tasks):
            raise SpecError(
                f"problems={self.problems}: instructions are made of {HELD_OUT} held-out problems of each of "
                f"{len(self.reasoning_tasks)} tasks; ask for no more, or name more tasks"
            )
        for budget in self.budgets:
            require_int("budgets", budget, low=0)
        for length in self.lengths:
            require_int("lengths", length, high=1 << 30)
        for name in ("suites", "tasks", "budgets", "lengths"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise SpecError(f"{name}={','.join(map(str, values))}: names one twice; name each once")
        if self.temperature:
            require_number("temperature", self.temperature, high=100.0)
        elif self.samples > 1:
            raise SpecError(
                f"samples={self.samples}: at temperature 0 all would be the same; give a temperature, for example 0.7"
            )
        if self.budgets and self.suites and "reasoning" not in self.suites:
            raise SpecError("budgets: are for the suite reasoning; add it, or leave them out")
        if self.budgets and self.thinking == "off":
            raise SpecError("budgets: change nothing with thinking=off; leave one of them out")
        self._check_tasks()

    def _check_tasks(self) -> None:
        from tandem.train.data.procedural import TASKS

        foreign = [task for task in self.tasks if task not in TASKS]
        if foreign and "lm-eval" not in self.suites:
            near = get_close_matches(foreign[0], TASKS, n=1)
            advice = f"did you mean {near[0]}" if near else f"{', '.join(TASKS)} are, and lm-eval's with the suite lm-eval"
            raise SpecError(f"tasks={foreign[0]!r}: not known; {advice}")

    @property
    def reasoning_tasks(self) -> tuple[str, ...]:
        """The procedural tasks to ask."""
        from tandem.train.data.procedural import TASKS

        named = tuple(task for task in self.tasks if task in TASKS)
        return named or tuple(TASKS)

    @property
    def harness_tasks(self) -> tuple[str, ...]:
        """The tasks named that are no procedural ones."""
        from tandem.train.data.procedural import TASKS

        return tuple(task for task in self.tasks if task not in TASKS)
