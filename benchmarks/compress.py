"""What scoring for compression costs: beside the forward passes it needs, beside naive layer scores, and in memory.

    python benchmarks/compress.py [--rounds 3] [--samples 42] [--json]   # minutes

Scores of all widths come from one pass, which is timed beside a plain pass over the same samples. One greedy step over the
layers is timed beside a pass for each candidate from the embedding on, with the head and the same comparison. Both sides take
turns in one process, on the released nano hybrid. Then a checkpoint of random weights, several times larger than the memory
that is allowed, is scored a layer at a time in a process of its own, whose peak is read from the system.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from model import ALLOCATOR, alternate

if __name__ == "__main__" and not ALLOCATOR.keys() <= os.environ.keys():
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)

import torch
from model_parts import timed

from tandem.compress.calibration import Calibration, Scoring
from tandem.compress.depth import score_depth
from tandem.compress.layers import LoadedLayers, StreamedLayers
from tandem.compress.streams import rows_within, working_bytes
from tandem.compress.width import score_width
from tandem.model.hybrid import Decoder
from tandem.model.load import load_model, save_model
from tandem.model.memory import return_freed_memory
from tandem.model.span import Span
from tandem.spec.catalog import find_weights
from tandem.spec.model import MLP, Attention, Mamba2, ModelSpec

MODEL = "nano-align-hybrid"
LENGTH = 512
ASKED = {"width over its pass": 1.3, "depth over naive": 0.6, "peak, layers beside activations": 2.0}
LARGE = ModelSpec(
    name="synthetic",
    vocab_size=4096,
    hidden_size=2048,
    layers=(
        Mamba2(num_heads=64, head_dim=64, state_dim=128, groups=8, conv_kernel=4, conv_bias=True, proj_bias=False),
        MLP(ffn_size=6144, gated=False),
        Attention(num_heads=16, num_kv_heads=4, head_dim=128),
        MLP(ffn_size=6144, gated=False),
    )
    * 5,
    max_context=4096,
)
LARGE_SAMPLES, LARGE_LENGTH = 2, 128
ALLOWED = 256 << 20
"""Bytes of memory for the scoring of `LARGE`, beside what Python and torch take."""


def calibration(samples: int, length: int, vocabulary: int) -> Calibration:
    """Random tokens: time and memory do not depend on what they say."""
    drawn = torch.randint(32, vocabulary, (samples, length + 1), generator=torch.Generator().manual_seed(0))
    return Calibration.of_rows(drawn)


def naive_step(decoder: Decoder, samples: Calibration, rows: int) -> list[float]:
    """Mean square of the logits' change without each layer, a whole pass for every one."""
    backbone, spec = decoder.backbone, decoder.spec
    span = Span(time=samples.length, device=torch.device("cpu"))

    def logits(ids: torch.Tensor, without: int | None) -> torch.Tensor:
        x = backbone.embeddings(ids).float()
        for i, layer in enumerate(backbone.layers):
            if i != without:
                x = layer(x, span)
        found: torch.Tensor = decoder.lm_head(backbone.norm_f(x))
        return found

    found = [0.0] * len(spec.layers)
    with torch.no_grad():
        for begin in range(0, len(samples), rows):
            ids = samples.input_ids[begin : begin + rows]
            whole = logits(ids, None)
            for i in range(len(found)):
                found[i] += float((logits(ids, i) - whole).double().square().sum())
    return [value / samples.input_ids.numel() / spec.vocab_size for value in found]


