"""GRPO by TRL's trainer with rollouts of our own: answers to prompts are sampled in groups, scored, and learned from.

    A     = reward - baseline of the group, over the group's standard deviation where that is asked for
    r     = pi(token) / pi_old(token)
    loss  = - mean over tokens of min(r A, clip(r, 1 - low, 1 + high) A) - beta * (ref/pi - log(ref/pi) - 1)

(Shao et al., arXiv:2402.03300; the mean over all tokens of a step and the higher upper clip are DAPO's, arXiv:2503.14476.)
Read `run_grpo` first.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from datasets import Dataset
from torch import Tensor
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from tandem.align.rollout import Generator, Rollout, Rollouts
from tandem.align.sample import Ask
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

Loss = Literal["dapo", "bnpo", "grpo", "dr_grpo"]
Baseline = Literal["leave-one-out", "group"]
Correction = Literal["none", "token", "sequence"]
Score = Callable[[Sequence[Ask], Sequence[Rollout]], Sequence[float]]
"""What each answer of a batch is worth: a verifier's verdict, a reward model's score."""
Render = Callable[[Ask], Sequence[int]]
"""A conversation as the tokens of a prompt; it ends inside the thinking block where `Ask.thinking` is true."""

_COURSE = ("reward", "tandem/kl", "tandem/finished", "tandem/length", "tandem/flat_groups")
_LOG = {
    "reward": "reward",
    "reward_std": "reward_std",
    "entropy": "entropy",
    "clip_ratio/region_mean": "clip_share",
    **{
        f"tandem/{name}": name
        for name in (
            "kl", "logprob_gap", "finished", "length", "forced_share", "flat_groups", "rollout_s", "rollout_tokens_per_s"
        )
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Reward:
    """One function that scores answers; the rewards of several are added by weight."""

    name: str
    score: Score
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class GrpoSettings(TrainerSettings):
    """How a GRPO run samples and learns. `rows` and `micro` count answers, `steps` those of the optimiser.

    The paper states none of these; 64 prompts of 16 answers and the rates and clips below are those of NVIDIA's public scripts.
    """

    rows: int = 1024
    generations: int = 16
    """Answers to each prompt."""
    updates: int = 1
    """Steps of the optimiser on each batch of answers; such a batch has `rows * updates` of them."""
    max_tokens: int = 512
    """Of an answer."""
    temperature: float = 1.0
    thinking_budget: int | None = None
    """Thinking tokens of asks that think, after which their block is closed; None for none."""
    lr: float = 5e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0
    beta2: float = 0.999
    clip_low: float = 0.2
    clip_high: float = 0.28
    """A token's ratio to the policy that sampled it counts up to 1 - `clip_low` and 1 + `clip_high`."""
    beta: float = 0.0
    """Weight of the KL divergence (k3) from the model at the start, in the loss."""
    loss: Loss = "dapo"
    """TRL's names: mean over all tokens of a step, of a forward pass, of each answer, or over `max_tokens` an answer."""
    baseline: Baseline = "leave-one-out"
    """Mean reward of the group, without or with the answer itself."""
    normalise: bool = True
    """Divide advantages by the standard deviation of their group's rewards."""
    correction: Correction = "none"
    """Weigh by pi_trainer / pi_generator, at most `correction_max`: for generators whose arithmetic is not the trainer's."""
    correction_max: float = 2.0
    mask_unfinished: bool = False
    """Learn nothing from answers that the limit cut off."""
    kl_every: int | None = 1
    """Batches between measurements of the KL divergence where `beta` is 0; None for never, which saves the second model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("generations", 2), ("updates", 1), ("max_tokens", 1)):
            require_int(name, getattr(self, name), low=low)
        for name, low in (("thinking_budget", 0), ("kl_every", 1)):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), low=low)
        for name in ("temperature", "correction_max"):
            require_number(name, getattr(self, name), high=100.0)
        for name in ("clip_low", "clip_high", "beta"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 0 <= value < (1 if name == "clip_low" else 100)
            ):
                raise SpecError(f"{name}={value!r}: must be a number from 0 to below {1 if name == 'clip_low' else 100}")
        for name, allowed in (("loss", get_args(Loss)), ("baseline", get_args(Baseline)), ("correction", get_args(Correction))):
            if getattr(self, name) not in allowed:
                raise SpecError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        if self.rows * self.updates % self.generations:
            whole = f"rows={self.rows}" if self.updates == 1 else f"rows={self.rows}, updates={self.updates}"
            raise SpecError(f"{whole}: a batch of answers must be a multiple of generations={self.generations}")
        if self.checkpoint_every % self.updates:
            raise SpecError(f"checkpoint_every={self.checkpoint_every}: must be a multiple of updates={self.updates}")
        if self.linears != "fp32":
            raise SpecError(f"linears={self.linears!r}: rollouts compute in fp32, so the trainer does; leave it out")

    @property
    def prompts(self) -> int:
        """Prompts of a batch of answers."""
        return self.rows * self.updates // self.generations

    def trainer_fields(self, examples: int) -> dict[str, Any]:
        """As of any stage, and what is GRPO's own; `examples` are answers."""
        usual = super().trainer_fields(examples)
        return {
            **usual,
            "include_num_input_tokens_seen": "no",  # GRPO counts itself
            "steps_per_generation": usual["gradient_accumulation_steps"] * self.updates,
            "num_generations": self.generations,
            "max_completion_length": self.max_tokens,
            "temperature": self.temperature,
            "epsilon": self.clip_low,
            "epsilon_high": self.clip_high,
            "beta": 0.0,  # with another, TRL would look for the reference in a folder; `_Grpo.take` gives it one
            "use_bias_correction_kl": False,
            "loss_type": self.loss,
            "scale_rewards": "group" if self.normalise else "none",
            "mask_truncated_completions": self.mask_unfinished,
            "vllm_importance_sampling_correction": self.correction != "none",
            "vllm_importance_sampling_mode": f"{'token' if self.correction == 'none' else self.correction}_truncate",
            "vllm_importance_sampling_clip_max": self.correction_max,
        }


