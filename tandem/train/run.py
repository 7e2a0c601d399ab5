"""A recipe from beginning to end: data, model, training, the trained checkpoint and what it is worth."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tandem._version import __version__
from tandem.model.hybrid import Decoder, TokenIds
from tandem.model.load import load_model, save_model
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
from tandem.train.loop import Listener, Speed, train_model
from tandem.train.machine import matmul_flops_per_s
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
    with joined() as ranks:
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
    began = time.perf_counter()
    if ranks.device.type == "cpu":
        keep_freed_memory()
    listen = listen if ranks.first else _nobody
    if ranks.first:
        prepare(recipe, data, recipe_folder=recipe_folder, progress=partial(_tell_data, listen))
    ranks.barrier()
    tokenizer = load_tokenizer(data / "tokenizer")
    decoder = _fresh(recipe, tokenizer) if recipe.model.initial is None else _initial(recipe)
    stream = TokenStream(data, recipe.data, recipe.batch, seed=recipe.seed)
    speed = Speed(
        flops_per_token=flops_per_token(decoder.spec, recipe.batch.sequence_length),
        peak_flops_per_s=matmul_flops_per_s(decoder.spec, recipe.precision, ranks.device)
        * (ranks.world if ranks.device.type == "cuda" else 1),
    )
    listen({"kind": "begin", "recipe": recipe.name, "parameters": decoder.spec.parameters, "steps": recipe.batch.steps})
    last, model = train_model(decoder, recipe, stream, out, ranks=ranks, speed=speed, listen=listen, tensorboard=tensorboard)
    weights = full_weights(model, ranks)
    if not ranks.first:
        return None
    trained = export(decoder.spec, weights, data / "tokenizer", out / "model")
    metrics = {**last, **_worth(recipe, trained, tokenizer, listen), "wall_s": time.perf_counter() - began}
    write_whole(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    _write_cards(recipe, decoder.spec, out, metrics, read_report(data), recipe_folder, *made)
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


def _tell_data(listen: Listener, stage: str, source: str, documents: int) -> None:
    listen({"kind": "data", "stage": stage, "source": source, "documents": documents})


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
    if size < spec.vocab_size:
        spec = with_vocabulary(spec, size)
    return Decoder(spec, seed=recipe.seed, token_ids=token_ids(tokenizer))


def _initial(recipe: Recipe) -> Decoder:
    """The model that the run goes on from, at least as long in context."""
    assert recipe.model.initial is not None
    loaded = load_model(find_weights(recipe.model.initial))
    spec = replace(loaded.spec, name=recipe.name, max_context=max(loaded.spec.max_context, recipe.batch.sequence_length))
    decoder = Decoder(spec, device="meta", token_ids=loaded.token_ids)
    decoder.load_state_dict(loaded.state_dict(), assign=True)
    return decoder.train()


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
    return {**found, "accuracy": accuracy} if accuracy else found
