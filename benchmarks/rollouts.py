"""How fast answers are sampled inside GRPO: our engine beside TRL's own generation, on the same model and prompts.

TRL generates with transformers: through our adapter (our layers and our decode step, `generate`'s loop around them) and with
transformers' own NemotronH. All three have the same weights in fp32, prompts, temperature and limit, and take turns in one
run; what is compared are tokens up to each answer's end a second. TRL returns no log-probabilities, ours come with them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from model import ALLOCATOR

if __name__ == "__main__" and not ALLOCATOR.keys() <= os.environ.keys():
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

import tandem
from tandem.align.trl import LocalTrainer, arguments, contained, hub_tokenizer
from tandem.engine.config import EngineConfig
from tandem.engine.rollout import EngineRollouts
from tandem.model.hf import TandemForCausalLM
from tandem.model.tokenizer import load_tokenizer
from tandem.train.data.procedural import evaluation_problems, prompt_of

AT_LEAST_RATIO = 3.0
TASKS = ("chain_sum", "letter_counting", "gcd", "number_sorting")
Side = Callable[[int], list[list[int]]]
"""A round's number to the tokens of its answers."""


class _Trainer(LocalTrainer, GRPOTrainer):
    """TRL's trainer, silent."""


def trl_side(model: Any, tokenizer: Any, prompts: list[list[int]], options: argparse.Namespace, out: Path) -> Side:
    """What TRL does where no rollout function is given, each prompt repeated for its answers."""
    rows = [prompt for prompt in prompts for _ in range(options.generations)]
    args = arguments(
        GRPOConfig,
        out,
        seed=0,
        per_device_train_batch_size=len(rows),
        num_generations=options.generations,
        max_completion_length=options.max_tokens,
        temperature=options.temperature,
    )
    data = Dataset.from_dict({"prompt": [""] * len(prompts)})
    trainer = _Trainer(model, lambda completions, **_: [0.0] * len(completions), args, data, processing_class=tokenizer)

    def generate(number: int) -> list[list[int]]:
        torch.manual_seed(number)
        ids, _ = trainer._generate_single_turn(rows, None, {}, options.generations)
        return [list(row) for row in ids]

    return generate


def engine_side(rollouts: EngineRollouts, prompts: list[list[int]], options: argparse.Namespace) -> Side:
    """Our engine, as `run_grpo` calls it."""

    def generate(number: int) -> list[list[int]]:
        count = options.generations
        found = rollouts.generate(
            prompts,
            seeds=[[number << 32 | i * count + j for j in range(count)] for i in range(len(prompts))],
            thinking=[True] * len(prompts),
            thinking_budgets=[None] * len(prompts),
            temperature=options.temperature,
            max_tokens=options.max_tokens,
        )
        return [list(answer.completion_ids) for group in found for answer in group]

    return generate


def take_turns(sides: dict[str, Side], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Of every side the rounds after one that does not count: seconds, processor seconds, tokens, the longest answer."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            began, cpu = time.perf_counter(), time.process_time()
            answers = side(number)
            seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
            tokens = sum(map(len, answers))
            print(f"round {number}, {name}: {tokens} tokens, {tokens / seconds:,.0f}/s", file=sys.stderr, flush=True)
            if number:
                found[name].append({"seconds": seconds, "cpu_s": cpu_s, "tokens": tokens, "longest": max(map(len, answers))})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="released/nano-hybrid")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-batch", type=int, default=128, help="Answers that the engine decodes at once.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--without", nargs="*", default=[], help="Sides to leave out.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    decoder, tokenizer = tandem.load_model(options.model, dtype=torch.float32), load_tokenizer(options.model)
    each = -(-options.prompts // len(TASKS))
    problems = [problem for task in TASKS for problem in evaluation_problems(task, each)][: options.prompts]
    prompts = [tokenizer.encode(prompt_of(problem)) for problem in problems]
    with contained(), tempfile.TemporaryDirectory() as scratch:
        theirs = hub_tokenizer(tokenizer)
        config = EngineConfig(max_batch=options.max_batch, threads=options.threads)
        sides: dict[str, Side] = {
            "engine": engine_side(EngineRollouts(decoder, tokenizer, config=config), prompts, options),
            "TRL, our adapter": trl_side(
                TandemForCausalLM.from_decoder(tandem.load_model(options.model, dtype=torch.float32)),
                theirs, prompts, options, Path(scratch, "adapter"),
            ),
        }  # fmt: skip
        if "nemotron" not in options.without:
            peer = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
            sides[f"TRL, {type(peer).__name__}"] = trl_side(peer, theirs, prompts, options, Path(scratch, "peer"))
        rounds = take_turns(sides, options.rounds)
    rates = {name: [r["tokens"] / r["seconds"] for r in found] for name, found in rounds.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(rates["engine"], rates[name], strict=True))
        for name in rates
        if name != "engine"
    }
    print(f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {options.threads} threads; {options.model}")
    asked = f"{options.prompts} prompts x {options.generations} answers of at most {options.max_tokens} tokens"
    print(f"{asked}, {options.rounds} rounds")
    for name, found in rounds.items():
        mean = sum(r["tokens"] for r in found) / len(found) / options.prompts / options.generations
        behind = "" if name == "engine" else f"; engine {ratios[name]:.2f}x ({AT_LEAST_RATIO:g}x wanted)"
        cpu = statistics.median(r["tokens"] / r["cpu_s"] for r in found)
        rate = statistics.median(rates[name])
        print(f"  {name}: {rate:,.0f} tokens/s, {cpu:,.0f} a processor second, {mean:.0f} tokens an answer{behind}")
    if options.json:
        result = {"options": vars(options) | {"json": None}, "rounds": rounds, "ratios": ratios}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