def run_grpo(
    decoder: Decoder,
    tokenizer: Tokenizer,
    asks: Sequence[Ask],
    rewards: Sequence[Reward],
    generator: Generator,
    settings: GrpoSettings,
    out: Path,
    *,
    render: Render,
    seed: int,
    stage: str = "grpo",
    listen: Listener = lambda event: None,
) -> dict[str, Any]:
    """Train `decoder` in place; what the run comes to, with the `course` of reward, KL and length. `out` is gone on with.

    `generator` samples from `decoder` itself. The reference of the KL divergence is `decoder` as it is given, so a run is gone
    on with from the same beginning. Events `{"kind": "step", "stage", "step", ...}` have, beside those of every stage:
    reward, reward_std, kl (nats a token), entropy, clip_share (of tokens), finished (share of answers), length (tokens an
    answer), forced_share (of tokens), flat_groups (all rewards equal: nothing to learn), logprob_gap (nats, trainer against
    generator), rollout_s, rollout_tokens_per_s, rollout_share (of the step's time). Raises SpecError for too few asks and for
    rewards that are no numbers, Diverged where the model's numbers overflow.
    """
    if len(asks) < settings.prompts:
        raise SpecError(f"asks: has {len(asks)} entries; a batch of answers needs {settings.prompts} prompts")
    if not rewards:
        raise SpecError("rewards=[]: needs at least one")
    prompts = [tuple(render(ask)) for ask in asks]
    context = decoder.spec.max_context
    for ask, ids in zip(asks, prompts, strict=True):
        if not 0 < len(ids) < context:
            raise SpecError(f"ask {ask.id!r}: has {len(ids):,} tokens; the model reads from 1 to {context - 1:,}")
    names = [(*f"{reward.name} {reward.weight}".encode(),) for reward in rewards]
    claim(out, stage, settings, decoder, seed=seed, data=fingerprint([*names, *prompts]))
    heard = ListenCallback(stage, _with_share(listen), _LOG)
    rollouts = Rollouts(
        generator,
        asks,
        prompts,
        count=settings.generations,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        thinking_budget=settings.thinking_budget,
        seed=seed,
    )
    with contained(), trainable(decoder, settings.linears):
        warnings.filterwarnings("ignore", "You are using 'rollout_func'", UserWarning)
        reference = None
        if settings.beta > 0 or settings.kl_every is not None:
            reference = TandemForCausalLM.from_decoder(copy.deepcopy(decoder)).requires_grad_(False)
        trainer = _Grpo(
            model=TandemForCausalLM.from_decoder(decoder),
            reward_funcs=[_reward_function(reward, rollouts) for reward in rewards],
            args=arguments(
                GRPOConfig,
                out,
                seed=seed,
                reward_weights=[reward.weight for reward in rewards],
                **settings.trainer_fields(len(asks) * settings.generations),
            ),
            train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(len(asks))]}),
            processing_class=hub_tokenizer(tokenizer),
            callbacks=[heard],
            rollout_func=rollouts,
        )
        trainer.take(settings, reference, rollouts)
        train(trainer)
        ours = {name: name.rpartition("/")[2] for name in _LOG if name in _COURSE}
        course = [
            {"step": entry["step"], **{name: entry[theirs] for theirs, name in ours.items() if theirs in entry}}
            for entry in trainer.state.log_history
            if "reward" in entry
        ]
        last = {name: value for name, value in heard.last.items() if name in _LOG.values()}
        return {**last, **run_metrics(trainer, heard), "course": course}


