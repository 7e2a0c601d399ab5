"""Duplicates and evaluation sets against brute force over sets of words."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.spec.errors import SpecError
from tandem.train.data.decontaminate import EvaluationSets
from tandem.train.data.dedup import ExactDuplicates, NearDuplicates


def _grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def _similarity(a: str, b: str) -> float:
    first, second = _grams(a, 5), _grams(b, 5)
    return len(first & second) / len(first | second)


def _texts(seed: int) -> list[str]:
    """Texts of 60 words, each followed by copies with 0 to 15 words changed that stand together."""
    rng = random.Random(seed)
    texts = []
    for _ in range(25):
        words = [f"w{rng.randrange(3000)}" for _ in range(60)]
        for changes in (0, *rng.choices(range(16), k=3)):
            at = rng.randrange(60 - changes)
            texts.append(" ".join([*words[:at], *(f"c{rng.randrange(3000)}" for _ in range(changes)), *words[at + changes :]]))
        texts.append(texts[-4].upper())
    return texts


def test_exact_duplicates() -> None:
    seen = ExactDuplicates().seen
    assert not seen("The sum of 4 - 6")
    assert seen("the  SUM of\n4 - 6 ")
    assert not seen("The sum of 4 + 6")
    assert seen("The sum of 4 + 6")
    assert not seen("")
    assert not seen("++")
    assert not seen("+")


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_near_duplicates_are_those_of_brute_force(threshold: float) -> None:
    """No text below the threshold is dropped, ever; of those above, the index misses at most one in fifty."""
    missed = found = 0
    for seed in range(3):
        index = NearDuplicates(threshold)
        kept: list[str] = []
        for text in _texts(seed):
            similar = max((_similarity(text, other) for other in kept), default=0.0)
            if index.seen(text):
                assert similar >= threshold
                found += 1
            else:
                missed += similar >= threshold
                kept.append(text)
    assert found >= 75
    assert missed <= found / 50


def test_near_duplicates_again_are_the_same() -> None:
    first, second = NearDuplicates(0.7), NearDuplicates(0.7)
    assert [first.seen(text) for text in _texts(9)] == [second.seen(text) for text in _texts(9)]


def test_short_and_empty_texts() -> None:
    index = NearDuplicates(0.8)
    assert [index.seen(text) for text in ("two words", "Two words!", "other", "", "", "...")] == [False, True, *[False] * 4]


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5])
def test_thresholds_that_are_refused(threshold: float) -> None:
    with pytest.raises(SpecError, match=r"data\.clean\.near_duplicates"):
        NearDuplicates(threshold)


WORDS = st.lists(st.sampled_from("ab"), max_size=12).map(" ".join)


@given(tests=st.lists(WORDS, max_size=4), text=WORDS, n=st.integers(1, 6))
@settings(max_examples=300)
def test_decontamination_is_brute_force(tests: list[str], text: str, n: int) -> None:
    """`n` is below the shortest text that is compared whole, so every text of at least n words counts."""
    sets = EvaluationSets(n)
    for i, test in enumerate(tests):
        sets.add(f"set{i}", test)
    words = text.split()
    shared = {
        f"set{i}"
        for i, test in enumerate(tests)
        for at in range(len(test.split()) - n + 1)
        for here in range(len(words) - n + 1)
        if test.split()[at : at + n] == words[here : here + n]
    }
    assert (sets.found(text) in shared) if shared else (sets.found(text) is None)


def test_texts_shorter_than_a_run_count_as_a_whole() -> None:
    sets = EvaluationSets(13)
    sets.add("s", "one two three four five six seven eight nine")
    sets.add("t", "too short to be looked for")
    assert sets.found("he said: One, two, three; four five SIX seven eight nine!") == "s"
    assert sets.found("one two three four five six seven eight") is None
    assert sets.found("too short to be looked for") is None


def test_files_of_evaluation_sets(tmp_path: Path) -> None:
    question = "a question of exactly thirteen words that is found again in some documents"
    rows = [{"question": question, "id": 3, "list": []}, question[::-1]]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    sets = EvaluationSets(13)
    sets.add_file("*.jsonl", tmp_path)
    assert sets.found(f"Before. {question.upper()}, after.") == "set.jsonl"
    assert sets.found(question.replace("again", "twice")) is None
    assert sets.found(question[::-1]) == "set.jsonl"
    (tmp_path / "set.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(SpecError, match=r"set\.jsonl line 1: not JSON"):
        sets.add_file("set.jsonl", tmp_path)
    (tmp_path / "set.jsonl").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(SpecError, match=r"set\.jsonl line 1: not JSON"):
        sets.add_file("set.jsonl", tmp_path)
    with pytest.raises(SpecError, match="no such file"):
        sets.add_file("none.jsonl", tmp_path)
    with pytest.raises(SpecError, match="decontaminate_ngram=0"):
        EvaluationSets(0)


NAMES = st.text("xyz", max_size=3)
ROWS = st.recursive(
    st.none() | st.integers() | st.just("LEAF"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=20,
)


@given(row=ROWS)
def test_texts_are_found_wherever_they_stand_in_a_row(tmp_path_factory: pytest.TempPathFactory, row: object) -> None:
    """Every leaf becomes a text of its own, by writing over its JSON."""
    pieces = json.dumps(row).split('"LEAF"')
    texts = [f"one two three four five six seven number{i}" for i in range(len(pieces) - 1)]
    folder = tmp_path_factory.mktemp("set")
    written = pieces[0] + "".join(json.dumps(text) + piece for text, piece in zip(texts, pieces[1:], strict=True))
    (folder / "set.jsonl").write_text(written, encoding="utf-8")
    sets = EvaluationSets(13)
    if not texts:
        with pytest.raises(SpecError, match=r"decontaminate='set\.jsonl': set\.jsonl holds no text of 8 words"):
            sets.add_file("set.jsonl", folder)
    else:
        sets.add_file("set.jsonl", folder)
    assert all(sets.found(f"He asked: {text}?") == "set.jsonl" for text in texts)


@pytest.mark.parametrize("content", ["", '{"answer": "7"}\n{"answer": "12"}', '{"one two three four five six seven eight": 1}'])
def test_a_set_in_which_nothing_can_be_looked_for(tmp_path: Path, content: str) -> None:
    (tmp_path / "good.jsonl").write_text('"one two three four five six seven eight"', encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(SpecError, match=r"decontaminate='\*\.jsonl': empty\.jsonl holds no text of 8 words or more"):
        EvaluationSets(13).add_file("*.jsonl", tmp_path)
