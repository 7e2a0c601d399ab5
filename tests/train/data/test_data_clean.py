"""Cleaning changes nothing twice and keeps a prompt's border; quality rules tell prose from rubbish."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.train.data.clean import clean_document, clean_text
from tandem.train.data.document import Document
from tandem.train.data.quality import quality_bucket, quality_score

TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \t\n\r\x0b\x0c\x85\u2028\u00a0\u200b\ufeffe\u0301")))
PROSE = (
    "The committee met on Tuesday to consider the report that had been sent to it in March. Its members agreed with most of "
    "what they read, and they asked for a second part, in which the costs of each proposal would be set out. Nobody spoke "
    "against that. The chairman thanked those who had come so far, and closed the meeting a little before noon."
)


@given(TEXT)
def test_cleaning_is_idempotent_and_leaves_no_invisible_characters(text: str) -> None:
    clean = clean_text(text)
    assert clean_text(clean) == clean
    assert unicodedata.is_normalized("NFC", clean)
    assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in clean)
    assert not set("\u00a0\u200b\ufeff\u2028\u00ad") & set(clean)
    assert "\n\n\n" not in clean
    assert " \n" not in clean
    assert clean == clean.strip()


def test_what_cleaning_does() -> None:
    assert clean_text("\ufeffCafe\u0301\r\n\r\n\r\n\r\nnext\u00a0line  \r\x00end\u200b ") == "Café\n\nnext line\nend"
    assert clean_text("def f():\n    return 1") == "def f():\n    return 1"


@given(prompt=TEXT.filter(str.strip), rest=TEXT)
def test_the_border_of_a_prompt_stays(prompt: str, rest: str) -> None:
    document = Document(text=f"{prompt}?\n<think>\nA{rest}", prompt_chars=len(prompt) + len("?\n<think>\n"), id="d")
    clean = clean_document(document)
    assert clean.text[: clean.prompt_chars].endswith("?\n<think>\n")
    assert clean.text[clean.prompt_chars :].startswith(unicodedata.normalize("NFC", f"A{rest}")[:1])
    assert clean.id == "d"


def test_a_document_without_prompt_is_clean_text() -> None:
    assert clean_document(Document(text=" a \n", id="d")).text == "a"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n ",
        "@@@ ### $$$ ### %%% ### &&&",
        "1 22 333 4444 55555 666666 7777777",
        "buy now\n" * 40,
        "• one\n• two\n• three\n• four",
        "xkcdqwrtzpsdfghjklxyvbnmqwrtzpsdfg hjklyxcvbnmqwrtzpsdfghjkl",
        "click here click here click here click here click here click here click here click here click here",
    ],
)
def test_rubbish_scores_below_prose(text: str) -> None:
    assert quality_score(PROSE) == 1.0
    assert quality_bucket(quality_score(PROSE)) == "high"
    assert quality_score(text) < 0.9
    assert quality_bucket(quality_score(text)) != "high"


def test_each_spoiled_copy_of_prose_scores_less() -> None:
    for spoiled in (
        PROSE.replace(" ", " # "),
        "\n".join([PROSE] * 3),
        PROSE + " {lorem ipsum}",
        PROSE.replace(".", "").replace(",", ""),
        "\n".join(f"- {line}..." for line in PROSE.split(". ")),
        " ".join(word[:2] for word in PROSE.split()),
    ):
        assert quality_score(spoiled) < 1.0, spoiled


@given(TEXT)
def test_scores_are_shares(text: str) -> None:
    assert 0.0 <= quality_score(text) <= 1.0


@pytest.mark.parametrize(
    ("score", "bucket"), [(0.0, "low"), (0.69, "low"), (0.7, "medium"), (0.89, "medium"), (0.9, "high"), (1.0, "high")]
)
def test_buckets(score: float, bucket: str) -> None:
    assert quality_bucket(score) == bucket
