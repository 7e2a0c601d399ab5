"""Needles: what is asked for is in the text, where it should be, and only the right answer counts."""

from __future__ import annotations

import re
from random import Random

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from tandem.model.hybrid import Decoder
from tandem.model.tokenizer import Tokenizer
from tandem.spec.errors import SpecError
from tandem.spec.model import Attention, ModelSpec
from tandem.train.evaluate import Accuracy, prompt_ids
from tandem.train.needles import (
    EVALUATION_KEYS,
    KINDS,
    Case,
    Things,
    accuracy_by,
    answer_cases,
    insert,
    is_right,
    make_question,
    needle_shares,
    needle_suite,
)

torch.set_num_threads(1)
PROSE = "".join(f"It was in the year {n} that the ship came. Nobody saw it, {n % 7} times.\n" for n in range(1700, 1990))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<s>", "</s>"])
    return Tokenizer(backend, special={"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="module")
def suite(tokenizer: Tokenizer) -> list[Case]:
    return needle_suite(tokenizer, PROSE, [800, 3000], 12, 5)


def sentences(case: Case) -> list[str]:
    return case.prompt.rpartition("\n\n")[0].split("\n")


def values(case: Case, thing: str) -> set[str]:
    """By search from the question back, not in order of the text: independent of how cases are made."""
    text = "\n".join(sentences(case))
    if other := re.search(rf"^Remember {thing} like (\w+)\.$", text, re.MULTILINE):
        return values(case, other[1])
    return set(re.findall(rf"^Remember {thing}=(\d\d)\.$", text, re.MULTILINE))


def test_answers_follow_from_the_prompt(suite: list[Case]) -> None:
    assert {case.kind for case in suite} == set(KINDS)
    for case in suite:
        question = case.prompt.rpartition("\n\n")[2].partition(":")[0]
        things = re.findall(r"\w+", question.replace("Recall all of", "").replace("Recall", ""))
        assert len(things) == (2 if case.kind == "multi-query" else 1)
        assert set(things) <= set(EVALUATION_KEYS)
        assert set(case.answers) == {value for thing in things for value in values(case, thing)}
        others = set(re.findall(r"=(\d\d)\.", case.prompt)) - set(case.answers)
        assert len(others) == (0 if case.kind == "single" else 5)


def test_lengths_are_filled_and_not_exceeded(suite: list[Case], tokenizer: Tokenizer) -> None:
    longest = max(map(len, PROSE.split("\n"))) * 2 + 160
    for case in suite:
        assert case.length - longest < len(prompt_ids(tokenizer, case.prompt)) <= case.length


def test_needles_are_at_their_depths_which_are_spread(suite: list[Case]) -> None:
    assert sorted({case.depth for case in suite}) == pytest.approx([(i + 0.5) / 12 for i in range(12)])
    for case in suite:
        text = case.prompt.rpartition("\n\n")[0]
        first = min(text.index(f"={answer}.") for answer in case.answers)
        assert first / len(text) == pytest.approx(case.depth, abs=0.2 if case.length == 3000 else 0.35)


def test_other_values_are_everywhere(suite: list[Case]) -> None:
    depths = []
    for case in suite:
        lines = sentences(case)
        wanted = [
            i
            for i, line in enumerate(lines)
            if (value := re.search(r"^Remember \w+=(\d\d)\.$", line)) and value[1] not in case.answers
        ]
        depths += [i / (len(lines) - 1) for i in wanted]
    assert 0.4 < sum(depths) / len(depths) < 0.6
    assert 0.2 < sum(depth < 1 / 3 for depth in depths) / len(depths) < 0.45


def test_several_values_stand_in_the_order_of_the_answer(suite: list[Case]) -> None:
    for case in suite:
        if case.kind == "multi-value":
            places = [case.prompt.index(f"={answer}.") for answer in case.answers]
            assert places == sorted(places)


def test_same_seed_same_cases(tokenizer: Tokenizer, suite: list[Case]) -> None:
    assert needle_suite(tokenizer, PROSE, [800, 3000], 12, 5) == suite
    assert not {case.prompt for case in needle_suite(tokenizer, PROSE, [800, 3000], 12, 6)} & {case.prompt for case in suite}
    assert needle_suite(tokenizer, PROSE, [3000], 12, 5, ["chain"]) == [
        c for c in suite if c.kind == "chain" and c.length == 3000
    ]


def test_filler_where_there_is_no_prose(tokenizer: Tokenizer) -> None:
    (case,) = needle_suite(tokenizer, None, [600], 1, 0, ["single"])
    assert case.prompt.count("Nobody is at home.") >= 2
    with pytest.raises(SpecError, match="lengths=60"):
        needle_suite(tokenizer, None, [60], 1, 0, ["single"])
    with pytest.raises(SpecError, match="kind='riddle'"):
        needle_suite(tokenizer, None, [600], 1, 0, ["riddle"])


@pytest.mark.parametrize(
    ("continuation", "right"),
    [
        ("47, ship=33", True),
        ("33, 47", True),
        ("47", False),
        ("47, ship=34", False),
        ("147, ship=33", False),
        ("473,33", False),
        ("47\n33", False),
        ("", False),
        ("\n 47 33", True),
    ],
)
def test_only_all_of_the_answers_count(continuation: str, right: bool) -> None:
    case = Case(prompt="?", answers=("47", "33"), kind="multi-query", length=1, depth=0.0)
    assert is_right(case, continuation) is right


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_reader_is_right_and_another_answer_is_not(kind: str) -> None:
    rng = Random(1)
    things = Things(rng, EVALUATION_KEYS)
    question, other = make_question(kind, things, rng), make_question(kind, things, rng)
    case = Case(prompt=question.prompt, answers=question.answers, kind=kind, length=1, depth=0.0)
    assert is_right(case, question.ending + "\nRecall")
    assert not is_right(case, other.ending)


def test_things_run_out_in_words() -> None:
    things = Things(Random(0), ["ship", "door"])
    assert {things.key(), things.key()} == {"ship", "door"}
    with pytest.raises(SpecError, match="nouns"):
        things.key()
    assert len({things.value() for _ in range(90)}) == 90
    with pytest.raises(SpecError, match="values"):
        things.value()


def test_insert_puts_sentences_at_their_depth() -> None:
    body = list("abcd")
    assert insert(body, [(0.0, "1"), (0.5, "2"), (1.0, "3")]) == ["1", "a", "b", "2", "c", "d", "3"]
    assert insert([], [(0.0, "1"), (0.9, "2")]) == ["1", "2"]


def test_a_model_is_asked_and_counted(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = needle_suite(tokenizer, None, [600, 700], 2, 0, ["single", "chain"])
    layers = (Attention(num_heads=2, num_kv_heads=1, head_dim=8),)
    model = Decoder(ModelSpec(name="tiny", vocab_size=259, hidden_size=16, layers=layers), seed=0)
    assert answer_cases(model, tokenizer, cases) == [False] * 8
    seen: list[str] = []

    def answers(model: Decoder, tokenizer: Tokenizer, prompts: list[str], **options: int) -> list[str]:
        seen.extend(prompts)
        return [f" {case.answers[0]}." if case.length == 600 else " 5" for case in cases]

    monkeypatch.setattr("tandem.train.needles.samples", answers)
    right = answer_cases(model, tokenizer, cases)
    assert seen == [case.prompt for case in cases]
    assert accuracy_by(cases, right, "length") == {
        (600,): Accuracy(correct=4, count=4),
        (700,): Accuracy(correct=0, count=4),
    }
    assert list(accuracy_by(cases, right, "kind", "length")) == [
        ("single", 600),
        ("single", 700),
        ("chain", 600),
        ("chain", 700),
    ]


def test_shares_of_found_facts_are_plain_data(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = (Attention(num_heads=2, num_kv_heads=1, head_dim=8),)
    model = Decoder(ModelSpec(name="tiny", vocab_size=259, hidden_size=16, layers=layers), seed=0)
    monkeypatch.setattr("tandem.train.needles.answer_cases", lambda model, tokenizer, cases: [c.length == 600 for c in cases])
    found = needle_shares(model, tokenizer, [600, 700], 3)
    assert list(found) == list(KINDS)
    for by in found.values():
        assert {length: (share["accuracy"], share["count"]) for length, share in by.items()} == {"600": (1, 3), "700": (0, 3)}
        assert 0 < by["600"]["low"] < by["600"]["high"] == 1
