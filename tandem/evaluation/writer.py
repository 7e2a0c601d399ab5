"""Answers of a model to many prompts, by Tandem's engine, and what became of their thinking blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tandem.align.answers import hidden_token
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
    unaided: bool | None = None
    """With a budget: whether the model, left alone after the closing mark, writes no second one. None: not asked."""
    fits: bool = True
    """False where the prompt does not leave room for a token, so that nothing was asked."""
    hidden: bool = False
    """Whether it holds tokens before its end that the text leaves out."""


NOT_ASKED = Written(text="", finished=False, closing_marks=0, forced=False, thinking_tokens=0, answer_tokens=0, fits=False)


class Writer:
    """Lets one model answer. What it writes to a prompt does not depend on what it is asked beside it."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, *, batch: int = 32) -> None:
        self._tokenizer = tokenizer
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

        With a thinking budget each answer is also written once more from its closing mark on, without the engine's care that
        no second one follows: `unaided` says what the model does by itself.
        """
        sampling = replace(sampling, stop_token_ids=tuple(sorted(self._ends)))
        each = [sampling if seeds is None else replace(sampling, seed=seed) for seed in seeds or [0] * len(prompts)]
        requests = [
            EngineRequest(id=str(i), prompt_ids=prompt.ids, sampling=drawn, thinking=prompt.thinking)
            for i, (prompt, drawn) in enumerate(zip(prompts, each, strict=True))
        ]
        found = self._run([request for request in requests if len(request.prompt_ids) < self.max_context], tick)
        written, again = [NOT_ASKED] * len(prompts), []
        for i, request in enumerate(requests):
            if request.id in found:
                written[i], block = self._written(request, found[request.id])
                room = min(sampling.max_tokens, self.max_context - len(request.prompt_ids)) - len(block)
                if sampling.thinking_budget is not None and block and room > 0:
                    free = replace(request.sampling, thinking_budget=None)
                    again.append(replace(request, sampling=free, output_ids=block))
        for id, generation in self._run(again, None).items():
            written[int(id)] = replace(written[int(id)], unaided=CLOSING not in generation.text)
        return written

    def _run(self, requests: Sequence[EngineRequest], tick: Tick | None) -> dict[str, Generation]:
        """What the engine brings by id. No more requests wait in it than it can soon take: it looks at all that wait."""
        engine, outputs = self._engine, {request.id: list[TokenOutput]() for request in requests}
        waiting, open_, done = list(requests[::-1]), 0, 0
        try:
            while waiting or engine.has_work:
                while waiting and open_ < 2 * self._batch:
                    engine.add(waiting.pop())
                    open_ += 1
                result = engine.step()
                for output in result.outputs:
                    outputs[output.request_id].append(output)
                if result.finished:
                    open_, done = open_ - len(result.finished), done + len(result.finished)
                    if tick is not None:
                        tick(done, len(requests))
        finally:
            for request in requests:
                engine.cancel(request.id)
        return {id: Generation.of(some) for id, some in outputs.items()}

    def _written(self, request: EngineRequest, found: Generation) -> tuple[Written, tuple[int, ...]]:
        """What became of an answer, and the tokens of its thinking block where that is closed."""
        tokens = found.token_ids[: -1 if found.token_ids[-1] in self._ends else None]
        vocabulary = self._engine.vocabulary
        budget = request.sampling.thinking_budget
        thinking = Thinking(vocabulary.closing_tag, vocabulary.spelling, budget=budget, opened=request.thinking)
        forced = False
        for token in tokens:
            forced = forced or thinking.forced is not None
            thinking.accept(token)
        written = Written(
            text=found.text,
            finished=found.finish_reason == "stop",
            closing_marks=found.text.count(CLOSING),
            forced=forced,
            thinking_tokens=thinking.tokens,
            answer_tokens=len(tokens) - thinking.tokens,
            hidden=hidden_token(tokens, self._tokenizer) is not None,
        )
        return written, tokens[: thinking.tokens] if request.thinking and thinking.closed else ()


def draw_seed(*parts: object) -> int:
    """A seed that follows from what it is for, the same on every machine."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:7], "big")
