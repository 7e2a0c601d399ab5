"""The two sides that benchmarks/train.py compares: our training loop and transformers' Trainer, both a few steps at a time."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from model_parts import matmul_flops_per_s, timed

import tandem
from tandem.model.hybrid import Decoder
from tandem.model.linear import Linear
from tandem.perf.training import flops_per_token
from tandem.train.build import model_spec
from tandem.train.data.prepare import prepare
from tandem.train.data.stream import TokenStream
from tandem.train.loop import Speed, train_model
from tandem.train.machine import matmul_flops_per_s as step_peak
from tandem.train.ranks import Ranks
from tandem.train.recipe import Recipe
from tandem.train.recipe_files import load_recipe

transformers.logging.set_verbosity_error()

QUIET = ["evaluate.every=1000000", "evaluate.batches=1", "checkpoint.every=1000000", "checkpoint.keep=1"]
PROSE = ["data.phases=[{until: 1.0, weights: {plays: 0.5, addresses: 0.5}}]"]
"""Text that is learned from its first token to its last, so that both sides compute the loss of every position."""
FEWER = ["data.sources.reasoning.documents=4000", "evaluate.tasks=[]", "evaluate.samples=[]"]
HIDDEN_512 = [
    "model.pattern=M-M-*M-M-M-*M-M-",
    "model.hidden_size=512",
    "model.ffn_size=2048",
    "model.num_heads=8",
    "model.num_kv_heads=2",
    "model.head_dim=64",
    "model.mamba_heads=16",
    "model.mamba_head_dim=64",
    "model.state_dim=128",
    "model.groups=8",
    "batch.sequences=4",
]
PEER_CHUNKS = (32, 64)
"""Lengths of a piece of its scan that the peer may take; it gets the faster. 16 is no faster, 128 takes far more memory."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Prepared data and where runs may write."""

    data: Path
    scratch: Path


def prepared(scratch: Path) -> Bench:
    """The data of nano-hybrid with fewer generated documents, which takes some ten seconds."""
    recipe, folder = load_recipe("nano-hybrid", FEWER)
    prepare(recipe, scratch / "data", recipe_folder=folder)
    return Bench(data=scratch / "data", scratch=scratch)


def recipe_of(*changes: str, steps: int = 6) -> Recipe:
    """nano-hybrid on prose, for a few steps without saves and evaluations between them."""
    recipe, _ = load_recipe("nano-hybrid", [*FEWER, *PROSE, *QUIET, *changes])
    return replace(recipe, batch=replace(recipe.batch, tokens=recipe.batch.tokens_per_step * steps))


class Ours:
    """Runs of `train_model` with a token stream; a call trains a fresh model for the recipe's steps."""

    def __init__(self, bench: Bench, recipe: Recipe) -> None:
        self.bench, self.recipe = bench, recipe
        self.spec = model_spec(recipe)
        self.speed = Speed(
            flops_per_token=flops_per_token(self.spec, recipe.batch.sequence_length),
            flops_per_learned_token=0.0,  # prose: all is learned, and the head is among the above
            peak_flops_per_s=step_peak(self.spec, recipe.precision, torch.device("cpu")),
        )
        self.losses: list[float] = []

    def decoder(self) -> Decoder:
        """The model as a run begins with it."""
        return Decoder(self.spec, seed=self.recipe.seed)

    def stream(self) -> TokenStream:
        """The rows of a run from its beginning."""
        return TokenStream(self.bench.data, self.recipe.data, self.recipe.batch, seed=self.recipe.seed)

    def __call__(self) -> list[float]:
        """Seconds from the end of one step to the end of the next: everything that lies between."""
        ends: list[float] = []
        self.losses = []

        def listen(event: dict[str, Any]) -> None:
            if event["kind"] == "step":
                ends.append(time.perf_counter())
                self.losses.append(event["loss"])

        with tempfile.TemporaryDirectory(dir=self.bench.scratch) as out:
            train_model(
                self.decoder(), self.recipe, self.stream(), Path(out) / "run", ranks=Ranks(), speed=self.speed, listen=listen
            )
        return np.diff(ends).tolist()


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The rows of a run as the Trainer takes them; it shifts the labels itself."""

    def __init__(self, stream: TokenStream, steps: int) -> None:
        self.ids = torch.from_numpy(np.concatenate([stream.batch().input_ids for _ in range(steps)]))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


class Ends(transformers.TrainerCallback):
    """When each step of the Trainer ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())


