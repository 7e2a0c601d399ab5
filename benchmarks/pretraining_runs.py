"""The runs behind `tandem study pretraining`: variants of the nano recipes times seeds, one after the other, on shared data.

    python benchmarks/pretraining_runs.py --out out/pretraining --tokens 1200000

Finished runs are skipped and one that was interrupted is gone on with, so the same command may be started again. Each run is
`tandem train` in a process of its own. The long-context runs go on from the hybrid of the same seed; facts in long
texts are asked of all three. Two cores take some five minutes for a million tokens of the hybrid.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tandem.spec.files import write_whole
from tandem.study.pretraining_claims import FP8, FP8_TENSOR, FP32, HYBRID, LONG, ONE_BLEND, SHORT, TRANSFORMER
from tandem.train.recipe_files import load_recipe


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A recipe and what is changed in it."""

    recipe: str
    changes: tuple[str, ...] = ()
    follows: bool = False
    """Whether it goes on from the hybrid of the same seed."""


def one_blend() -> str:
    """The three phases' tokens of each source as one phase."""
    phases, weights, begin = load_recipe("nano-hybrid")[0].data.phases, {}, 0.0
    for phase in phases:
        total = sum(phase.weights.values())
        for name, share in phase.weights.items():
            weights[name] = weights.get(name, 0.0) + (phase.until - begin) * share / total
        begin = phase.until
    return f"data.phases={json.dumps([{'until': 1.0, 'weights': {k: round(v, 9) for k, v in weights.items()}}])}"


def variants() -> dict[str, Variant]:
    """All of them, in the order of running."""
    long, base = load_recipe("nano-long")[0], load_recipe("nano-hybrid")[0]
    needles = f"evaluate.needles={list(long.evaluate.needles)}"
    short = (
        f"batch.tokens={long.batch.tokens}",
        f"batch.sequences={max(1, long.batch.tokens_per_step // base.batch.sequence_length)}",
        f"data.phases={json.dumps([{'until': 1.0, 'weights': base.data.phases[-1].weights}])}",
        *(f"optimiser.{name}={value}" for name, value in asdict(long.optimiser).items()),
        needles,
    )
    return {
        HYBRID: Variant(recipe="nano-hybrid", changes=("precision.linears=bf16", needles)),
        FP8: Variant(recipe="nano-hybrid-fp8"),
        TRANSFORMER: Variant(recipe="nano-transformer", changes=("precision.linears=bf16",)),
        ONE_BLEND: Variant(recipe="nano-hybrid", changes=("precision.linears=bf16", one_blend())),
        FP32: Variant(recipe="nano-hybrid", changes=("precision.linears=fp32",)),
        LONG: Variant(recipe="nano-long", follows=True),
        SHORT: Variant(recipe="nano-hybrid", changes=short, follows=True),
        FP8_TENSOR: Variant(recipe="nano-hybrid", changes=("precision.linears=fp8-tensor",)),
    }


def place(out: Path, name: str, seed: int) -> Path:
    """The folder of a run."""
    return out / name / f"seed-{seed}"


def train(out: Path, name: str, variant: Variant, seed: int, more: Sequence[str], problems: int) -> None:
    """One run, unless it is finished; the log of one that fails stays in its folder."""
    folder = place(out, name, seed)
    if (folder / "metrics.json").is_file():
        return
    asked = [f"evaluate.problems={problems}", f"seed={seed}"]
    data = "data"
    if variant.follows:
        base = place(out, HYBRID, seed) / "model"
        asked += [f"model.initial={base.resolve()}"]
        if variant.recipe == "nano-long":
            # The tokenizer is the same for every seed, and so is this data.
            asked += [f"data.tokenizer.name={(place(out, HYBRID, 0) / 'model').resolve()}"]
            data = "data-long"
    command = [sys.executable, "-m", "tandem.cli", "train", variant.recipe, *variant.changes, *asked, *more]
    began = time.perf_counter()
    print(f"{name}, seed {seed}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        places = ["--out", str(folder), "--data", str(out / data), "--json"]
        done = subprocess.run([*command, *places], stdout=log, stderr=log, check=False)
    if done.returncode:
        last = (folder / "log.txt").read_text(encoding="utf-8").splitlines()[-1:]
        raise SystemExit(f"{name}, seed {seed}: {''.join(last)}")
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    right = ", ".join(f"{task} {share['accuracy']:.0%}" for task, share in found.get("accuracy", {}).items())
    print(f"  loss {found['loss']:.4f}; {right}; {(time.perf_counter() - began) / 60:.1f} minutes", flush=True)


def ask_long(out: Path, folder: Path, batches: int = 20) -> None:
    """Loss of a finished run on the held-out sequences of the long-context phase, by source, kept beside it."""
    target = folder / "long.json"
    if target.is_file() or not ((folder / "metrics.json").is_file() and (out / "data-long").is_dir()):
        return
    from tandem.model.load import load_model
    from tandem.train.data.stream import TokenStream
    from tandem.train.evaluate import held_out_loss

    recipe, _ = load_recipe("nano-long")
    stream = TokenStream(out / "data-long", recipe.data, recipe.batch, seed=0)
    model = load_model(folder / "model")
    asked = {name: stream.held_out(name, batches, recipe.batch.sequences) for name in recipe.data.phases[-1].weights}
    found = {name: held_out_loss(model, rows) for name, rows in asked.items() if any(row.learned for row in rows)}
    write_whole(target, json.dumps(found, indent=1) + "\n")
    print("  long sequences: " + ", ".join(f"{name} {loss:.3f}" for name, loss in found.items()), flush=True)


def main() -> None:
    known = variants()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/pretraining"))
    parser.add_argument("--tokens", type=int, default=1_200_000, help="Of each base run.")
    parser.add_argument("--long-tokens", type=int, help="Of each run that goes on from one; default nano-long's.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--problems", type=int, default=200, help="Of each task.")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD.PATH=VALUE", help="Changes to every run.")
    options = parser.parse_args()
    for seed in range(options.seeds):  # seed by seed, so that whatever is there when time ends can be compared
        for name in options.only:
            tokens = options.long_tokens if known[name].follows else options.tokens
            more = [*([] if tokens is None else [f"batch.tokens={tokens}"]), *options.set]
            train(options.out, name, known[name], seed, more, options.problems)
        for name in (HYBRID, LONG, SHORT):
            ask_long(options.out, place(options.out, name, seed))


if __name__ == "__main__":
    main()
