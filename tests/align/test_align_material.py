"""What stages learn from: samples and asks in their shares, answers as they were written, portion by portion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from chat_cases import chat_tokenizer

from tandem.align.chat import answer_text
from tandem.align.data.episodes import verify_episode
from tandem.align.data.reasoning import reasoning_asks
from tandem.align.data.tools import tool_asks, tool_samples
from tandem.align.encode import encode_answer, encode_ask
from tandem.align.material import Sampler, asks_of, read_rollout, samples_of
from tandem.align.recipe import AsksPart, MixPart, PairsPart
from tandem.align.sample import Ask
from tandem.align.verify import verify
from tandem.model.tokenizer import Tokenizer
from tandem.spec.errors import SpecError
from tandem.train.loop import Diverged

TASKS = ("chain_sum", "recall")


@dataclass(frozen=True)
class Written:
    """An answer of these tokens."""

    completion_ids: tuple[int, ...]
    text: str
    finished: bool = True
    error: str | None = None

    @property
    def logprobs(self) -> tuple[float, ...]:
        return (0.0,) * len(self.completion_ids)

    @property
    def chosen(self) -> tuple[bool, ...]:
        return (True,) * len(self.completion_ids)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def right_text(ask: Ask) -> str:
    return f"steps\n</think>\n\n{ask.check['answer']}" if ask.thinking else str(ask.check["answer"])


def test_special_tokens_before_the_end_are_seen_though_the_text_hides_them(tokenizer: Tokenizer) -> None:
    (ask,) = reasoning_asks(["chain_sum"], 1, 0)
    *ids, end = encode_answer(right_text(ask), tokenizer)
    special = [tokenizer.encode(token, add_special_tokens=False)[0] for token in ("<s>", "<SPECIAL_11>", "<SPECIAL_12>")]
    for at in (0, 3, len(ids)):
        for token in (*special, tokenizer.backend.get_vocab_size()):
            written = (*ids[:at], token, *ids[at:], end)
            assert tokenizer.decode(written) == right_text(ask)
            answer = read_rollout(ask, Written(written, tokenizer.decode(written)), tokenizer)
            assert answer.malformed is not None
            assert answer.hidden
            assert verify(ask, answer) == 0.0
            cut = read_rollout(ask, Written(written[:-1], tokenizer.decode(written), finished=False), tokenizer)
            assert cut.hidden
    plain = read_rollout(ask, Written((*ids, end), tokenizer.decode(ids)), tokenizer)
    assert (plain.malformed, plain.hidden, verify(ask, plain)) == (None, False, 1.0)


class Scripted:
    """Writes what `answer` says to a prompt and a seed, and keeps what it was asked. Refuses prompts as the engine does."""

    def __init__(self, tokenizer: Tokenizer, answer: Callable[[tuple[int, ...], int], str], context: int = 10**6) -> None:
        self._tokenizer, self._answer, self._context = tokenizer, answer, context
        self.calls: list[dict[str, Any]] = []
        self.error: str | None = None

    def generate(self, prompts: Sequence[Sequence[int]], **asked: Any) -> list[list[Written]]:
        for prompt in prompts:
            if len(prompt) >= self._context:
                raise SpecError(f"prompt: has {len(prompt)} tokens")
        self.calls.append({"prompts": prompts, **asked})
        return [
            [self._written(self._answer(tuple(prompt), seed)) for seed in seeds]
            for prompt, seeds in zip(prompts, asked["seeds"], strict=True)
        ]

    def _written(self, text: str) -> Written:
        return Written(tuple(encode_answer(text, self._tokenizer)), text, error=self.error)


def sampler(generator: Scripted, tokenizer: Tokenizer, **options: Any) -> Sampler:
    return Sampler(generator, tokenizer, temperature=1.0, max_tokens=64, seed=3, **options)


class ToolExpert:
    """The expert's next turn, or where a third of the seeds says so, nonsense."""

    def __init__(self, count: int, seed: int, tokenizer: Tokenizer, *, wrong: bool = False) -> None:
        self._turns: dict[tuple[int, ...], str] = {}
        self._wrong = wrong
        for ask, sample in zip(tool_asks(count, seed), tool_samples(count, seed, off=0), strict=True):
            for at, message in enumerate(sample.messages):
                if message["role"] == "assistant":
                    prompt = encode_ask(replace(ask, messages=sample.messages[:at]), tokenizer)
                    self._turns[tuple(prompt)] = answer_text(message, thinking=True)

    def __call__(self, prompt: tuple[int, ...], seed: int) -> str:
        return f"Well.</think>No {seed}." if self._wrong and seed % 3 == 0 else self._turns[prompt]


