"""Paper A's headline, live on this machine: a hybrid beside a Transformer of its size under one memory cap, and a teacher
beside what compression made of it.

    tandem calibrate host                                        # for the predictions of the hybrid and the Transformer
    tandem calibrate host -m nano-compress                       # for the compressed model's
    python benchmarks/headline.py --out headline.json            # about four minutes, on a quiet machine
    tandem study paper-a --with headline.json

The cap stands to the Transformer's weights as an A10G's usable memory to Qwen3-8B's, and lengths are scaled so that one of its
sequences takes the share of its weights that one of Qwen3-8B's takes at 8k + 16k (1k + 8k) tokens. Each side runs as many
sequences at once as its cache holds at full length, four rounds of them, in our engine, in turns in one process; every answer
has the full length. Judged apart are whether it is faster at all and whether by as much as is printed. `--compressed FOLDER`
names the compressed model, `--rounds` how often each side runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignment_runs import generation
from model import ALLOCATOR

if __name__ == "__main__" and not ALLOCATOR.keys() <= os.environ.keys():
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)

import torch

from tandem.engine.config import EngineConfig, size_cache
from tandem.model.hybrid import Decoder
from tandem.model.load import load_model
from tandem.perf.costs import Layout
from tandem.perf.estimate import estimate
from tandem.perf.host import load_host
from tandem.perf.memory import MemoryModel
from tandem.spec.catalog import find_weights, load_hardware, load_spec
from tandem.spec.design import Precision
from tandem.spec.errors import TandemError
from tandem.spec.files import write_whole
from tandem.study.result import Claim
from tandem.study.seeds import half_interval

PAPER = {"8k + 16k": (8192, 16384, 6.3), "1k + 8k": (1024, 8192, 3.3)}
"""Lengths and the factor over Qwen3-8B that paper A's figure 1 shows."""
DRIVER_SHARE = 0.95
"""Of an A10G's memory that an engine takes (facts of paper A: the budget of its search)."""
WAVES = 4
HOST, PRECISION = "host", "fp32/bf16/fp32"
ONE = Layout(1.0, 1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Setting:
    """One cap and one pair of lengths."""

    name: str
    cap_bytes: int
    isl: int
    osl: int


def paper_shares(isl: int, osl: int) -> tuple[float, float]:
    """Of Qwen3-8B on an A10G: usable memory over weights, and one sequence's cache over weights."""
    spec, gpu = load_spec("Qwen/Qwen3-8B"), load_hardware("a10g")
    memory = MemoryModel(spec, Precision(), gpu)
    weights = 2.0 * spec.parameters
    return gpu.memory_bytes * DRIVER_SHARE / weights, float(memory.sequence_bytes(ONE, float(isl + osl))) / weights


def setting(name: str, model: Decoder) -> Setting:
    """Cap and lengths for a Transformer of our own."""
    isl, osl, _ = PAPER[name]
    room, share = paper_shares(isl, osl)
    weights = weight_bytes(model)
    size = size_cache(model.spec, EngineConfig(max_batch=1), model.state_dtype, free_bytes=1 << 40)
    total = share * weights / (size.block_bytes / EngineConfig().block_size)
    ours = round(total * isl / (isl + osl))
    return Setting(name, int(room * weights), ours, round(total) - ours)


def weight_bytes(model: Decoder) -> int:
    """Of all parameters as they lie in memory."""
    return sum(p.nbytes for p in model.parameters())


def batch_of(model: Decoder, at: Setting) -> int:
    """Sequences that the cap holds beside the weights at full length."""
    config = EngineConfig(max_batch=1)
    size = size_cache(model.spec, config, model.state_dtype, free_bytes=1 << 40)
    sequence = size.slot_bytes + size.block_bytes * -(-(at.isl + at.osl) // config.block_size)
    return (at.cap_bytes - weight_bytes(model)) // sequence


def runs(model: Decoder, at: Setting, batch: int) -> Callable[[], float]:
    """Output tokens a second of `batch` sequences at once, prompts included, within the cap."""
    room = at.cap_bytes - weight_bytes(model)
    size = size_cache(model.spec, EngineConfig(max_batch=batch, cache_bytes=room), model.state_dtype, free_bytes=1 << 40)
    if size.total_bytes > room:
        raise SystemExit(f"{at.name}: the cache takes {size.total_bytes:,} bytes beside the weights, over the cap")
    return generation(model, batch, at.isl, at.osl, waves=WAVES, cache_bytes=room)


def compare(names: tuple[str, str], at: Setting, models: dict[str, Decoder], rounds: int) -> dict[str, Any]:
    """The first over the second: measured with its interval, at one sequence each too, and predicted."""
    batches = {name: batch_of(models[name], at) for name in names}
    for name, batch in batches.items():
        if batch < 1:
            raise SystemExit(f"{at.name}: the cap of {at.cap_bytes:,} bytes holds no sequence of {name}")
    rates: dict[str, list[float]] = {name: [] for name in names}
    alone: dict[str, list[float]] = {name: [] for name in names}
    for kept, sizes in ((rates, batches), (alone, dict.fromkeys(names, 1))):
        sides = {name: runs(models[name], at, sizes[name]) for name in names}
        for name in names:
            sides[name]()
        for _ in range(rounds):
            for name in names:
                kept[name].append(sides[name]())

    def ratio(of: dict[str, list[float]]) -> dict[str, float]:
        logs = [math.log(a / b) for a, b in zip(*(of[name] for name in names), strict=True)]
        mean, half = sum(logs) / len(logs), half_interval(logs)
        return {"value": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half)}

    return {
        **asdict(at),
        "names": names,
        "weight_bytes": {name: weight_bytes(models[name]) for name in names},
        "batch": batches,
        "tokens_per_s": rates,
        "ratio": ratio(rates),
        "ratio_alone": ratio(alone),
        "predicted": predicted(names, at, batches),
    }


def predicted(names: tuple[str, str], at: Setting, batches: dict[str, int]) -> dict[str, Any] | None:
    """The same ratio by the performance model on the calibrated host, and whose coefficients are another model's, because
    their own were not calibrated. None where the host was not."""
    specs = {name: load_spec(find_weights(name)) for name in names}
    try:
        rates = [
            estimate(
                model=specs[name], hardware=HOST, isl=at.isl, osl=at.osl, batch=batches[name], precision=PRECISION,
                backend="tandem",
            ).tokens_per_s_per_gpu.value
            for name in names
        ]  # fmt: skip
        host = load_host(HOST)
    except TandemError:
        return None
    weights = PRECISION.partition("/")[0]
    borrowed = [name for name in names if host is None or host.find(specs[name], weights)[1] != "calibrated"]
    return {"value": rates[0] / rates[1], "borrowed": borrowed}


def told(prediction: dict[str, Any] | None, ratio: dict[str, float]) -> str:
    """A prediction in words: on what it rests, and whether the measured interval holds it."""
    if prediction is None:
        return "not calibrated"
    borrowed = ", ".join(prediction["borrowed"])
    inside = ratio["low"] <= prediction["value"] <= ratio["high"]
    return (
        f"{prediction['value']:.2f}x"
        + (f" with another model's coefficients for {borrowed}" if borrowed else "")
        + ("" if inside else ", outside the interval")
    )


def claim(id: str, title: str, printed: str | None, found: dict[str, Any], holds: bool | None) -> Claim:
    """As `tandem study paper-a --with` reads it."""
    a, b = found["names"]
    ratio, alone = found["ratio"], found["ratio_alone"]["value"]
    ours = f"{ratio['value']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
    return Claim(
        id=id,
        title=title,
        printed=printed,
        ours=ours,
        holds=holds,
        holds_engine=None,
        why=f"batch {found['batch'][a]} beside {found['batch'][b]} under {found['cap_bytes'] / 1e6:.1f} MB at {found['isl']} + "
        f"{found['osl']} tokens; predicted {told(found['predicted'], ratio)}; {alone:.2f}x at one sequence each",
        source="benchmarks/headline.py",
        ours_by={"engine": ours},
        values=found,
    )


def faster(ratio: dict[str, float]) -> bool:
    """Whether the interval lies above 1."""
    return ratio["low"] > 1


def as_much(ratio: dict[str, float], factor: float) -> bool:
    """Whether the interval reaches the printed factor."""
    return ratio["high"] >= factor


def against_paper(number: int, lengths: str, factor: float, found: dict[str, Any]) -> list[Claim]:
    """Two questions, since a small gain may be sure and far below what is printed: faster at all, and by as much."""
    where = f"live, in the proportions of {lengths} on an A10G"
    return [
        claim(
            f"H{number}",
            f"a hybrid generates faster than a Transformer of its size, {where}",
            "faster",
            found,
            faster(found["ratio"]),
        ),
        claim(
            f"H{number}b",
            f"and by as much as the paper prints, {where}",
            f"{factor}x",
            found,
            as_much(found["ratio"], factor),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("headline.json"))
    parser.add_argument("--hybrid", default="nano-align-hybrid")
    parser.add_argument("--transformer", default="nano-align-transformer")
    parser.add_argument("--compressed", default="nano-compress", help="Name or folder; of --hybrid.")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.rounds < 2:
        raise SystemExit(f"rounds={options.rounds}: two or more have an interval")
    names = (options.hybrid, options.transformer, options.compressed)
    models = {name: load_model(find_weights(name), dtype=torch.float32) for name in names}
    claims: list[Claim] = []
    for number, (lengths, (_, _, factor)) in enumerate(PAPER.items()):
        at = setting(lengths, models[options.transformer])
        found = compare((options.hybrid, options.transformer), at, models, options.rounds)
        claims += against_paper(number + 1, lengths, factor, found)
        for one in claims[-2:]:
            print(f"{one.title}: {'yes' if one.holds else 'no'}, {one.ours}; {one.why}", flush=True)
    at = setting("8k + 16k", models[options.transformer])
    found = compare((options.compressed, options.hybrid), at, models, options.rounds)
    claims.append(
        claim(
            "H3",
            "the compressed hybrid generates faster than its teacher under the same cap",
            None,
            found,
            faster(found["ratio"]),
        )
    )
    print(f"{claims[-1].title}: {claims[-1].ours}; {claims[-1].why}", flush=True)
    capability = torch.backends.cpu.get_cpu_capability()
    machine = f"{platform.machine()} ({capability}), {torch.get_num_threads()} threads, fp32, torch {torch.__version__}"
    text = json.dumps({"study": "headline", "machine": machine, "claims": [asdict(one) for one in claims]}, indent=1)
    write_whole(options.out, text + "\n")


if __name__ == "__main__":
    main()
