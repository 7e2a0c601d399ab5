from __future__ import annotations

import pytest
import torch
from evaluated import PLAIN, SPECIAL, VOCABULARY
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_model
from toys import byte_tokenizer

from tandem.engine.types import SamplingParams
from tandem.evaluation.form import Prompt
from tandem.evaluation.writer import NOT_ASKED, Writer, draw_seed
from tandem.model.tokenizer import Tokenizer
from tandem.train.evaluate import generate_greedy

TOKENIZER = Tokenizer(byte_tokenizer(special=SPECIAL, plain=PLAIN).backend, special={"eos_token": "</s>"})
MODEL = small_model("hybrid", vocabulary=VOCABULARY, context=128)
TEXTS = ["one", "two and three", "4 + 5 =", "a longer question, with words", "x"]
SAMPLED = SamplingParams(max_tokens=12, temperature=1.5)


def prompts(*texts: str, thinking: bool = True) -> list[Prompt]:
    return [Prompt(tuple(TOKENIZER.encode(text)), thinking) for text in texts]


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer(MODEL, TOKENIZER, batch=2)


def test_greedy_answers_are_those_of_the_decoder(writer: Writer) -> None:
    found = writer.write(prompts(*TEXTS), SamplingParams(max_tokens=12))
    alone = generate_greedy(MODEL, [TOKENIZER.encode(text) for text in TEXTS], 12, {2})
    assert [w.text for w in found] == [TOKENIZER.decode(ids) for ids in alone]
    assert [w.thinking_tokens + w.answer_tokens for w in found] == [len(ids) for ids in alone]
    assert [w.finished for w in found] == [len(ids) < 12 for ids in alone]


def test_the_end_mark_is_no_token_of_the_answer() -> None:
    ends = tuple(range(3, 180))
    quick = small_model("hybrid", vocabulary=VOCABULARY, context=128, eos=ends)
    found = Writer(quick, TOKENIZER).write(prompts(*TEXTS, thinking=False), SamplingParams(max_tokens=12))
    alone = generate_greedy(quick, [TOKENIZER.encode(text) for text in TEXTS], 12, ends)
    assert any(w.finished for w in found)
    assert [w.answer_tokens for w in found] == [len(ids) for ids in alone]


def test_tokens_that_the_text_hides_are_told_of() -> None:
    special = {TOKENIZER.encode(text)[0] for text in ("<pad>", "<s>", "</s>", *SPECIAL)}
    told = []
    for liking in (0.0, 1.0, 3.0):
        model = small_model("hybrid", vocabulary=VOCABULARY, context=128, seed=1)
        with torch.no_grad():
            model.lm_head.weight[sorted(special)] *= liking
        found = Writer(model, TOKENIZER).write(prompts(*TEXTS), SamplingParams(max_tokens=12))
        alone = generate_greedy(model, [TOKENIZER.encode(text) for text in TEXTS], 12, {2})
        assert [w.hidden for w in found] == [bool(special & set(ids)) for ids in alone]
        told += [w.hidden for w in found]
    assert set(told) == {True, False}


def test_draws_follow_each_prompts_own_seed(writer: Writer) -> None:
    found = writer.write(prompts("same", "same", "same"), SAMPLED, seeds=[1, 2, 1])
    assert found[0] == found[2] != found[1]


@settings(max_examples=4, deadline=None)
@given(st.permutations(range(len(TEXTS))))
def test_an_answer_depends_on_its_prompt_and_seed_alone(order: list[int]) -> None:
    writer = Writer(MODEL, TOKENIZER, batch=3)
    seeds = [draw_seed(0, text) for text in TEXTS]
    straight = writer.write(prompts(*TEXTS), SAMPLED, seeds=seeds)
    mixed = writer.write(prompts(*(TEXTS[i] for i in order)), SAMPLED, seeds=[seeds[i] for i in order])
    assert mixed == [straight[i] for i in order]


@pytest.mark.parametrize("budget", [0, 3, None])
def test_a_budget_closes_the_block_and_the_count_says_so(writer: Writer, budget: int | None) -> None:
    seeds = [draw_seed(1, i) for i in range(12)]
    found = writer.write(
        prompts(*(f"question {i}" for i in range(12))),
        SamplingParams(max_tokens=40, temperature=1.5, thinking_budget=budget),
        seeds=seeds,
    )
    if budget == 0:
        assert all(w.forced and w.closing_marks == 1 and w.thinking_tokens == 1 for w in found)
    if budget is None:
        assert not any(w.forced for w in found)
    assert all(w.thinking_tokens + w.answer_tokens <= 40 for w in found)


def test_unaided_is_what_the_model_writes_without_the_engines_care() -> None:
    """Brute force: the decoder itself goes on from the closed block; a head that likes the mark writes it again."""
    close = TOKENIZER.backend.token_to_id("</think>")
    texts = [f"question {i}" for i in range(8)]
    told = []
    for liking in (0.0, 1.0, 3.0):
        model = small_model("hybrid", vocabulary=VOCABULARY, context=128, seed=2)
        with torch.no_grad():
            model.lm_head.weight[close] *= liking
        found = Writer(model, TOKENIZER, batch=3).write(prompts(*texts), SamplingParams(max_tokens=24, thinking_budget=0))
        alone = generate_greedy(model, [[*TOKENIZER.encode(text), close] for text in texts], 23, {2})
        assert [w.unaided for w in found] == [close not in rest for rest in alone]
        assert {w.closing_marks for w in found} == {1}
        told += [w.unaided for w in found]
    assert set(told) == {True, False}


def test_without_a_budget_nothing_is_said_of_it(writer: Writer) -> None:
    assert {w.unaided for w in writer.write(prompts(*TEXTS), SamplingParams(max_tokens=4))} == {None}


def test_without_an_open_block_all_is_answer(writer: Writer) -> None:
    (found,) = writer.write(prompts("no block", thinking=False), SamplingParams(max_tokens=5))
    assert "</think>" not in found.text
    assert found.thinking_tokens == 0


def test_a_prompt_beyond_the_context_is_not_asked_and_stops_no_other(writer: Writer) -> None:
    found = writer.write(prompts("x" * 128, "short"), SamplingParams(max_tokens=3))
    assert found[0] == NOT_ASKED
    assert found[1].fits


def test_progress_ends_with_all(writer: Writer) -> None:
    seen: list[tuple[int, int]] = []
    writer.write(prompts(*TEXTS), SamplingParams(max_tokens=3), tick=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (5, 5)
    assert seen == sorted(seen)


def test_seeds_differ_with_what_they_are_for() -> None:
    assert len({draw_seed(0, "a", 0), draw_seed(0, "a", 1), draw_seed(1, "a", 0), draw_seed(0, "b", 0)}) == 4
