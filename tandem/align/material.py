"""What a stage learns from, as its recipe states it: samples, questions, sampled answers, preference pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from random import Random

from tandem.align.answers import read_answer
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

_SEEDS = 10**8
"""Training seeds; those of evaluation begin beyond (`tandem.train.data.procedural.EVALUATION_SEED`)."""


def seed_of(*parts: object) -> int:
    """A training seed of its own for every list of names and numbers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") % _SEEDS


def samples_of(tasks: Sequence[str], mix: MixPart, seed: int) -> list[Sample]:
    """A mix's conversations in random order."""
    found: list[Sample] = []
    if mix.reasoning:
        found += islice(reasoning_samples(tasks, mix.reasoning, seed, off=mix.no_think, truncated=mix.truncated), mix.reasoning)
    if mix.instructions:
        found += islice(instruction_samples(tasks, mix.instructions, seed), mix.instructions)
    if mix.tools:
        found += tool_samples(mix.tools, seed)
    Random(seed).shuffle(found)
    return found


def asks_of(tasks: Sequence[str], part: AsksPart, seed: int, *, episodes: bool = False) -> list[Ask]:
    """Questions to be answered, in random order; those about tools are single turns or, as `episodes`, whole requests."""
    found: list[Ask] = []
    off = round(part.no_think * part.reasoning)
    if part.reasoning > off:
        found += reasoning_asks(tasks, part.reasoning - off, seed)
    if off:
        found += reasoning_asks(tasks, off, seed_of(seed, "off"), thinking=False)
    if part.instructions:
        found += instruction_asks(tasks, part.instructions, seed)
    if part.tools:
        found += tool_asks(part.tools, seed) if episodes else tool_turns(part.tools, seed)
    Random(seed).shuffle(found)
    return found


def read_rollout(ask: Ask, rollout: Rollout, tokenizer: Tokenizer) -> Answer:
    """A sampled answer, read; malformed where a special token stands before its end, which the text does not show.

    Otherwise a model could write what it likes around an answer that is taken for right.
    """
    answer = read_answer(rollout.text, thinking=ask.thinking, finished=rollout.finished)
    special = {id for id, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    for id in rollout.completion_ids[: -1 if rollout.finished else None]:
        name = tokenizer.backend.id_to_token(id)
        if name is None or id in special:
            return replace(answer, malformed=f"holds the token {name or id}, which is no text", hidden=True)
    return answer


class Sampler:
    """Draws a model's answers to asks; every call draws others, the same for the same seed."""

    def __init__(self, generator: Generator, tokenizer: Tokenizer, *, temperature: float, max_tokens: int, seed: int) -> None:
        self._generator, self._tokenizer = generator, tokenizer
        self._temperature, self._max_tokens = temperature, max_tokens
        self._rng = Random(seed)

    def answers(self, asks: Sequence[Ask], count: int = 1) -> list[list[Answer]]:
        """`count` answers to each."""
        rollouts = self._generator.generate(
            [encode_ask(ask, self._tokenizer) for ask in asks],
            seeds=[[self._rng.randrange(2**40) for _ in range(count)] for _ in asks],
            thinking=[ask.thinking for ask in asks],
            thinking_budgets=[None] * len(asks),
            temperature=self._temperature,
            max_tokens=self._max_tokens,
        )
        return [[read_rollout(ask, one, self._tokenizer) for one in group] for ask, group in zip(asks, rollouts, strict=True)]

    def episodes(self, asks: Sequence[Ask], count: int = 1) -> list[list[Episode]]:
        """`count` episodes of each ask about tools."""
        repeated = [ask for ask in asks for _ in range(count)]
        ran = run_episodes(repeated, lambda turns: [group[0] for group in self.answers(turns)])
        return [ran[i : i + count] for i in range(0, len(ran), count)]

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

    def worth(self, asks: Sequence[Ask], verifier: Callable[[Ask, Answer], float] = verify) -> float:
        """Mean of what one answer to each is worth."""
        answers = self.answers(asks)
        return sum(verifier(ask, group[0]) for ask, group in zip(asks, answers, strict=True)) / len(asks)
