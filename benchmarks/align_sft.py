"""How fast supervised fine-tuning by TRL runs beside the training loop of `tandem train`, and beside TRL with its own loss.

All train nano-hybrid's shape on the same rows from the same weights, in alternating rounds; a step is all from the end of
one to the end of the next. Takes some five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model import ALLOCATOR

if __name__ == "__main__" and not ALLOCATOR.keys() <= os.environ.keys():
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)

from train_parts import Bench, Ours, prepared, recipe_of, take_turns
from trl.trainer.sft_trainer import SFTTrainer

from tandem.align import sft
from tandem.align.encode import Packed
from tandem.align.sft import SftSettings, train_packed
from tandem.model.precision import cpu_has_fast_bf16
from tandem.model.tokenizer import load_tokenizer
from tandem.train.data.packing import IGNORED

AT_MOST_RATIO = 1.5


def rows_of(ours: Ours) -> Packed:
    """The rows of a run, labels in transformers' places: a token's own, not the one before it."""
    stream = ours.stream()
    batches = [stream.batch() for _ in range(ours.recipe.batch.steps)]
    ids, labels, documents = (
        np.concatenate([getattr(batch, name) for batch in batches]) for name in ("input_ids", "labels", "documents")
    )
    return Packed(
        input_ids=ids,
        labels=np.concatenate([np.full_like(labels[:, :1], IGNORED), labels[:, :-1]], 1),
        documents=documents,
        samples=tuple(tuple(range(int(row[-1]) + 1)) for row in documents),
        too_long=(),
    )


class FineTuning:
    """Runs of `train_packed`; a call trains a fresh model. `own_loss` False: TRL's own loss in its place."""

    def __init__(self, bench: Bench, ours: Ours, *, linears: str, own_loss: bool = True) -> None:
        self.bench, self.ours, self.own_loss = bench, ours, own_loss
        self.rows = rows_of(ours)
        self.settings = SftSettings(
            steps=ours.recipe.batch.steps,
            rows=ours.recipe.batch.sequences,
            lr=ours.recipe.optimiser.lr,
            linears=linears,  # type: ignore[arg-type]
            checkpoint_every=10**6,
        )

    def __call__(self) -> list[float]:
        """Seconds from the end of one step to the end of the next."""
        ends: list[float] = []
        loss = sft._Sft.compute_loss
        if not self.own_loss:
            sft._Sft.compute_loss = SFTTrainer.compute_loss  # type: ignore[method-assign]
        try:
            with tempfile.TemporaryDirectory(dir=self.bench.scratch) as out:
                train_packed(
                    self.ours.decoder(),
                    load_tokenizer(self.bench.data / "tokenizer"),
                    self.rows,
                    self.settings,
                    Path(out),
                    seed=0,
                    listen=lambda event: ends.append(time.perf_counter()),
                )
        finally:
            sft._Sft.compute_loss = loss  # type: ignore[method-assign]
        return np.diff(ends).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    formats = ["fp32", "bf16"] if cpu_has_fast_bf16() else ["fp32"]
    with tempfile.TemporaryDirectory() as scratch:
        bench = prepared(Path(scratch))
        runs: dict[str, Any] = {}
        for linears in formats:
            ours = Ours(bench, recipe_of(f"precision.linears={linears}"))
            runs[f"train {linears}"] = ours
            runs[f"sft {linears}"] = FineTuning(bench, ours, linears=linears)
            runs[f"sft, TRL's loss {linears}"] = FineTuning(bench, ours, linears=linears, own_loss=False)
        step_s = take_turns(runs, options.rounds)
    ratios = {name: step_s[name] / step_s[f"train {name.rpartition(' ')[2]}"] for name in step_s}
    for name, ratio in ratios.items():
        print(f"{name}: {1e3 * step_s[name]:.0f} ms a step, {ratio:.2f}x of tandem train (at most {AT_MOST_RATIO}x wanted)")
    if options.json:
        options.json.write_text(json.dumps({"step_s": step_s, "ratio": ratios}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