def test_answers_are_asked_for_in_portions_and_told_of(tokenizer: Tokenizer) -> None:
    asks = list(reasoning_asks(TASKS, 70, 0))
    generator, told = Scripted(tokenizer, lambda prompt, seed: f"a</think>{seed}"), []
    found = sampler(generator, tokenizer, tell=lambda done, total: told.append((done, total))).answers(asks, 8)
    assert [len(call["prompts"]) for call in generator.calls] == [64, 6]
    assert told == [(512, 560), (560, 560)]
    assert [prompt for call in generator.calls for prompt in call["prompts"]] == [encode_ask(ask, tokenizer) for ask in asks]
    seeds = [seeds for call in generator.calls for seeds in call["seeds"]]
    assert [[answer.content for answer in group] for group in found] == [[str(seed) for seed in some] for some in seeds]
    assert len({seed for some in seeds for seed in some}) == 560
    again = Scripted(tokenizer, lambda prompt, seed: f"a</think>{seed}")
    assert sampler(again, tokenizer).answers(asks, 8) == found


def test_answers_of_a_model_whose_numbers_overflow_are_none(tokenizer: Tokenizer) -> None:
    generator = Scripted(tokenizer, lambda prompt, seed: "a</think>b")
    generator.error = "logits are not finite"
    for draw in (lambda some: some.answers(list(reasoning_asks(TASKS, 1, 0))), lambda some: some.episodes(tool_asks(1, 0))):
        with pytest.raises(Diverged, match=r"^answer to '[^']*': logits are not finite; lower"):
            draw(sampler(generator, tokenizer))


def test_the_first_turn_of_all_episodes_of_an_ask_is_one_prompt(tokenizer: Tokenizer) -> None:
    asks = tool_asks(6, 2)
    generator = Scripted(tokenizer, ToolExpert(6, 2, tokenizer, wrong=True))
    found = sampler(generator, tokenizer).episodes(asks, 8)
    first = generator.calls[0]
    assert first["prompts"] == [encode_ask(ask, tokenizer) for ask in asks]
    assert [len(set(seeds)) for seeds in first["seeds"]] == [8] * 6
    assert [[episode.ask for episode in group] for group in found] == [[ask] * 8 for ask in asks]
    for group, seeds in zip(found, first["seeds"], strict=True):
        for episode, seed in zip(group, seeds, strict=True):
            assert (episode.answers[0].content == f"No {seed}.") == (seed % 3 == 0)
    worth = [verify_episode(episode) for group in found for episode in group]
    assert 0 < sum(worth) < len(worth)


def test_a_conversation_without_room_ends_as_cut(tokenizer: Tokenizer) -> None:
    asks = tool_asks(6, 2)
    lengths = [len(encode_ask(ask, tokenizer)) for ask in asks]
    context = max(lengths) + 1
    generator = Scripted(tokenizer, ToolExpert(6, 2, tokenizer), context)
    ended = Counter(e.ended for (e,) in sampler(generator, tokenizer, context=context).episodes(asks))
    assert ended["cut"] > 0
    assert set(ended) <= {"cut", "answered"}
    narrow = sampler(Scripted(tokenizer, ToolExpert(6, 2, tokenizer), min(lengths)), tokenizer, context=min(lengths))
    assert {e.ended for group in narrow.episodes(asks, 2) for e in group} == {"cut"}
    with pytest.raises(SpecError, match="prompt: has"):
        sampler(Scripted(tokenizer, ToolExpert(6, 2, tokenizer), context), tokenizer).episodes(asks)


def test_a_share_of_every_kind_does_not_think() -> None:
    mix = MixPart(reasoning=600, instructions=600, tools=600, no_think=0.1, truncated=0.2)
    samples = samples_of(TASKS, mix, 5)
    kinds = Counter(sample.kind for sample in samples)
    for kinds_of in (("reasoning", "reasoning-off", "truncated"), ("instructions",), ("tools",)):
        some = [sample for sample in samples if sample.kind in kinds_of]
        assert len(some) == 600
        assert sum(not sample.thinking for sample in some) / 600 == pytest.approx(0.1, abs=0.04)
    assert kinds["truncated"] / 600 == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize("episodes", [False, True])
def test_questions_of_every_kind_can_be_asked_without_thinking(episodes: bool) -> None:
    part = AsksPart(reasoning=40, instructions=20, tools=12, no_think=0.25)
    asks = asks_of(TASKS, part, 7, episodes=episodes)
    assert Counter((ask.kind, ask.thinking) for ask in asks) == {
        ("reasoning", True): 30,
        ("reasoning", False): 10,
        ("instructions", True): 15,
        ("instructions", False): 5,
        ("tools", True): 9,
        ("tools", False): 3,
    }
    assert len({ask.id for ask in asks}) == 72
    assert asks == asks_of(TASKS, part, 7, episodes=episodes) != asks_of(TASKS, part, 8, episodes=episodes)
    assert not any(ask.thinking for ask in asks_of(TASKS, AsksPart(tools=3, no_think=1.0), 7))


def test_pairs_are_made_of_both_kinds_of_answers(tokenizer: Tokenizer) -> None:
    part = PairsPart(asks=AsksPart(tools=6), samples=6)
    expert = ToolExpert(6, 2, tokenizer, wrong=True)
    (chosen,) = sampler(Scripted(tokenizer, expert), tokenizer).pairs(TASKS, part, 2)
    assert chosen.pairs
    assert all("No " in pair.rejected for pair in chosen.pairs)
