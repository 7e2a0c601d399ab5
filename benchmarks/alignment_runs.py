"""The runs behind `tandem study alignment`: variants of the nano recipes times seeds, one after the other.

    python benchmarks/alignment_runs.py --out out/alignment --seeds 3 --scale 0.25

Finished runs are skipped and one that was interrupted is gone on with, so the same command may be started again. Each run is
`tandem align` in a process of its own, on the recipe that lies in OUT/recipes. `--scale` multiplies the conversations, the
questions and the steps that stages learn from; what models are judged by (evaluation, the merge's questions) stays. The merge
is swept from the one model to the other, both included. Then the model after the truncation stage is asked at every thinking
budget, with thoughts cut off and without, and both aligned models of seed 0 generate in turns. At a quarter a run takes some
20 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from model import ALLOCATOR

if __name__ == "__main__" and not ALLOCATOR.keys() <= os.environ.keys():
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)

from tandem.align.recipe import AlignRecipe
from tandem.align.recipe_files import load_recipe
from tandem.spec.files import write_whole
from tandem.study.alignment_claims import HYBRID, NO_TRUNCATION, TRANSFORMER, TRUNCATION

VARIANTS = {HYBRID: "nano-align-hybrid", TRANSFORMER: "nano-align-transformer", NO_TRUNCATION: "nano-align-hybrid"}
"""The recipe of each."""
BASES = {HYBRID: "hybrid", TRANSFORMER: "transformer", NO_TRUNCATION: "hybrid"}
"""The variant of pre-training that each begins from, where bases of every seed are given."""
_ASKED = ("reasoning", "instructions", "tools")
SETTINGS = ((32, 64, 256), (32, 512, 448), (128, 64, 256))
"""Batch, tokens of prompt and output at which generation is measured."""
ROUNDS = 5


def recipe_of(
    variant: str, scale: float, problems: int, until: str | None = None, learned: Sequence[str] = ()
) -> dict[str, Any]:
    """A variant's recipe as plain data, `scale` applied but to stages that are `learned`, up to a stage where one is named."""
    recipe = load_recipe(VARIANTS[variant])
    data: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    data["evaluate"]["problems"] = problems
    for name, stage in data["stages"].items():
        if name not in learned:
            rescale(stage, scale)
        if recipe.stages[name].merge is not None:
            inside = [alpha for alpha in stage["merge"]["alphas"] if 0 < alpha < 1]
            stage["merge"]["alphas"] = [*inside, 0.0, 1.0]  # of equal ones the first is taken: one inside
    last = TRUNCATION if variant == NO_TRUNCATION else until
    if last is not None:
        names = list(data["stages"])
        data["stages"] = {name: data["stages"][name] for name in names[: names.index(last) + 1]}
    if variant == NO_TRUNCATION:
        data["stages"][TRUNCATION]["sft"]["data"]["truncated"] = 0.0
        data["evaluate"]["budgets"] = []  # asked after the truncation stage, of both variants alike
    data["name"] = VARIANTS[variant] if variant != NO_TRUNCATION else f"{VARIANTS[variant]}-{NO_TRUNCATION}"
    return data


def rescale(stage: dict[str, Any], scale: float) -> None:
    """Multiply what a stage learns from: conversations, questions, steps (at least 10, and a batch of prompts)."""

    def count(value: int, least: int = 1) -> int:
        return max(least, round(value * scale)) if value else 0

    sft, grpo = stage["sft"], stage["grpo"]
    if sft is not None:
        sft["data"] |= {kind: count(sft["data"][kind]) for kind in _ASKED}
    if grpo is not None:
        grpo["asks"] |= {kind: count(grpo["asks"][kind]) for kind in _ASKED}
        prompts = grpo["train"]["rows"] * grpo["train"]["updates"] // grpo["train"]["generations"]
        lacking = prompts - sum(grpo["asks"][kind] for kind in _ASKED)
        if lacking > 0:
            grpo["asks"][max(_ASKED, key=lambda kind: grpo["asks"][kind])] += lacking
    for part in (stage["dpo"], stage["reward_model"]):
        if part is not None:
            part["pairs"]["asks"] |= {kind: count(part["pairs"]["asks"][kind]) for kind in _ASKED}
    for part in (sft, grpo, stage["dpo"], stage["reward_model"]):
        if part is not None and part["train"]["steps"] is not None:
            part["train"]["steps"] = count(part["train"]["steps"], 10)