class Peer:
    """transformers' Trainer on its own NemotronH with the same weights and rows, one document a row.

    Its CPU path has no notion of documents in a row, so it does less than we do: ours keeps packed documents apart.
    """

    def __init__(self, ours: Ours, *, bf16: bool, chunk: int) -> None:
        recipe = ours.recipe
        self.folder = ours.bench.scratch / f"peer-{recipe.model.hidden_size}"
        if not self.folder.is_dir():
            tandem.save_model(ours.decoder(), self.folder)
        self.rows = Rows(ours.stream(), recipe.batch.steps)
        self.chunk, self.bf16, self.recipe = chunk, bf16, recipe
        self.losses: list[float] = []

    def model(self) -> Any:
        """Its model with our initial weights in fp32."""
        config = transformers.AutoConfig.from_pretrained(self.folder)
        config.chunk_size, config.use_cache = self.chunk, False
        return transformers.NemotronHForCausalLM.from_pretrained(self.folder, config=config, dtype=torch.float32)

    def __call__(self) -> list[float]:
        """Seconds from the end of one step to the end of the next."""
        part, ends = self.recipe.optimiser, Ends()
        with tempfile.TemporaryDirectory() as out:
            arguments = transformers.TrainingArguments(
                output_dir=out,
                use_cpu=True,
                bf16=self.bf16,
                per_device_train_batch_size=self.recipe.batch.sequences,
                max_steps=self.recipe.batch.steps,
                optim="adamw_torch_fused",
                learning_rate=part.lr,
                adam_beta1=part.beta1,
                adam_beta2=part.beta2,
                weight_decay=part.weight_decay,
                max_grad_norm=part.clip,
                lr_scheduler_type="constant",
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            )
            trainer = transformers.Trainer(model=self.model(), args=arguments, train_dataset=self.rows, callbacks=[ends])
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        return np.diff(ends.times).tolist()

    def first_loss(self) -> float:
        """Loss of the first batch before any step (nats): ours must be the same."""
        ids = self.rows.ids[: self.recipe.batch.sequences]
        with torch.no_grad():
            return float(self.model()(input_ids=ids, labels=ids).loss)


def take_turns(runs: dict[str, Callable[[], list[float]]], rounds: int) -> dict[str, float]:
    """Median seconds of a step of each side over all rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name] += run()
    return {name: statistics.median(took) for name, took in seconds.items()}


def fastest_peer(ours: Ours, *, bf16: bool = False) -> Peer:
    """The peer with the length of its scan's pieces that is fastest here."""
    few = Ours(ours.bench, recipe_of(f"precision.linears={ours.recipe.precision.linears}", steps=3))
    took = {chunk: min(Peer(few, bf16=bf16, chunk=chunk)()) for chunk in PEER_CHUNKS}
    return Peer(ours, bf16=bf16, chunk=min(took, key=took.__getitem__))


def matmul_share(bench: Bench, rounds: int) -> dict[str, float]:
    """What part of the machine's fp32 matmul rate the model's FLOPs reach in a training step at hidden size 512."""
    ours = Ours(bench, recipe_of("precision.linears=fp32", *HIDDEN_512, steps=5))
    shapes = [(m.out_features, m.in_features) for m in ours.decoder().modules() if isinstance(m, Linear)]
    took, rates = [], []
    for _ in range(rounds):
        rates.append(matmul_flops_per_s(sorted(set(shapes))))
        took += ours()
    batch, step_s, rate = ours.recipe.batch, statistics.median(took), statistics.median(rates)
    flops = ours.speed.flops_per_token * batch.tokens_per_step
    return {
        "share": flops / step_s / rate,
        "step_s": step_s,
        "tokens_per_s": batch.tokens_per_step / step_s,
        "flops_per_token": ours.speed.flops_per_token,
        "matmul_flops_per_s": rate,
        "parameters": ours.spec.parameters,
    }


def loader_seconds(bench: Bench, batches: int = 50) -> float:
    """Median seconds of a batch of nano-hybrid's own blend."""
    recipe, _ = load_recipe("nano-hybrid", FEWER)
    stream = TokenStream(bench.data, recipe.data, recipe.batch, seed=0)
    return statistics.median(timed(stream.batch) for _ in range(batches))


def two_ranks(bench: Bench, steps: int, threads: int) -> dict[str, float]:
    """One process with all threads beside two with half of them each: how far losses are apart, and the speeds."""
    found: dict[int, dict[int, dict[str, Any]]] = {}
    for ranks in (1, 2):
        out = bench.scratch / f"ranks-{ranks}"
        tokens = load_recipe("nano-hybrid")[0].batch.tokens_per_step * steps
        changes = [*FEWER, *QUIET, "precision.linears=fp32", f"batch.tokens={tokens}"]
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launch, "-m", "tandem.cli", "train", "nano-hybrid", *changes]
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, threads // ranks))}
        subprocess.run(
            [*command, "--out", str(out), "--data", str(bench.data), "--json"],
            env=environment,
            check=True,
            capture_output=True,
        )
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        found[ranks] = {line["step"]: line for line in lines if line["kind"] == "step"}
    one, two = found[1], found[2]
    return {
        "steps": len(one),
        "largest_loss_difference": max(abs(one[i]["loss"] - two[i]["loss"]) for i in one),
        "tokens_per_s_1": statistics.median(line["tokens_per_s"] for line in one.values()),
        "tokens_per_s_2": statistics.median(line["tokens_per_s"] for line in two.values()),
    }