def costs(samples: int, rounds: int) -> dict[str, Any]:
    """Seconds of each side, and the two ratios."""
    decoder = load_model(MODEL, dtype=torch.float32)
    layers, given = LoadedLayers(decoder), calibration(samples, LENGTH, decoder.spec.vocab_size)
    rows, _ = rows_within(decoder.spec, samples, LENGTH, streams=1, held_bytes=0, memory_bytes=None)

    @torch.no_grad()
    def a_pass() -> None:
        for begin in range(0, samples, rows):
            decoder.hidden_states(given.input_ids[begin : begin + rows])

    ours, naive = score_depth(layers, given, drop=1).rounds[0], naive_step(decoder, given, rows)
    worst = max(abs(one.logit_mse - naive[one.layer]) / naive[one.layer] for one in ours)
    if worst > 1e-3:
        raise SystemExit(f"depth: scores differ from the naive ones by {worst:.1e} of their size")
    seconds = alternate(
        {
            "a pass": lambda: timed(a_pass),
            "width": lambda: timed(lambda: score_width(layers, given)),
            "depth": lambda: timed(lambda: score_depth(layers, given, drop=1)),
            "naive depth": lambda: timed(lambda: naive_step(decoder, given, rows)),
        },
        rounds,
    )
    return {
        "seconds": seconds,
        "samples": samples,
        "length": LENGTH,
        "width over its pass": seconds["width"] / seconds["a pass"],
        "depth over naive": seconds["depth"] / seconds["naive depth"],
        "depth in passes": seconds["depth"] / seconds["a pass"],
    }


def memory() -> dict[str, Any]:
    """Peak of scoring a checkpoint that is larger than what is allowed, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(Decoder(LARGE, dtype=torch.bfloat16), Path(folder) / "model")
        held = sum(file.stat().st_size for file in (Path(folder) / "model").glob("*.safetensors"))
        command = [sys.executable, __file__, "--score", folder]
        environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
        printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return {"checkpoint_bytes": held, "allowed_bytes": ALLOWED, **json.loads(printed)}


def score(folder: Path) -> dict[str, Any]:
    """Score widths and one greedy step within `ALLOWED`; how far this process rose above what it took before."""
    layers = StreamedLayers(folder / "model")
    given = calibration(LARGE_SAMPLES, LARGE_LENGTH, LARGE.vocab_size)
    found: dict[str, Any] = {"layer_bytes": layers.held_bytes}
    score_width(layers, calibration(1, 8, LARGE.vocab_size))  # what is loaded at first use is there
    runs: dict[str, tuple[int, Callable[..., object]]] = {
        "width": (1, partial(score_width, layers, given)),
        "depth": (len(LARGE.layers) + 2, partial(score_depth, layers, given, drop=1)),
    }
    for name, (streams, run) in runs.items():
        return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = status("VmRSS")
        run(scoring=Scoring(folder=folder / name, memory_bytes=ALLOWED))
        stream = LARGE_LENGTH * LARGE.hidden_size * 4
        rows, spilled = rows_within(
            LARGE, LARGE_SAMPLES, LARGE_LENGTH, streams=streams, held_bytes=layers.held_bytes, memory_bytes=ALLOWED
        )
        held = rows * ((3 if spilled else streams) * stream + working_bytes(LARGE, LARGE_LENGTH))
        found[name] = {"rose_bytes": status("VmHWM") - before, "activation_bytes": held, "spilled": spilled, "rows": rows}
    return found


def status(field: str) -> int:
    """A number of this process from the system, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=42)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.score is not None:
        return print(json.dumps(score(options.score)))
    find_weights(MODEL)
    found = {"costs": costs(options.samples, options.rounds), "memory": memory()}
    for name in ("width", "depth"):
        one = found["memory"][name]
        one["peak, layers beside activations"] = (one["rose_bytes"] - one["activation_bytes"]) / found["memory"]["layer_bytes"]
    if options.json:
        return print(json.dumps(found, indent=1))
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{platform.machine()} ({capability}), {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in ("width over its pass", "depth over naive"):
        print(f"{name}: {found['costs'][name]:.2f} (asked: at most {ASKED[name]})")
    beside = "peak, layers beside activations"
    large = found["memory"]
    print(f"checkpoint {large['checkpoint_bytes']:,} bytes, allowed {ALLOWED:,}, a layer at most {large['layer_bytes']:,}")
    for name in ("width", "depth"):
        one = large[name]
        where = "on disk" if one["spilled"] else "in memory"
        print(
            f"{name}: rose by {one['rose_bytes']:,} bytes, {one['rows']} samples together, streams {where}; {beside}: "
            f"{one[beside]:.2f} (asked: at most {ASKED[beside]})"
        )


if __name__ == "__main__":
    main()
