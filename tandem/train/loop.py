"""The training loop: batches in, optimiser steps, a journal, checkpoints, and a model at the end. Read `train_model` first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from tandem.model.hybrid import Decoder
from tandem.spec.errors import SpecError, TandemError
from tandem.train.checkpoint import Checkpoints
from tandem.train.data.packing import Batch
from tandem.train.data.stream import TokenStream
from tandem.train.evaluate import loss_sum
from tandem.train.guard import Guard
from tandem.train.journal import Journal, read_journal
from tandem.train.loss import Trainee
from tandem.train.ranks import Ranks
from tandem.train.recipe import Recipe
from tandem.train.recipe_files import recipe_json
from tandem.train.run_folder import claimed_folder
from tandem.train.schedule import learning_rate
from tandem.train.trainee import WithLoss, clip_gradients, make_optimiser, make_trainee, synchronise

Listener = Callable[[dict[str, Any]], None]
"""Told of every event of a run; the command line draws its progress from them."""


class Diverged(TandemError):
    """A run that went wrong more often than its recipe allows."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What the rate of a step is measured against."""

    flops_per_token: float
    """Of forward and backward pass at every position, attention within documents of usual length, without the head."""
    flops_per_learned_token: float
    """Of the head, which runs on learned tokens only."""
    peak_flops_per_s: float
    """Of all ranks together."""

    def mfu(self, tokens: int, learned: int, seconds: float) -> float:
        """Share of the peak that a step's own FLOPs, nothing computed twice, come to."""
        flops = tokens * self.flops_per_token + learned * self.flops_per_learned_token
        return flops / seconds / self.peak_flops_per_s


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
    data: str = "",
    with_loss: WithLoss = Trainee,
) -> tuple[dict[str, Any], nn.Module]:
    """Train a decoder; the last step's metrics, and the model that holds the weights. A run that `out` holds is gone on with.

    The loss of every step is that of the uninterrupted run: bit for bit with as many ranks as before, to rounding with
    others. `data` is the fingerprint of what the stream reads, `with_loss` what is learned from it, by default the next token.
    Raises SpecError for a run that was begun with other data, Diverged where the loss cannot be saved. Whoever calls this has
    `claimed` the folder.
    """
    if recipe.batch.sequences % ranks.world:
        raise SpecError(f"batch.sequences={recipe.batch.sequences}: must be a multiple of the {ranks.world} ranks")
    model = make_trainee(decoder, recipe, ranks, with_loss)
    run = _Run(model, make_optimiser(model, recipe.optimiser), recipe, stream, data, out, ranks, speed, listen, tensorboard)
    try:
        return run.to_the_end(), model
    finally:
        run.close()


_MAY_DIFFER = ("parallel", "checkpoint", "guard", "about", "batch.micro")
"""Fields that say how a run is spread, guarded and saved, which does not change what it learns."""


@contextmanager
def claimed(out: Path, recipe: Recipe, ranks: Ranks) -> Iterator[None]:
    """`claimed_folder` for all ranks of a run of this recipe."""
    mine = recipe_json(recipe)
    with ExitStack() as held:
        ranks.by_first(
            lambda: held.enter_context(
                claimed_folder(out, mine, may_differ=_MAY_DIFFER, holds=("checkpoints", "metrics.jsonl", "model"))
            )
        )
        yield


class _Run:
    """The state of a run between two steps, and how the next one is made."""

    def __init__(
        self,
        model: nn.Module,
        optimiser: AdamW,
        recipe: Recipe,
        stream: TokenStream,
        data: str,
        out: Path,
        ranks: Ranks,
        speed: Speed,
        listen: Listener,
        tensorboard: bool,
    ) -> None:
        self.model, self.optimiser, self.recipe, self.stream = model, optimiser, recipe, stream
        self.data, self.ranks, self.speed, self.listen = data, ranks, speed, listen
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
            if self.step % recipe.evaluate.every == 0 or self.step == steps:
                self._evaluate()
            if self.step % recipe.checkpoint.every == 0 or self.step == steps:
                self._save()
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
        if not learned:
            raise SpecError(f"batch: step {self.step + 1} holds no token to learn; make sequences longer or prompts shorter")
        loss = self.ranks.total(self._gradients(batch, learned)) / learned
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
            "tokens_per_s": self.recipe.batch.tokens_per_step / seconds,
            "mfu": self.speed.mfu(self.recipe.batch.tokens_per_step, learned, seconds),
            "data_share": read_s / seconds,
            "padding": self.stream.padding(),
        }
        self._tell(self.last)
        return None

    def _gradients(self, batch: Batch, learned: int) -> float:
        """Backward passes of all micro-batches; this rank's sum of negative log-likelihoods (nats)."""
        rows = len(batch.input_ids)
        micro = self.recipe.batch.micro or rows
        device, total = self.ranks.device, 0.0
        scale = self.ranks.world / learned  # sharding averages gradients over ranks; ours add up
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
        run = {"data": self.data, "stream": self.stream.state(), "losses": self.guard.losses, "learned": self.learned}
        self.checkpoints.save(self.step, self.model, self.optimiser, run)

    def _resume(self) -> None:
        run = self.checkpoints.load(self.model, self.optimiser)
        if run is None:
            return
        if run["data"] != self.data:
            raise SpecError(
                f"{self.checkpoints.folder}: this run was begun with other data; bring them back or name another folder"
            )
        self.step, self.learned = run["step"], run["learned"]
        self.stream.restore(run["stream"])
        self.guard = Guard(self.recipe.guard, run["losses"])

    def _go_back(self, why: str) -> None:
        """Return to the last good checkpoint, with the batches since then left out."""
        wrong, retries, ahead = self.step + 1, self.retries + 1, self.stream.state()
        if retries > self.recipe.guard.retries:
            raise Diverged(f"step {wrong}: {why}; {self.recipe.guard.retries} returns to a checkpoint did not help")
        if retries > 1:  # the checkpoint itself may be spoilt
            self.checkpoints.drop_last()
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
