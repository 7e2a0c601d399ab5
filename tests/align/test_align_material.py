"""What stages learn from: samples and asks in their shares, answers as they were written, portion by portion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from chat_cases import chat_tokenizer

from tandem.align.data.reasoning import reasoning_asks
from tandem.align.encode import encode_answer
from tandem.align.material import read_rollout
from tandem.align.sample import Ask
from tandem.align.verify import verify
from tandem.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Written:
    """An answer of these tokens."""

    completion_ids: tuple[int, ...]
    text: str
    finished: bool = True
    error: str | None = None

    @property
    def logprobs(self) -> tuple[float, ...]:
        return (0.0,) * len(self.completion_ids)

    @property
    def chosen(self) -> tuple[bool, ...]:
        return (True,) * len(self.completion_ids)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def right_text(ask: Ask) -> str:
    return f"steps\n</think>\n\n{ask.check['answer']}" if ask.thinking else str(ask.check["answer"])


def test_special_tokens_before_the_end_are_seen_though_the_text_hides_them(tokenizer: Tokenizer) -> None:
    (ask,) = reasoning_asks(["chain_sum"], 1, 0)
    *ids, end = encode_answer(right_text(ask), tokenizer)
    special = [tokenizer.encode(token, add_special_tokens=False)[0] for token in ("<s>", "<SPECIAL_11>", "<SPECIAL_12>")]
    for at in (0, 3, len(ids)):
        for token in (*special, tokenizer.backend.get_vocab_size()):
            written = (*ids[:at], token, *ids[at:], end)
            assert tokenizer.decode(written) == right_text(ask)
            answer = read_rollout(ask, Written(written, tokenizer.decode(written)), tokenizer)
            assert answer.malformed is not None
            assert answer.hidden
            assert verify(ask, answer) == 0.0
            cut = read_rollout(ask, Written(written[:-1], tokenizer.decode(written), finished=False), tokenizer)
            assert cut.hidden
    plain = read_rollout(ask, Written((*ids, end), tokenizer.decode(ids)), tokenizer)
    assert (plain.malformed, plain.hidden, verify(ask, plain)) == (None, False, 1.0)