class _Grpo(LocalTrainer, GRPOTrainer):
    """TRL's trainer with a reference that is given, a leave-one-out baseline and more figures."""

    def take(self, settings: GrpoSettings, reference: TandemForCausalLM | None, rollouts: Rollouts) -> None:
        """What TRL's constructor has no arguments for."""
        self._settings, self._rollouts = settings, rollouts
        self._logps: Tensor | None = None
        if reference is not None:
            add_fused_lm_head(reference, temperature=self.temperature)
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self.beta = settings.beta
        if settings.correction != "none":  # TRL corrects only what it takes for vLLM's
            self.use_vllm, self._last_loaded_step = True, -1
            self.vllm_generation: Any = _SameWeights()

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = super()._calculate_rewards(*args, **kwargs)
        groups = (found * self.reward_weights).sum(1).view(-1, self._settings.generations)
        self._flat = (groups == groups[:, :1]).all(1)
        return found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        settings, count = self._settings, self._settings.generations
        for name, value in {**self._rollouts.figures, "flat_groups": float(self._flat.sum())}.items():
            self._metrics["train"][f"tandem/{name}"].append(value)
        # Rounding of the mean would leave equal rewards a trace, which the standard deviation of almost 0 makes large.
        flat = self._flat.repeat_interleave(count)[self.accelerator.process_index * len(inputs) :][: len(inputs)]
        output["advantages"] = output["advantages"].masked_fill(flat, 0.0)
        if settings.baseline == "leave-one-out":  # r - mean of the others = (r - mean of all) * n / (n - 1)
            output["advantages"] *= count / (count - 1)
        batch = self.state.global_step // settings.updates
        if "ref_per_token_logps" not in output and settings.kl_every is not None and batch % settings.kl_every == 0:
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
            mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
            with torch.no_grad():
                output["ref_per_token_logps"], _, _ = self._get_per_token_logps_and_entropies(
                    self.ref_model, ids, mask, output["completion_ids"].shape[1], batch_size=settings.micro or settings.rows
                )
        return output

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before or not self.model.training:
            return inputs
        passes = self.args.gradient_accumulation_steps
        batches: list[dict[str, Any]] = self._buffered_inputs
        updates = [batches[i : i + passes] for i in range(0, len(batches), passes)]
        self._buffered_inputs = [part for some in updates for part in _by_length(some, self.args.train_batch_size)]
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
                    padded = torch.nn.functional.pad(values, (0, logits_to_keep - kept)).float()
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
            if "ref_per_token_logps" in inputs:
                apart = inputs["ref_per_token_logps"] - logps
                figures["tandem/kl"].append(float(((apart.exp() - apart - 1) * mask).sum() / tokens))
        return loss


def _by_length(batches: Sequence[dict[str, Any]], rows: int) -> list[dict[str, Any]]:
    """The batches of one step of the optimiser with their answers sorted by length, so that little of each is padding."""
    whole = {
        name: value if not isinstance(value, Tensor) or value.dim() == 0 else torch.cat([batch[name] for batch in batches])
        for name, value in batches[0].items()
    }
    order = (whole["prompt_mask"].sum(1) + whole["completion_mask"].sum(1)).argsort(stable=True)
    return [
        {name: value[some] if isinstance(value, Tensor) and value.dim() else value for name, value in whole.items()}
        for some in order.split(rows)
    ]


class _SameWeights:
    """TRL's engine to be told of new weights. Ours computes with the trainer's own."""

    def sync_weights(self) -> None:
        """Nothing to do."""


def _with_share(listen: Listener) -> Listener:
    """Events with the share of the time that went into rollouts, where there were any."""

    def told(event: dict[str, Any]) -> None:
        if "rollout_s" in event and event["seconds"] > 0:
            event["rollout_share"] = event["rollout_s"] / event["seconds"]
        listen(event)

    return told


def _reward_function(reward: Reward, rollouts: Rollouts) -> Callable[..., list[float]]:
    """A reward as TRL calls it."""

    def score(**_: Any) -> list[float]:
        found = [float(value) for value in reward.score(rollouts.asks, rollouts.answers)]
        if len(found) != len(rollouts.answers):
            raise SpecError(f"reward {reward.name!r} gives {len(found)} scores: there are {len(rollouts.answers)} answers")
        wrong = next((value for value in found if not math.isfinite(value)), None)
        if wrong is not None:
            raise SpecError(f"reward {reward.name!r} gives {wrong}: must be a number")
        return found

    score.__name__ = reward.name
    return score
