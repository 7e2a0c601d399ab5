"""What GRPO asks of whoever generates: several answers to each prompt, with the log-probability of every token.

`tandem.engine.rollout.EngineRollouts` is one such generator; `tandem.align` knows only what is said here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


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
