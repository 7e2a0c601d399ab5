"""A tiny model, asks, rewards and a generator that samples nothing, for the tests of GRPO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import small_model
from toys import byte_tokenizer

pytest.importorskip("trl", reason="pip install tandem-lm[train]")
from tandem.align.grpo import GrpoSettings, Reward, run_grpo
from tandem.align.rollout import Rollout
from tandem.align.sample import Ask
from tandem.engine.config import EngineConfig
from tandem.engine.rollout import EngineRollouts
from tandem.model.hybrid import Decoder

TOKENIZER = byte_tokenizer(plain=("<think>", "</think>"))
TOKENIZER.special |= {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
CLOSING = TOKENIZER.encode("</think>")[0]
VOCABULARY = TOKENIZER.backend.get_vocab_size()
(WANTED,) = TOKENIZER.encode("x")
ASKS = [
    Ask(id=str(i), kind="chat", task="letters", messages=({"role": "user", "content": text},), thinking=i % 2 == 1)
    for i, text in enumerate(("ab", "cde", "f", "ghij", "kl", "mno"))
]
QUICK = GrpoSettings(steps=2, rows=8, generations=4, max_tokens=6, lr=1e-2, checkpoint_every=100)


def render(ask: Ask) -> list[int]:
    return TOKENIZER.encode(ask.messages[0]["content"])


def decoder_of(seed: int = 0, **options: Any) -> Decoder:
    return small_model("hybrid", vocabulary=VOCABULARY, seed=seed, **options)


def engine(decoder: Decoder) -> EngineRollouts:
    return EngineRollouts(decoder, TOKENIZER, config=EngineConfig(max_batch=32, cache_bytes=1 << 24))


def wanted_share(asks: Sequence[Ask], answers: Sequence[Rollout]) -> list[float]:
    return [sum(token == WANTED for token in answer.completion_ids) / len(answer.completion_ids) for answer in answers]


SHARE = Reward(name="share", score=wanted_share)


@dataclass(frozen=True)
class Written:
    """An answer out of a table."""

    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    chosen: tuple[bool, ...]
    text: str = ""
    finished: bool = False
    error: str | None = None


class Table:
    """A generator that samples nothing: random answers, drawn by the seeds alone; the last but one token was forced."""

    def __init__(self, decoder: Decoder, *, error: str | None = None) -> None:
        self._decoder, self._error = decoder, error
        self.calls: list[dict[str, Any]] = []

    def generate(self, prompts: Sequence[Sequence[int]], **asked: Any) -> list[list[Written]]:
        self.calls.append({"prompts": [tuple(p) for p in prompts], **asked})
        return [[self._one(p, seed) for seed in seeds] for p, seeds in zip(prompts, asked["seeds"], strict=True)]

    @torch.no_grad()
    def _one(self, prompt: Sequence[int], seed: int) -> Written:
        random = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCABULARY, (int(torch.randint(3, 7, (1,), generator=random)),), generator=random)
        logits = self._decoder(torch.tensor([[*prompt, *ids.tolist()]]))[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        chosen = [i != len(ids) - 2 for i in range(len(ids))]
        return Written(tuple(ids.tolist()), tuple(logps.tolist()), tuple(chosen), finished=len(ids) > 4, error=self._error)


def first_id(asks: Sequence[Ask], answers: Sequence[Rollout]) -> list[float]:
    return [answer.completion_ids[0] / 100 for answer in answers]


FIRST = Reward(name="first", score=first_id)


def run(decoder: Decoder, out: Path, settings: GrpoSettings = QUICK, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"rewards": [SHARE], "generator": None, "seed": 0, "render": render, "asks": ASKS, **options}
    given["generator"] = given["generator"] or engine(decoder)
    return run_grpo(decoder, TOKENIZER, settings=settings, out=out, **given)


class Interrupted(Exception):
    """Ends a run when what was looked for is there."""
