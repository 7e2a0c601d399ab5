"""The state of a run on disk: saved while the run goes on, published by a rename, read again at any number of ranks.

A checkpoint is the folder `step-00000200`: torch's distributed checkpoint of weights and optimiser, and `run.json` with all
else. It has another name while it is written, so whatever a crash leaves behind is never taken for one.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.checkpoint import state_dict_loader as loader
from torch.distributed.checkpoint import state_dict_saver as saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.optim import Optimizer

from tandem.spec.errors import SpecError
from tandem.train.ranks import Ranks

# Said at every save of a process that is alone, in the thread that saves: no filter around the call would reach it there.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
_NAME = re.compile(r"step-(\d{8})")
_RUN = "run.json"


@dataclass
class _Saving:
    draft: Path
    final: Path
    written: Future[Any]


class Checkpoints:
    """Checkpoints of one run in one folder. Every rank makes one of these and calls its methods at the same steps."""

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int, asynchronous: bool) -> None:
        if keep < 1:
            raise SpecError(f"checkpoint.keep={keep}: must be at least 1")
        self.folder, self.ranks, self.keep = folder, ranks, keep
        self.asynchronous = asynchronous
        self._saving: _Saving | None = None
        # Asynchronous saves talk among ranks while the training step does, so not over the same group.
        self._group = distributed.new_group(backend="gloo") if ranks.world > 1 else None
        if ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
            for draft in folder.glob(".step-*"):
                shutil.rmtree(draft, ignore_errors=True)
        ranks.barrier()

    def save(self, step: int, model: nn.Module, optimiser: Optimizer, run: dict[str, Any]) -> None:
        """Save after `step` steps; `run` is JSON data. An earlier save that still goes on is waited for."""
        self.finish()
        name = f"step-{step:08}"
        draft, final = self.folder / f".{name}", self.folder / name
        state = _state(model, optimiser)
        if self.ranks.first:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            (draft / _RUN).write_text(json.dumps({"step": step, **run}), encoding="utf-8")
        self.ranks.barrier()
        written: Future[Any]
        if self.asynchronous:
            begun = saver.async_save(state, checkpoint_id=draft, process_group=self._group, no_dist=self.ranks.world == 1)
            written = begun if isinstance(begun, Future) else begun.upload_completion
        else:
            saver.save(state, checkpoint_id=draft, process_group=self._group, no_dist=self.ranks.world == 1)
            written = Future()
            written.set_result(None)
        self._saving = _Saving(draft, final, written)
        if not self.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Put a save in place if it is written by now; costs nothing otherwise."""
        if self._saving is not None and self._saving.written.done():
            self._publish()

    def finish(self) -> None:
        """Wait until what is being saved is in place."""
        self._publish()
        self.ranks.barrier()

    def _publish(self) -> None:
        """The first rank's save ends when those of all have: it writes the index of them all."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        try:
            saving.written.result()
        except (CheckpointException, OSError) as wrong:
            raise SpecError(f"{saving.final}: cannot be written ({_told(wrong)}); make room and start again") from None
        if self.ranks.first:
            publish(saving.draft, saving.final)
            for old in published(self.folder)[: -self.keep]:
                shutil.rmtree(old)

    def load(self, model: nn.Module, optimiser: Optimizer) -> dict[str, Any] | None:
        """Fill model and optimiser from the last checkpoint and return its `run` with `step`; None where there is none.

        Raises SpecError where it cannot be read: another one is never taken instead without being asked for.
        """
        self.finish()
        there = published(self.folder)
        if not there:
            return None
        state = _state(model, optimiser)
        try:
            run: dict[str, Any] = json.loads((there[-1] / _RUN).read_text(encoding="utf-8"))
            loader.load(state, checkpoint_id=there[-1], process_group=self._group, no_dist=self.ranks.world == 1)
        except (CheckpointException, OSError, ValueError, EOFError, pickle.UnpicklingError) as wrong:
            older = there[-2].name if len(there) > 1 else "the beginning"
            raise SpecError(f"{there[-1]}: cannot be read ({_told(wrong)}); remove it to go on from {older}") from None
        set_state_dict(model, optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"])
        return run

    def drop_last(self) -> None:
        """Remove the last checkpoint where there is an older one to go back to."""
        self.finish()
        there = published(self.folder)
        if self.ranks.first and len(there) > 1:
            shutil.rmtree(there[-1])
        self.ranks.barrier()


def _state(model: nn.Module, optimiser: Optimizer) -> dict[str, Any]:
    """What a checkpoint holds. torch makes the moments of an optimiser that has none by a step without gradients or rate, and
    counts it: our first step would be corrected for bias as a second one."""
    fresh = not optimiser.state
    weights, moments = get_state_dict(model, optimiser)
    if fresh:
        for held in optimiser.state.values():
            held["step"].zero_()
        weights, moments = get_state_dict(model, optimiser)
    return {"model": weights, "optimiser": moments}


def _told(wrong: BaseException) -> str:
    return f"{type(wrong).__name__}: {' '.join(str(wrong).split())[:200]}"


def published(folder: Path) -> list[Path]:
    """Whole checkpoints in a folder, the oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and (path / _RUN).is_file())


def publish(draft: Path, final: Path) -> None:
    """Give a finished checkpoint its name, once all of it is on disk."""
    for file in [*draft.rglob("*"), draft]:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    shutil.rmtree(final, ignore_errors=True)
    draft.replace(final)
    handle = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def full_weights(model: nn.Module, ranks: Ranks) -> dict[str, torch.Tensor]:
    """All weights by their names, whole and on the CPU, on the first rank; nothing on the others."""
    whole = StateDictOptions(full_state_dict=ranks.world > 1, cpu_offload=ranks.world > 1)
    weights: dict[str, Any] = get_model_state_dict(model, options=whole)
    return weights
