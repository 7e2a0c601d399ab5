"""Text from tokens: pieces and the rest add up to the decoded whole, cut at the stop text that ends first."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers
from toys import byte_tokenizer

from tandem.engine.spelling import Spelling
from tandem.engine.text import TextStream
from tandem.model.tokenizer import Tokenizer, load_tokenizer

BYTES = byte_tokenizer(
    "ab", "bc", "stop", "\n\n", "é", "👍", special=("<|im_end|>", "<a b>"), plain=("<think>", "</think>", "é x")
)
SIZE = BYTES.backend.get_vocab_size()
WORDS = load_tokenizer("smollm2-135m-instruct")


def first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    """Where the stop text that ends first begins; of those that end together, the longest."""
    for end in range(1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return min(begins)
    return None


def check(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...], skip: bool) -> None:
    stream, pieces, stopped_at = TextStream(tokenizer, stops, skip), [], None
    for n, token in enumerate(ids):
        piece = stream.push(token)
        pieces.append(piece.text)
        if piece.stopped and stopped_at is None:
            stopped_at = n
        so_far = tokenizer.decode(ids[: n + 1], skip_special_tokens=skip)
        if stopped_at is None and (tokenizer is not PIECES or "\ufffd" not in so_far):  # there, a byte spoils those before it
            given = "".join(pieces)
            assert so_far.startswith(given)
            held = so_far.rstrip("\ufffd")[len(given) :]
            assert not held or any(stop.startswith(held) for stop in stops), "text is held back without need"
    text = "".join(pieces) + stream.flush()
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    cut = first_stop(whole, stops)
    assert text == whole[:cut]
    if stopped_at is None:
        assert cut is None or whole[cut:].endswith("\ufffd")
    else:
        assert first_stop(tokenizer.decode(ids[: stopped_at + 1], skip_special_tokens=skip), stops) == cut
        assert stream.stopped
    assert stream.flush() == ""


texts = st.text(alphabet=st.sampled_from("abcst op\né👍中\u0301"), max_size=30)
stops = st.lists(
    st.sampled_from(["a", "ab", "abc", "bca", "stop", "op\n", "é", "👍a", "\n\n", "aab", "aaab", "<think>", "k>a", "\ufffd"]),
    max_size=4,
    unique=True,
).map(tuple)


@settings(max_examples=400, deadline=None)
@given(
    ids=st.lists(st.integers(0, SIZE - 1) | st.sampled_from([*BYTES.encode("abstopaé👍"), SIZE - 1]), max_size=40),
    stop=stops,
    skip=st.booleans(),
)
@example(ids=BYTES.encode("aaaaab"), stop=("aaab",), skip=True)
@example(ids=BYTES.encode("stostop"), stop=("stop", "tos"), skip=True)
@example(ids=BYTES.encode("abc"), stop=("abc", "bc"), skip=True)
def test_any_tokens(ids: list[int], stop: tuple[str, ...], skip: bool) -> None:
    check(BYTES, ids, stop, skip)


@settings(max_examples=200, deadline=None)
@given(text=texts, stop=stops, skip=st.booleans())
def test_texts_byte_by_byte(text: str, stop: tuple[str, ...], skip: bool) -> None:
    check(BYTES, BYTES.encode(text), stop, skip)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=30), text=texts, stop=stops, skip=st.booleans())
def test_a_real_vocabulary(ids: list[int], text: str, stop: tuple[str, ...], skip: bool) -> None:
    check(WORDS, [*ids, *WORDS.encode(text)], stop, skip)


def sentence_piece() -> Tokenizer:
    """As Llama 2 has it: words with a mark for the space before them, and bytes for what is no word."""
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁stop", "▁a", "ab", "c", "▁é", "中"]
    backend = Backend(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


PIECES = sentence_piece()


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(
        st.sampled_from(
            [[260 - 2], [259], [260], [261], [262], [263], [1 + b for b in "👍".encode()], [1 + b for b in "é".encode()]]
        ),
        max_size=20,
    ),
    stop=stops,
)
def test_sentence_pieces_and_bytes_that_make_characters(words: list[list[int]], stop: tuple[str, ...]) -> None:
    check(PIECES, [token for word in words for token in word], stop, True)


@pytest.mark.parametrize("tokenizer", [BYTES, WORDS], ids=["bytes", "words"])
def test_every_token_is_spelled_as_it_decodes(tokenizer: Tokenizer) -> None:
    spelling = Spelling(tokenizer)
    assert spelling.byte_level
    ids = range(tokenizer.backend.get_vocab_size())
    for token in ids:
        assert spelling(token).decode(errors="replace") == tokenizer.decode([token], skip_special_tokens=False)
    assert spelling.join(ids).decode(errors="replace") == tokenizer.decode(ids, skip_special_tokens=False)
    assert spelling(10**6) == b""


def test_pieces_of_sentences_are_spelled() -> None:
    spelling = Spelling(PIECES)
    assert not spelling.byte_level
    assert spelling.join(PIECES.encode("stop é 👍")) == " stop é 👍".encode()


def test_special_tokens_are_shown_only_where_asked() -> None:
    end = BYTES.backend.token_to_id("<|im_end|>")
    ids = [*BYTES.encode("a"), end, *BYTES.encode("b")]
    for skip, text in ((True, "ab"), (False, "a<|im_end|>b")):
        stream = TextStream(BYTES, (), skip)
        assert "".join(stream.push(token).text for token in ids) + stream.flush() == text
    stream = TextStream(BYTES, ("im_end",), False)
    assert [tuple(stream.push(token)) for token in ids] == [("a", False), ("<|", True), ("", True)]


def test_a_long_output_is_not_decoded_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cost is linear: every token's bytes are looked up once, whatever came before."""
    calls = []
    spelled = Spelling.__call__
    monkeypatch.setattr(Spelling, "__call__", lambda self, token: calls.append(token) or spelled(self, token))
    monkeypatch.setattr(Tokenizer, "decode", lambda *_args, **_named: pytest.fail("decoded as a whole"))
    stream = TextStream(BYTES, ("zzz",), True)
    ids = BYTES.encode("an output of some length " * 200)
    assert "".join(stream.push(token).text for token in ids) + stream.flush() == "an output of some length " * 200
    assert calls == ids
