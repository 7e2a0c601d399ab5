"""TRL's GRPO trainer as `tandem.align.grpo` runs it: a given reference, another baseline, less padding, more figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from tandem.align.rollout import Rollouts
from tandem.align.trl import LocalTrainer
from tandem.model.hf import TandemForCausalLM

if TYPE_CHECKING:
    from tandem.align.grpo import GrpoSettings


class RolloutTrainer(LocalTrainer, GRPOTrainer):
    """TRL's trainer with a reference that is given, a leave-one-out baseline and more figures.

    Groups whose rewards are all equal have nothing to teach: no forward pass is spent on them after their rewards, so they are
    neither in the loss, beyond its count of tokens, nor in its figures.
    """

    def take(self, settings: GrpoSettings, reference: TandemForCausalLM, rollouts: Rollouts) -> None:
        """What TRL's constructor has no arguments for."""
        self._settings, self._rollouts = settings, rollouts
        self._logps: Tensor | None = None
        add_fused_lm_head(reference, temperature=self.temperature)
        self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self.beta = settings.beta

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = super()._calculate_rewards(*args, **kwargs)
        groups = (found * self.reward_weights).sum(1).view(-1, self._settings.generations)
        self._flat = (groups == groups[:, :1]).all(1)
        return found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.beta = 0.0  # so that TRL leaves the reference's log-probabilities to what follows
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        settings, count = self._settings, self._settings.generations
        self.beta = settings.beta
        for name, value in {**self._rollouts.figures, "flat_groups": float(self._flat.sum())}.items():
            self._metrics["train"][f"tandem/{name}"].append(value)
        # Rounding of the mean would leave equal rewards a trace, which the standard deviation of almost 0 makes large.
        flat = self._flat.repeat_interleave(count)[self.accelerator.process_index * len(inputs) :][: len(inputs)]
        output["advantages"] = output["advantages"].masked_fill(flat, 0.0)
        output["advantages"] *= count / (count - 1)  # r - mean of the others = (r - mean of all) * n / (n - 1)
        learned = self._learned(flat)
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        output["ref_per_token_logps"] = torch.zeros_like(output["completion_mask"], dtype=torch.float32)
        with torch.no_grad():
            logps, _, _ = self._get_per_token_logps_and_entropies(
                self.ref_model, ids[learned], mask[learned], output["completion_ids"].shape[1], batch_size=settings.pass_rows
            )
        output["ref_per_token_logps"][learned] = logps
        output["learned"] = learned
        return output

    def _learned(self, flat: Tensor) -> Tensor:
        """Which answers are learned from: (answers,), those of flat groups not, but one a forward pass at least."""
        passes = self.args.gradient_accumulation_steps * self._settings.updates
        lacking = max(0, passes - int((~flat).sum()))
        filled: Tensor = ~flat
        filled[flat.nonzero()[:lacking, 0]] = True
        return filled

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before or not self.model.training:
            return inputs
        self._buffered_inputs = _passes(self._buffered_inputs, self._settings.updates)
        return self._buffered_inputs[self._step % len(self._buffered_inputs)]

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As TRL's, but rows of like length go together, and columns that are padding in all of them are left out."""
        rows, time = input_ids.shape
        order = attention_mask.sum(1).argsort(stable=True)
        found: list[Tensor] = [input_ids.new_zeros(rows, logits_to_keep, dtype=torch.float32) for _ in range(2)]
        entropies = None
        for some in order.split(batch_size or rows):
            held = attention_mask[some].any(0).nonzero()
            begin, end = int(held[0]), max(int(held[-1]) + 1, time - logits_to_keep + 1)
            kept = logits_to_keep - (time - end)
            ids, mask = input_ids[some, begin:end], attention_mask[some, begin:end]
            logps, entropies, _ = super()._get_per_token_logps_and_entropies(model, ids, mask, kept, **kwargs)
            for i, values in enumerate((logps, entropies)):
                if values is not None:
                    padded = functional.pad(values, (0, logits_to_keep - kept)).float()
                    found[i] = found[i].index_copy(0, some, padded)
        if torch.is_grad_enabled():
            self._logps = found[0].detach()
        return found[0], None if entropies is None else found[1], None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss: Tensor = super()._compute_loss(model, inputs)
        if self._logps is not None:
            mask = inputs["completion_mask"] * inputs["tool_mask"]
            tokens = mask.sum().clamp(min=1)
            figures, logps, self._logps = self._metrics["train"], self._logps, None
            if self.state.global_step % self._settings.updates == 0:  # later updates have moved away from what sampled
                gap = (logps - inputs["sampling_per_token_logps"]).abs()
                figures["tandem/logprob_gap"].append(float((gap * mask).sum() / tokens))
            apart = inputs["ref_per_token_logps"] - logps
            figures["tandem/kl"].append(float(((apart.exp() - apart - 1) * mask).sum() / tokens))
        return loss


def _passes(batches: Sequence[dict[str, Any]], updates: int) -> list[dict[str, Any]]:
    """As many batches of the answers that are learned from; those of an update sorted by length, so that little is padding."""
    whole = {
        name: value if not isinstance(value, Tensor) or value.dim() == 0 else torch.cat([batch[name] for batch in batches])
        for name, value in batches[0].items()
    }
    length = whole["prompt_mask"].sum(1) + whole["completion_mask"].sum(1)
    learned = whole.pop("learned").nonzero()[:, 0]
    return [
        {name: value[some] if isinstance(value, Tensor) and value.dim() else value for name, value in whole.items()}
        for update in learned.tensor_split(updates)
        for some in update[length[update].argsort(stable=True)].tensor_split(len(batches) // updates)
    ]
