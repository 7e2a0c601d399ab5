"""TRL's trainers as this project runs them: nothing leaves the machine, nothing is printed, a run can be gone on with.

A trainer of ours is `class _Sft(LocalTrainer, SFTTrainer)`, made from `arguments` and run inside `contained`.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import datasets
import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from tandem.model.hybrid import Decoder
from tandem.model.memory import keep_freed_memory
from tandem.model.tokenizer import Tokenizer
from tandem.spec.catalog import read_json
from tandem.spec.errors import SpecError
from tandem.spec.files import write_whole
from tandem.spec.units import require_int, require_number
from tandem.train.loop import Diverged, Listener
from tandem.train.precision import apply_precision
from tandem.train.recipe import LinearFormat, PrecisionPart

Schedule = Literal["constant", "linear", "cosine"]
Arguments = TypeVar("Arguments", bound=TrainingArguments)
_CHECKPOINTS, _WHOLE, _RUN = "checkpoints", "whole", "run.json"
_POINTS = 50
"""Most points of a run's course."""


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """What every stage states of its optimiser: AdamW, steps of `rows` examples, a learning rate that rises and falls."""

    steps: int | None = None
    """Optimiser steps; None where `epochs` is given."""
    epochs: float | None = None
    """How often all examples are learned from; None where `steps` is given."""
    rows: int = 16
    """Examples of a step: sequences, pairs."""
    micro: int | None = None
    """Examples of one forward pass, a divisor of `rows`; None: all of a step."""
    lr: float = 1e-4
    schedule: Schedule = "cosine"
    """How the rate goes from `lr` at the end of the warm-up to 0 at the end."""
    warmup: float = 0.03
    """Share of the steps in which the rate rises from 0."""
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    """Norm to which gradients are scaled down."""
    linears: LinearFormat = "fp32"
    """Number format of the linears' products (`tandem.train.precision`); weights and gradients stay fp32."""
    checkpoint_every: int = 100
    """Steps between checkpoints; one is written at the end as well."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise SpecError(f"steps={self.steps}, epochs={self.epochs}: state one of the two")
        if self.steps is not None:
            require_int("steps", self.steps)
        if self.epochs is not None:
            require_number("epochs", self.epochs, high=1e6)
        require_int("rows", self.rows)
        require_int("checkpoint_every", self.checkpoint_every)
        if self.micro is not None and (require_int("micro", self.micro) > self.rows or self.rows % self.micro):
            raise SpecError(f"micro={self.micro}: must divide rows={self.rows}")
        require_number("lr", self.lr, high=1.0)
        require_number("clip", self.clip)
        for name in ("schedule", "linears"):
            allowed = get_args(Schedule if name == "schedule" else LinearFormat)
            if getattr(self, name) not in allowed:
                raise SpecError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        for name in ("warmup", "weight_decay", "beta1", "beta2"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise SpecError(f"{name}={value!r}: must be a number from 0 to below 1")

    def steps_for(self, examples: int) -> int:
        """Optimiser steps of a run over so many examples."""
        if self.steps is not None:
            return self.steps
        return max(1, round((self.epochs or 0.0) * -(-examples // self.rows)))

    def trainer_fields(self, examples: int) -> dict[str, Any]:
        """The same in the words of transformers' TrainingArguments."""
        steps, micro = self.steps_for(examples), self.micro or self.rows
        return {
            "max_steps": steps,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": self.rows // micro,
            "learning_rate": self.lr,
            "lr_scheduler_type": "constant_with_warmup" if self.schedule == "constant" else self.schedule,
            "warmup_steps": round(self.warmup * steps),
            "weight_decay": self.weight_decay,
            "adam_beta1": self.beta1,
            "adam_beta2": self.beta2,
            "max_grad_norm": self.clip,
            "save_steps": self.checkpoint_every,
            "include_num_input_tokens_seen": "non_padding",
        }

    @property
    def may_differ(self) -> tuple[str, ...]:
        """Settings that a run may be gone on with differently: they do not change what it learns."""
        return ("micro", "checkpoint_every")

    def to_json(self) -> dict[str, Any]:
        """The fields, for the record of a run."""
        return asdict(self)


