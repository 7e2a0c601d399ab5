"""Long documents: every answer follows from the text above it, as a reader of its own finds."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.spec.errors import SpecError
from tandem.train.data.document import BadRows, Document
from tandem.train.data.rows import READERS, read_rows
from tandem.train.long import LONG_KINDS, QUESTIONS, estimated_tokens, long_documents, prose_of
from tandem.train.needles import EVALUATION_KEYS, TRAINING_KEYS, units
from tandem.train.recipe import SourcePart

SAID = "the of a ship went slowly over dark water while nobody was there to see how its sails were torn by wind"
WORDS = SAID.split()


def prose(seed: int, sentences: int = 400) -> str:
    rng = Random(seed)
    made = (
        " ".join(rng.choice(WORDS) + str(rng.randrange(9)) * (rng.random() < 0.3) for _ in range(rng.randint(4, 30)))
        for _ in range(sentences)
    )
    return "".join(sentence.capitalize() + rng.choice([". ", ".\n", ".\n\n"]) for sentence in made)


PROSE = prose(0)
"""Prose with some numbers in it, which are no values."""


def read(body: str) -> dict[str, list[str]]:
    """Values of every thing, as the sentences of a text say, one at a time from the first on."""
    values: dict[str, list[str]] = defaultdict(list)
    like: dict[str, str] = {}
    for line in body.split("\n"):
        if found := re.fullmatch(r"Remember (\w+)=(\d\d)\.", line):
            values[found[1]].append(found[2])
        if found := re.fullmatch(r"Remember (\w+) like (\w+)\.", line):
            like[found[1]] = found[2]
    for thing, other in like.items():
        assert len(values[other]) == 1
        values[thing] = [f"{other}={values[other][0]}"]
    return values


def expected(question: str, body: str) -> str:
    """The line with the answer that the text gives."""
    values = read(body)
    if found := re.match(r"Recall all of (\w+): ", question):
        return f"{found[0]}{found[1]}={','.join(values[found[1]])}"
    if found := re.match(r"Recall (\w+), (\w+): ", question):
        (one,), (other,) = values[found[1]], values[found[2]]
        return f"{found[0]}{found[1]}={one}, {found[2]}={other}"
    if found := re.match(r"Recall (\w+): ", question):
        (value,) = values[found[1]]
        return f"{found[0]}{found[1]}{' like ' if '=' in value else '='}{value}"
    if found := re.match(r"Count (\w+): ", question):
        return f"{found[0]}{len(values[found[1]])}"
    words = question.removeprefix("Go on: ").split()
    quoted = " ".join(words[:4])
    assert body.count(quoted) == 1
    after = body.partition(quoted)[2].split()[:4]
    return f"Go on: {quoted} {' '.join(after)}"


def parts(document: Document) -> tuple[str, list[str]]:
    body, tail = document.text[: document.prompt_chars], document.text[document.prompt_chars :]
    assert body.endswith(f"\n\n{QUESTIONS}\n")
    return body.removesuffix(f"\n\n{QUESTIONS}\n"), tail.split("\n")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(64, 3000), kinds=st.sets(st.sampled_from(LONG_KINDS), min_size=1))
def test_every_answer_follows_from_the_text(seed: int, length: int, kinds: set[str]) -> None:
    for document in islice(long_documents([PROSE], length=length, seed=seed, kinds=sorted(kinds)), 3):
        body, questions = parts(document)
        for question in questions:
            if question:
                assert question == expected(question, body)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(64, 3000), kinds=st.sets(st.sampled_from(LONG_KINDS), min_size=1))
def test_the_prose_of_a_document_is_a_stretch_of_its_source(seed: int, length: int, kinds: set[str]) -> None:
    round_and_round = "\n".join(units(PROSE) * 3)
    for document in islice(long_documents([PROSE], length=length, seed=seed, kinds=sorted(kinds)), 3):
        assert prose_of(document) in round_and_round
        lines = [line for line in parts(document)[0].split("\n") if not line.startswith("Remember ")]
        assert prose_of(document) == "\n".join(lines)


def test_all_kinds_are_asked_and_only_those_named() -> None:
    openings = {
        r"Recall \w+: \w+=": "multi-key",
        r"Recall \w+: \w+ like": "chain",
        r"Recall all of": "multi-value",
        r"Recall \w+, ": "multi-query",
        r"Count ": "count",
        r"Go on: ": "continue",
    }
    for kinds in (LONG_KINDS, ("count",), ("chain", "continue")):
        questions = [q for d in islice(long_documents([PROSE], length=2048, seed=1, kinds=kinds), 5) for q in parts(d)[1]]
        for opening, kind in openings.items():
            assert any(re.match(opening, question) for question in questions) == (kind in kinds)


def test_short_documents_have_questions_too() -> None:
    for length in (64, 128, 256):
        for document in islice(long_documents([PROSE], length=length, seed=8, kinds=("multi-key",)), 20):
            questions = parts(document)[1]
            assert all(questions)
            assert len(questions) >= {64: 1, 128: 2, 256: 4}[length]
            assert estimated_tokens(document.text) <= length


@pytest.mark.parametrize("length", [512, 2048, 8192])
def test_length_is_kept_and_used(length: int) -> None:
    """In characters here, as a tokenizer with one token a character counts."""
    for document in islice(long_documents([PROSE], length=length, seed=2, count_tokens=len), 20):
        assert length - max(200, 0.2 * length) < len(document.text) + 2 <= length  # a sentence has up to 160 characters
        assert 0.08 * length < len(document.text) - document.prompt_chars < 0.45 * length


def test_the_estimate_is_not_below_what_the_nano_tokenizers_need() -> None:
    assert estimated_tokens("") == 0
    assert 10 <= estimated_tokens("Remember ferry=47. Recall ferry: ferry=47") <= 20
    assert estimated_tokens("12345") == 5


def test_needles_and_quotes_come_from_everywhere() -> None:
    depths: list[float] = []
    for document in islice(long_documents([PROSE], length=1500, seed=3), 60):
        lines = parts(document)[0].split("\n")
        depths += [i / len(lines) for i, line in enumerate(lines) if line.startswith("Remember ")]
    shares = [sum(low / 5 <= depth < (low + 1) / 5 for depth in depths) / len(depths) for low in range(5)]
    assert min(shares) > 0.15
    assert max(shares) < 0.25


def test_nothing_is_asked_that_the_text_says_twice() -> None:
    """Prose of one paragraph again and again: words that stand in it once stand there as often as it does."""
    paragraph = "Nobody knew at all when the old ship would come home from sea. It came at last.\n"
    for document in islice(long_documents([paragraph * 50], length=2048, seed=7, kinds=("continue",)), 3):
        assert document.prompt_chars == len(document.text)


def test_same_seed_same_documents() -> None:
    def first(count: int, seed: int) -> list[Document]:
        return list(islice(long_documents([PROSE], length=600, seed=seed), count))

    assert first(9, 4) == first(9, 4)
    assert first(3, 4) == first(9, 4)[:3]
    assert len({document.text for document in first(9, 4) + first(9, 5)}) == 18
    assert len({document.id for document in first(9, 4)}) == 9


def test_training_asks_for_no_thing_of_the_evaluation() -> None:
    assert not set(TRAINING_KEYS) & set(EVALUATION_KEYS)
    assert len(set(TRAINING_KEYS)) == len(TRAINING_KEYS) > 2 * len(set(EVALUATION_KEYS)) > 80
    things = {thing for d in islice(long_documents([PROSE], length=2048, seed=6), 40) for thing in read(d.text)}
    assert things <= set(TRAINING_KEYS)
    assert len(things) > 0.9 * len(TRAINING_KEYS)


def test_read_as_a_source_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text(PROSE)
    (tmp_path / "rows.jsonl").write_text(
        '{"words": "One line of prose that is long enough to be read here."}\n{"words": 3}\n[]\n'
    )
    source = SourcePart(kind="long-documents", path="*.txt", documents=60, length=512, seed=3)
    documents = list(read_rows("long", source, tmp_path))
    assert len(documents) == 60
    expected_texts = [document.text for document in read_rows("prose", SourcePart(kind="text", path="prose.txt"), tmp_path)]
    assert documents == list(islice(long_documents(expected_texts, length=512, seed=3), 60))
    rows = SourcePart(kind="long-documents", path="rows.jsonl", text="{words}", documents=2, length=256, tasks=("count",))
    bad = BadRows(source="long", limit=2)
    assert all("One line of prose" in document.text for document in read_rows("long", rows, tmp_path, bad))
    assert bad.count >= 1


def test_of_a_large_source_only_what_is_used_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_end(name: str, source: SourcePart, folder: Path, bad: BadRows) -> Iterator[Document]:
        return (Document(text=prose(i, 20), id=str(i)) for i in count())

    monkeypatch.setitem(READERS, "hub", without_end)
    source = SourcePart(kind="long-documents", path="someone/prose", documents=4, length=512)
    assert len(list(read_rows("long", source, tmp_path))) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": None}, r"data\.sources\.long\.documents"),
        ({"length": None}, r"data\.sources\.long\.length"),
        ({"length": 50}, "length=50"),
        ({"seed": 10**9}, r"data\.sources\.long\.seed"),
        ({"tasks": ("riddle",)}, "riddle"),
        ({"path": "nothing.txt"}, "nothing.txt"),
    ],
)
def test_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    (tmp_path / "prose.txt").write_text(PROSE)
    fields: dict[str, object] = {"path": "prose.txt", "documents": 3, "length": 512} | change
    with pytest.raises(SpecError, match=message):
        list(read_rows("long", SourcePart(kind="long-documents", **fields), tmp_path))  # type: ignore[arg-type]


def test_no_text_no_documents() -> None:
    with pytest.raises(SpecError, match="hold no text"):
        long_documents(["", " \n\n"], length=512, seed=0)


@given(st.text(alphabet=st.sampled_from("ab.?! \n\té\u2028"), max_size=300) | st.just("x" * 900) | st.just("word " * 300))
def test_units_are_the_text(text: str) -> None:
    found = units(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(unit.strip() == unit and 0 < len(unit) <= 400 for unit in found)
