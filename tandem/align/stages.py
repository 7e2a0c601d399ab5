"""One stage of an alignment: its material is made, the model learns from it, and what happened is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tandem.align.dpo import run_dpo
from tandem.align.encode import encode_ask
from tandem.align.grpo import Reward, run_grpo
from tandem.align.material import Sampler, asks_of, read_rollout, samples_of, seed_of
from tandem.align.merge import merge_folders, merge_sweep
from tandem.align.recipe import AlignRecipe, PairsPart
from tandem.align.reward_model import RewardModel, train_reward_model
from tandem.align.rollout import Generator, Rollout
from tandem.align.sample import Answer, Ask, Pair, pair_from_json
from tandem.align.sft import run_sft
from tandem.align.verify import parts, verify
from tandem.model.hybrid import Decoder
from tandem.model.load import load_model
from tandem.model.tokenizer import Tokenizer
from tandem.spec.catalog import read_json
from tandem.spec.errors import SpecError
from tandem.spec.files import write_whole
from tandem.train.loop import Listener

_REWARD_MODEL = "reward-model"
"""The folder within a stage's that holds its reward model."""


@dataclass(kw_only=True)
class Stage:
    """What a stage is run with. `decoder` is trained in place; a merge writes its model itself."""

    recipe: AlignRecipe
    name: str
    decoder: Decoder
    tokenizer: Tokenizer
    out: Path
    """Of the whole run; the stage's own folder is `out/name`."""
    seed: int
    make_generator: Callable[[Decoder, Tokenizer], Generator]
    listen: Listener

    @property
    def folder(self) -> Path:
        """Where the stage keeps its checkpoints."""
        return self.out / self.name

    def sampler(self, *, temperature: float, max_tokens: int, seed: int, decoder: Decoder | None = None) -> Sampler:
        """Draws answers of the stage's model."""
        chosen = decoder or self.decoder
        return Sampler(
            self.make_generator(chosen, self.tokenizer),
            self.tokenizer,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            context=chosen.spec.max_context,
            tell=self._sampled,
        )

    def _sampled(self, done: int, total: int) -> None:
        self.listen({"kind": "sampled", "stage": self.name, "done": done, "total": total})


def run_stage(stage: Stage) -> dict[str, Any]:
    """Run it; the figures of what it learned from and how. Raises SpecError for material that there is none of."""
    return _RUNS[stage.recipe.stages[stage.name].kind](stage)


def _sft(stage: Stage) -> dict[str, Any]:
    part = stage.recipe.stages[stage.name].sft
    assert part is not None
    samples = samples_of(stage.recipe.tasks, part.data, stage.seed)
    return run_sft(
        stage.decoder,
        stage.tokenizer,
        samples,
        part.train,
        stage.folder,
        seed=stage.seed,
        stage=stage.name,
        listen=stage.listen,
    )


def _grpo(stage: Stage) -> dict[str, Any]:
    part = stage.recipe.stages[stage.name].grpo
    assert part is not None
    reward = verified_reward(stage.tokenizer)
    if part.reward_model is not None:
        reward = model_reward(RewardModel.load(stage.out / part.reward_model / _REWARD_MODEL), stage.tokenizer)
    return run_grpo(
        stage.decoder,
        stage.tokenizer,
        asks_of(stage.recipe.tasks, part.asks, stage.seed),
        [reward],
        stage.make_generator(stage.decoder, stage.tokenizer),
        part.train,
        stage.folder,
        render=lambda ask: encode_ask(ask, stage.tokenizer),
        seed=stage.seed,
        stage=stage.name,
        listen=stage.listen,
    )


def model_reward(model: RewardModel, tokenizer: Tokenizer) -> Reward:
    """A reward model's score. What is not finished or not in form gets no more than the worst answer beside it.

    The model learned from ended answers alone, so its score of others means nothing.
    """

    def worth(asks: Sequence[Ask], rollouts: Sequence[Rollout]) -> list[float]:
        pairs = list(zip(asks, rollouts, strict=True))
        found = model.rewards([[*encode_ask(ask, tokenizer), *one.completion_ids] for ask, one in pairs])
        formed = [_formed(ask, read_rollout(ask, one, tokenizer)) for ask, one in pairs]
        return [reward if form else min(found) for reward, form in zip(found, formed, strict=True)]

    return Reward(name="reward model", score=worth)


