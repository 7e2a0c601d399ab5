"""Made-up finished alignment runs, for the tests of the study that compares them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

STAGES = ("base", "sft-1", "sft-2", "sft-3", "ifeval-grpo", "dpo", "rlhf", "merge", "final")
AFTER = {
    "sft-1": "base", "sft-2": "sft-1", "sft-3": "sft-2", "ifeval-grpo": "sft-3", "dpo": "ifeval-grpo", "reward-model": "dpo",
    "rlhf": "dpo", "merge": "dpo", "final": "merge",
}  # fmt: skip
KINDS = {"ifeval-grpo": "grpo", "dpo": "dpo", "reward-model": "reward_model", "rlhf": "grpo", "merge": "merge"}
MODES = ("thinking on", "thinking off")
REASONING = (0.3, 0.5, 0.6, 0.65, 0.66, 0.67, 0.68, 0.69, 0.69)
INSTRUCTIONS = (None, 0.3, 0.4, 0.5, 0.7, 0.7, 0.72, 0.71, 0.71)
TOOLS = (None, 0.4, 0.5, 0.5, 0.5, 0.8, 0.78, 0.8, 0.8)
BUDGETS = (0, 16, 64)
JITTER = (0.0, 0.004, -0.004)
"""What a seed adds to every share."""


def score(accuracy: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "low": 0.0, "high": 1.0, "count": 100, "correct": 100 * accuracy}


def evaluation(at: int, add: float, off: float) -> dict[str, Any]:
    """What a stage's report holds; the base is asked reasoning with thinking alone."""
    modes = MODES[:1] if at == 0 else MODES
    suites = {"reasoning": REASONING[at], "instructions": INSTRUCTIONS[at], "tools": TOOLS[at]}
    return {
        suite: {
            mode: {"all": score(share + add - (off if mode == MODES[1] else 0.0)), "sums": score(share), "legs": score(share)}
            for mode in modes
        }
        for suite, share in suites.items()
        if share is not None
    }


def point(budget: int, accuracy: float, mark: float | None, tokens: float) -> dict[str, Any]:
    forced = {0: 1.0, 16: 0.6, 64: 0.1}[budget]
    return {
        "budget": budget, **score(accuracy), "one_closing_mark": 1.0, "one_closing_mark_unaided": mark, "forced": forced,
        "answer_tokens": tokens, "thinking_tokens": budget + 4.0, "tasks": {},
    }  # fmt: skip


def budgets(accuracy: Mapping[int, float], mark: float, tokens: float, add: float = 0.0) -> list[dict[str, Any]]:
    """Unsorted, as a file may be."""
    return [point(b, accuracy[b] + add, 1.0 if b == 64 else mark, tokens) for b in reversed(BUDGETS)]


def write_run(
    folder: Path, variant: str, seed: int, *, last: str = "final", lower: float = 0.0, off: float = 0.2,
    curve: tuple[float, float, float] = (0.2, 0.4, 0.7), mark: float = 0.998, tokens: float = 6.0, rise: float = 0.2,
    sweep: tuple[float, float, float] = (0.6, 0.65, 0.61), ask: bool = True,
) -> Path:  # fmt: skip
    """A finished run: all shares `lower`; rewards rise by `rise`; `sweep` is at alphas 0, a half and 1."""
    place = folder / variant / f"seed-{seed}"
    place.mkdir(parents=True)
    add = JITTER[seed % 3] - lower
    stages = STAGES if last == "final" else (*STAGES[: STAGES.index(last) + 1], "final")
    reports: dict[str, Any] = {}
    for stage in stages:
        at = STAGES.index(stage if stage != "final" or last == "final" else last)
        kind = KINDS.get(stage, "sft")
        metrics: dict[str, Any] = {"loss": 1.0}
        if kind == "grpo":
            rewards = [0.3 + rise * (1 + 0.01 * seed) * step / 8 for step in range(9)]
            metrics["course"] = [{"step": i + 1, "loss": 0.1, "reward": r, "kl": 0.01 * i} for i, r in enumerate(rewards)]
        if kind == "merge":
            rows = zip((0.5, 1.0, 0.0), (sweep[1], sweep[2], sweep[0]), strict=True)
            metrics |= {"alpha": 0.5, "sweep": [{"alpha": a, "verified": v + 0.01 * seed} for a, v in rows]}
        reports[stage] = {"stage": stage, "seconds": 60.0, "evaluation": evaluation(at, add, off)}
        if stage not in ("base", "final"):
            reports[stage] |= {"what": kind, "metrics": metrics}
        if stage != "base":
            reports[stage]["after"] = AFTER[stage] if last == "final" or stage != "final" else last
    if last == "final":
        reports["final"]["evaluation"]["budgets"] = budgets(dict(zip(BUDGETS, curve, strict=True)), mark, tokens, add)
        reports["reward-model"] = {
            "stage": "reward-model",
            "what": "reward_model",
            "after": "dpo",
            "metrics": {},
            "seconds": 9.0,
        }
    metrics = {"evaluation": reports["final"]["evaluation"], "seconds": 600.0, "reports": reports}
    merges = {name: None if name != "merge" else {"first": "dpo", "second": "rlhf"} for name in stages if name in AFTER}
    (place / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    recipe = {"stages": {name: {"merge": merge} for name, merge in merges.items() if name != "final"}}
    (place / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    if ask:
        shifted = budgets(dict(zip(BUDGETS, curve, strict=True)), mark - 0.0005 * seed, tokens + 0.1 * seed)
        (place / "budgets.json").write_text(json.dumps({"stage": "sft-3", "budgets": shifted}), encoding="utf-8")
    return place


def write_rates(folder: Path, times: float) -> None:
    def setting(osl: int, factor: float) -> dict[str, Any]:
        rounds = [{"hybrid": factor * (1000 + i), "transformer": 1000 - i} for i in range(3)]
        return {"batch": 32, "prompt_tokens": 64, "output_tokens": osl, "rounds": rounds}

    data = {"machine": "a machine", "settings": [setting(448, times), setting(8, 0.5)]}
    (folder / "throughput.json").write_text(json.dumps(data), encoding="utf-8")


def write_all(folder: Path, *, rates: float = 1.5, transformer: float = 0.1, plain: float = 0.7, **hybrid: Any) -> None:
    for seed in range(3):
        write_run(folder, "hybrid", seed, **hybrid)
        write_run(folder, "transformer", seed, lower=transformer, ask=False)
        write_run(folder, "no-truncation", seed, last="sft-3", mark=plain, tokens=20.0)
    write_rates(folder, rates)


def edit(place: Path, change: Callable[[dict[str, Any]], None]) -> None:
    reports = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
    change(reports)
    (place / "metrics.json").write_text(json.dumps(reports), encoding="utf-8")
