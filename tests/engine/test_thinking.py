"""The thinking budget on outputs that do their worst: tags whole and in parts, begun and dropped, newlines or none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import EOS, byte_tokenizer, vocabulary

from tandem.engine.choose import Chooser, choose
from tandem.engine.thinking import CLOSING, GRACE, Thinking
from tandem.engine.types import EngineRequest, Grammar, SamplingParams
from tandem.engine.vocabulary import Vocabulary
from tandem.model.tokenizer import Tokenizer, load_tokenizer
from tandem.spec.errors import SpecError

PARTS = ("</", "</th", "think", "ink>", ">\n", ">\n\n", "x<", "k>a", ".\n", "<th", "ink>\n", "a</think>b", "ink></th")
BYTES = vocabulary(byte_tokenizer(*PARTS))
WHOLE = vocabulary(byte_tokenizer(*PARTS, plain=("<think>", "</think>")))
VOCABULARIES = {
    "in parts": BYTES,
    "one token": WHOLE,
    "words": Vocabulary(load_tokenizer("smollm2-135m-instruct"), 49152, (2,)),
}


def loved(words: Vocabulary) -> list[int]:
    """Tokens that a model bent on trouble would write: every part of a tag, newlines, and a few others."""
    tags = "<think></think>"
    found = [t for t in range(words.vocab_size) if (text := words.spelling(t).decode(errors="replace")) and text in tags]
    tokenizer = words.tokenizer
    assert tokenizer is not None
    more = [token for text in (*PARTS, "\n", "a", " ", "</think>", "<think>") for token in tokenizer.encode(text)]
    added = range(259, words.vocab_size) if words.vocab_size < 1000 else ()
    return sorted({*found, *more, *added})


LOVED = {name: loved(words) for name, words in VOCABULARIES.items()}


def thinking_chooser(
    words: Vocabulary, budget: int | None, *, opened: bool, grammar: Grammar | None = None, done: tuple[int, ...] = ()
) -> Chooser:
    sampling = SamplingParams(max_tokens=4000, thinking_budget=budget, grammar=grammar, ignore_eos=True)
    words.check(sampling)
    return Chooser(EngineRequest(id="r", prompt_ids=(5,), sampling=sampling, thinking=opened, output_ids=done), words)


def write(words: Vocabulary, chooser: Chooser, wishes: list[int]) -> list[int]:
    """What becomes of an output whose model wants one token after the other."""
    out = []
    rng = np.random.default_rng(len(wishes))
    row = torch.from_numpy(rng.normal(0, 1, words.vocab_size).astype(np.float32))
    for wish in wishes:
        row[wish] += 100.0
        out.append(choose(row[None], [chooser])[0].token_id)
        row[wish] -= 100.0
        if chooser.finished_by_grammar:
            break
    return out


def length_of_rest(words: Vocabulary, state: int) -> int:
    """Tokens that finish a tag of which so many bytes are there."""
    text, length = CLOSING.encode()[:state], 0
    while not text.endswith(CLOSING.encode()):
        text += words.spelling(words.closing_tag.next(len(text)))
        length += 1
    assert text == CLOSING.encode(), "finished, not written anew"
    return length


LONGEST = {name: max(length_of_rest(words, state) for state in range(8)) for name, words in VOCABULARIES.items()}

wishes = st.data()


def some_wishes(data: st.DataObject, name: str, size: int) -> list[int]:
    seed, few = data.draw(st.integers(0, 2**31)), data.draw(st.integers(1, 12))
    rng = np.random.default_rng(seed)
    return [int(i) for i in rng.choice(rng.choice(LOVED[name], few), size)]


def tokens_until(words: Vocabulary, out: list[int], tag: bytes) -> int | None:
    """Tokens up to the one that completes the first such tag."""
    begin = words.spelling.join(out).find(tag)
    lengths = np.cumsum([len(words.spelling(token)) for token in out])
    return None if begin < 0 else int(np.searchsorted(lengths, begin + len(tag))) + 1


@pytest.mark.parametrize("name", VOCABULARIES)
@settings(max_examples=60, deadline=None)
@given(data=wishes, budget=st.sampled_from([0, 1, 2, 7, 30]), opened=st.booleans())
def test_one_closing_tag_and_in_time(name: str, data: st.DataObject, budget: int, opened: bool) -> None:
    words = VOCABULARIES[name]
    out = write(words, thinking_chooser(words, budget, opened=opened), some_wishes(data, name, budget + GRACE + 60))
    assert words.spelling.join(out).count(CLOSING.encode()) <= 1
    begin, closed = 0 if opened else tokens_until(words, out, b"<think>"), tokens_until(words, out, CLOSING.encode())
    if begin is not None and (closed is None or begin < closed):
        assert (closed or len(out)) - begin <= budget + GRACE + LONGEST[name]


@pytest.mark.parametrize("name", VOCABULARIES)
@settings(max_examples=40, deadline=None)
@given(data=wishes, budget=st.sampled_from([0, 3, 8]), opened=st.booleans())
def test_what_is_not_ruled_out_is_left_alone(name: str, data: st.DataObject, budget: int, opened: bool) -> None:
    """Against the rule written down as a plain search through the text so far."""
    words = VOCABULARIES[name]
    wanted = some_wishes(data, name, 60)
    out = write(words, thinking_chooser(words, budget, opened=opened), wanted)
    pieces = [words.spelling(token) for token in out]
    tag = CLOSING.encode()
    for n, wish in enumerate(wanted):
        before = b"".join(pieces[:n])
        if tag in before:
            if (before + words.spelling(wish)).count(tag) == 1:
                assert out[n] == wish
            continue
        start = 0 if opened else next((m + 1 for m in range(n) if b"<think>" in b"".join(pieces[: m + 1])), None)
        due = start is not None and (budget == 0 or any(b"\n" in piece for piece in pieces[start + budget - 1 : n]))
        if not due:
            assert out[n] == wish
        else:
            assert pieces[n] in tag
            assert tag.startswith(pieces[n]) or (before + pieces[n]).endswith(tag[: tag.find(pieces[n]) + len(pieces[n])])


@pytest.mark.parametrize("name", VOCABULARIES)
@settings(max_examples=25, deadline=None)
@given(data=wishes, budget=st.sampled_from([None, 0, 1, 6]), opened=st.booleans(), ruled=st.booleans())
def test_replayed_tokens_lead_to_the_same_place(
    name: str, data: st.DataObject, budget: int | None, opened: bool, ruled: bool
) -> None:
    words = VOCABULARIES[name]
    grammar = Grammar(kind="regex", text="[ab<>/ ]+") if ruled else None
    wanted = some_wishes(data, name, 30)
    out = write(words, thinking_chooser(words, budget, opened=opened, grammar=grammar), wanted)
    for cut in range(0, len(out), 3):
        again = thinking_chooser(words, budget, opened=opened, grammar=grammar, done=tuple(out[:cut]))
        live = thinking_chooser(words, budget, opened=opened, grammar=grammar)
        for token in out[:cut]:
            live.accept(token)
        rows = torch.randn(5, 1, words.vocab_size, generator=torch.Generator().manual_seed(cut))
        for row in rows:
            if again.finished_by_grammar:
                break
            assert choose(row, [again]) == choose(row, [live])
            assert again.thinking_tokens == live.thinking_tokens


def test_a_newline_closes_after_the_budget_and_not_before() -> None:
    def closes_after(text: str, budget: int) -> str:
        words = BYTES
        wanted = [3 + sorted_bytes.index(b) for b in text.encode()]
        out = write(words, thinking_chooser(words, budget, opened=True), wanted)
        return words.spelling.join(out).decode()

    sorted_bytes = [BYTES.spelling(t)[0] for t in range(3, 259)]
    assert closes_after("one\ntwo three\nfour five six", 6).startswith("one\ntwo three\n</think>")
    assert closes_after("one\ntwo three\nfour five six", 4).startswith("one\n</think>")
    assert closes_after("one\ntwo three\nfour five six", 0).startswith("</think>")
    assert "</think>" not in closes_after("one\ntwo three\nfour five six", 100)
    assert closes_after("no line at all" * 50, 10)[: 10 + GRACE] == ("no line at all" * 50)[: 10 + GRACE]
    assert closes_after("no line at all" * 50, 10)[10 + GRACE :].startswith("</think>")


def test_a_model_that_closes_by_itself_is_left_alone() -> None:
    words = WHOLE
    tokenizer = words.tokenizer
    assert tokenizer is not None
    wanted = tokenizer.encode("a b\nc</think>\n\nThe answer\nis 4.\n")
    chooser = thinking_chooser(words, 50, opened=True)
    assert write(words, chooser, wanted) == wanted
    assert chooser.thinking_tokens == 6


def test_a_begun_tag_is_finished_and_not_written_anew() -> None:
    for words in VOCABULARIES.values():
        for state in range(len(CLOSING)):
            assert length_of_rest(words, state) <= len(CLOSING) - state
        assert words.spelling.join(words.closing_tag.tokens) == CLOSING.encode()
        assert length_of_rest(words, 0) == len(words.closing_tag.tokens)


def test_a_tag_that_cannot_be_finished_is_written_anew() -> None:
    """One token is the tag, and nothing else of its text is in the vocabulary but its beginning."""
    whole = WHOLE
    tokenizer = whole.tokenizer
    assert tokenizer is not None
    close, begun = tokenizer.encode("</think>")[0], tokenizer.encode("<")[0]
    spelling = {close: b"</think>", begun: b"</thi", 7: b"a"}

    class Poor:
        special: frozenset[int] = frozenset()
        byte_level = True

        def __call__(self, token: int) -> bytes:
            return spelling.get(token, b"")

        def join(self, tokens: list[int]) -> bytes:
            return b"".join(map(self, tokens))

    from tandem.engine.thinking import ClosingTag

    tag = ClosingTag(Poor(), whole.vocab_size, (close,))  # type: ignore[arg-type]
    thinking = Thinking(tag, Poor(), budget=2, opened=True)  # type: ignore[arg-type]
    for token in [7] + [begun] * (GRACE + 1):
        assert thinking.forced is None
        thinking.accept(token)
    assert thinking.forced == close
    thinking.accept(close)
    assert thinking.closed


def json_after(words: Vocabulary, out: list[int]) -> object:
    text = words.spelling.join(out).decode(errors="replace")
    return json.loads(text.partition(CLOSING)[2])


@pytest.mark.parametrize("name", VOCABULARIES)
@settings(max_examples=20, deadline=None)
@given(data=wishes, budget=st.sampled_from([0, 2, 9]))
def test_the_grammar_holds_after_thinking_and_not_before(name: str, data: st.DataObject, budget: int) -> None:
    words = VOCABULARIES[name]
    grammar = Grammar(kind="json_schema", text='{"enum": [true, {"a": "</think"}, 12]}')
    chooser = thinking_chooser(words, budget, opened=True, grammar=grammar)
    seed = data.draw(st.integers(0, 10**6))
    out = write(words, chooser, [EOS, *some_wishes(data, name, budget + GRACE + 1200)])
    assert chooser.finished_by_grammar, seed
    assert chooser.error is None
    assert json_after(words, out) in (True, {"a": "</think"}, 12)
    assert EOS not in out


def test_a_grammar_may_ask_for_what_the_budget_forbids() -> None:
    chooser = thinking_chooser(BYTES, 0, opened=True, grammar=Grammar(kind="regex", text="</think>!"))
    out = write(BYTES, chooser, [3] * 40)
    assert BYTES.spelling.join(out) == b"</think></think>!"
    assert chooser.finished_by_grammar


def test_without_a_block_the_grammar_holds_from_the_start() -> None:
    chooser = thinking_chooser(WHOLE, 5, opened=False, grammar=Grammar(kind="regex", text="[ab]{4}"))
    tokenizer = WHOLE.tokenizer
    assert tokenizer is not None
    out = write(WHOLE, chooser, tokenizer.encode("<think>") * 10)
    assert len(out) == 4
    assert set(WHOLE.spelling.join(out)) <= set(b"ab")


def test_a_vocabulary_that_cannot_write_the_tag_is_refused() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    backend = Backend(models.BPE(vocab={"a": 0, "<": 1, ">": 2}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    words = Vocabulary(Tokenizer(backend), 3, (2,))
    with pytest.raises(SpecError, match="thinking_budget=4: this model's vocabulary cannot write </think>; leave it out"):
        words.check(SamplingParams(thinking_budget=4))
    assert Chooser(EngineRequest(id="r", prompt_ids=(0,), thinking=True), words).thinking_tokens == 0
