"""A recipe from beginning to end: data, model, training, the trained checkpoint and what it is worth."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tandem._version import __version__
from tandem.model.hybrid import Decoder, TokenIds
from tandem.model.load import load_model, renamed, save_model
from tandem.model.memory import keep_freed_memory
from tandem.model.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer
from tandem.perf.training import flops_per_token
from tandem.spec.catalog import find_weights
from tandem.spec.errors import SpecError
from tandem.spec.files import write_whole
from tandem.spec.model import ModelSpec
from tandem.train.build import model_spec, with_vocabulary
from tandem.train.cards import data_card, model_card
from tandem.train.checkpoint import full_weights
from tandem.train.data.prepare import prepare
from tandem.train.data.prepared import DataReport, read_report
from tandem.train.data.procedural import evaluation_problems
from tandem.train.data.stream import TokenStream
from tandem.train.evaluate import samples, task_accuracy
from tandem.train.journal import read_journal
from tandem.train.loop import Listener, Speed, claimed, train_model
from tandem.train.machine import matmul_flops_per_s
from tandem.train.needles import needle_shares
from tandem.train.ranks import Ranks, joined
from tandem.train.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run leaves."""

    checkpoint: Path
    metrics: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The contract's fields."""
        return {"checkpoint": str(self.checkpoint), "metrics": self.metrics}


def _nobody(event: dict[str, Any]) -> None:
    """Listens to ranks that are not the first."""


def run_recipe(
    recipe: Recipe,
    recipe_folder: Path,
    out: Path,
    *,
    date: str,
    command: str | None = None,
    data_folder: Path | None = None,
    listen: Listener = _nobody,
    tensorboard: bool = False,
) -> Trained | None:
    """Run a recipe into the folder `out`, or go on with the run that is there; every rank calls this, the first one returns.

    Data are prepared once into `data_folder` (default: `out/data`), which runs with the same data may share. The trained
    model is `out/model`, a Hugging Face checkpoint in bf16 with its card and that of its data, which state `date` and the
    `command` that made them. Raises SpecError for settings that cannot be run.
    """
    if recipe.plan_only is not None:
        raise SpecError(f"recipe={recipe.name!r}: {recipe.plan_only}; `tandem train {recipe.name} --plan` says what it takes")
    for name in ("gpus", "tp", "cp"):
        if getattr(recipe.parallel, name) != 1:
            raise SpecError(f"parallel.{name}={getattr(recipe.parallel, name)}: is for --plan; start as many ranks by torchrun")
    with joined() as ranks, claimed(out, recipe, ranks):
        return _run(recipe, recipe_folder, out, data_folder or out / "data", (date, command), ranks, listen, tensorboard)


