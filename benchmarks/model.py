"""How fast the decoder decodes, prefills and trains on this CPU, beside transformers on the same weights in the same run.

Models: a NemotronH of 189 million random weights and SmolLM2-135M-Instruct. Both sides run in one process, with the same
allocator settings and threads, in alternating rounds; a figure is the median of its rounds, what matters are the ratios.
transformers runs in fp32, its fastest dtype on a CPU without bf16 arithmetic (with it, in the faster of the two). Printed
beside them: the memory bandwidth's ceiling, the matmul rate, and llama.cpp where llama-cpp-python is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ALLOCATOR = {  # without these glibc returns large temporaries to the system each time, which costs the peer up to 2.5x
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
if __name__ == "__main__" and not ALLOCATOR.keys() <= os.environ.keys():
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)

import torch  # noqa: E402
from model_parts import (  # noqa: E402
    BATCHES,
    CONTEXT,
    HYBRID,
    PROMPT,
    TRAINED,
    Ours,
    Peer,
    machine_limits,
    matmul_flops_per_s,
    peak_prefill_bytes,
    smollm2_folder,
    startup_seconds,
    training_pair,
    write_hybrid,
)

DTYPES = ("float32", "float16", "int8")


def alternate(runs: dict[str, Any], rounds: int) -> dict[str, float]:
    """Median seconds of each run, the runs taking turns; one round first that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            took = run()
            if round_number:
                seconds[name].append(took)
    return {name: statistics.median(took) for name, took in seconds.items()}


def decoding(folder: Path, rounds: int, limits: dict[str, float]) -> dict[str, Any]:
    """Tokens/s by batch, ratios to transformers, the ceiling of the bandwidth at batch 1, and how far logits are apart."""
    peer = Peer(folder)
    ours = {dtype: Ours(folder, dtype) for dtype in DTYPES}
    result: dict[str, Any] = {"accuracy": {dtype: side.distance(peer) for dtype, side in ours.items()}, "batches": {}}
    for batch in BATCHES:
        runs = {"transformers": peer.decode_run(batch)} | {dtype: side.decode_run(batch) for dtype, side in ours.items()}
        step_s = alternate(runs, rounds)
        row: dict[str, Any] = {"tokens_per_s": {name: batch / took for name, took in step_s.items()}}
        row["ratio"] = {dtype: step_s["transformers"] / step_s[dtype] for dtype in DTYPES}
        if batch == 1:
            row["ceiling_tokens_per_s"] = {d: limits["read_bytes_per_s"] / side.weight_bytes for d, side in ours.items()}
        result["batches"][batch] = row
    runs = {"transformers": peer.prefill_run()} | {dtype: side.prefill_run() for dtype, side in ours.items()}
    prefill_s = alternate(runs, max(2, rounds // 2))
    result["prefill_tokens_per_s"] = {name: PROMPT / took for name, took in prefill_s.items()}
    result["prefill_ratio"] = {dtype: prefill_s["transformers"] / prefill_s[dtype] for dtype in DTYPES}
    return result


def training(rounds: int) -> dict[str, Any]:
    """Seconds of a training step (forward, loss, backward) beside transformers, and the share of the matmul rate."""
    result = {}
    for name in TRAINED:
        ours, peer, flops, shapes = training_pair(name)
        step_s = alternate({"transformers": peer, "ours": ours}, max(2, rounds // 2))
        rate = matmul_flops_per_s(shapes)
        result[name] = {
            "ratio": step_s["transformers"] / step_s["ours"],
            "step_s": step_s,
            "matmul_share": flops / step_s["ours"] / rate,
            "matmul_flops_per_s": rate,
        }
    return result


def show(result: dict[str, Any]) -> None:
    """The tables, for people."""
    limits = result["limits"]
    print(f"{result['machine']}; {result['threads']} threads; torch {torch.__version__}")
    print(f"memory reads {limits['read_bytes_per_s'] / 1e9:.1f} GB/s\n")
    for model in ("hybrid-189m", "smollm2-135m"):
        part = result[model]
        print(f"{model}: decode at context {CONTEXT}, tokens/s (times transformers fp32)")
        for batch, row in part["batches"].items():
            speeds = row["tokens_per_s"]
            cells = [f"{d} {speeds[d]:7.1f} ({row['ratio'][d]:.2f}x)" for d in DTYPES]
            print(f"  batch {batch:>2}  transformers {speeds['transformers']:6.1f}   " + "   ".join(cells))
            if "ceiling_tokens_per_s" in row:
                print(
                    "            ceiling of the memory bus: "
                    + ", ".join(f"{d} {v:.0f}" for d, v in row["ceiling_tokens_per_s"].items())
                )
        cells = [f"{d} {part['prefill_tokens_per_s'][d]:.0f} ({part['prefill_ratio'][d]:.2f}x)" for d in DTYPES]
        print(f"  prefill of {PROMPT}: transformers {part['prefill_tokens_per_s']['transformers']:.0f}   " + "   ".join(cells))
        for dtype, apart in part["accuracy"].items():
            print(f"  {dtype}: logits {apart['relative']:.1e} of fp32's largest apart, same argmax {apart['argmax']:.1%}")
    for name, row in result["training"].items():
        print(f"training step, {name}: {row['ratio']:.2f}x transformers, {row['matmul_share']:.0%} of the matmul rate")
    memory = result["memory"]
    print(f"32k-token prefill: peak {memory['peak_bytes'] / 2**20:.0f} MiB, bound {memory['bound_bytes'] / 2**20:.0f} MiB")
    print(f"start-up: cold cache {result['startup_s']['cold']:.1f} s, warm {result['startup_s']['warm']:.1f} s")
    if "llama_cpp" in result:
        print("llama.cpp on SmolLM2: " + ", ".join(f"{k} {v:.1f} tok/s" for k, v in result["llama_cpp"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    limits = machine_limits()
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "limits": limits,
    }
    result["machine"] = f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
    with tempfile.TemporaryDirectory() as scratch:
        hybrid = write_hybrid(Path(scratch), HYBRID)
        with torch.no_grad():
            result["hybrid-189m"] = decoding(hybrid, options.rounds, limits)
            result["smollm2-135m"] = decoding(smollm2_folder(Path(scratch)), options.rounds, limits)
        result["startup_s"] = startup_seconds(hybrid)
        result["memory"] = peak_prefill_bytes()
    result["training"] = training(options.rounds)
    try:
        from model_parts import llama_cpp_tokens_per_s

        result["llama_cpp"] = llama_cpp_tokens_per_s(options.threads)
    except ImportError:
        print("llama-cpp-python is not installed: no figures of llama.cpp")
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
