"""One stage of a compression: a cut, with what it was decided by, or a distillation, with how far it came."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem.compress.calibration import Calibration, Scoring
from tandem.compress.data import Prepared, distil_recipe
from tandem.compress.depth import DepthScores, score_depth
from tandem.compress.distil import Distillation, Teacher
from tandem.compress.keep import Kept, choose, whole_layers
from tandem.compress.layers import Layers, LoadedLayers, StreamedLayers
from tandem.compress.prune import prune_decoder, prune_folder
from tandem.compress.recipe import CompressRecipe, Cut, DistilPart, search_recipe
from tandem.compress.search import Found, kept_importance
from tandem.compress.shape import Shape, pruned_spec
from tandem.compress.width import WidthScores, score_width
from tandem.model.hybrid import Decoder
from tandem.model.load import load_model, renamed, save_model, token_ids_in
from tandem.spec.catalog import load_spec
from tandem.train.checkpoint import full_weights
from tandem.train.data.prepared import read_report
from tandem.train.data.stream import TokenStream
from tandem.train.evaluate import loss_sum
from tandem.train.journal import read_journal
from tandem.train.loop import Listener, train_model
from tandem.train.loss import Trainee
from tandem.train.machine import matmul_flops_per_s
from tandem.train.ranks import Ranks
from tandem.train.recipe import Recipe
from tandem.train.recipe_files import load_recipe
from tandem.train.run import speed_of

_POST_SHARE = 0.7
"""Of calibration, as of distillation (paper A: 70/30)."""
_JUDGED_BATCHES, _JUDGED_ROWS = 8, 8
"""Of every source's held-out text."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage is run with."""

    recipe: CompressRecipe
    name: str
    source: Path
    """The checkpoint that it goes on from."""
    teacher: Path
    out: Path
    """Of the whole run; the stage's own folder is `out/name`."""
    data: Prepared
    ranks: Ranks
    listen: Listener

    @property
    def folder(self) -> Path:
        """Where the stage leaves its model and what it kept on the way."""
        return self.out / self.name

    def tell(self, doing: str) -> None:
        """Say what is being done."""
        self.listen({"kind": "stage", "stage": self.name, "doing": doing})


def run_cut(stage: Stage, cut: Cut) -> dict[str, Any]:
    """Score, choose a shape within the budget, cut; what was decided and by what, and what is left (`kl`, `nll`: `held_out`).

    Where memory has a bound, teacher and student are not held to be compared.
    A model that is within the budget already is not cut in width, and says so (`within_budget`).
    """
    recipe = stage.recipe
    calibration = stage.data.calibration(recipe.calibration.samples, recipe.calibration.length, _POST_SHARE, recipe.seed)
    layers, decoder = _layers(stage)
    scoring = Scoring(folder=stage.folder / "scores", ranks=stage.ranks, memory_bytes=recipe.memory_bytes)
    stage.tell("importance")
    if cut == "depth":
        kept, metrics = _depth(stage, layers, calibration, scoring)
    else:
        kept, metrics = _width(stage, layers, decoder, calibration, scoring)
    stage.tell("cutting")
    stage.ranks.by_first(lambda: _cut(stage, decoder, kept))
    if recipe.memory_bytes is not None:
        return metrics
    return {**metrics, **held_out(stage)}


def _layers(stage: Stage) -> tuple[Layers, Decoder | None]:
    """The model to be cut: in memory, or where memory has a bound a layer at a time."""
    if stage.recipe.memory_bytes is not None:
        return StreamedLayers(stage.source), None
    decoder = load_model(stage.source)
    return LoadedLayers(decoder), decoder


def _cut(stage: Stage, decoder: Decoder | None, kept: Kept) -> None:
    name = f"{stage.recipe.name}-{stage.name}"
    if stage.recipe.without.weights:
        fresh = Decoder(pruned_spec(load_spec(stage.source), kept.shape, name=name), seed=stage.recipe.seed)
        fresh.token_ids, fresh.source = token_ids_in(stage.source), stage.source
        save_model(fresh, stage.folder / "model")
    elif decoder is None:
        prune_folder(stage.source, kept, stage.folder / "model", name=name)
    else:
        save_model(prune_decoder(decoder, kept, name=name), stage.folder / "model")


