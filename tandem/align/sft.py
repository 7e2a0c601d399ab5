"""Supervised fine-tuning: a decoder learns the assistant's tokens of conversations, by TRL's SFTTrainer.

Ours are the encoding (`tandem.align.encode`) and the loss: the head runs on learned positions alone, in pieces, where TRL's
scores every position and takes several more figures of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from tandem.align.encode import Packed, encode_sample, pack
from tandem.align.sample import Sample
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

_WIDTH = 32
"""Rows are cut to a multiple of this: oneDNN keeps compiled code and memory for every shape that it has met."""


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


def collate(packed: Packed, rows: Sequence[int]) -> dict[str, Tensor]:
    """Some rows as int64 tensors [rows, time], no wider than they need be, with `attention_mask` (1 at tokens).

    `documents` is there where a row holds more than one sample.
    """
    numbers = torch.from_numpy(packed.documents[rows])
    held = torch.tensor([[len(packed.samples[row])] for row in rows])
    mask = (numbers < held).long()
    width = -(-int(mask.sum(1).max()) // _WIDTH) * _WIDTH
    batch = {
        "input_ids": torch.from_numpy(packed.input_ids[rows])[:, :width],
        "labels": torch.from_numpy(packed.labels[rows])[:, :width],
        "attention_mask": mask[:, :width],
    }
    return {**batch, "documents": numbers[:, :width]} if int(held.max()) > 1 else batch


def sft_trainer(decoder: Decoder, tokenizer: Tokenizer, packed: Packed, settings: SftSettings, out: Path, *, seed: int) -> _Sft:
    """TRL's trainer over rows that are made already."""
    trainer = _Sft(
        model=TandemForCausalLM.from_decoder(decoder),
        args=arguments(
            SFTConfig,
            out,
            seed=seed,
            use_cpu=decoder.device.type == "cpu",
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            **settings.trainer_fields(len(packed.samples)),
        ),
        train_dataset=Dataset.from_dict({"row": range(len(packed.samples))}),
        data_collator=lambda rows: collate(packed, [row["row"] for row in rows]),
        processing_class=hub_tokenizer(tokenizer),
    )
    trainer.product = head_product(PrecisionPart(linears=settings.linears))
    return trainer


def run_sft(
    decoder: Decoder,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    settings: SftSettings,
    out: Path,
    *,
    seed: int,
    stage: str = "sft",
    listen: Listener = lambda event: None,
) -> dict[str, Any]:
    """Teach a decoder, in place, the assistant's turns of conversations; what the run came to.

    The folder `out` holds checkpoints, from which the same call goes on, to the bit as if it had not been interrupted. Samples
    longer than a sequence are left out and counted (`too_long`). `learned` is the share of all tokens that is learned, `course`
    the loss on the way. Raises SpecError where there is nothing to learn or `out` holds another run, Diverged for a loss that
    is not a number.
    """
    if not samples:
        raise SpecError("samples=[]: nothing to learn from; give at least one conversation")
    encoded = [encode_sample(sample, tokenizer) for sample in samples]
    packed = pack(encoded, settings.length, concatenate=settings.concatenate)
    left_out = len(packed.too_long)
    if left_out == len(samples):
        shortest = min(length for _, length in packed.too_long)
        raise SpecError(f"length={settings.length}: every sample is longer, the shortest {shortest} tokens; state more")
    found = train_packed(decoder, tokenizer, packed, settings, out, seed=seed, stage=stage, listen=listen)
    return {**found, "samples": len(samples) - left_out, "too_long": left_out}


def train_packed(
    decoder: Decoder,
    tokenizer: Tokenizer,
    packed: Packed,
    settings: SftSettings,
    out: Path,
    *,
    seed: int,
    stage: str = "sft",
    listen: Listener = lambda event: None,
) -> dict[str, Any]:
    """As `run_sft`, on samples that are in rows already."""
    learned = int((packed.labels != IGNORED).sum())
    if not learned:
        raise SpecError("samples: no token of them is learned; they need turns of an assistant")
    data = fingerprint([*packed.input_ids, *packed.labels, *packed.documents])
    heard = ListenCallback(stage, listen)
    with contained(), trainable(decoder, settings.linears):
        claim(out, stage, settings, decoder, seed=seed, data=data)
        trainer = sft_trainer(decoder, tokenizer, packed, settings, out, seed=seed)
        trainer.add_callback(heard)
        train(trainer)
        found = run_metrics(trainer, heard)
    held = np.array([[len(some)] for some in packed.samples])
    return {**found, "rows": len(packed.samples), "learned": learned / int((packed.documents < held).sum())}
