"""The runs behind `tandem study compression`: variants of nano-compress times seeds, one after the other.

    python benchmarks/compression_runs.py --out out/compression --seeds 3 --scale 0.25

Finished runs are skipped and one that was interrupted is gone on with, so the same command may be started again. Each run is
`tandem compress` in a process of its own, on the recipe that lies in OUT/recipes; runs of a seed share their prepared data.
`--scale` multiplies the tokens that are distilled on; what models are judged by stays. `whole` is the recipe as it is. The
others are one cut and one distillation on as many tokens. The cut is in width to 8 Mamba heads and the largest of the
recipe's other widths that fits, but for `depth-only`, and for `width-only`, which is cut to the bytes that `depth-only` of
that seed came to. At last the teacher and the compressed model of seed 0 generate in turns. `--write` writes the recipes and
runs nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from alignment_runs import measure, place, tandem
from model import ALLOCATOR

if __name__ == "__main__" and not ALLOCATOR.keys() <= os.environ.keys():
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)

from tandem.compress.recipe import CompressRecipe, search_recipe
from tandem.compress.recipe_files import load_recipe
from tandem.spec.catalog import find_weights, load_spec
from tandem.spec.files import write_whole
from tandem.study.compression_claims import (
    CROSS_ENTROPY,
    DEPTH_ONLY,
    EQUAL,
    GROUP_BLIND,
    PRUNED,
    SCRATCH,
    WHOLE,
    WIDTH_ONLY,
)
from tandem.study.compression_runs import TEACHER

RECIPE = "nano-compress"
VARIANTS = (WHOLE, PRUNED, SCRATCH, CROSS_ENTROPY, GROUP_BLIND, DEPTH_ONLY, WIDTH_ONLY)
"""In the order that they are run in; width-only needs depth-only."""
WITHOUT = {SCRATCH: "weights", CROSS_ENTROPY: "teacher", GROUP_BLIND: "groups"}
"""What each leaves out."""
ASKED = (WHOLE, PRUNED, SCRATCH, CROSS_ENTROPY)
"""Variants whose models answer questions."""
HEADS = 8
"""Mamba heads that a cut in width leaves, of 12 in two groups: few enough for the ranking to matter."""
GRID = {
    "hidden_size": [176, 168, 160, 152, 144],
    "ffn_size": [672, 640, 608, 576, 544, 512, 480, 448],
    "mamba_heads": [10, 8],
}
"""Widths near enough to each other that one has the bytes of any cut in depth."""


def recipe_of(variant: str, scale: float, problems: int, teacher: str | None, held: int | None = None) -> dict[str, Any]:
    """A variant's recipe as plain data, `scale` applied; `held` are the bytes that width-only may take."""
    data: dict[str, Any] = json.loads(json.dumps(asdict(load_recipe(RECIPE))))
    data["teacher"] = data["teacher"] if teacher is None else teacher
    if variant not in ASKED:
        data["evaluate"] = None
    elif data["evaluate"] is not None:
        data["evaluate"]["problems"] = problems
    distils = [stage["distil"] for stage in data["stages"].values() if stage["distil"] is not None]
    for part in distils:
        step = part["length"] * part["rows"]
        part["tokens"] = max(1, round(part["tokens"] * scale / step)) * step
    if variant == WHOLE:
        return data
    cut = "depth" if variant == DEPTH_ONLY else "width"
    last = distils[-1] | {"tokens": sum(part["tokens"] for part in distils)}
    data |= {
        "name": f"{RECIPE}-{variant}",
        "about": f"{variant}, of the study of compression: one cut and one distillation",
        "stages": {"cut": {"cut": cut}, "distil": {"distil": last}},
        "objective": None,
        "ranking": None,
        "select": {"by": "total_bytes", "take": 1},
    }
    if variant in WITHOUT:
        data["without"][WITHOUT[variant]] = True
    layers = len(load_spec(data["teacher"]).layers)
    if variant == DEPTH_ONLY:
        data |= {"width": None, "depth": {"layers": list(range(layers - 1, layers // 2 - 1, -1))}}
    elif variant == WIDTH_ONLY:
        data |= {"depth": None, "width": GRID}
        data["budget"] |= {"share": None, "total_bytes": held}
    else:
        data["depth"] = None
        data["width"]["mamba_heads"] = [HEADS]
    return data


def write_recipe(out: Path, name: str, data: dict[str, Any]) -> tuple[Path, CompressRecipe]:
    """The recipe as a file, and as it is read from there."""
    file = out / "recipes" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, yaml.safe_dump(data, sort_keys=False, width=120))
    return file, load_recipe(file)


def as_large_as(data: dict[str, Any], out: Path, seed: int, held: int) -> Path:
    """The recipe of width-only for a seed. Ends all where the grid has no shape of those bytes, up to what counts as equal."""
    file, recipe = write_recipe(out, f"{WIDTH_ONLY}-{seed}", data)
    found = search_recipe(recipe).candidates[0].total_bytes
    if held - found > EQUAL * held:
        raise SystemExit(f"{WIDTH_ONLY}, seed {seed}: the largest shape that fits has {found:,} of {held:,} bytes; refine GRID")
    return file


def share_data(out: Path, variant: str, seed: int) -> None:
    """Let a run begin with the prepared data of a finished one of the same seed."""
    mine = place(out, variant, seed) / "data"
    if mine.exists():
        return
    for other in VARIANTS:
        there = place(out, other, seed)
        if (there / "metrics.json").is_file() and (there / "data").is_dir():
            mine.parent.mkdir(parents=True, exist_ok=True)
            mine.symlink_to((there / "data").resolve())
            return


def compress(out: Path, variant: str, seed: int, recipe: Path, changes: Sequence[str]) -> None:
    """One run, unless it is finished."""
    folder = place(out, variant, seed)
    if (folder / "metrics.json").is_file():
        return
    print(f"{variant}, seed {seed}", flush=True)
    share_data(out, variant, seed)
    began = time.perf_counter()
    log = out / f"{variant}-{seed}.log"
    found = json.loads(tandem("compress", str(recipe), f"seed={seed}", *changes, "--out", str(folder), "--json", log=log))
    metrics = found["metrics"]
    share = metrics["student"]["total_bytes"] / metrics["teacher"]["total_bytes"]
    end = list(metrics["reports"].values())[-1]["metrics"]
    minutes = (time.perf_counter() - began) / 60
    print(f"  {share:.1%} of the bytes, KL {end['kl']:.4f}, loss {end['nll']:.4f}; {minutes:.1f} minutes", flush=True)


def held_by(out: Path, seed: int) -> int | None:
    """Bytes of the finished depth-only model of a seed; None where it is not there."""
    file = place(out, DEPTH_ONLY, seed) / "metrics.json"
    return int(json.loads(file.read_text(encoding="utf-8"))["student"]["total_bytes"]) if file.is_file() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/compression"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=0.25, help="Of the tokens that are distilled on.")
    parser.add_argument("--problems", type=int, default=100, help="Held-out ones of each task.")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--teacher", help="A model's name or a checkpoint folder. Default: the recipe's.")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD.PATH=VALUE", help="Changes to every run.")
    parser.add_argument("--write", action="store_true", help="Write the recipes and run nothing.")
    options = parser.parse_args()
    if not 0 < options.scale < math.inf:
        raise SystemExit(f"scale={options.scale}: must be above 0")
    teacher = options.teacher
    if teacher is not None and Path(teacher).is_dir():
        teacher = str(Path(teacher).resolve())
    chosen = [name for name in VARIANTS if name in options.only]
    settings = options.scale, options.problems, teacher
    recipes = {name: write_recipe(options.out, name, recipe_of(name, *settings))[0] for name in chosen if name != WIDTH_ONLY}
    if options.write:
        return
    for seed in range(options.seeds):  # seed by seed, so that whatever is there when time ends can be compared
        for name in chosen:
            file = recipes.get(name)
            if file is None:
                held = held_by(options.out, seed)
                if held is None:
                    raise SystemExit(f"{WIDTH_ONLY}, seed {seed}: is cut to the bytes of {DEPTH_ONLY}; run that first")
                file = as_large_as(recipe_of(name, *settings, held), options.out, seed, held)
            compress(options.out, name, seed, file, options.set)
    if (place(options.out, WHOLE, 0) / "metrics.json").is_file():
        original = find_weights(teacher or load_recipe(RECIPE).teacher)
        measure(options.out / "throughput.json", {TEACHER: original, WHOLE: place(options.out, WHOLE, 0) / "model"})


if __name__ == "__main__":
    main()
