"""Choosing for a batch: each row alone, ties, penalties against a plain formula, log-probabilities, going on elsewhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import EOS, byte_tokenizer, vocabulary

from tandem.engine.choose import Choice, Chooser, choose
from tandem.engine.penalties import Penalties
from tandem.engine.types import EngineRequest, Grammar, SamplingParams
from tandem.engine.vocabulary import Vocabulary
from tandem.spec.errors import SpecError

WORDS = vocabulary(byte_tokenizer("the ", "and ", ".\n", "</think>"))
SIZE = WORDS.vocab_size

KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.5, "top_p": 0.9, "seed": 5},
    {"temperature": 0.8, "top_k": 7, "logprobs": 3},
    {"logprobs": 0},
    {"repetition_penalty": 1.3, "temperature": 0.6},
    {"presence_penalty": 1.0, "frequency_penalty": 0.4, "logit_bias": {7: 3.0, 9: -100.0}},
    {"thinking_budget": 4, "temperature": 1.0},
    {"grammar": Grammar(kind="regex", text="[a-f0-9]{6,}"), "temperature": 1.0},
    {"min_p": 0.2, "temperature": 1.2},
]


def chooser(kind: dict[str, Any], prompt: tuple[int, ...] = (5, 6, 7), done: tuple[int, ...] = ()) -> Chooser:
    sampling = SamplingParams(**kind)
    thinking = "thinking_budget" in kind
    return Chooser(EngineRequest(id="r", prompt_ids=prompt, sampling=sampling, thinking=thinking, output_ids=done), WORDS)


def steps(count: int, rows: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, SIZE, generator=generator) * 3 for _ in range(count)]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_row_does_not_see_the_others(data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6))
    logits = steps(5, len(kinds), data.draw(st.integers(0, 1000)))
    together = [chooser(kind) for kind in kinds]
    batched = [choose(step, together) for step in logits]
    for i, kind in enumerate(kinds):
        alone = chooser(kind)
        assert [choose(step[i : i + 1], [alone])[0] for step in logits] == [step[i] for step in batched]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_request_goes_on_elsewhere_as_it_would_have_here(kind: dict[str, Any]) -> None:
    logits = steps(8, 1)
    here = chooser(kind)
    chosen = [choose(step, [here])[0] for step in logits]
    for cut in range(len(chosen)):
        there = chooser(kind, done=tuple(c.token_id for c in chosen[:cut]))
        assert [choose(step, [there])[0] for step in logits[cut:]] == chosen[cut:]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logits_are_left_as_they_are(kind: dict[str, Any]) -> None:
    (logits,) = steps(1, 2)
    before = logits.clone()
    choose(logits, [chooser(kind), chooser({})])
    assert torch.equal(logits, before)


def test_of_equal_logits_the_lowest_id_is_taken() -> None:
    logits = torch.zeros(3, SIZE)
    logits[1, [200, 17, 90]] = 1.0
    logits[2] = -torch.inf
    logits[2, [4, 250]] = -7.0
    assert [c.token_id for c in choose(logits, [chooser({}) for _ in range(3)])] == [0, 17, 4]
    assert [c.token_id for c in choose(logits, [chooser({"logprobs": 0}) for _ in range(3)])] == [0, 17, 4]


def test_different_seeds_and_positions_draw_differently() -> None:
    logits = torch.zeros(1, SIZE)
    outputs = set()
    for seed in range(20):
        one = chooser({"temperature": 1.0, "seed": seed})
        tokens = tuple(choose(logits, [one])[0].token_id for _ in range(6))
        assert len(set(tokens)) > 1
        outputs.add(tokens)
    assert len(outputs) == 20


def expected(row: Tensor, prompt: tuple[int, ...], output: tuple[int, ...], s: SamplingParams) -> list[float]:
    """The penalties as their definitions say, token by token."""
    out = []
    for token, value in enumerate(row.double().tolist()):
        if token in prompt or token in output:
            value = value / s.repetition_penalty if value > 0 else value * s.repetition_penalty
        value -= s.frequency_penalty * output.count(token) + s.presence_penalty * (token in output)
        out.append(value + s.logit_bias.get(token, 0.0))
    return out


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.integers(1, 250).flatmap(lambda n: st.lists(st.integers(0, SIZE - 1), min_size=n, max_size=n)).map(tuple),
    output=st.lists(st.integers(0, 30), max_size=100).map(tuple),
    repetition=st.sampled_from([1.0, 1.2, 0.8]),
    presence=st.sampled_from([0.0, 1.5, -2.0]),
    frequency=st.sampled_from([0.0, 0.3, -0.1]),
    bias=st.dictionaries(st.integers(0, SIZE - 1), st.floats(-100, 100, width=32), max_size=4),
)
def test_penalties_are_their_definitions(
    prompt: tuple[int, ...],
    output: tuple[int, ...],
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
) -> None:
    kind = {
        "repetition_penalty": repetition, "presence_penalty": presence, "frequency_penalty": frequency, "logit_bias": bias,
    }  # fmt: skip
    (logits,) = steps(1, 1, len(prompt))
    (choice,) = choose(logits, [chooser(kind, prompt, output)])
    sampling = SamplingParams(**kind)
    values = expected(logits[0], prompt, output, sampling)
    penalties, row = Penalties(sampling, prompt), logits[0].numpy().copy()
    for token in output:
        penalties.accept(token)
    penalties.apply(row)
    assert np.allclose(row, values, rtol=1e-5, atol=1e-5)
    assert values[choice.token_id] >= max(values) - 1e-4


def test_a_banned_token_never_comes_and_a_favoured_one_always_does() -> None:
    logits = torch.zeros(1, SIZE)
    one = chooser({"temperature": 1.0, "logit_bias": {i: -100.0 for i in range(SIZE) if i not in (40, 41)}})
    assert {choose(logits, [one])[0].token_id for _ in range(40)} == {40, 41}
    one = chooser({"temperature": 1.0, "logit_bias": {40: 100.0}})
    assert {choose(logits, [one])[0].token_id for _ in range(40)} == {40}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 20), spread=st.sampled_from([0.0, 0.5, 4.0, 30.0]))
def test_logprobs_are_of_the_logits_before_anything_else(seed: int, count: int, spread: float) -> None:
    row = torch.randn(1, SIZE, generator=torch.Generator().manual_seed(seed)) * spread
    kind = {"logprobs": count, "temperature": 1.4, "logit_bias": {3: 50.0}, "repetition_penalty": 1.5, "seed": seed}
    (choice,) = choose(row, [chooser(kind)])
    found = choice.logprobs
    assert found is not None
    assert found.token_id == choice.token_id
    right = torch.log_softmax(row[0].double(), -1)
    assert math.isclose(found.logprob, right[choice.token_id], abs_tol=1e-4)
    order = sorted(range(SIZE), key=lambda i: (-float(row[0, i]), i))[:count]
    assert [i for i, _ in found.top] == order
    assert np.allclose([p for _, p in found.top], right[order], atol=1e-4)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_tempered_logprobs_are_of_what_is_drawn_from(temperature: float) -> None:
    """Chosen alone, among others, greedily, and with alternatives listed beside."""
    rows = 3 * torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    expected = (rows / temperature).log_softmax(-1)
    plain = {"temperature": temperature, "logprobs": 0, "tempered_logprobs": True}
    vocabulary = Vocabulary(None, 50, (2,))

    def choosers(**kind: Any) -> list[Chooser]:
        asked = [SamplingParams(**{**plain, **kind}, seed=i) for i in range(6)]  # type: ignore[arg-type]
        return [Chooser(EngineRequest(id="r", prompt_ids=(5,), sampling=sampling), vocabulary) for sampling in asked]

    together, listed = choose(rows, choosers()), choose(rows, choosers(logprobs=2))
    alone = [choose(rows[i : i + 1], [one])[0] for i, one in enumerate(choosers())]
    assert together == alone
    assert [choice.token_id for choice in listed] == [choice.token_id for choice in alone]
    for i, (one, other) in enumerate(zip(together, listed, strict=True)):
        assert one.logprobs is not None
        assert other.logprobs is not None
        assert one.logprobs.logprob == pytest.approx(expected[i, one.token_id].item(), abs=1e-5)
        assert one.logprobs.top == ()
        assert other.logprobs.logprob == pytest.approx(one.logprobs.logprob, abs=1e-6)
        assert [p for _, p in other.logprobs.top] == pytest.approx(expected[i].topk(2).values.tolist(), abs=1e-5)
    (greedy,) = choose(rows[:1], choosers(temperature=0.0)[:1])
    assert greedy.logprobs is not None
    assert greedy.logprobs.logprob == pytest.approx(rows[0].log_softmax(-1).max().item(), abs=1e-5)


def test_sampling_that_a_vocabulary_cannot_do_is_refused() -> None:
    bare = Vocabulary(None, 100, (EOS,))
    for wrong, text in (
        ({"logit_bias": {100: 1.0}}, "logit_bias=100: must be from 0 to 99"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids=-1: must be"),
        ({"stop": ("a",)}, "stop=.*tokenizer"),
        ({"thinking_budget": 3}, "thinking_budget=3.*tokenizer"),
        ({"grammar": Grammar(kind="regex", text="a")}, "grammar=.*tokenizer"),
    ):
        with pytest.raises(SpecError, match=text):
            bare.check(SamplingParams(**wrong))
    bare.check(SamplingParams(logit_bias={99: 1.0}, stop_token_ids=(0, 99), temperature=1.0))
    assert bare.text_stream(SamplingParams()) is None
    unsampled = Chooser(EngineRequest(id="r", prompt_ids=(1,), thinking=True), bare)
    assert choose(torch.eye(100)[5:6], [unsampled]) == [Choice(5, None)]


def test_rows_and_choosers_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="2 rows of logits for 1 choosers"):
        choose(torch.zeros(2, SIZE), [chooser({})])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_end_their_request_and_no_other(kind: dict[str, Any], wrong: float) -> None:
    (logits,) = steps(1, 3)
    expected = choose(logits.clone(), [chooser(kind) for _ in range(3)])
    logits[1, slice(None) if wrong < 0 else SIZE - 1] = wrong
    choosers = [chooser(kind) for _ in range(3)]
    found = choose(logits, choosers)
    assert (found[0], found[2]) == (expected[0], expected[2])
    assert [one.error is not None for one in choosers] == [False, True, False]
    assert "\n" not in str(choosers[1].error)
    assert 0 <= found[1].token_id < SIZE
