"""Direct preference optimisation (Rafailov et al. 2023) by TRL's DPOTrainer, one round on given pairs.

    loss = -log sigmoid(beta ((log p(chosen) - log p0(chosen)) - (log p(rejected) - log p0(rejected))))

p0 is the model as the round begins: its log-probabilities are computed once, before the first step, so no second model is held.
Rounds on fresh answers are the caller's loop: sample from the decoder that a round left, make pairs, call `run_dpo` again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, concatenate_datasets
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from tandem.align.encode import encode_pair
from tandem.align.sample import Pair
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
from tandem.spec.units import require_int, require_number
from tandem.train.loop import Listener

WIDTH = 32
"""Batches are padded to a multiple of this: oneDNN keeps compiled code and memory for every shape that it has met."""
_LOG = {
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "logps/chosen": "chosen_logp",
    "logps/rejected": "rejected_logp",
}


@dataclass(frozen=True, kw_only=True)
class DpoSettings(TrainerSettings):
    """A round of preference optimisation. `rows` and `micro` count pairs."""

    beta: float = 0.1
    """How strongly the model is held to what it was."""
    sft_weight: float = 0.0
    """Weight of the chosen answers' mean negative log-likelihood in the loss: it keeps their probability from falling."""
    length: int = 512
    """Most tokens of a prompt with an answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("beta", self.beta, high=1e3)
        require_int("length", self.length, low=2)
        if isinstance(self.sft_weight, bool) or not 0 <= self.sft_weight <= 1e3:
            raise SpecError(f"sft_weight={self.sft_weight!r}: must be a number from 0 to 1000")


class EncodedPair(NamedTuple):
    """A pair as tokens; both answers end in the end mark."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def length(self) -> int:
        """Tokens of the prompt with the longer answer."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def encode_pairs(pairs: Sequence[Pair], tokenizer: Tokenizer, length: int) -> tuple[list[EncodedPair], int]:
    """Pairs as tokens, and how many were left out because they are longer than `length`.

    Raises SpecError where none is left, and for a pair whose answers are the same.
    """
    if not pairs:
        raise SpecError("pairs=[]: nothing to learn from; give at least one pair")
    for i, pair in enumerate(pairs):
        if pair.chosen == pair.rejected:
            raise SpecError(f"pairs[{i}] of {pair.ask.id!r}: both answers are the same; leave it out")
    encoded = [EncodedPair(*encode_pair(pair, tokenizer)) for pair in pairs]
    kept = [pair for pair in encoded if pair.length <= length]
    if not kept:
        shortest = min(pair.length for pair in encoded)
        raise SpecError(f"length={length}: every pair is longer, the shortest {shortest} tokens; state more")
    return kept, len(encoded) - len(kept)


class _Dpo(LocalTrainer, DPOTrainer):
    """TRL's trainer on pairs that are tokens already, with the reference's log-probabilities in memory."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """TRL's would write them to the cache of data sets and show a bar."""
        found: dict[str, list[float]] = {"ref_chosen_logps": [], "ref_rejected_logps": []}
        for begin in range(0, len(dataset), batch_size):
            rows = [dataset[i] for i in range(begin, min(begin + batch_size, len(dataset)))]
            logps = self.compute_ref_log_probs(self.model, self._prepare_inputs(self.data_collator(rows)))
            for some, values in zip(found.values(), logps, strict=True):
                some += values.tolist()
        return concatenate_datasets([dataset, Dataset.from_dict(found)], axis=1)


def dpo_trainer(
    decoder: Decoder, tokenizer: Tokenizer, pairs: Sequence[EncodedPair], settings: DpoSettings, out: Path, *, seed: int
) -> _Dpo:
    """TRL's trainer over encoded pairs, the decoder as it is now as the reference."""
    weighted = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, settings.sft_weight]} if settings.sft_weight else {}
    fields = settings.trainer_fields(len(pairs))
    return _Dpo(
        model=TandemForCausalLM.from_decoder(decoder),
        args=arguments(
            DPOConfig,
            out,
            seed=seed,
            use_cpu=decoder.device.type == "cpu",
            beta=settings.beta,
            max_length=None,
            pad_to_multiple_of=WIDTH,
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=fields["per_device_train_batch_size"],
            **weighted,
            **fields,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]
        ),
        processing_class=hub_tokenizer(tokenizer),
    )


def run_dpo(
    decoder: Decoder,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    settings: DpoSettings,
    out: Path,
    *,
    seed: int,
    stage: str = "dpo",
    listen: Listener = lambda event: None,
) -> dict[str, Any]:
    """Teach a decoder, in place, to prefer the chosen answers; what the round came to.

    `accuracy` is the share of pairs whose chosen answer gained more than the rejected one, `margin` by how much (beta times
    nats), `chosen_logp` and `rejected_logp` what the answers have (nats), all of the last step; `course` has loss, accuracy and
    margin on the way. Checkpoints, resuming and errors are those of `run_sft`.
    """
    encoded, left_out = encode_pairs(pairs, tokenizer, settings.length)
    heard = ListenCallback(stage, listen, _LOG)
    with contained(), trainable(decoder, settings.linears):
        claim(out, stage, settings, decoder, seed=seed, data=fingerprint(ids for pair in encoded for ids in pair))
        trainer = dpo_trainer(decoder, tokenizer, encoded, settings, out, seed=seed)
        trainer.add_callback(heard)
        train(trainer)
        found = run_metrics(trainer, heard, course=("accuracy", "margin"))
    return {**found, "pairs": len(encoded), "too_long": left_out}
