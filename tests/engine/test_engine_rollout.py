from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from small_models import KINDS, small_model
from toys import byte_tokenizer

from tandem.align.rollout import Generator
from tandem.engine.config import EngineConfig
from tandem.engine.rollout import EngineRollouts, SampledAnswer
from tandem.model.generate import Sampling, generate_tokens
from tandem.model.hybrid import Decoder
from tandem.spec.errors import SpecError

TOKENIZER = byte_tokenizer(plain=("<think>", "</think>"))
CLOSING = TOKENIZER.encode("</think>")[0]
(NEWLINE,) = TOKENIZER.encode("\n")
GRACE = 12
VOCABULARY = TOKENIZER.backend.get_vocab_size()
LONG = ([9] * 40, list(range(5, 45)), [12, 13] * 20)
PROMPTS = ([5, 6, 7], [9] * 40, [11, 12], [30, 31, 32, 33, 34])


def model(kind: str, **options: object) -> Decoder:
    return small_model(kind, vocabulary=VOCABULARY, **options)  # type: ignore[arg-type]


def rollouts(decoder: Decoder, **config: object) -> EngineRollouts:
    return EngineRollouts(decoder, TOKENIZER, config=EngineConfig(**{"max_batch": 8, "cache_bytes": 1 << 24, **config}))  # type: ignore[arg-type]


def sample(
    generator: Generator,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    *,
    n: int = 3,
    temperature: float = 1.0,
    max_tokens: int = 20,
    budget: int | None = None,
    seed: int = 0,
) -> list[list[SampledAnswer]]:
    found = generator.generate(
        prompts,
        seeds=[[seed + 100 * i + j for j in range(n)] for i in range(len(prompts))],
        thinking=[budget is not None] * len(prompts),
        thinking_budgets=[budget] * len(prompts),
        temperature=temperature,
        max_tokens=max_tokens,
    )
    return list(map(list, found))  # type: ignore[arg-type]


def forward_logprobs(decoder: Decoder, prompt: Sequence[int], ids: Sequence[int], temperature: float) -> torch.Tensor:
    """As a trainer computes them: one pass with gradients over prompt and answer."""
    logits = decoder(torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 : -1]
    assert logits.requires_grad
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.8])
def test_logprobs_are_those_of_the_trainers_forward_pass(kind: str, temperature: float) -> None:
    decoder = model(kind)
    answers = sample(rollouts(decoder), temperature=temperature)
    assert [len(group) for group in answers] == [3] * len(PROMPTS)
    for prompt, group in zip(PROMPTS, answers, strict=True):
        for one in group:
            assert len(one.completion_ids) == len(one.logprobs) == len(one.chosen) >= 1
            expected = forward_logprobs(decoder, prompt, one.completion_ids, temperature)
            assert torch.tensor(one.logprobs) == pytest.approx(expected, abs=1e-4)
            assert all(one.chosen)


def test_forced_tokens_have_the_models_own_logprobs_and_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.engine.thinking.GRACE", GRACE)
    decoder = model("hybrid", eos=())
    with torch.no_grad():
        decoder.lm_head.weight[NEWLINE] *= 2  # so that some blocks are closed at a newline, some by force
    answers = sample(rollouts(decoder), n=8, budget=5, max_tokens=40)
    ways = set()
    for prompt, group in zip(PROMPTS, answers, strict=True):
        for one in group:
            forced = [i for i, chosen in enumerate(one.chosen) if not chosen]
            assert all(one.completion_ids[i] == CLOSING for i in forced)
            assert len(forced) <= 1
            if forced:  # at the first newline once the budget is used up, or after the grace
                before = one.completion_ids[: forced[0]]
                text = TOKENIZER.decode(before, skip_special_tokens=False)
                assert len(before) >= 5
                assert text.endswith("\n") or len(before) == 5 + GRACE
                ways.add(text.endswith("\n"))
            expected = forward_logprobs(decoder, prompt, one.completion_ids, 1.0)
            assert torch.tensor(one.logprobs) == pytest.approx(expected, abs=1e-4)
    assert ways == {True, False}


