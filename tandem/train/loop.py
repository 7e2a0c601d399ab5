"""The training loop: batches in, optimiser steps, a journal, checkpoints, and a model at the end. Read `train_model` first."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from tandem.model.hybrid import Decoder
from tandem.spec.errors import SpecError, TandemError
from tandem.spec.files import write_whole
from tandem.train.checkpoint import Checkpoints
from tandem.train.data.packing import Batch
from tandem.train.data.stream import TokenStream
from tandem.train.evaluate import loss_sum
from tandem.train.guard import Guard
from tandem.train.journal import Journal, read_journal
from tandem.train.ranks import Ranks
from tandem.train.recipe import Recipe
from tandem.train.recipe_files import recipe_json
from tandem.train.schedule import learning_rate
from tandem.train.trainee import clip_gradients, make_optimiser, make_trainee, synchronise

Listener = Callable[[dict[str, Any]], None]
"""Told of every event of a run; the command line draws its progress from them."""


class Diverged(TandemError):
    """A run that went wrong more often than its recipe allows."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What the rate of a step is measured against."""

    flops_per_token: float
    """Of forward and backward pass, nothing computed twice."""
    peak_flops_per_s: float
    """Of all ranks together."""


def train_model(
    decoder: Decoder,
    recipe: Recipe,
    stream: TokenStream,
    out: Path,
    *,
    ranks: Ranks,
    speed: Speed,
    listen: Listener = lambda event: None,
    tensorboard: bool = False,
) -> tuple[dict[str, Any], nn.Module]:
    """Train a decoder; the last step's metrics, and the model that holds the weights. A run that `out` holds is gone on with.

    The loss of every step is that of the uninterrupted run: bit for bit with as many ranks as before, to rounding with
    others. Raises SpecError where `out` holds another recipe's run, Diverged where the loss cannot be saved.
    """
    claim(out, recipe, ranks)
    model = make_trainee(decoder, recipe, ranks)
    run = _Run(model, make_optimiser(model, recipe.optimiser), recipe, stream, out, ranks, speed, listen, tensorboard)
    try:
        return run.to_the_end(), model
    finally:
        run.close()


def claim(out: Path, recipe: Recipe, ranks: Ranks) -> None:
    """Make the folder this recipe's, or refuse one that holds a run of another."""
    file, mine = out / "recipe.json", recipe_json(recipe)
    if file.is_file():
        there = json.loads(file.read_text(encoding="utf-8"))
        changed = _changed(there, mine)
        if changed:
            raise SpecError(f"out={str(out)!r}: holds a run of another recipe ({changed} differs); name another folder")
    ranks.barrier()
    if ranks.first and not file.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(mine, indent=2) + "\n")
    ranks.barrier()


def _changed(there: Any, mine: Any, where: str = "") -> str | None:
    """The path of the first field that differs; how a run is spread and how often it is saved does not change it."""
    if where in ("parallel", "checkpoint", "about"):
        return None
    if isinstance(there, dict) and isinstance(mine, dict):
        for name in {**mine, **there}:
            path = f"{where}.{name}" if where else name
            found = _changed(there.get(name), mine.get(name), path)
            if found is not None:
                return found
        return None
    return None if there == mine else where


