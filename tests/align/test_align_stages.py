"""Rewards of the reinforcement stages: form without substance, and answers that were never ended, gain nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest

pytest.importorskip("trl", reason="pip install tandem-lm[train]")
from tandem.align.chat import end_id
from tandem.align.data.reasoning import reasoning_asks
from tandem.align.encode import encode_answer
from tandem.align.reward_model import RewardModel
from tandem.align.stages import model_reward, verified_reward
from tandem.train.data.bpe import train_bpe

TOKENIZER = train_bpe(["ab=12, cd=34. ab?"], 320)
(ASK,) = reasoning_asks(["recall"], 1, 5)
RIGHT = str(ASK.check["answer"])


@dataclass(frozen=True)
class Sampled:
    completion_ids: tuple[int, ...]
    finished: bool = True
    error: str | None = None

    @property
    def text(self) -> str:
        return TOKENIZER.decode(self.completion_ids)

    @property
    def logprobs(self) -> tuple[float, ...]:
        return (-1.0,) * len(self.completion_ids)

    @property
    def chosen(self) -> tuple[bool, ...]:
        return (True,) * len(self.completion_ids)


def written(text: str, *, finished: bool = True) -> Sampled:
    return Sampled(tuple(encode_answer(text, TOKENIZER, finished=finished)), finished)


ANSWERS = {
    "right": written(f"x\n</think>\n\n{RIGHT}"),
    "wrong": written("x\n</think>\n\nzz"),
    "cut": written(f"x\n</think>\n\n{RIGHT}", finished=False),
    "open": written("x"),
    "twice": written(f"x\n</think>\n</think>\n\n{RIGHT}"),
    "hidden": Sampled((*encode_answer(f"x\n</think>\n\n{RIGHT}", TOKENIZER, finished=False), 1, 11, end_id(TOKENIZER))),
}


class Longest:
    """A reward model that likes whatever is asked of it last best."""

    def rewards(self, rows: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [float(i) for i in range(len(rows))]


def test_only_a_whole_right_answer_is_verified() -> None:
    found = verified_reward(TOKENIZER).score([ASK] * len(ANSWERS), list(ANSWERS.values()))
    assert dict(zip(ANSWERS, found, strict=True)) == {name: float(name == "right") for name in ANSWERS}


def test_a_reward_model_is_not_asked_about_what_it_never_saw() -> None:
    reward = model_reward(cast(RewardModel, Longest()), TOKENIZER)
    found = dict(zip(ANSWERS, reward.score([ASK] * len(ANSWERS), list(ANSWERS.values())), strict=True))
    assert found == {"right": 0.0, "wrong": 1.0, "cut": 0.0, "open": 0.0, "twice": 0.0, "hidden": 0.0}
