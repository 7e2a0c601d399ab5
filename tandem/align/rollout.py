"""What GRPO asks of whoever generates: several answers to each prompt, with the log-probability of every token.

`tandem.engine.rollout.EngineRollouts` is one such generator; `tandem.align` knows only what is said here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from tandem.align.data.draws import number_of
from tandem.align.sample import Ask
from tandem.train.loop import Diverged


class Rollout(Protocol):
    """One sampled answer. The three sequences are of one length, the tokens after the prompt."""

    @property
    def completion_ids(self) -> tuple[int, ...]:
        """Tokens after the prompt, the end token included where there is one. Never empty."""
        ...

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Natural logarithm of each token's probability by softmax(logits / temperature)."""
        ...

    @property
    def chosen(self) -> tuple[bool, ...]:
        """Whether the model chose each token; False where a thinking budget forced it, so that there is nothing to learn."""
        ...

    @property
    def text(self) -> str:
        """The tokens as text, special ones left out."""
        ...

    @property
    def finished(self) -> bool:
        """Whether an end token came before the limit."""
        ...

    @property
    def error(self) -> str | None:
        """Why the answer broke off, in one line: the model's numbers overflow."""
        ...


class Generator(Protocol):
    """Samples answers from the weights as they are at the moment of the call."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[Sequence[int]],
        thinking: Sequence[bool],
        thinking_budgets: Sequence[int | None],
        temperature: float,
        max_tokens: int,
    ) -> Sequence[Sequence[Rollout]]:
        """For each prompt one answer a seed, in their order.

        `thinking`: the prompt ends inside an open thinking block. `thinking_budgets`: tokens of the block after which it is
        closed, None for as many as the model likes. Raises SpecError for a prompt that leaves no room in the model's context.
        """
        ...


class Rollouts:
    """TRL's `rollout_func`: prompts in (numbers of asks, as texts), tokens out. Keeps the latest batch for those who score."""

    def __init__(
        self,
        generator: Generator,
        asks: Sequence[Ask],
        prompts: Sequence[tuple[int, ...]],
        *,
        count: int,
        temperature: float,
        max_tokens: int,
        thinking_budget: int | None,
        seed: int,
    ) -> None:
        """`prompts` are the asks as tokens. TRL names each ask `count` times in a row, once for every answer."""
        self._generator, self._known, self._prompts, self._count = generator, asks, prompts, count
        self._temperature, self._max_tokens, self._budget, self._seed = temperature, max_tokens, thinking_budget, seed
        self.asks: list[Ask] = []
        """Of the latest batch, one an answer."""
        self.answers: list[Rollout] = []
        self.figures: dict[str, float] = {}
        """Of the latest batch: finished, length, forced_share, rollout_s, rollout_tokens_per_s."""

    def __call__(self, prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        """Token ids of prompts and answers, log-probabilities, and `env_mask`: 0 at tokens that were forced.

        An answer's seed follows from the run's, the step and its place. Raises Diverged where the model's numbers overflow.
        """
        numbers = [int(prompt) for prompt in prompts]
        step, first = int(trainer.state.global_step), trainer.accelerator.process_index * len(numbers)
        seeds = [number_of(f"grpo:{self._seed}:{step}:{first + row}") >> 1 for row in range(len(numbers))]
        groups = [self._known[i] for i in numbers[:: self._count]]
        began = time.perf_counter()
        found = self._generator.generate(
            [self._prompts[i] for i in numbers[:: self._count]],
            seeds=[seeds[row : row + self._count] for row in range(0, len(seeds), self._count)],
            thinking=[ask.thinking for ask in groups],
            thinking_budgets=[self._budget if ask.thinking else None for ask in groups],
            temperature=self._temperature,
            max_tokens=self._max_tokens,
        )
        seconds = time.perf_counter() - began
        self.asks = [self._known[i] for i in numbers]
        self.answers = answers = [answer for group in found for answer in group]
        wrong = next((answer.error for answer in answers if answer.error is not None), None)
        if wrong is not None:
            raise Diverged(f"rollouts of step {step}: {wrong}; lower the learning rate")
        tokens = sum(len(answer.completion_ids) for answer in answers)
        self.figures = {
            "finished": sum(answer.finished for answer in answers) / len(answers),
            "length": tokens / len(answers),
            "forced_share": 1 - sum(sum(answer.chosen) for answer in answers) / tokens,
            "rollout_s": seconds,
            "rollout_tokens_per_s": tokens / seconds,
        }
        return {
            "prompt_ids": [list(self._prompts[i]) for i in numbers],
            "completion_ids": [list(answer.completion_ids) for answer in answers],
            "logprobs": [list(answer.logprobs) for answer in answers],
            "env_mask": [[int(chosen) for chosen in answer.chosen] for answer in answers],
        }
