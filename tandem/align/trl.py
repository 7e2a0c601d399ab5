"""TRL's trainers as this project runs them: nothing leaves the machine, nothing is printed, a run can be gone on with.

A trainer of ours is `class _Sft(LocalTrainer, SFTTrainer)`, made from `arguments` and run inside `contained`.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from tandem.model.memory import keep_freed_memory
from tandem.model.tokenizer import Tokenizer
from tandem.spec.catalog import read_json
from tandem.spec.errors import SpecError
from tandem.spec.files import write_whole
from tandem.train.loop import Diverged, Listener

Arguments = TypeVar("Arguments", bound=TrainingArguments)
_CHECKPOINTS, _WHOLE, _RUN = "checkpoints", "whole", "run.json"


def arguments(cls: type[Arguments], out: Path, *, seed: int, **settings: Any) -> Arguments:
    """A trainer's settings (`SFTConfig`, `DPOConfig` ...): fp32, one log a step, checkpoints in `out/checkpoints`.

    `settings` are the class's own fields and go before what is set here. Checkpoints are written every `save_steps` and at
    the end; without `save_steps` none is.
    """
    usual: dict[str, Any] = {
        "output_dir": str(out / _CHECKPOINTS),
        "seed": seed,
        "data_seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "optim": "adamw_torch_fused",
        "report_to": "none",
        "push_to_hub": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if "save_steps" in settings else "no",
        "save_total_limit": 2,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    return cls(**{**usual, **settings})


@contextmanager
def contained() -> Iterator[None]:
    """While this lasts trainers are silent; what they change of the process (seeds, verbosity) is put back after it."""
    verbosity, bars = transformers.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    state, numpy_state = random.getstate(), np.random.get_state()
    if not torch.cuda.is_available():
        keep_freed_memory()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        transformers.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        with warnings.catch_warnings(), torch.random.fork_rng(devices):
            for module in ("transformers", "trl", "accelerate", "torch"):
                warnings.filterwarnings("ignore", module=rf"{module}\.")
            warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing\w*` is deprecated", FutureWarning)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        transformers.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


class LocalTrainer(Trainer):
    """What every trainer of ours does otherwise than TRL: put it before TRL's class.

    No telemetry and no card for a hub. Weight decay acts on matrices alone, as in pre-training. A loss that is not a number
    raises Diverged before a step is made of it. A checkpoint that was not finished is never taken for one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)

    def _send_telemetry(self) -> None:
        """Nothing is sent."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: cards are written by `tandem.align`."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices, but for those of convolutions."""
        return [name for name, p in model.named_parameters() if p.dim() > 1 and ".conv1d." not in name]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of a micro-batch, whose gradients are added."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if not bool(torch.isfinite(loss)):
            raise Diverged(f"loss={float(loss)}: is not a number; lower the learning rate or look at the data")
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        write_whole(Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}", _WHOLE), "")


class ListenCallback(TrainerCallback):
    """Tells `listen` of every step: kind, stage, step, steps, loss, grad_norm, lr, seconds, tokens, tokens_per_s.

    `names` are more figures of the trainer's log and what they are called in the event. Tokens are there where the arguments
    say `include_num_input_tokens_seen`. Raises Diverged for a step whose loss or gradient is not a number; none is saved.
    """

    def __init__(self, stage: str, listen: Listener, names: Mapping[str, str] | None = None) -> None:
        self.stage, self.listen, self.names = stage, listen, dict(names or {})
        self.last: dict[str, Any] = {}
        """The latest event."""
        self._since, self._tokens = time.perf_counter(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._since, self._tokens = time.perf_counter(), int(state.num_input_tokens_seen)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """A step was made."""
        if logs is None or "loss" not in logs:
            return
        loss, norm = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(f"step={state.global_step}: loss {loss}, gradient norm {norm}; lower the learning rate")
        now, tokens = time.perf_counter(), int(state.num_input_tokens_seen)
        seconds, counted = now - self._since, tokens - self._tokens
        self._since, self._tokens = now, tokens
        event: dict[str, Any] = {
            "kind": "step",
            "stage": self.stage,
            "step": state.global_step,
            "steps": state.max_steps,
            "loss": loss,
            "grad_norm": norm,
            "lr": float(logs.get("learning_rate", 0.0)),
            "seconds": seconds,
        }
        if counted:
            event |= {"tokens": counted, "tokens_per_s": counted / seconds}
        event |= {name: float(logs[theirs]) for theirs, name in self.names.items() if theirs in logs}
        self.last = event
        self.listen(event)


def hub_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer as TRL asks for one, with the same special tokens and template. Raises SpecError without a padding token."""
    if "pad_token" not in tokenizer.special:
        raise SpecError("pad_token=None: the tokenizer must have one; batches are padded with it")
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, **tokenizer.special)
    theirs.chat_template = tokenizer.template
    return theirs


def claim(out: Path, run: Mapping[str, Any]) -> None:
    """Make `out` the folder of a run that `run` describes (settings, seed, fingerprint of data), or go on with it.

    Raises SpecError where the folder holds another run.
    """
    mine, file = json.loads(json.dumps(run)), out / _RUN
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as wrong:
        raise SpecError(f"out={str(out)!r}: cannot be written ({wrong.strerror}); name another folder") from None
    if not file.is_file():
        if (out / _CHECKPOINTS).exists():
            raise SpecError(f"out={str(out)!r}: holds a run without its {_RUN}; name another folder")
        write_whole(file, json.dumps(mine, indent=2) + "\n")
        return
    there = read_json(file)
    changed = [name for name in {**mine, **there} if there.get(name) != mine.get(name)]
    if changed:
        raise SpecError(f"out={str(out)!r}: holds a run with another {changed[0]}; name another folder")


def last_checkpoint(out: Path) -> Path | None:
    """The newest finished checkpoint of a run, None where there is none. What a crash left half written is removed."""
    found: dict[int, Path] = {}
    for folder in (out / _CHECKPOINTS).glob("checkpoint-*"):
        if (folder / _WHOLE).is_file():
            found[int(folder.name.rpartition("-")[2])] = folder
        else:
            shutil.rmtree(folder)
    return found[max(found)] if found else None


def train(trainer: LocalTrainer) -> None:
    """Run a trainer from its newest checkpoint, or from the beginning, to the end."""
    newest = last_checkpoint(Path(str(trainer.args.output_dir)).parent)
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
