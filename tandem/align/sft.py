"""Supervised fine-tuning: a decoder learns the assistant's tokens of conversations, by TRL's SFTTrainer.

Ours are the encoding (`tandem.align.encode`) and the loss: the head runs on learned positions alone, in pieces, where TRL's
scores every position and takes several more figures of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

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
from tandem.model.hf import TandemForCausalLM
from tandem.model.hybrid import Decoder
from tandem.model.tokenizer import Tokenizer
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int
from tandem.train.data.packing import IGNORED
from tandem.train.loop import Listener
from tandem.train.loss import Product, summed_nll
from tandem.train.recipe import PrecisionPart
from tandem.train.trainee import head_product

Row = Mapping[str, Sequence[int]]
"""A sequence: `input_ids`, `labels` (the same, `IGNORED` where not learned) and `documents` (numbers of those it holds)."""


@dataclass(frozen=True, kw_only=True)
class SftSettings(TrainerSettings):
    """A stage of supervised fine-tuning. `rows` and `micro` count sequences of `length` tokens."""

    length: int = 512
    """Tokens of a sequence."""
    concatenate: bool = True
    """Whether a sequence holds several conversations, each of which begins anew; else it holds one and is as long as that."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("length", self.length, low=2)


class _Sft(LocalTrainer, SFTTrainer):
    """TRL's trainer with the loss of learned positions alone, and rows that are made already."""

    loss_is_scaled_for_ga = True  # type: ignore[assignment]
    product: Product = torch.mm

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Float[Tensor, ""]:
        """Mean negative log-likelihood (nats) of the learned tokens of a step."""
        labels = inputs["labels"][:, 1:]
        hidden = model.model(inputs["input_ids"], documents=inputs.get("documents"), use_cache=False).last_hidden_state
        learned = labels != IGNORED
        total = summed_nll(hidden[:, :-1][learned], model.lm_head.weight, labels[learned], self.product)
        count = int(learned.sum()) if num_items_in_batch is None else num_items_in_batch
        return total / max(1, int(count))


def collate(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """Rows as int64 tensors [rows, longest], padded on the right, with `attention_mask` (1 at tokens).

    `documents` is there where a row holds more than one; padding counts as one of its own.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), IGNORED)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    documents = torch.full((len(rows), longest), -1)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[i, :length] = torch.tensor(row["input_ids"])
        labels[i, :length] = torch.tensor(row["labels"])
        documents[i, :length] = torch.tensor(row["documents"])
        mask[i, :length] = 1
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    several = any(row["documents"][0] != row["documents"][-1] for row in rows)
    return {**batch, "documents": documents} if several else batch


def train_rows(
    decoder: Decoder,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    settings: SftSettings,
    out: Path,
    *,
    seed: int,
    stage: str = "sft",
    listen: Listener = lambda event: None,
) -> dict[str, Any]:
    """As `run_sft`, on sequences that are made already."""
    if not rows:
        raise SpecError("samples=[]: nothing to learn from; give at least one conversation")
    if not any(label != IGNORED for row in rows for label in row["labels"][1:]):
        raise SpecError("samples: no token of them is learned; they need assistant turns")
    data = fingerprint(numbers for row in rows for numbers in (row["input_ids"], row["labels"], row["documents"]))
    claim(out, stage, settings, decoder, seed=seed, data=data)
    heard = ListenCallback(stage, listen)
    with contained(), trainable(decoder, settings.linears):
        theirs = hub_tokenizer(tokenizer)
        trainer = _Sft(
            model=TandemForCausalLM.from_decoder(decoder),
            args=arguments(
                SFTConfig,
                out,
                seed=seed,
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
                **settings.trainer_fields(len(rows)),
            ),
            train_dataset=Dataset.from_list([dict(row) for row in rows]),
            data_collator=lambda some: collate(some, theirs.pad_token_id),
            processing_class=theirs,
            callbacks=[heard],
        )
        trainer.product = head_product(PrecisionPart(linears=settings.linears))
        train(trainer)
        return {**run_metrics(trainer, heard), "rows": len(rows)}
