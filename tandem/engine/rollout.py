"""Rollouts for reinforcement learning: several sampled answers to each of many prompts, from weights that change in between.

Each prompt is read once, many in a pass; its state is handed to as many decoding requests as answers are asked for, which an
engine serves by continuous batching. The engine computes with the trainer's own tensors: nothing is copied, and no prefix
is kept from one call to the next, so an optimiser step is seen at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from tandem.engine.choose import Choice, Chooser, choose
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.handoff import Handoff
from tandem.engine.thinking import Thinking
from tandem.engine.types import EngineRequest, Logprobs, SamplingParams
from tandem.model.hybrid import PREFILL_TOKENS, Decoder
from tandem.model.tokenizer import Tokenizer
from tandem.sched.request import Request
from tandem.spec.errors import SpecError

DEFAULT_CONFIG = EngineConfig(max_batch=128)
"""Where nobody says otherwise: on CPUs a row of a decode step costs as little as it ever does from about 64 rows on, and the
more are waiting, the longer a step stays that full."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledAnswer:
    """One answer; `completion_ids`, `logprobs` and `chosen` have an entry for each of its tokens."""

    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of softmax(logits / temperature), before anything was forbidden or forced."""
    chosen: tuple[bool, ...]
    """False where the thinking budget forced a token."""
    text: str
    """Special tokens left out."""
    finished: bool
    """An end token came before the limit."""
    error: str | None = None


class EngineRollouts:
    """Samples answers from a decoder by an engine of its own. Not thread-safe."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, *, config: EngineConfig = DEFAULT_CONFIG) -> None:
        """The config's prefix cache is left out: what it kept would be of older weights."""
        self._decoder, self._tokenizer = decoder, tokenizer
        self._engine = Engine(decoder, tokenizer=tokenizer, config=replace(config, prefix_cache_bytes=0))

    @property
    def engine(self) -> Engine:
        """What serves; of use for its counts."""
        return self._engine

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[Sequence[int]],
        thinking: Sequence[bool],
        thinking_budgets: Sequence[int | None],
        temperature: float,
        max_tokens: int,
    ) -> list[list[SampledAnswer]]:
        """For each prompt one answer a seed. An answer depends on its prompt, settings and seed, not on the others beside it
        (but for rounding, where prompts of other lengths are read in one pass with it).

        Raises SpecError, before anything is computed, for a prompt without room in the context, for lists of other lengths.
        """
        for name, values in (("seeds", seeds), ("thinking", thinking), ("thinking_budgets", thinking_budgets)):
            if len(values) != len(prompts):
                raise SpecError(f"{name} has {len(values)} entries: prompts has {len(prompts)}")
        asked = [
            [
                _Answering(
                    EngineRequest(
                        id=f"{i}.{j}",
                        prompt_ids=tuple(prompt),
                        thinking=thinking[i],
                        sampling=SamplingParams(
                            max_tokens=max_tokens,
                            temperature=temperature,
                            seed=seed,
                            logprobs=0,
                            tempered_logprobs=True,
                            thinking_budget=thinking_budgets[i],
                        ),
                    )
                )
                for j, seed in enumerate(seeds[i])
            ]
            for i, prompt in enumerate(prompts)
        ]
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) < self._engine.max_context:
                raise SpecError(f"prompt {i} has {len(prompt):,} tokens: must be from 1 to {self._engine.max_context - 1:,}")
        waiting = {one.request.id: one for group in asked for one in group}
        try:
            for batch in _passes(prompts):
                self._begin(prompts, [asked[i] for i in batch], batch)
            while self._engine.has_work:
                for output in self._engine.step().outputs:
                    one = waiting[output.request_id]
                    one.take(output.token_ids, output.logprobs or ())
                    one.finish_reason, one.error = output.finish_reason, output.error
        finally:
            for name in waiting:
                self._engine.cancel(name)
        return [[self._answer(one) for one in group] for group in asked]

    @torch.no_grad()
    def _begin(self, prompts: Sequence[Sequence[int]], groups: Sequence[list[_Answering]], batch: Sequence[int]) -> None:
        """Read some prompts in one pass, draw the first token of every answer, hand the answers to the engine."""
        engine, vocabulary = self._engine, self._engine.vocabulary
        lengths = [len(prompts[i]) for i in batch]
        ids = torch.zeros(len(batch), max(lengths), dtype=torch.int64)
        for row, i in enumerate(batch):
            ids[row, : lengths[row]] = torch.tensor(prompts[i])
        mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
        device = self._decoder.device
        logits, state = self._decoder.prefill(ids.to(device), attention_mask=mask.to(device))
        for row, group in enumerate(groups):
            if not group:
                continue
            vocabulary.check(group[0].request.sampling)
            choosers = [Chooser(one.request, vocabulary) for one in group]
            choices: list[Choice] = choose(logits[row].expand(len(group), -1), choosers)
            own = state.slice([row])
            for one, choice, chooser in zip(group, choices, choosers, strict=True):
                one.take((choice.token_id,), (choice.logprobs,) if choice.logprobs else ())
                one.error = chooser.error
                if one.error is None and choice.token_id in vocabulary.eos:
                    one.finish_reason = "stop"
                elif one.error is None and one.request.sampling.max_tokens > 1 and lengths[row] + 1 < engine.max_context:
                    life = Request(
                        id=one.request.id, isl=lengths[row], max_tokens=one.request.sampling.max_tokens, arrival_s=0.0
                    )
                    engine.import_state(Handoff(replace(one.request, output_ids=(choice.token_id,)), life, own))

    def _answer(self, one: _Answering) -> SampledAnswer:
        ids = tuple(one.ids)
        return SampledAnswer(
            completion_ids=ids,
            logprobs=tuple(one.logprobs) if one.error is None else (float("nan"),) * len(ids),
            chosen=self._chosen(one.request, ids),
            text=self._tokenizer.decode(ids),
            finished=one.finish_reason == "stop",
            error=one.error,
        )

    def _chosen(self, request: EngineRequest, ids: Sequence[int]) -> tuple[bool, ...]:
        """Which tokens the budget did not force. It follows from the tokens alone, so it is read from them afterwards."""
        budget, vocabulary = request.sampling.thinking_budget, self._engine.vocabulary
        if budget is None:
            return (True,) * len(ids)
        thinking = Thinking(vocabulary.closing_tag, vocabulary.spelling, budget=budget, opened=request.thinking)
        found = []
        for token in ids:
            found.append(thinking.forced is None)
            thinking.accept(token)
        return tuple(found)


@dataclass(slots=True)
class _Answering:
    """An answer as far as it has come."""

    request: EngineRequest
    ids: list[int]
    logprobs: list[float]
    finish_reason: str | None = None
    error: str | None = None

    def __init__(self, request: EngineRequest) -> None:
        self.request, self.ids, self.logprobs = request, [], []
        self.finish_reason = self.error = None

    def take(self, ids: Sequence[int], logprobs: Sequence[Logprobs]) -> None:
        self.ids.extend(ids)
        self.logprobs.extend(entry.logprob for entry in logprobs)


def _passes(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Prompts that are read together: of like length, so many that their columns make one pass of `Decoder.prefill`."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while order:
        count = max(1, PREFILL_TOKENS // len(prompts[order[0]]))
        yield order[:count]
        order = order[count:]