def test_a_closing_mark_that_the_model_chose_is_learned_from() -> None:
    decoder = model("hybrid")
    with torch.no_grad():
        decoder.lm_head.weight[CLOSING] *= 3
    answers = sample(rollouts(decoder), n=8, budget=400, max_tokens=100)
    closed = [one for group in answers for one in group if CLOSING in one.completion_ids]
    assert closed
    assert all(all(one.chosen) for one in closed)
    assert all(one.completion_ids.count(CLOSING) == 1 for one in closed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tight", [False, True])
def test_after_a_step_of_the_optimiser_rollouts_come_from_the_new_weights(kind: str, tight: bool) -> None:
    """Also of requests that were preempted, whose prompts are read again by the engine itself."""
    decoder = model(kind)
    size = rollouts(decoder).engine.size
    least = 14 * size.block_bytes + 8 * size.slot_bytes
    generator = rollouts(decoder, prefix_cache_bytes=1 << 22, pass_tokens=16, cache_bytes=least if tight else 1 << 24)
    assert generator.engine.size.prefix_bytes == 0  # what a prefix cache kept would be of older weights
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=0.05)
    seen = []
    for _ in range(3):
        answers = sample(generator, LONG, n=3, temperature=0.0, max_tokens=40)
        for prompt, group in zip(LONG, answers, strict=True):
            expected = tuple(generate_tokens(decoder, prompt, Sampling(max_tokens=40)))
            assert {one.completion_ids for one in group} == {expected}
        seen.append([group[0].completion_ids for group in answers])
        generator.engine.check_integrity()
        optimiser.zero_grad()
        decoder(torch.tensor([LONG[1]]))[..., 3:].logsumexp(-1).sum().backward()
        optimiser.step()
    assert seen[0] != seen[1] != seen[2]
    assert (generator.engine.stats.preemptions > 0) == (tight and kind != "recurrent")


def test_an_answer_depends_on_its_seed_and_not_on_who_is_served_beside_it() -> None:
    generator = rollouts(model("hybrid"))
    together, again = sample(generator, n=5), sample(rollouts(model("hybrid"), max_batch=2), n=5)
    assert [[one.completion_ids for one in group] for group in together] == [[one.completion_ids for one in g] for g in again]
    (alone,) = sample(generator, PROMPTS[:1], n=5)
    assert [one.completion_ids for one in alone] == [one.completion_ids for one in together[0]]
    assert len({one.completion_ids for group in together for one in group}) > 10
    assert sample(generator, n=5, seed=7) != together


def test_an_end_token_and_the_limits_are_told_apart() -> None:
    eos = tuple(range(3, VOCABULARY, 3))
    decoder = model("transformer", eos=eos, context=24)
    answers = [one for n in (1, 9) for group in sample(rollouts(decoder), PROMPTS[::2], n=9, max_tokens=n) for one in group]
    assert {one.finished for one in answers} == {True, False}
    for one in answers:
        assert one.finished == (one.completion_ids[-1] in eos)
        assert not set(one.completion_ids[:-1]) & set(eos)
        assert one.text == TOKENIZER.decode(one.completion_ids)
    (group,) = sample(rollouts(decoder), [[7] * 23], n=4)
    assert all(len(one.completion_ids) == 1 for one in group)


def test_little_memory_gives_the_same_answers() -> None:
    decoder = model("hybrid")
    plenty = rollouts(decoder)
    least = max(1 << 15, 12 * plenty.engine.size.block_bytes + 8 * plenty.engine.size.slot_bytes)
    tight = rollouts(decoder, cache_bytes=least)
    expected, found = sample(plenty, n=4, max_tokens=30), sample(tight, n=4, max_tokens=30)
    assert tight.engine.stats.preemptions > 0
    assert [[one.completion_ids for one in group] for group in found] == [[o.completion_ids for o in g] for g in expected]
    for group, others in zip(found, expected, strict=True):
        for one, other in zip(group, others, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_numbers_that_overflow_are_an_error_of_the_answer() -> None:
    decoder = model("hybrid")
    with torch.no_grad():
        decoder.lm_head.weight.fill_(math.nan)
    assert all(one.error and not one.finished for group in sample(rollouts(decoder), n=2) for one in group)
    assert not rollouts(decoder).engine.has_work


def test_what_cannot_be_generated_is_refused_before_anything_is_computed() -> None:
    generator = rollouts(model("hybrid", context=32))
    with pytest.raises(SpecError, match="prompt 1 has 40 tokens"):
        sample(generator)
    with pytest.raises(SpecError, match="prompt 0 has 0 tokens"):
        sample(generator, [[]])
    with pytest.raises(SpecError, match="seeds has 1 entries"):
        generator.generate(
            [[5], [6]], seeds=[[0]], thinking=[False] * 2, thinking_budgets=[None] * 2, temperature=1.0, max_tokens=4
        )
    assert not generator.engine.has_work
    assert generator.generate([], seeds=[], thinking=[], thinking_budgets=[], temperature=1.0, max_tokens=4) == []