def _depth(stage: Stage, layers: Layers, calibration: Calibration, scoring: Scoring) -> tuple[Kept, dict[str, Any]]:
    recipe, depth = stage.recipe, stage.recipe.depth
    assert depth is not None
    scores = score_depth(
        layers,
        calibration,
        drop=len(layers.spec.layers) - min(depth.layers),
        attention=depth.attention_layers,
        metric=depth.metric,
        greedy=depth.greedy,
        scoring=scoring,
    )
    found = search_recipe(recipe, teacher=layers.spec, order=_whole_order(scores))
    chosen = found.candidates[0].shape.layers
    kept = whole_layers(layers.spec, chosen or tuple(range(len(layers.spec.layers))))
    return kept, {
        "kept_layers": list(kept.shape.layers or ()),
        "order": list(scores.order),
        "metric": scores.metric,
        "perplexity": scores.perplexity,
        "rounds": [[asdict(one) for one in part] for part in scores.rounds],
        "search": found.to_json(),
    }


def _whole_order(scores: DepthScores) -> tuple[int, ...]:
    """The order in which layers left, and then the rest from the least missed in the last round: blocks may need more of it."""
    rest = sorted((one for one in scores.rounds[-1] if one.layer not in scores.order), key=lambda one: one.of(scores.metric))
    return (*scores.order, *(one.layer for one in rest))


def _width(
    stage: Stage, layers: Layers, decoder: Decoder | None, calibration: Calibration, scoring: Scoring
) -> tuple[Kept, dict[str, Any]]:
    spec = layers.spec
    scores = score_width(layers, calibration, scoring=scoring)
    units = _by_size(scores)
    search = _width_search(stage)
    if search.budget.allows(spec) and search.budget.tokens_per_s is None:
        kept = whole_layers(spec, tuple(range(len(spec.layers))))
        return kept, {**_chosen(kept, units), "within_budget": True}
    found = search_recipe(search, teacher=spec, quality=kept_importance(spec, units))
    losses = _ranked(stage, decoder, scores, found)
    if losses:
        found = search_recipe(search, teacher=spec, quality=kept_importance(spec, units), losses=losses)
    kept = choose(spec, found.candidates[0].shape, scores, group_aware=not stage.recipe.without.groups)
    ranking = [{**shape.to_json(), "kl": loss} for shape, loss in losses.items()]
    return kept, {**_chosen(kept, units), "ranking": ranking, "search": found.to_json()}


def _chosen(kept: Kept, units: dict[str, dict[int, list[float]]]) -> dict[str, Any]:
    """What stays, by which scores."""
    indices = {"hidden": kept.hidden.tolist(), "layers": {i: some.to_json() for i, some in kept.units.items()}}
    return {"shape": kept.shape.to_json(), "scores": units, "kept": indices}


def _width_search(stage: Stage) -> CompressRecipe:
    """The recipe's search among widths of a model that was cut in depth: what is allowed is a share of the first teacher."""
    recipe = stage.recipe
    limits = recipe.budget.limits(load_spec(stage.teacher))
    budget = replace(recipe.budget, share=None, total_bytes=limits.get("total_bytes"))
    return replace(recipe, budget=budget, depth=None, stages={})


def _by_size(scores: WidthScores) -> dict[str, dict[int, list[float]]]:
    """Scores by the size that counts their units, and by layer; the final norm's layer is the one behind the last."""
    by: dict[str, dict[int, Tensor]] = {
        "hidden_size": dict(enumerate(scores.hidden)),
        "ffn_size": scores.ffn,
        "mamba_heads": {i: found.norm(dim=1) for i, found in scores.mamba.items()},
        "mamba_head_dim": {i: found.norm(dim=0) for i, found in scores.mamba.items()},
        "attention_heads": scores.attention,
        "experts": scores.experts,
        "expert_ffn_size": {i: found.mean(0) for i, found in scores.expert_ffn.items()},
    }
    return {size: {i: found.tolist() for i, found in layers.items()} for size, layers in by.items() if layers}


def _ranked(stage: Stage, decoder: Decoder | None, scores: WidthScores, found: Found) -> dict[Shape, float]:
    """Distance from the teacher of each candidate after a short distillation; nothing where the recipe asks for none."""
    part = stage.recipe.ranking
    if part is None or len(found.candidates) == 1:
        return {}
    whole = decoder or load_model(stage.source)
    losses = {}
    for i, candidate in enumerate(found.candidates):
        stage.tell(f"ranking {i + 1} of {len(found.candidates)}")
        kept = choose(whole.spec, candidate.shape, scores, group_aware=not stage.recipe.without.groups)
        student = prune_decoder(whole, kept, name=f"{stage.recipe.name}-candidate-{i + 1}")
        course = _distil(stage, part, student.float(), stage.folder / "ranking" / str(i + 1))[0]
        losses[candidate.shape] = course[-1]["loss"]
    return losses