class _Run:
    """The state of a run between two steps, and how the next one is made."""

    def __init__(
        self,
        model: nn.Module,
        optimiser: AdamW,
        recipe: Recipe,
        stream: TokenStream,
        out: Path,
        ranks: Ranks,
        speed: Speed,
        listen: Listener,
        tensorboard: bool,
    ) -> None:
        self.model, self.optimiser, self.recipe, self.stream = model, optimiser, recipe, stream
        self.ranks, self.speed, self.listen = ranks, speed, listen
        part = recipe.checkpoint
        self.checkpoints = Checkpoints(out / "checkpoints", ranks, keep=part.keep, asynchronous=part.asynchronous)
        self.guard = Guard(recipe.guard)
        self.step, self.learned, self.retries = 0, 0, 0
        self.last: dict[str, Any] = {}
        self._resume()
        self.journal = Journal(out, from_step=self.step, tensorboard=tensorboard) if ranks.first else None
        if self.step and ranks.first:
            steps = [line for line in read_journal(out) if line["kind"] == "step"]
            self.last = steps[-1] if steps else {}

    def to_the_end(self) -> dict[str, Any]:
        """All steps that are left."""
        steps, recipe = self.recipe.batch.steps, self.recipe
        if self.step == 0:
            self._save()  # a run that goes wrong at once has something to return to
        while self.step < steps:
            refused = self._one_step(steps)
            if refused is not None:
                self._go_back(refused)
                continue
            self.checkpoints.poll()
            if self.step % recipe.checkpoint.every == 0 or self.step == steps:
                self._save()
            if self.step % recipe.evaluate.every == 0 or self.step == steps:
                self._evaluate()
        self.checkpoints.finish()
        return self.last

    def close(self) -> None:
        """Leave nothing half written."""
        self.checkpoints.finish()
        if self.journal is not None:
            self.journal.close()

    def _one_step(self, steps: int) -> str | None:
        """One optimiser step; or why it must not be made."""
        began = time.perf_counter()
        phase = self.stream.phase
        batch = self.stream.batch(self.ranks.rank, self.ranks.world)
        read_s = time.perf_counter() - began
        learned = round(self.ranks.total(batch.learned))
        loss = self.ranks.total(self._gradients(batch, learned)) / max(learned, 1)
        norm = clip_gradients(self.model, self.recipe.optimiser.clip)
        refused = self.guard.refuses(loss, norm)
        if refused is not None:
            self.optimiser.zero_grad(set_to_none=True)
            return refused
        rate = learning_rate(self.step, steps, self.recipe.optimiser)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.learned += learned
        seconds = time.perf_counter() - began
        tokens_per_s = self.recipe.batch.tokens_per_step / seconds
        self.last = {
            "kind": "step",
            "step": self.step,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "phase": phase,
            "tokens": self.step * self.recipe.batch.tokens_per_step,
            "learned_tokens": self.learned,
            "seconds": seconds,
            "tokens_per_s": tokens_per_s,
            "mfu": tokens_per_s * self.speed.flops_per_token / self.speed.peak_flops_per_s,
            "data_share": read_s / seconds,
        }
        self._tell(self.last)
        return None

    def _gradients(self, batch: Batch, learned: int) -> float:
        """Backward passes of all micro-batches; this rank's sum of negative log-likelihoods (nats)."""
        rows = len(batch.input_ids)
        micro = self.recipe.batch.micro or rows
        device, total = self.ranks.device, 0.0
        scale = self.ranks.world / max(learned, 1)  # sharding averages gradients over ranks; ours add up
        for begin in range(0, rows, micro):
            synchronise(self.model, begin + micro >= rows)
            part = (batch.input_ids, batch.labels, batch.documents)
            nll = self.model(*(torch.from_numpy(values[begin : begin + micro]).to(device) for values in part))
            (nll * scale).backward()
            total += float(nll.detach())
        return total

    def _evaluate(self) -> None:
        """Held-out loss of every source; each rank runs its rows of every batch."""
        rank, world = self.ranks.rank, self.ranks.world
        losses = {}
        for source in self.recipe.data.sources:
            batches = self.stream.held_out(source, self.recipe.evaluate.batches, self.recipe.batch.sequences)
            mine = [b.rows(rank, world) for b in batches]
            total, tokens = (self.ranks.total(value) for value in loss_sum(self.model, mine))
            if tokens:
                losses[source] = total / tokens
        self._tell({"kind": "held_out", "step": self.step, "loss": losses})

    def _save(self) -> None:
        run = {"stream": self.stream.state(), "losses": self.guard.losses, "learned": self.learned, "retries": self.retries}
        self.checkpoints.save(self.step, self.model, self.optimiser, run)

    def _resume(self) -> None:
        run = self.checkpoints.load(self.model, self.optimiser)
        if run is None:
            return
        self.step, self.learned, self.retries = run["step"], run["learned"], run["retries"]
        self.stream.restore(run["stream"])
        self.guard = Guard(self.recipe.guard, run["losses"])

    def _go_back(self, why: str) -> None:
        """Return to the last good checkpoint, with the batches since then left out."""
        wrong, retries, ahead = self.step + 1, self.retries + 1, self.stream.state()
        if retries > self.recipe.guard.retries:
            raise Diverged(f"step {wrong}: {why}; {self.recipe.guard.retries} returns to a checkpoint did not help")
        self._resume()
        self.retries = retries
        self.stream.restore(ahead)
        if self.journal is not None:
            self.journal.rewind(self.step)
        self._tell({"kind": "rollback", "step": self.step, "at": wrong, "why": why, "retry": retries})

    def _tell(self, event: dict[str, Any]) -> None:
        if self.journal is not None:
            self.journal.write(event)
        if self.ranks.first:
            self.listen(event)