def _run(
    recipe: Recipe,
    recipe_folder: Path,
    out: Path,
    data: Path,
    made: tuple[str, str | None],
    ranks: Ranks,
    listen: Listener,
    tensorboard: bool,
) -> Trained | None:
    if ranks.device.type == "cpu":
        keep_freed_memory()
    listen = listen if ranks.first else _nobody
    ranks.by_first(lambda: _prepare(recipe, data, recipe_folder, listen))
    tokenizer, report = load_tokenizer(data / "tokenizer"), read_report(data)
    decoder = _fresh(recipe, tokenizer) if recipe.model.initial is None else _initial(recipe, recipe.model.initial, tokenizer)
    stream = TokenStream(data, recipe.data, recipe.batch, seed=recipe.seed)
    peak = matmul_flops_per_s(decoder.spec, recipe.precision, ranks.device)
    speed = speed_of(decoder.spec, recipe, report, peak * (ranks.world if ranks.device.type == "cuda" else 1))
    listen({"kind": "begin", "recipe": recipe.name, "parameters": decoder.spec.parameters, "steps": recipe.batch.steps})
    last, model = train_model(
        decoder,
        recipe,
        stream,
        out,
        ranks=ranks,
        speed=speed,
        listen=listen,
        tensorboard=tensorboard,
        data=report.fingerprint,
    )
    weights = full_weights(model, ranks)
    if not ranks.first:
        return None
    trained = export(decoder.spec, weights, data / "tokenizer", out / "model")
    steps_s = sum(line["seconds"] for line in read_journal(out) if line["kind"] == "step")
    metrics = {**last, **_worth(recipe, trained, tokenizer, listen), "steps_s": steps_s}
    write_whole(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    _write_cards(recipe, decoder.spec, out, metrics, report, recipe_folder, *made)
    return Trained(checkpoint=out / "model", metrics=metrics)


def _write_cards(
    recipe: Recipe,
    spec: ModelSpec,
    out: Path,
    metrics: dict[str, Any],
    data: DataReport,
    recipe_folder: Path,
    date: str,
    command: str | None,
) -> None:
    notices = [file.read_text(encoding="utf-8") for file in sorted((recipe_folder / "data").glob("NOTICE*"))]
    about = model_card(
        recipe,
        spec,
        metrics,
        read_journal(out),
        data,
        date=date,
        version=__version__,
        command=command,
        base=recipe.model.initial,
    )
    write_whole(out / "model" / "README.md", about)
    write_whole(out / "model" / "DATA.md", data_card(recipe, data, date=date, version=__version__, notices="\n".join(notices)))


def _prepare(recipe: Recipe, data: Path, recipe_folder: Path, listen: Listener) -> None:
    def tell(stage: str, source: str, documents: int) -> None:
        listen({"kind": "data", "stage": stage, "source": source, "documents": documents})

    prepare(recipe, data, recipe_folder=recipe_folder, progress=tell)


def speed_of(spec: ModelSpec, recipe: Recipe, data: DataReport, peak_flops_per_s: float) -> Speed:
    """What a step of this run computes: attention within documents of the data's mean length, the head where it is learned."""
    length = recipe.batch.sequence_length
    documents = max(1, sum(source.documents - source.held_out_documents for source in data.sources))
    mean = min(length, max(1, round(data.tokens / documents)))
    head = 6.0 * spec.hidden_size * spec.vocab_size
    return Speed(
        flops_per_token=flops_per_token(spec, length, mean) - head,
        flops_per_learned_token=head,
        peak_flops_per_s=peak_flops_per_s,
    )


def export(spec: ModelSpec, weights: dict[str, torch.Tensor], tokenizer: Path, folder: Path) -> Decoder:
    """Write trained weights as a Hugging Face checkpoint in bf16 with their tokenizer; the model as it reads back, in fp32."""
    names = load_tokenizer(tokenizer)
    decoder = Decoder(spec, device="meta", token_ids=token_ids(names))
    decoder.load_state_dict({name.removeprefix("decoder."): value for name, value in weights.items()}, assign=True)
    decoder.to(torch.bfloat16)
    save_model(decoder, folder)
    copy_tokenizer(tokenizer, folder)
    return load_model(folder)


def token_ids(tokenizer: Tokenizer) -> TokenIds:
    """The special tokens of a tokenizer by what they are for."""
    found = {name: tokenizer.backend.token_to_id(text) for name, text in tokenizer.special.items()}
    eos = found.get("eos_token")
    return TokenIds(bos=found.get("bos_token"), eos=() if eos is None else (eos,), pad=found.get("pad_token"))


def _fresh(recipe: Recipe, tokenizer: Tokenizer) -> Decoder:
    spec = model_spec(recipe)
    size = tokenizer.backend.get_vocab_size()
    if size > spec.vocab_size:
        raise SpecError(f"data.tokenizer.vocab_size={spec.vocab_size}: the tokenizer has {size} tokens; state at least as many")
    if size < spec.vocab_size and recipe.model.name is None:
        spec = with_vocabulary(spec, size)
    return Decoder(spec, seed=recipe.seed, token_ids=token_ids(tokenizer))


def _initial(recipe: Recipe, name: str, tokenizer: Tokenizer) -> Decoder:
    """The model that the run goes on from, at least as long in context."""
    folder = find_weights(name)
    loaded = load_model(folder)
    if recipe.model.pattern is not None and model_spec(recipe).layers != loaded.spec.layers:
        raise SpecError(f"model.initial={name!r}: its layers are not those that the model's other fields state")
    if load_tokenizer(folder).backend.get_vocab() != tokenizer.backend.get_vocab():
        raise SpecError(f"data.tokenizer.name={recipe.data.tokenizer.name!r}: must be that of model.initial={name!r}")
    return renamed(loaded, name=recipe.name, context=recipe.batch.sequence_length).train()


def _worth(recipe: Recipe, model: Decoder, tokenizer: Tokenizer, listen: Listener) -> dict[str, Any]:
    part = recipe.evaluate
    found: dict[str, Any] = {}
    if part.samples:
        found["samples"] = dict(zip(part.samples, samples(model, tokenizer, list(part.samples)), strict=True))
        listen({"kind": "samples", "samples": found["samples"]})
    accuracy: dict[str, Any] = {}
    for task in part.tasks:
        problems = evaluation_problems(task, part.problems)
        found_right = task_accuracy(model, tokenizer, task, problems)
        accuracy[task] = {
            "accuracy": found_right.share,
            "low": found_right.low,
            "high": found_right.high,
            "count": found_right.count,
        }
        listen({"kind": "task", "task": task, **accuracy[task]})
    if accuracy:
        found["accuracy"] = accuracy
    if part.needles:
        found["needles"] = needle_shares(model, tokenizer, part.needles, part.needle_cases)
        listen({"kind": "needles", "needles": found["needles"]})
    return found
