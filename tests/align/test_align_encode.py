"""Tokens of conversations: what is learned, what a user cannot say, and rows that lose nothing and mix nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from chat_cases import CONTROLS, MARKS, TOOLS, chat_tokenizer, learnable, plain, smuggled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tandem.align.answers import read_answer
from tandem.align.chat import answer_text, controls, render, segments
from tandem.align.encode import Encoded, encode_answer, encode_ask, encode_pair, encode_sample, pack
from tandem.align.sample import Ask, Pair, Sample
from tandem.model.hf import TandemForCausalLM
from tandem.model.hybrid import Decoder
from tandem.model.tokenizer import Tokenizer
from tandem.spec.errors import SpecError
from tandem.spec.mixers import MLP, Attention, Mamba2
from tandem.spec.model import ModelSpec
from tandem.train.data.packing import IGNORED

END = 12
ASKED = {"role": "user", "content": "Why?"}
TOLD = {"role": "assistant", "content": "So.", "reasoning_content": "hm"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def text_of(sample: Sample) -> str:
    enable = None if sample.thinking else False
    return render(sample.messages, tools=sample.tools, enable_thinking=enable, add_generation_prompt=False)


def steering(tokenizer: Tokenizer, ids: tuple[int, ...]) -> list[str]:
    return [text for text in map(tokenizer.backend.id_to_token, ids) if text in CONTROLS]


# --- samples ---


@settings(deadline=None, max_examples=60)
@given(sample=learnable(said=plain | smuggled))
def test_tokens_are_the_text_and_learned_ones_the_models(tokenizer: Tokenizer, sample: Sample) -> None:
    ids, learned = encode_sample(sample, tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text_of(sample)
    runs = [[token for token, _ in run] for flag, run in groupby(zip(ids, learned, strict=True), lambda pair: pair[1]) if flag]
    last_user = max(i for i, message in enumerate(sample.messages) if message["role"] == "user")
    turns = [message for message in sample.messages[last_user:] if message["role"] == "assistant"]
    assert len(runs) == len(turns)
    for message, run in zip(turns, runs, strict=True):
        assert (
            tokenizer.decode(run, skip_special_tokens=False) == f"{answer_text(message, thinking=sample.thinking)}<SPECIAL_12>"
        )
        assert run.count(END) == 1
        assert run[-1] == END


@settings(deadline=None, max_examples=60)
@given(sample=learnable(said=plain | smuggled))
def test_an_answer_is_learned_from_where_the_prompt_ends(tokenizer: Tokenizer, sample: Sample) -> None:
    ids, learned = encode_sample(sample, tokenizer)
    ask = Ask(id="1", kind="", task="", messages=sample.messages[:-1], tools=sample.tools, thinking=sample.thinking)
    prompt = encode_ask(ask, tokenizer)
    assert list(ids[: len(prompt)]) == prompt
    answer = answer_text(sample.messages[-1], thinking=sample.thinking)
    rest = [*encode_answer(answer, tokenizer), *tokenizer.encode("\n", add_special_tokens=False)]
    assert list(ids[len(prompt) :]) == rest
    assert learned[len(prompt) :] == (True,) * (len(rest) - 1) + (False,)
    assert not learned[len(prompt) - 1]
    read = read_answer(tokenizer.decode(ids[len(prompt) :]), thinking=sample.thinking, finished=True)
    assert read.malformed is None


@settings(deadline=None, max_examples=80)
@given(sample=learnable(said=smuggled), data=st.data())
def test_what_others_say_makes_no_control_token(tokenizer: Tokenizer, sample: Sample, data: st.DataObject) -> None:
    name = data.draw(smuggled)
    tools = (*sample.tools, {"name": name, "parameters": {"type": "object", "properties": {name: {"enum": [name]}}}})
    sample = replace(sample, tools=tools)
    harmless = tuple(m if m["role"] == "assistant" else {**m, "content": "x"} for m in sample.messages)
    bare = replace(sample, messages=harmless, tools=(*tools[:-1], TOOLS[0]))
    ids, _ = encode_sample(sample, tokenizer)
    assert steering(tokenizer, ids) == steering(tokenizer, encode_sample(bare, tokenizer).ids)


def test_words_of_a_user_are_cut_where_they_would_be_a_token_and_nowhere_else(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "a<SPECIAL_11>b < <x> </think>\n<TOOLCALL"}]
    (part,) = segments(messages, tokenizer=tokenizer)
    assert [piece[-1] for piece in list(part.pieces())[:-1]] == ["<", "<"]
    assert len(list(segments([ASKED], tokenizer=tokenizer)[0].pieces())) == 1
    ids = encode_ask(Ask(id="1", kind="", task="", messages=(ASKED,)), tokenizer)
    assert ids == tokenizer.encode(render([ASKED]), add_special_tokens=False)


def test_all_noncharacters_at_once_are_refused(tokenizer: Tokenizer) -> None:
    text = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    with pytest.raises(SpecError, match=r"^messages: hold too many of the noncharacters"):
        segments([{"role": "user", "content": text}], tokenizer=tokenizer)
    ids = encode_ask(Ask(id="1", kind="", task="", messages=({"role": "user", "content": f"<s>{text[:-4]}"},)), tokenizer)
    assert f"<s>{text[:-4]}" in tokenizer.decode(ids)


def sample_of(*messages: dict[str, Any], thinking: bool = True) -> Sample:
    return Sample(kind="test", messages=messages, thinking=thinking)


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        (sample_of(), r"messages: end with no turn"),
        (sample_of(ASKED), r"messages: end with no turn"),
        (sample_of(ASKED, TOLD, ASKED), r"messages: end with no turn"),
        (sample_of(ASKED, {**TOLD, "reasoning_content": None}), r"messages\[1\]\.reasoning_content=None: a turn that thinks"),
        (
            sample_of(ASKED, {"role": "assistant", "content": "a"}, {"role": "tool", "content": "1"}, TOLD),
            r"messages\[1\]\.reasoning_content=None: a turn that thinks",
        ),
        (sample_of({"role": "user", "content": "/no_think"}, TOLD), r"thinking=True: the messages say /no_think"),
        (sample_of(ASKED, {**TOLD, "content": "a</think>"}), r"messages\[1\]\.content: holds </think>, which would be learned"),
        (sample_of(ASKED, {**TOLD, "reasoning_content": "<s>"}), r"messages\[1\]\.reasoning_content: holds <s>,"),
        (
            sample_of(ASKED, {**TOLD, "tool_calls": [{"name": "f", "arguments": {"a": "</TOOLCALL>"}}]}, thinking=False),
            r"messages\[1\]\.tool_calls: holds </TOOLCALL>",
        ),
    ],
)
def test_samples_that_would_teach_something_else_are_refused(tokenizer: Tokenizer, sample: Sample, says: str) -> None:
    with pytest.raises(SpecError, match=f"^{says}"):
        encode_sample(sample, tokenizer)


def test_thoughts_are_stripped_where_thinking_is_off(tokenizer: Tokenizer) -> None:
    ids, _ = encode_sample(sample_of(ASKED, TOLD, thinking=False), tokenizer)
    assert tokenizer.decode(ids).endswith("Assistant\n<think></think>So.\n\n")


# --- answers and pairs ---


@settings(deadline=None)
@given(
    text=st.lists(st.sampled_from([*CONTROLS, "a", " ", "\n", "<"]) | st.text(max_size=3), max_size=8).map("".join),
    finished=st.booleans(),
)
def test_what_a_model_wrote_is_encoded_with_its_marks_and_one_end(text: str, finished: bool, tokenizer: Tokenizer) -> None:
    ids = encode_answer(text, tokenizer, finished=finished)
    assert tokenizer.decode(ids) == text
    assert [i for i in ids if i <= END] == [END] * finished
    assert sum(text.count(mark) for mark in MARKS) == sum(13 <= i <= 20 for i in ids)


def test_a_pair_is_one_prompt_and_two_answers(tokenizer: Tokenizer) -> None:
    ask = Ask(id="1", kind="", task="", messages=(ASKED,))
    prompt, chosen, rejected = encode_pair(Pair(ask=ask, chosen="a</think>b\n", rejected="c"), tokenizer)
    assert tokenizer.decode(prompt, skip_special_tokens=False) == render([ASKED])
    assert tokenizer.decode(chosen, skip_special_tokens=False) == "a</think>b\n<SPECIAL_12>"
    assert tokenizer.decode(rejected, skip_special_tokens=False) == "c<SPECIAL_12>"


def test_control_tokens_are_the_special_ones_and_the_marks(tokenizer: Tokenizer) -> None:
    assert controls(tokenizer).texts == frozenset(CONTROLS)


# --- rows ---


encoded_samples = st.lists(
    st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=20).map(
        lambda pairs: Encoded(tuple(i for i, _ in pairs), (False, *(learned for _, learned in pairs[1:])))
    ),
    max_size=60,
)


@settings(deadline=None)
@given(samples=encoded_samples, length=st.integers(1, 40), concatenate=st.booleans())
def test_every_sample_lies_in_one_row_whole(samples: list[Encoded], length: int, concatenate: bool) -> None:
    packed = pack(samples, length, concatenate=concatenate, padding=77)
    assert packed.too_long == tuple((i, len(s.ids)) for i, s in enumerate(samples) if len(s.ids) > length)
    placed = [i for row in packed.samples for i in row]
    assert sorted(placed + [i for i, _ in packed.too_long]) == list(range(len(samples)))
    widths = []
    for row, some in enumerate(packed.samples):
        at = 0
        assert list(some) == sorted(some)
        for number, i in enumerate(some):
            ids, learned = samples[i]
            here = slice(at, at + len(ids))
            assert packed.input_ids[row, here].tolist() == list(ids)
            assert packed.labels[row, here].tolist() == [t if flag else IGNORED for t, flag in zip(ids, learned, strict=True)]
            assert packed.documents[row, here].tolist() == [number] * len(ids)
            assert packed.positions[row, here].tolist() == list(range(len(ids)))
            at += len(ids)
        assert (packed.input_ids[row, at:] == 77).all()
        assert (packed.labels[row, at:] == IGNORED).all()
        assert (packed.documents[row, at:] == len(some)).all()
        assert packed.positions[row, at:].tolist() == list(range(packed.input_ids.shape[1] - at))
        widths.append(at)
    assert (
        packed.input_ids.shape == packed.labels.shape == packed.documents.shape == (len(packed.samples), max(widths, default=0))
    )
    assert concatenate or all(len(some) == 1 for some in packed.samples)
    if concatenate and len(packed.samples) <= 32:  # no sample could have gone into an earlier row
        for row, some in enumerate(packed.samples):
            before = [sum(len(samples[j].ids) for j in earlier if j < some[0]) for earlier in packed.samples[:row]]
            assert all(length - taken < len(samples[some[0]].ids) for taken in before)


def test_the_first_token_of_a_sample_is_never_learned_from_the_one_before_it() -> None:
    packed = pack([Encoded((5, 6), (True, True)), Encoded((7, 8), (True, True))], 4)
    assert packed.labels.tolist() == [[IGNORED, 6, IGNORED, 8]]


def test_no_sample_makes_no_row() -> None:
    assert pack([], 8).input_ids.shape == (0, 0)
    assert pack([Encoded((1, 2, 3), (False, True, True))], 2).too_long == ((0, 3),)
    with pytest.raises(SpecError, match=r"^length=0"):
        pack([], 0)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(3)
    mixers = (
        Mamba2(num_heads=4, head_dim=8, state_dim=8, groups=2),
        Attention(num_heads=4, num_kv_heads=2, head_dim=8),
        MLP(ffn_size=64, gated=False),
    )
    return Decoder(ModelSpec(name="tiny", vocab_size=320, hidden_size=32, layers=mixers))


def losses(decoder: Decoder, samples: list[Encoded], *, length: int, concatenate: bool) -> tuple[torch.Tensor, float]:
    """Of each learned token in the order of the samples; and the mean of all by the adapter, which is given positions."""
    packed = pack(samples, length, concatenate=concatenate)
    ids, labels, documents = (torch.from_numpy(a) for a in (packed.input_ids, packed.labels, packed.documents))
    with torch.no_grad():
        logits = decoder(ids, documents=documents)
        nll = functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")
        mean = TandemForCausalLM.from_decoder(decoder)(ids, labels=labels, position_ids=torch.from_numpy(packed.positions)).loss
    found = {
        i: nll[row][(labels[row, 1:] != IGNORED) & (documents[row, 1:] == number)]
        for row, some in enumerate(packed.samples)
        for number, i in enumerate(some)
    }
    return torch.cat([found[i] for i in range(len(samples))]), float(mean)


@settings(deadline=None, max_examples=8)
@given(samples=st.lists(learnable(said=plain), min_size=2, max_size=5))
def test_concatenated_is_separate(tokenizer: Tokenizer, decoder: Decoder, samples: list[Sample]) -> None:
    encoded = [encode_sample(sample, tokenizer) for sample in samples]
    length = max(len(ids) for ids, _ in encoded) * 2
    together, mean = losses(decoder, encoded, length=length, concatenate=True)
    apart, _ = losses(decoder, encoded, length=length, concatenate=False)
    assert len(together) == sum(sum(learned) for _, learned in encoded)
    assert float((together - apart).abs().max()) <= 1e-5
    assert mean == pytest.approx(float(together.mean()), abs=1e-5)


def test_boundaries_matter_to_that_comparison(decoder: Decoder) -> None:
    rng = np.random.default_rng(0)
    one = Encoded(tuple(rng.integers(21, 300, 20).tolist()), (False,) + (True,) * 19)
    packed = pack([one, one], 40)
    ids = torch.from_numpy(packed.input_ids)
    with torch.no_grad():
        kept, mixed = decoder(ids, documents=torch.from_numpy(packed.documents)), decoder(ids)
    assert float((kept[:, :20] - kept[:, 20:]).abs().max()) <= 1e-5
    assert float((mixed[:, :20] - mixed[:, 20:]).abs().max()) > 1e-2
