"""A reward model: a decoder's layers with one number at the last token, learned from pairs by TRL's RewardTrainer.

loss = -log sigmoid(r(chosen) - r(rejected))          (Bradley and Terry 1952)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Bool, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from tandem.align.dpo import WIDTH, EncodedPair, encode_pairs
from tandem.align.encode import encode_answer, encode_ask
from tandem.align.sample import Ask, Pair
from tandem.align.trl import (
    ListenCallback,
    LocalTrainer,
    TrainerSettings,
    arguments,
    claim,
    contained,
    fingerprint,
    hub_tokenizer,
    run_metrics,
    train,
    trainable,
)
from tandem.model.checkpoint import new_folder
from tandem.model.hf import TandemModel, TandemPreTrainedModel
from tandem.model.hf_config import TandemConfig
from tandem.model.hybrid import Decoder
from tandem.model.load import load_model, save_model
from tandem.model.tokenizer import Tokenizer
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int
from tandem.train.evaluate import Accuracy, evaluating
from tandem.train.loop import Listener

_HEAD = "reward_head.safetensors"
_LOG = {"accuracy": "accuracy", "margin": "margin", "mean_reward": "mean_reward"}


@dataclass(frozen=True, kw_only=True)
class RewardSettings(TrainerSettings):
    """How a reward model is trained. `rows` and `micro` count pairs."""

    length: int = 512
    """Most tokens of a prompt with an answer."""
    held_out: float = 0.1
    """Share of the questions whose pairs are not learned from: on them the accuracy is measured."""
    centre: float = 0.0
    """Weight of (r(chosen) + r(rejected))^2 in the loss, which keeps rewards around 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("length", self.length, low=2)
        for name, most in (("held_out", 0.9), ("centre", 1e3)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
                raise SpecError(f"{name}={value!r}: must be a number from 0 to {most:g}")


class RewardModel(TandemPreTrainedModel):
    """The layers of a decoder, sharing every parameter, and a linear head of one output without bias, 0 at first."""

    def __init__(self, decoder: Decoder) -> None:
        config = TandemConfig.of(decoder)
        config.num_labels = 1
        super().__init__(config)
        self.model = TandemModel(config, decoder)
        weight = decoder.backbone.embeddings.weight
        self.score = nn.Linear(config.hidden_size, 1, bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.score.weight)
        self.post_init()
        self.train(decoder.training)

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"] | Bool[Tensor, "b t"] | None = None,
        documents: Int[Tensor, "b t"] | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Rewards, `logits` [rows, 1], fp32: each row's at its last token, on whichever side its padding (mask 0) is.

        With `documents`, numbers of those that are packed into a row, [documents of all rows, 1], in their order.
        """
        hidden = self.model(input_ids, attention_mask, documents=documents, use_cache=False).last_hidden_state
        ends = _ends(input_ids, attention_mask, documents)
        if documents is None and int(ends.sum()) != len(input_ids):
            raise SpecError("attention_mask: each row must hold tokens, one after the other")
        return SequenceClassifierOutput(logits=self.score(hidden[ends]).float())

    def rewards(self, rows: Sequence[Sequence[int]], *, tokens: int = 8192) -> list[float]:
        """Rewards of token sequences, each a prompt with its answer; at most so many `tokens` at once, padding included."""
        if any(not row for row in rows):
            raise SpecError("rows: one is empty; each must hold a token at least")
        found = [0.0] * len(rows)
        with evaluating(self):
            for some in _batches([len(row) for row in rows], tokens):
                longest = -(-max(len(rows[i]) for i in some) // WIDTH) * WIDTH
                ids, mask = torch.zeros(2, len(some), longest, dtype=torch.int64, device=self.device)
                for n, i in enumerate(some):
                    ids[n, : len(rows[i])] = torch.tensor(rows[i])
                    mask[n, : len(rows[i])] = 1
                for i, reward in zip(some, self(ids, mask).logits[:, 0].tolist(), strict=True):
                    found[i] = reward
        return found

    def save(self, folder: Path) -> None:
        """Write the decoder as `save_model` does, and the head beside it. A folder never holds half of a model."""
        with new_folder(folder) as draft:
            save_file({"weight": self.score.weight.detach().contiguous()}, draft / _HEAD)
            save_model(self.model.decoder, draft)

    @classmethod
    def load(cls, folder: Path, *, dtype: str = "float32", device: torch.device | str = "cpu") -> RewardModel:
        """What `save` wrote. Raises SpecError for a folder without a head, or with that of another model."""
        file = folder / _HEAD
        if not file.is_file():
            raise SpecError(f"reward_model={str(folder)!r}: holds no {_HEAD}; name a folder of a reward model")
        model = cls(load_model(folder, dtype=dtype, device=device))
        try:
            weight = load_file(file).get("weight")
        except (OSError, SafetensorError) as wrong:
            raise SpecError(f"{file}: cannot be read ({wrong})") from None
        if weight is None or weight.shape != model.score.weight.shape:
            raise SpecError(f"{file}: is not of this model; it must hold weight {list(model.score.weight.shape)}")
        with torch.no_grad():
            model.score.weight.copy_(weight)
        return model


def _ends(
    ids: Int[Tensor, "b t"], mask: Int[Tensor, "b t"] | Bool[Tensor, "b t"] | None, documents: Int[Tensor, "b t"] | None
) -> Bool[Tensor, "b t"]:
    """The last token of each document: after it comes padding, another document or nothing."""
    tokens = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    follows = tokens[:, 1:]
    if documents is not None:
        follows = follows & (documents[:, 1:] == documents[:, :-1])
    return tokens & ~torch.cat([follows, torch.zeros_like(tokens[:, :1])], 1)


def _batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Numbers of rows, those of like length together, as many as fit."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if not found or (len(found[-1]) + 1) * (lengths[i] + WIDTH) > tokens:
            found.append([])
        found[-1].append(i)
    return found


def score(model: RewardModel, tokenizer: Tokenizer, asks_and_texts: Sequence[tuple[Ask, str]]) -> list[float]:
    """What answers (texts after the prompt, as if ended) are worth to a reward model; only differences mean something."""
    return model.rewards([[*encode_ask(ask, tokenizer), *encode_answer(text, tokenizer)] for ask, text in asks_and_texts])


class _Reward(LocalTrainer, RewardTrainer):
    """TRL's trainer."""


def reward_trainer(
    model: RewardModel, tokenizer: Tokenizer, pairs: Sequence[EncodedPair], settings: RewardSettings, out: Path, *, seed: int
) -> _Reward:
    """TRL's trainer over encoded pairs."""
    return _Reward(
        model=model,
        args=arguments(
            RewardConfig,
            out,
            seed=seed,
            use_cpu=model.device.type == "cpu",
            max_length=None,
            pad_to_multiple_of=WIDTH,
            center_rewards_coefficient=settings.centre or None,
            **settings.trainer_fields(len(pairs)),
        ),
        train_dataset=Dataset.from_list(
            [{"chosen_ids": p.prompt + p.chosen, "rejected_ids": p.prompt + p.rejected} for p in pairs]
        ),
        processing_class=hub_tokenizer(tokenizer),
    )


def split_pairs(pairs: Sequence[Pair], held_out: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to learn from and pairs that are held out; all pairs of a question are on one side, whatever their order."""
    parts: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        parts[Random(f"{seed}:{pair.ask.id}").random() < held_out].append(pair)
    return parts


def train_reward_model(
    decoder: Decoder,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    settings: RewardSettings,
    out: Path,
    *,
    seed: int,
    stage: str = "reward-model",
    listen: Listener = lambda event: None,
) -> tuple[RewardModel, dict[str, Any]]:
    """A reward model out of a decoder, which is trained in place (give a copy of one that is still needed), and how good it is.

    The metrics' `accuracy`, `margin` and `mean_reward` are of the pairs of the last step, `course` has the first two on the
    way. `held_out` has `accuracy`, `low`, `high` and `count` of the pairs that were not learned from; it is None where
    there are none. Checkpoints, resuming and errors are those of `run_sft`; `RewardModel.save` writes the model.
    """
    learned, kept_back = split_pairs(pairs, settings.held_out, seed)
    encoded, left_out = encode_pairs(learned or pairs, tokenizer, settings.length)
    heard = ListenCallback(stage, listen, _LOG)
    with contained(), trainable(decoder, settings.linears):
        claim(out, stage, settings, decoder, seed=seed, data=fingerprint(ids for pair in encoded for ids in pair))
        model = RewardModel(decoder)
        trainer = reward_trainer(model, tokenizer, encoded, settings, out, seed=seed)
        trainer.add_callback(heard)
        train(trainer)
        found = run_metrics(trainer, heard, course=("accuracy", "margin"))
    accuracy = pair_accuracy(model, tokenizer, kept_back) if learned and kept_back else None
    held_out = accuracy and {
        "accuracy": accuracy.share,
        "low": accuracy.low,
        "high": accuracy.high,
        "count": accuracy.count,
    }
    return model, {**found, "pairs": len(encoded), "too_long": left_out, "held_out": held_out}


def pair_accuracy(model: RewardModel, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> Accuracy:
    """In how many pairs the chosen answer has the higher reward."""
    chosen = score(model, tokenizer, [(pair.ask, pair.chosen) for pair in pairs])
    rejected = score(model, tokenizer, [(pair.ask, pair.rejected) for pair in pairs])
    return Accuracy(correct=sum(a > b for a, b in zip(chosen, rejected, strict=True)), count=len(pairs))
