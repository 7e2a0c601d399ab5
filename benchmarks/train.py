"""How fast training runs on this CPU, beside transformers' Trainer on its own NemotronH in the same run.

Both sides train nano-hybrid's shape on the same rows, from the same weights, with the same optimiser, threads and allocator,
in alternating rounds; a step is all from the end of one to the end of the next: data, forward, loss, backward, clipping,
optimiser, and what the loop does around them. Also: the share of the machine's fp32 matmul rate that the model's FLOPs reach at
hidden size 512, what the data loader takes of a step, and two ranks beside one. Takes some five minutes on two cores, and
wants a quiet machine.
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

import torch
from model import ALLOCATOR

if __name__ == "__main__" and not ALLOCATOR.keys() <= os.environ.keys():
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)

from train_parts import (
    Bench,
    Ours,
    Peer,
    fastest_peer,
    loader_seconds,
    matmul_share,
    prepared,
    recipe_of,
    take_turns,
    two_ranks,
)

from tandem.model.precision import cpu_has_fast_bf16

BEGAN = time.perf_counter()
AT_LEAST_RATIO = 1.3
AT_LEAST_SHARE = 0.6
AT_MOST_LOADER = 0.02


def note(text: str) -> None:
    """A line on stderr when a part begins: all of them take minutes."""
    print(f"{time.perf_counter() - BEGAN:4.0f} s  {text}", file=sys.stderr, flush=True)


def beside_trainer(bench: Bench, rounds: int) -> dict[str, Any]:
    """Seconds of a step on both sides, in fp32 and, where the CPU multiplies bf16, with bf16 products on both."""
    ours = {"fp32": Ours(bench, recipe_of("precision.linears=fp32"))}
    peers = {"fp32": fastest_peer(ours["fp32"])}
    if cpu_has_fast_bf16():
        ours["bf16"] = Ours(bench, recipe_of("precision.linears=bf16"))
        peers["bf16"] = Peer(ours["bf16"], bf16=True, chunk=peers["fp32"].chunk)
    runs: dict[str, Any] = {f"ours {name}": side for name, side in ours.items()}
    runs |= {f"trainer {name}": side for name, side in peers.items()}
    step_s = take_turns(runs, rounds)
    tokens = ours["fp32"].recipe.batch.tokens_per_step
    return {
        "parameters": ours["fp32"].spec.parameters,
        "tokens_per_step": tokens,
        "peer_chunk": peers["fp32"].chunk,
        "first_loss": {"ours": ours["fp32"].losses[0], "trainer": peers["fp32"].first_loss()},
        "step_s": step_s,
        "tokens_per_s": {name: tokens / took for name, took in step_s.items()},
        "ratio": {name: step_s[f"trainer {name}"] / step_s[f"ours {name}"] for name in ours},
    }


def show(result: dict[str, Any]) -> None:
    """The figures, for people."""
    print(f"{result['machine']}; {result['threads']} threads; torch {torch.__version__}")
    part = result["trainer"]
    print(f"\nnano-hybrid, {part['parameters'] / 1e6:.2f} M parameters, {part['tokens_per_step']:,} tokens a step")
    for name, ratio in part["ratio"].items():
        ours, peer = (part["tokens_per_s"][f"{side} {name}"] for side in ("ours", "trainer"))
        print(f"  {name}: {ours:,.0f} tokens/s, Trainer {peer:,.0f}: {ratio:.2f}x (at least {AT_LEAST_RATIO}x wanted)")
    losses = part["first_loss"]
    print(f"  loss of the first step {losses['ours']:.5f}, Trainer's {losses['trainer']:.5f} (it mixes documents of a row)")
    share = result["matmul"]
    print(f"hidden 512, {share['parameters'] / 1e6:.1f} M parameters, fp32: {share['tokens_per_s']:,.0f} tokens/s,")
    print(f"  {share['share']:.0%} of {share['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s (at least {AT_LEAST_SHARE:.0%} wanted)")
    loader = result["loader"]
    print(f"data: {1e3 * loader['batch_s']:.2f} ms a batch, {loader['share']:.2%} of a step (at most {AT_MOST_LOADER:.0%})")
    if "ranks" in result:
        ranks = result["ranks"]
        print(
            f"2 ranks beside 1, {ranks['steps']} steps: losses at most {ranks['largest_loss_difference']:.1e} apart; "
            f"{ranks['tokens_per_s_2']:,.0f} and {ranks['tokens_per_s_1']:,.0f} tokens/s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--rank-steps", type=int, default=20, help="Steps of the comparison of ranks; 0: none.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        note("data")
        bench = prepared(Path(scratch))
        note("beside transformers' Trainer")
        trainer = beside_trainer(bench, options.rounds)
        note("share of the matmul rate")
        matmul = matmul_share(bench, max(2, options.rounds // 2))
        batch_s = loader_seconds(bench)
        result: dict[str, Any] = {
            "machine": f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
            "threads": options.threads,
            "trainer": trainer,
            "matmul": matmul,
            "loader": {"batch_s": batch_s, "share": batch_s / min(trainer["step_s"].values())},
        }
        if options.rank_steps:
            note("two ranks")
            result["ranks"] = two_ranks(bench, options.rank_steps, options.threads)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
