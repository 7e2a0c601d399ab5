"""GRPO by TRL's trainer with rollouts of our own: answers to prompts are sampled in groups, scored, and learned from.

    A     = reward - mean reward of the group's other answers, over the group's standard deviation
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
from typing import Any, Literal

from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig

from tandem.align.grpo_trainer import RolloutTrainer
from tandem.align.rollout import Generator, Rollout, Rollouts
from tandem.align.sample import Ask
from tandem.align.trl import (
    ListenCallback,
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

Score = Callable[[Sequence[Ask], Sequence[Rollout]], Sequence[float]]
"""What each answer of a batch is worth: a verifier's verdict, a reward model's score."""
Render = Callable[[Ask], Sequence[int]]
"""A conversation as the tokens of a prompt; it ends inside the thinking block where `Ask.thinking` is true."""

_COURSE = ("reward", "kl", "finished", "length", "flat_groups")
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
    micro: int | None = None
    """Answers of one forward pass, a divisor of `rows`; None: the largest up to 32."""
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
    normalise: bool = True
    """Divide advantages by the standard deviation of their group's rewards."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("generations", 2), ("updates", 1), ("max_tokens", 1)):
            require_int(name, getattr(self, name), low=low)
        if self.thinking_budget is not None:
            require_int("thinking_budget", self.thinking_budget, low=0)
        require_number("temperature", self.temperature, high=100.0)
        for name in ("clip_low", "clip_high", "beta"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 0 <= value < (1 if name == "clip_low" else 100)
            ):
                raise SpecError(f"{name}={value!r}: must be a number from 0 to below {1 if name == 'clip_low' else 100}")
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

    @property
    def pass_rows(self) -> int:
        """Answers of one forward pass."""
        return self.micro or next(n for n in range(min(32, self.rows), 0, -1) if self.rows % n == 0)

    def trainer_fields(self, examples: int) -> dict[str, Any]:
        """As of any stage, and what is GRPO's own; `examples` are answers."""
        passes = self.rows // self.pass_rows
        return {
            **super().trainer_fields(examples),
            "per_device_train_batch_size": self.pass_rows,
            "gradient_accumulation_steps": passes,
            "include_num_input_tokens_seen": "no",  # GRPO counts itself
            "steps_per_generation": passes * self.updates,
            "num_generations": self.generations,
            "max_completion_length": self.max_tokens,
            "temperature": self.temperature,
            "epsilon": self.clip_low,
            "epsilon_high": self.clip_high,
            "beta": 0.0,  # with another, TRL would look for the reference in a folder; `RolloutTrainer.take` gives it one
            "use_bias_correction_kl": False,
            "loss_type": "dapo",
            "scale_rewards": "group" if self.normalise else "none",
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
    """Train `decoder` in place; what the run comes to, with the `course` of loss, reward, KL, finished, length, flat groups.

    `out` is gone on with. `generator` samples from `decoder` itself. The reference of the KL divergence is `decoder` as it is
    given, so a run is gone on with from the same beginning. Events `{"kind": "step", ...}` have, beside those of every stage:
    reward, reward_std, kl (nats a token), entropy, clip_share (of tokens), finished (share of answers), length (tokens an
    answer), forced_share (of tokens), flat_groups (all rewards equal: nothing to learn), logprob_gap (nats, trainer against
    generator), rollout_s, rollout_tokens_per_s, rollout_share (of the step's time); kl, entropy, clip_share and logprob_gap are
    of the answers that are learned from, those of groups that are not flat. Raises SpecError for too few asks and for
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
        reference = TandemForCausalLM.from_decoder(copy.deepcopy(decoder)).requires_grad_(False)
        trainer = RolloutTrainer(
            model=TandemForCausalLM.from_decoder(decoder),
            reward_funcs=[_reward_function(reward, rollouts) for reward in rewards],
            args=arguments(
                GRPOConfig,
                out,
                seed=seed,
                use_cpu=decoder.device.type == "cpu",
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
        return run_metrics(trainer, heard, course=_COURSE)


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
