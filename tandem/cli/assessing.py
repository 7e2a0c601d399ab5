"""The evaluation that alignment and compression ask of their models on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def assess(
    folder: Path, *, tasks: Sequence[str], problems: int, max_tokens: int, budgets: Sequence[int] = ()
) -> dict[str, Any]:
    """Metrics of a checkpoint on held-out questions: reasoning, and of one with a chat format instructions and tools too."""
    from tandem.evaluation.run import evaluate_models
    from tandem.evaluation.settings import EvaluationSettings
    from tandem.model.tokenizer import load_tokenizer

    settings = EvaluationSettings(
        suites=("reasoning",) if load_tokenizer(folder).template is None else ("reasoning", "instructions", "tools"),
        tasks=tuple(tasks),
        problems=problems,
        budgets=tuple(budgets),
        max_tokens=max_tokens,
    )
    metrics: dict[str, Any] = evaluate_models([str(folder)], settings)["models"][0]["metrics"]
    return metrics
