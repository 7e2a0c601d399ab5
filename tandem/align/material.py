"""What a stage learns from, as its recipe states it: samples, questions, sampled answers, preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from random import Random

from tandem.align.answers import hidden_token, read_answer
from tandem.align.data.draws import number_of
from tandem.align.data.episodes import Episode, run_episodes, verify_episode
from tandem.align.data.instructions import instruction_asks, instruction_samples
from tandem.align.data.reasoning import reasoning_asks, reasoning_samples
from tandem.align.data.tools import tool_asks, tool_samples, tool_turns
from tandem.align.encode import encode_ask
from tandem.align.pairs import Chosen, choose_pairs, episode_pairs
from tandem.align.recipe import AsksPart, MixPart, PairsPart
from tandem.align.rollout import Generator, Rollout
from tandem.align.sample import Answer, Ask, Sample
from tandem.align.verify import verify
from tandem.model.tokenizer import Tokenizer
from tandem.train.loop import Diverged

_SEEDS = 10**8
"""Training seeds; those of evaluation begin beyond (`tandem.train.data.procedural.EVALUATION_SEED`)."""
_PORTION = 512
"""Answers that are asked for at once: four times what an engine decodes side by side, so that its places stay filled."""


def seed_of(*parts: object) -> int:
    """A training seed of its own for every list of names and numbers."""
    return number_of(repr(parts)) % _SEEDS


def samples_of(tasks: Sequence[str], mix: MixPart, seed: int) -> list[Sample]:
    """A mix's conversations in random order.

    Of every kind a share `no_think` has no thoughts; of the reasoning ones besides, a share `truncated` has thoughts cut off.
    """
    found: list[Sample] = []
    if mix.reasoning:
        found += reasoning_samples(tasks, mix.reasoning, seed, off=mix.no_think, truncated=mix.truncated)
    if mix.instructions:
        found += instruction_samples(tasks, mix.instructions, seed, off=mix.no_think)
    if mix.tools:
        found += tool_samples(mix.tools, seed, off=mix.no_think)
    Random(seed).shuffle(found)
    return found


def asks_of(tasks: Sequence[str], part: AsksPart, seed: int, *, episodes: bool = False) -> list[Ask]:
    """Questions to be answered, in random order; those about tools are single turns or, as `episodes`, whole requests.

    Of every kind a share `no_think` is asked without thinking, rounded to whole questions.
    """
    made: dict[str, Callable[[int, int, bool], Iterable[Ask]]] = {
        "reasoning": lambda count, drawn, thinking: reasoning_asks(tasks, count, drawn, thinking=thinking),
        "instructions": lambda count, drawn, thinking: instruction_asks(tasks, count, drawn, thinking=thinking),
        "tools": lambda count, drawn, thinking: (tool_asks if episodes else tool_turns)(count, drawn, thinking=thinking),
    }
    found: list[Ask] = []
    for kind, make in made.items():
        count = getattr(part, kind)
        off = round(part.no_think * count)
        if count > off:
            found += make(count - off, seed, True)
        if off:
            found += make(off, seed_of(seed, "off"), False)
    Random(seed).shuffle(found)
    return found


def read_rollout(ask: Ask, rollout: Rollout, tokenizer: Tokenizer) -> Answer:
    """A sampled answer, read; malformed where it holds a token that its text does not show, so that none is rewarded."""
    answer = read_answer(rollout.text, thinking=ask.thinking, finished=rollout.finished)
    hidden = hidden_token(rollout.completion_ids[: -1 if rollout.finished else None], tokenizer)
    return answer if hidden is None else replace(answer, malformed=f"holds {hidden}, which is no text", hidden=True)


class Sampler:
    """Draws a model's answers to asks; every call draws others, the same for the same seed."""

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        *,
        temperature: float,
        max_tokens: int,
        seed: int,
        context: int | None = None,
        tell: Callable[[int, int], None] | None = None,
    ) -> None:
        """`context`: tokens of prompt and answer that the model takes in; None: whatever is asked fits.

        `tell` is told how many answers of how many are there, of each call, and of each turn of episodes.
        """
        self._generator, self._tokenizer = generator, tokenizer
        self._temperature, self._max_tokens = temperature, max_tokens
        self._context, self._tell = context, tell
        self._rng = Random(seed)

    def answers(self, asks: Sequence[Ask], count: int = 1) -> list[list[Answer]]:
        """`count` answers to each. Raises Diverged where the model's numbers overflow."""
        return self._sampled(asks, [encode_ask(ask, self._tokenizer) for ask in asks], [count] * len(asks))

    def episodes(self, asks: Sequence[Ask], count: int = 1) -> list[list[Episode]]:
        """`count` episodes of each ask about tools; one whose conversation no longer fits the context is cut off."""
        repeated = [ask for ask in asks for _ in range(count)]
        ran = run_episodes(repeated, self._turns)
        return [ran[i : i + count] for i in range(0, len(ran), count)]

    def _turns(self, asks: Sequence[Ask]) -> list[Answer]:
        """A turn for each; asks that are the same, one after the other, are one prompt with several answers."""
        groups = [(ask, len(list(same))) for ask, same in groupby(asks)]
        prompts = [encode_ask(ask, self._tokenizer) for ask, _ in groups]
        fits = [self._context is None or len(prompt) < self._context for prompt in prompts]
        asked = [i for i, fit in enumerate(fits) if fit]
        sampled = iter(self._sampled([groups[i][0] for i in asked], [prompts[i] for i in asked], [groups[i][1] for i in asked]))
        nothing = Answer(text="", reasoning=None, content="", finished=False)
        return [
            answer
            for (_, count), fit in zip(groups, fits, strict=True)
            for answer in (next(sampled) if fit else [nothing] * count)
        ]

    def _sampled(self, asks: Sequence[Ask], prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> list[list[Answer]]:
        """So many answers to each prompt. A generator reads all prompts of a call first, so it is given portions."""
        seeds = [[self._rng.randrange(2**40) for _ in range(count)] for count in counts]
        found: list[list[Answer]] = []
        done = begin = end = 0
        while begin < len(asks):
            while end < len(asks) and (end == begin or sum(counts[begin : end + 1]) <= _PORTION):
                end += 1
            some = asks[begin:end]
            rollouts = self._generator.generate(
                prompts[begin:end],
                seeds=seeds[begin:end],
                thinking=[ask.thinking for ask in some],
                thinking_budgets=[None] * len(some),
                temperature=self._temperature,
                max_tokens=self._max_tokens,
            )
            for ask, group in zip(some, rollouts, strict=True):
                for one in group:
                    if one.error is not None:
                        raise Diverged(f"answer to {ask.id!r}: {one.error}; lower the learning rate of the stage before")
                found.append([read_rollout(ask, one, self._tokenizer) for one in group])
            done, begin = done + sum(map(len, rollouts)), end
            if self._tell is not None:
                self._tell(done, sum(counts))
        return found

    def pairs(self, tasks: Sequence[str], part: PairsPart, seed: int) -> list[Chosen]:
        """Preferences among a model's own answers: of single answers, and of episodes where tools are asked for."""
        asks = asks_of(tasks, part.asks, seed, episodes=True)
        single, multi = [ask for ask in asks if ask.kind != "tools"], [ask for ask in asks if ask.kind == "tools"]
        found = []
        if single:
            found.append(choose_pairs(single, self.answers(single, part.samples), verify, per_ask=part.per_ask, seed=seed))
        if multi:
            found.append(episode_pairs(self.episodes(multi, part.samples), verify_episode, per_ask=part.per_ask, seed=seed))
        return found

    def worth(self, asks: Sequence[Ask]) -> float:
        """Mean of what one answer to each is worth."""
        answers = self.answers(asks)
        return sum(verify(ask, group[0]) for ask, group in zip(asks, answers, strict=True)) / len(asks)
