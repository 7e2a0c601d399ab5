"""A run small enough for tests: a recipe file, text to learn from, and the command that trains it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPE = """
about: a run for tests
model:
  {pattern: "M*-M-", hidden_size: 32, ffn_size: 64, num_heads: 4, num_kv_heads: 2, head_dim: 8,
   mamba_heads: 4, mamba_head_dim: 16, state_dim: 8, groups: 2}
data:
  tokenizer: {vocab_size: 300}
  sources:
    words: {kind: text, path: words.txt, licence: none}
    sums: {kind: jsonl, path: sums.jsonl, text: "{question} {answer}", prompt: "{question} ", licence: none}
  phases:
    - {until: 0.6, weights: {words: 0.5, sums: 0.5}}
    - {until: 0.9, weights: {words: 0.25, sums: 0.75}}
    - {until: 1.0, weights: {sums: 1.0}}
  cut: [words]
  held_out: 0.1
batch: {sequence_length: 64, sequences: 4, tokens: 5120}
optimiser: {lr: 3.0e-3, min_lr: 3.0e-5, warmup: 0.1}
precision: {linears: fp32}
checkpoint: {every: 5}
evaluate: {every: 10, batches: 2}
"""


def write_recipe(folder: Path, more: str = "") -> Path:
    """The recipe with its sources in `folder`; `more` is YAML of a recipe that extends it."""
    draw = random.Random(5)
    nouns = ["river", "stone", "bird", "lantern", "winter", "harbour", "bread", "music", "garden", "letter"]
    lines = [" ".join(draw.choices(nouns, k=draw.randint(5, 40))) + "." for _ in range(150)]
    (folder / "words.txt").write_text("\n\n".join(lines), encoding="utf-8")
    with (folder / "sums.jsonl").open("w", encoding="utf-8") as stream:
        for a in range(20):
            for b in range(20):
                stream.write(json.dumps({"question": f"{a} + {b} =", "answer": str(a + b)}) + "\n")
    base = folder / "small.yaml"
    base.write_text(RECIPE, encoding="utf-8")
    if not more:
        return base
    (folder / "more.yaml").write_text(f"extends: small\n{more}\n", encoding="utf-8")
    return folder / "more.yaml"


def run(recipe: Path, out: Path, *changes: str, ranks: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`tandem train` in processes of its own, under torchrun where there are several ranks."""
    command = [
        "-m",
        "tandem.cli",
        "train",
        str(recipe),
        *changes,
        "--out",
        str(out),
        "--data",
        str(recipe.parent / "data"),
        "--json",
    ]
    if ranks > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=240)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def losses(out: Path) -> dict[int, float]:
    """Loss by step, as the journal has it."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "step"}


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of one kind."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]