def write_recipe(
    out: Path, variant: str, scale: float, problems: int, until: str | None, learned: Sequence[str]
) -> tuple[Path, AlignRecipe]:
    """The variant's recipe as a file, and as it is read from there."""
    file = out / "recipes" / f"{variant}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, yaml.safe_dump(recipe_of(variant, scale, problems, until, learned), sort_keys=False, width=120))
    return file, load_recipe(file)


def place(out: Path, variant: str, seed: int) -> Path:
    """The folder of a run."""
    return out / variant / f"seed-{seed}"


def tandem(*arguments: str, log: Path) -> str:
    """Run a command of ours in a process of its own; what it prints. Its log stays; one that fails ends all."""
    with log.open("a", encoding="utf-8") as errors:
        command = [sys.executable, "-m", "tandem.cli", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, check=False, text=True)
    if done.returncode:
        last = log.read_text(encoding="utf-8").splitlines()[-1:]
        raise SystemExit(f"{log.parent}: {''.join(last)}")
    return done.stdout


def align(out: Path, variant: str, seed: int, recipe: Path, changes: Sequence[str]) -> None:
    """One run, unless it is finished."""
    folder = place(out, variant, seed)
    if (folder / "metrics.json").is_file():
        return
    print(f"{variant}, seed {seed}", flush=True)
    began = time.perf_counter()
    log = out / f"{variant}-{seed}.log"
    found = json.loads(tandem("align", str(recipe), *changes, "--out", str(folder), "--json", log=log))
    shares = {
        f"{suite}, {mode}": tasks["all"]["accuracy"]
        for suite, modes in found["metrics"]["evaluation"].items()
        if suite != "budgets"
        for mode, tasks in modes.items()
    }
    right = "; ".join(f"{asked} {share:.0%}" for asked, share in shares.items())
    print(f"  {right}; {(time.perf_counter() - began) / 60:.1f} minutes", flush=True)


def before_truncation(recipe: AlignRecipe) -> list[str]:
    """Its stages before the truncation stage."""
    names = list(recipe.stages)
    return names[: names.index(TRUNCATION)]


def share_stages(source: Path, folder: Path, recipe: AlignRecipe) -> None:
    """What a run has learned before the truncation stage is taken over by another that would learn the same."""
    before = before_truncation(recipe)
    if folder.exists():
        return
    missing = next((name for name in before if not (source / name / "report.json").is_file()), None)
    if missing is not None:
        raise SystemExit(f"{source}: has no finished {missing} to go on from")
    folder.mkdir(parents=True)
    write_whole(folder / "recipe.json", json.dumps(asdict(recipe), indent=2) + "\n")
    shutil.copyfile(source / "base.json", folder / "base.json")
    for name in before:
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("checkpoints"))


def ask_budgets(out: Path, variant: str, seed: int, recipe: AlignRecipe, budgets: Sequence[int]) -> None:
    """The model after the truncation stage of a finished run at every thinking budget, kept beside the run."""
    folder = place(out, variant, seed)
    target = folder / "budgets.json"
    if target.is_file() or not (folder / "metrics.json").is_file():
        return
    asked = recipe.evaluate
    printed = tandem(
        "evaluate", str(folder / TRUNCATION / "model"), "--suite", "reasoning", "--thinking", "on", "--tasks",
        ",".join(recipe.tasks), "--problems", str(asked.problems), "--budgets", ",".join(map(str, budgets)), "--max-tokens",
        str(asked.max_tokens), "--json", log=out / f"{variant}-{seed}.log",
    )  # fmt: skip
    points = json.loads(printed)["metrics"]["budgets"]
    write_whole(target, json.dumps({"stage": TRUNCATION, "budgets": points}, indent=1) + "\n")
    shown = ", ".join(f"{point['budget']}: {point['one_closing_mark_unaided']:.1%}" for point in points)
    print(f"  {variant}, seed {seed}, exactly one closing mark by budget: {shown}", flush=True)