@contextmanager
def trainable(decoder: Decoder, linears: LinearFormat) -> Iterator[None]:
    """While this lasts the decoder's linears multiply in a number format; then they are plain again, in the mode of before.

    Raises SpecError for weights of fewer bits than fp32: a step would be lost in their rounding.
    """
    dtype = decoder.backbone.embeddings.weight.dtype
    if dtype != torch.float32:
        raise SpecError(f"dtype={str(dtype).removeprefix('torch.')}: training needs weights in float32; load them so")
    training = decoder.training
    apply_precision(decoder, PrecisionPart(linears=linears))
    try:
        yield
    finally:
        apply_precision(decoder, PrecisionPart(linears="fp32"))
        decoder.train(training)


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
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    no_data_bars = datasets.are_progress_bars_disabled()
    state, numpy_state = random.getstate(), np.random.get_state()
    if not torch.cuda.is_available():
        keep_freed_memory()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
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
        if bars:
            transformers.logging.enable_progress_bar()
        if not no_data_bars:
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
        self.seconds = 0.0
        """Of all steps of this process."""
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
        self._since, self._tokens, self.seconds = now, tokens, self.seconds + seconds
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
        self.listen(event)


def hub_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer as TRL asks for one, with the same special tokens and template. Raises SpecError without a padding token."""
    if "pad_token" not in tokenizer.special:
        raise SpecError("pad_token=None: the tokenizer must have one; batches are padded with it")
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, **tokenizer.special)
    theirs.chat_template = tokenizer.template
    return theirs


def fingerprint(rows: Iterable[Sequence[int]]) -> str:
    """What rows of whole numbers are told apart by: 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(np.asarray(row, dtype=np.int64).tobytes())
    return digest.hexdigest()


def weights_fingerprint(decoder: Decoder) -> str:
    """What decoders are told apart by: a thousand numbers of every weight."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in decoder.named_parameters():
        digest.update(name.encode())
        some = weight.detach().flatten()[:: max(1, weight.numel() // 1000)]
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def claim(out: Path, stage: str, settings: TrainerSettings, decoder: Decoder, *, seed: int, data: str) -> None:
    """Make `out` the folder of this run, or go on with it; `data` is the fingerprint of what is learned from.

    Raises SpecError where the folder holds another run.
    """
    stated = {"stage": stage, "seed": seed, "data": data, "model": weights_fingerprint(decoder), **settings.to_json()}
    mine = json.loads(json.dumps({name: value for name, value in stated.items() if name not in settings.may_differ}))
    file = out / _RUN
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
    """Run a trainer from its newest checkpoint, or from the beginning, to the end. Of a run at its end weights are read."""
    newest = last_checkpoint(Path(str(trainer.args.output_dir)).parent)
    if newest is not None:
        state = TrainerState.load_from_json(str(newest / "trainer_state.json"))
        if state.global_step >= trainer.args.max_steps:  # transformers would make one step more
            trainer._load_from_checkpoint(str(newest))
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))


def run_metrics(trainer: LocalTrainer, heard: ListenCallback, *, course: Sequence[str] = ()) -> dict[str, Any]:
    """What a finished run comes to: steps, tokens, the mean loss of the last tenth of its steps, seconds of this process.

    Besides, by the names of `heard`, the latest value of each of its figures, and `course`: at most 50 points of step, loss and
    the figures named, each the mean of the steps since the point before. All but the seconds are of the whole run, from the
    trainer's log, wherever it was gone on with.
    """
    ours = {"loss": "loss", **heard.names}
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    told = [{"step": e["step"], **{name: e[theirs] for theirs, name in ours.items() if theirs in e}} for e in logged]
    latest = {name: value for entry in told for name, value in entry.items() if name in heard.names.values()}
    losses = [entry["loss"] for entry in told[-max(1, len(told) // 10) :]]
    size = -(-len(told) // _POINTS)
    spans = [told[i : i + size] for i in range(0, len(told), size)]
    return {
        **latest,
        "steps": trainer.state.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "loss": sum(losses) / len(losses),
        "seconds": heard.seconds,
        "course": [{"step": span[-1]["step"], **_means(span, ("loss", *course))} for span in spans],
    }


def _means(entries: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Of each name, over the entries that have it."""
    values = {name: [entry[name] for entry in entries if name in entry] for name in names}
    return {name: sum(some) / len(some) for name, some in values.items() if some}