def _formed(ask: Ask, answer: Answer) -> bool:
    found = parts(ask, answer)
    return answer.malformed is None and found["finished"] == 1.0 and found.get("format", 1.0) == 1.0


def verified_reward(tokenizer: Tokenizer) -> Reward:
    """1 for a whole right answer, else 0."""

    def worth(asks: Sequence[Ask], rollouts: Sequence[Rollout]) -> list[float]:
        return [verify(ask, read_rollout(ask, one, tokenizer)) for ask, one in zip(asks, rollouts, strict=True)]

    return Reward(name="verifier", score=worth)


def _dpo(stage: Stage) -> dict[str, Any]:
    part = stage.recipe.stages[stage.name].dpo
    assert part is not None
    rounds = []
    for number in range(1, part.rounds + 1):
        seed = seed_of(stage.seed, number)
        folder = stage.folder / f"round-{number}"
        pairs, counts = _pairs(stage, part.pairs, seed, folder)
        found = run_dpo(
            stage.decoder,
            stage.tokenizer,
            pairs,
            part.train,
            folder,
            seed=seed,
            stage=f"{stage.name} {number}",
            listen=stage.listen,
        )
        rounds.append({**found, "pairs": len(pairs), "sampled": counts})
    return {"rounds": rounds}


def _pairs(stage: Stage, part: PairsPart, seed: int, folder: Path) -> tuple[list[Pair], list[dict[str, int]]]:
    """Preferences among the model's own answers; kept in a folder, so that a run that goes on learns from the same ones."""
    file = folder / "pairs.json"
    if file.is_file():
        kept = read_json(file)
        return [pair_from_json(pair) for pair in kept["pairs"]], kept["sampled"]
    sampler = stage.sampler(temperature=part.temperature, max_tokens=part.max_tokens, seed=seed)
    chosen = sampler.pairs(stage.recipe.tasks, part, seed)
    pairs = [pair for some in chosen for pair in some.pairs]
    if not pairs:
        counts = ", ".join(f"{some.counts.all_right} all right and {some.counts.all_wrong} all wrong" for some in chosen)
        raise SpecError(
            f"stages.{stage.name}: no question has both right and wrong answers ({counts}); ask more or harder ones"
        )
    counted = [asdict(some.counts) for some in chosen]
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps({"sampled": counted, "pairs": [asdict(pair) for pair in pairs]}, indent=1) + "\n")
    return pairs, counted


def _reward_model(stage: Stage) -> dict[str, Any]:
    part = stage.recipe.stages[stage.name].reward_model
    assert part is not None
    pairs, counts = _pairs(stage, part.pairs, stage.seed, stage.folder)
    model, found = train_reward_model(
        stage.decoder,
        stage.tokenizer,
        pairs,
        part.train,
        stage.folder,
        seed=stage.seed,
        stage=stage.name,
        listen=stage.listen,
    )
    model.save(stage.folder / _REWARD_MODEL)
    return {**found, "pairs": len(pairs), "sampled": counts}


def _merge(stage: Stage) -> dict[str, Any]:
    part = stage.recipe.stages[stage.name].merge
    assert part is not None
    first, second = (stage.out / name / "model" for name in (part.first, part.second))
    asks = asks_of(stage.recipe.tasks, part.asks, stage.seed)

    file = stage.folder / "sweep.json"
    known: dict[str, float] = read_json(file) if file.is_file() else {}

    def worth(alpha: float, merged: Decoder) -> float:
        """Kept at once: each takes a minute or more."""
        if str(alpha) not in known:
            sampler = stage.sampler(temperature=part.temperature, max_tokens=part.max_tokens, seed=stage.seed, decoder=merged)
            known[str(alpha)] = sampler.worth(asks)
            stage.folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(known) + "\n")
        return known[str(alpha)]

    swept = merge_sweep(load_model(first), load_model(second), part.alphas, worth)
    merge_folders(first, second, stage.folder / "model", alpha=swept.best)
    return {"alpha": swept.best, "sweep": [{"alpha": alpha, "verified": share} for alpha, share in swept.scores]}


_RUNS: dict[str, Callable[[Stage], dict[str, Any]]] = {
    "sft": _sft,
    "grpo": _grpo,
    "dpo": _dpo,
    "reward_model": _reward_model,
    "merge": _merge,
}