def measure(target: Path, folders: Mapping[str, Path]) -> None:
    """Tokens a second of some models, in turns in this process, unless the file `target` is there; by name."""
    if target.is_file():
        return
    import torch

    from tandem.model.load import load_model

    models = {name: load_model(folder, dtype=torch.float32) for name, folder in folders.items()}
    context = min(model.spec.max_context for model in models.values())
    measured = []
    for batch, isl, osl in SETTINGS:
        if isl + osl > context:
            continue
        sides = {name: generation(model, batch, isl, osl) for name, model in models.items()}
        rounds = [{name: side() for name, side in sides.items()} for _ in range(ROUNDS + 1)][1:]
        measured.append({"batch": batch, "prompt_tokens": isl, "output_tokens": osl, "rounds": rounds})
        rates = ", ".join(f"{name} {sum(r[name] for r in rounds) / ROUNDS:,.0f}" for name in sides)
        print(f"batch {batch}, {isl} + {osl} tokens: {rates} tokens/s", flush=True)
    capability = torch.backends.cpu.get_cpu_capability()
    machine = f"{platform.machine()} ({capability}), {torch.get_num_threads()} threads, fp32, torch {torch.__version__}"
    write_whole(target, json.dumps({"machine": machine, "settings": measured}, indent=1) + "\n")


def generation(
    model: Any, batch: int, isl: int, osl: int, *, waves: int = 1, cache_bytes: int | None = None
) -> Callable[[], float]:
    """Tokens a second from when all prompts, `waves` times `batch`, wait to when all answers are whole, prompts included."""
    import torch

    from tandem.engine.config import EngineConfig
    from tandem.engine.engine import Engine
    from tandem.engine.types import EngineRequest, SamplingParams

    config = EngineConfig(max_batch=batch, cache_bytes=cache_bytes, prefix_cache_bytes=0, threads=torch.get_num_threads())
    engine, count = Engine(model, config=config), waves * batch
    drawn = torch.randint(32, model.spec.vocab_size, (count, isl), generator=torch.Generator().manual_seed(0)).tolist()
    sampling = SamplingParams(max_tokens=osl, ignore_eos=True)

    def once() -> float:
        tokens, began = 0, time.perf_counter()
        for i, prompt in enumerate(drawn):
            engine.add(EngineRequest(id=str(i), prompt_ids=tuple(prompt), sampling=sampling))
        while engine.has_work:
            tokens += sum(len(output.token_ids) for output in engine.step().outputs)
        if tokens != count * osl:
            raise SystemExit(f"{tokens} tokens came, {count * osl} were asked for")
        return tokens / (time.perf_counter() - began)

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/alignment"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=0.25, help="Of what stages learn from.")
    parser.add_argument("--problems", type=int, default=100, help="Held-out ones of each task.")
    parser.add_argument("--until", help="The last stage that is run; without it all are.")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument(
        "--learned", type=Path, help="Runs LEARNED/hybrid and LEARNED/transformer: every seed goes on from their sft-2."
    )
    parser.add_argument("--bases", type=Path, help="Runs of pre-training: each seed begins from BASES/VARIANT/seed-K/model.")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD.PATH=VALUE", help="Changes to every run.")
    options = parser.parse_args()
    if not 0 < options.scale < math.inf:
        raise SystemExit(f"scale={options.scale}: must be above 0")
    whole = load_recipe(VARIANTS[HYBRID])
    if options.until is not None and options.until not in whole.stages:
        raise SystemExit(f"until={options.until!r}: must be one of {', '.join(whole.stages)}")
    learned = () if options.learned is None else before_truncation(whole)
    recipes = {
        name: write_recipe(options.out, name, options.scale, options.problems, options.until, learned) for name in options.only
    }
    budgets = whole.evaluate.budgets
    for seed in range(options.seeds):  # seed by seed, so that whatever is there when time ends can be compared
        for name, (file, recipe) in recipes.items():
            base = [] if options.bases is None else [f"base={(place(options.bases, BASES[name], seed) / 'model').resolve()}"]
            changes = [f"seed={seed}", *base, *options.set]
            if options.learned is not None:
                share_stages(options.learned / BASES[name], place(options.out, name, seed), load_recipe(file, changes))
            elif name == NO_TRUNCATION and place(options.out, HYBRID, seed).exists():
                share_stages(place(options.out, HYBRID, seed), place(options.out, name, seed), load_recipe(file, changes))
            align(options.out, name, seed, file, changes)
            if name != TRANSFORMER:
                ask_budgets(options.out, name, seed, recipe, budgets)
    aligned = {name: place(options.out, name, 0) for name in (HYBRID, TRANSFORMER)}
    if all((folder / "metrics.json").is_file() for folder in aligned.values()):
        measure(options.out / "throughput.json", {name: folder / "model" for name, folder in aligned.items()})


if __name__ == "__main__":
    main()
