"""The tokenizer that a recipe trains: lossless, deterministic, and the same in Tandem and transformers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.model.tokenizer import Tokenizer, load_tokenizer
from tandem.spec.errors import SpecError
from tandem.train.data.bpe import CONTROL, MARKS, save_tokenizer, train_bpe

RANDOM = random.Random(3)
WORDS = ["the", "sum", "of", "legs", "is", "counted", "and", "12", "more", "are", "found", "in", "2026"]
TEXTS = [" ".join(RANDOM.choices(WORDS, k=30)) for _ in range(200)]
ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe") / "tokenizer"
    save_tokenizer(train_bpe(TEXTS, 300), folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@given(text=ANY_TEXT)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]


@given(pieces=st.lists(st.sampled_from([*MARKS, *CONTROL, " ", "legs", "\n", "é"]), max_size=12))
def test_marks_survive_decoding_and_control_tokens_do_not(tokenizer: Tokenizer, pieces: list[str]) -> None:
    ids = tokenizer.encode("".join(pieces), add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "".join(pieces)
    assert tokenizer.decode(ids) == "".join(piece for piece in pieces if piece not in CONTROL)


def test_special_tokens_have_the_lowest_ids(tokenizer: Tokenizer) -> None:
    expected = ("<pad>", "<s>", "</s>", "<SPECIAL_3>", "<SPECIAL_12>", "<think>", "</think>", "</AVAILABLE_TOOLS>")
    assert [tokenizer.backend.token_to_id(token) for token in expected] == [0, 1, 2, 3, 12, 13, 14, 20]
    for i, token in enumerate((*CONTROL, *MARKS)):
        assert tokenizer.encode(token, add_special_tokens=False) == [i]
    assert tokenizer.special == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def test_digits_are_tokens_of_their_own(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("12 and 2026", add_special_tokens=False)
    digits = [token for token in map(tokenizer.backend.id_to_token, ids) if any(c.isdigit() for c in token)]
    assert digits == list("122026")


def test_frequent_words_become_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.backend.get_vocab_size() == 300
    assert len(tokenizer.encode(" counted", add_special_tokens=False)) < len(" counted")


def test_the_same_texts_give_the_same_tokenizer() -> None:
    first, second = (train_bpe(iter(TEXTS), 310).backend.to_str() for _ in range(2))
    assert first == second


def test_a_vocabulary_that_holds_no_bytes() -> None:
    with pytest.raises(SpecError, match="vocab_size=276: must be at least 277"):
        train_bpe(TEXTS, 276)
    assert train_bpe(TEXTS, 277).backend.get_vocab_size() == 277


@pytest.mark.slow
def test_transformers_reads_the_same(folder: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    for text in (TEXTS[0], "<think>\n1 + 2 = 3\n</think>\n3</s>", "naïve 漢字 👍\u200d"):
        ids = tokenizer.encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
