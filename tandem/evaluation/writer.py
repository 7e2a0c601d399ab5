"""Answers of a model to many prompts, by Tandem's engine, and what became of their thinking blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.thinking import CLOSING, Thinking
from tandem.engine.types import EngineRequest, Generation, SamplingParams, TokenOutput
from tandem.evaluation.form import Prompt
from tandem.model.hybrid import Decoder
from tandem.model.tokenizer import Tokenizer
from tandem.train.evaluate import special_id

Tick = Callable[[int, int], None]
"""Told how many answers of how many are done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a model wrote after a prompt."""

    text: str
    finished: bool
    """Ended by the model, not by a limit."""
    closing_marks: int
    forced: bool
    """A closing mark that the budget forced."""
    thinking_tokens: int
    """Its closing mark included."""
    answer_tokens: int
    """After the block; the end mark is not counted."""
    fits: bool = True
    """False where the prompt does not leave room for a token, so that nothing was asked."""


NOT_ASKED = Written(text="", finished=False, closing_marks=0, forced=False, thinking_tokens=0, answer_tokens=0, fits=False)


class Writer:
    """Lets one model answer. What it writes to a prompt does not depend on what it is asked beside it."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, *, batch: int = 32) -> None:
        self._engine = Engine(model, tokenizer=tokenizer, config=EngineConfig(max_batch=batch, prefix_cache_bytes=0))
        end = special_id(tokenizer, "eos_token")
        self._ends = frozenset(model.token_ids.eos) | (frozenset() if end is None else {end})
        self._batch = batch

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and answer."""
        return self._engine.max_context

    def write(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        seeds: Sequence[int] | None = None,
        tick: Tick | None = None,
    ) -> list[Written]:
        """The answers in the order of the prompts; `seeds` are those of the draws, one a prompt.

        No more requests wait in the engine than it can soon take, so that many prompts cost no more than their tokens.
        """
        sampling = replace(sampling, stop_token_ids=tuple(sorted(self._ends)))
        engine, outputs = self._engine, [list[TokenOutput]() for _ in prompts]
        asked = [i for i, prompt in enumerate(prompts) if len(prompt.ids) < engine.max_context]
        waiting, open_, done = asked[::-1], 0, 0
        try:
            while waiting or engine.has_work:
                while waiting and open_ < 2 * self._batch:
                    i, open_ = waiting.pop(), open_ + 1
                    each = sampling if seeds is None else replace(sampling, seed=seeds[i])
                    prompt = prompts[i]
                    engine.add(EngineRequest(id=str(i), prompt_ids=prompt.ids, sampling=each, thinking=prompt.thinking))
                result = engine.step()
                for output in result.outputs:
                    outputs[int(output.request_id)].append(output)
                if result.finished:
                    open_, done = open_ - len(result.finished), done + len(result.finished)
                    if tick is not None:
                        tick(done, len(asked))
        finally:
            for i in asked:
                engine.cancel(str(i))
        return [
            self._written(prompt, sampling, Generation.of(some)) if some else NOT_ASKED
            for prompt, some in zip(prompts, outputs, strict=True)
        ]

    def _written(self, prompt: Prompt, sampling: SamplingParams, found: Generation) -> Written:
        tokens = found.token_ids[: -1 if found.token_ids[-1] in self._ends else None]
        vocabulary = self._engine.vocabulary
        budget = sampling.thinking_budget
        thinking = Thinking(vocabulary.closing_tag, vocabulary.spelling, budget=budget, opened=prompt.thinking)
        forced = False
        for token in tokens:
            forced = forced or thinking.forced is not None
            thinking.accept(token)
        return Written(
            text=found.text,
            finished=found.finish_reason == "stop",
            closing_marks=found.text.count(CLOSING),
            forced=forced,
            thinking_tokens=thinking.tokens,
            answer_tokens=len(tokens) - thinking.tokens,
        )


def draw_seed(*parts: object) -> int:
    """A seed that follows from what it is for, the same on every machine."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:7], "big")