def run_distil(stage: Stage, part: DistilPart) -> dict[str, Any]:
    """Train the stage's model towards the teacher; `course` has the held-out loss on the way, then there is `held_out`."""
    student = renamed(load_model(stage.source), name=f"{stage.recipe.name}-{stage.name}", context=part.length)
    course, last, weights = _distil(stage, part, student, stage.folder)
    if stage.ranks.first:
        trained = Decoder(student.spec, device="meta", token_ids=student.token_ids)
        trained.load_state_dict({name.removeprefix("decoder."): value for name, value in weights.items()}, assign=True)
        trained.source = stage.source
        save_model(trained, stage.folder / "model")
    stage.ranks.barrier()
    return {"tokens": part.tokens, "course": course, **held_out(stage), "tokens_per_s": last["tokens_per_s"]}


def held_out(stage: Stage) -> dict[str, float]:
    """Of the model that the stage left: `kl` from the teacher and `nll` of the true next token, nats a learned token.

    Every stage is judged on the same held-out text, of the calibration's length, in the blend's shares.
    """
    length, model = stage.recipe.calibration.length, load_model(stage.folder / "model")
    judging = DistilPart(tokens=length * _JUDGED_ROWS, length=length, rows=_JUDGED_ROWS, lr=1e-4, final_lr=1e-4)
    training = _training(stage, judging, model.spec.name)
    stream = TokenStream(stage.data.folder, training.data, training.batch, seed=stage.recipe.seed)
    student = Distillation(teacher=Teacher(load_model(stage.teacher)))(model, torch.mm)
    found: dict[str, dict[str, float]] = {"kl": {}, "nll": {}}
    for source in training.data.sources:
        batches = stream.held_out(source, _JUDGED_BATCHES, _JUDGED_ROWS)
        for name, judge in (("kl", student), ("nll", model)):
            total, tokens = loss_sum(judge, batches)
            if tokens:
                found[name][source] = total / tokens
    return {name: _mean(losses, training) for name, losses in found.items()}


def _training(stage: Stage, part: DistilPart, name: str) -> Recipe:
    assert stage.recipe.data is not None
    base, _ = load_recipe(stage.recipe.data.pretraining, stage.recipe.data.changes)
    return distil_recipe(stage.recipe, part, stage.data, base, name=name)


def _distil(
    stage: Stage, part: DistilPart, student: Decoder, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Tensor]]:
    """Held-out distances on the way, the last step's metrics, the trained weights (on the first rank)."""
    recipe, ranks = stage.recipe, stage.ranks
    training = _training(stage, part, student.spec.name)
    said = None if part.top_k is None else stage.out / "data" / "said"
    teacher = None
    if not recipe.without.teacher:
        teacher = Teacher(load_model(stage.teacher, device=ranks.device), top_k=part.top_k, folder=said)
    peak = matmul_flops_per_s(student.spec, training.precision, ranks.device)
    peak *= ranks.world if ranks.device.type == "cuda" else 1
    last, model = train_model(
        student.train(),
        training,
        TokenStream(stage.data.folder, training.data, training.batch, seed=recipe.seed),
        folder,
        ranks=ranks,
        speed=speed_of(student.spec, training, read_report(stage.data.folder), peak),
        listen=lambda event: stage.listen({**event, "stage": student.spec.name, "steps": training.batch.steps}),
        data=stage.data.fingerprint,
        with_loss=Trainee if teacher is None else Distillation(teacher=teacher),
    )
    a_step = training.batch.tokens_per_step
    course = [
        {"tokens": line["step"] * a_step, "loss": _mean(line["loss"], training), "by_source": line["loss"]}
        for line in read_journal(folder)
        if line["kind"] == "held_out"
    ]
    return course, last, full_weights(model, ranks)


def _mean(losses: dict[str, float], training: Recipe) -> float:
    """Of the sources' distances, in the blend's shares."""
    weights = training.data.phases[-1].weights
    found = {name: weights.get(name, 0.0) for name in losses}
    total = sum(found.values())
    return sum(losses[name] * weight for name, weight in found.items()) / total
