"""The card of a compressed checkpoint in the Hugging Face format, from what its run reports of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem._version import __version__
from tandem.compress.recipe import CompressRecipe
from tandem.compress.shape import common_sizes
from tandem.spec.catalog import load_spec
from tandem.spec.model import ModelSpec
from tandem.train.card_text import bullets, card, code, score_cell, scores_by_question, table


def model_card(
    recipe: CompressRecipe,
    spec: ModelSpec,
    reports: Mapping[str, Mapping[str, Any]],
    *,
    date: str,
    command: str | None = None,
) -> str:
    """The card of the last model of a run. `reports` are the teacher's and those of the stages, in order."""
    front = {
        "language": ["en"],
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tandem", "pruning", "distillation"],
        "base_model": recipe.teacher,
    }
    before, after = reports["teacher"]["held"]["total_bytes"], recipe.budget.held(spec)["total_bytes"]
    return card(
        front,
        [
            f"# {recipe.name}",
            recipe.about.rstrip(".") + "." if recipe.about else "",
            f"{recipe.teacher} cut to {spec.parameters:,} parameters and distilled, {date}, with Tandem {__version__}: "
            f"{after / before:.0%} of its bytes with {recipe.budget.batch} sequence(s) of {recipe.budget.context:,} tokens.",
            "## Make it again",
            code(command or f"tandem compress {recipe.name}"),
            "## Sizes",
            _sizes(load_spec(recipe.teacher), spec),
            "## Stages",
            "Distance: KL(teacher || model) on held-out text, nats a learned token. Questions: share right of held-out ones, "
            "greedy, verified, with the 95 % interval (Wilson).",
            _stages(reports),
            "## Limits",
            bullets(
                [
                    "It knows what its teacher knows at best; the card of the teacher holds for it too.",
                    "The last model is stored in bf16; stages go on in fp32, in which they were asked.",
                ]
            ),
        ],
    )


def _sizes(teacher: ModelSpec, spec: ModelSpec) -> str:
    rows: list[tuple[str, int | None, int | None]] = [("layers", len(teacher.layers), len(spec.layers))]
    before, after = common_sizes(teacher), common_sizes(spec)
    rows += [(name.replace("_", " "), before[name], after[name]) for name in before if before[name] is not None]
    rows.append(("parameters", teacher.parameters, spec.parameters))
    return table(["", "teacher", "this model"], [(name, f"{a or 0:,}", f"{b or 0:,}") for name, a, b in rows])


def _stages(reports: Mapping[str, Mapping[str, Any]]) -> str:
    asked = list(dict.fromkeys(q for report in reports.values() for q in scores_by_question(report.get("evaluation") or {})))
    rows = []
    for name, report in reports.items():
        metrics = report.get("metrics", {})
        found = scores_by_question(report.get("evaluation") or {})
        kl = f"{metrics['kl']:.4f}" if "kl" in metrics else "-"
        tokens = f"{metrics['tokens']:,}" if "tokens" in metrics else "-"
        rows.append((name, f"{report['held']['parameters']:,}", tokens, kl, *(score_cell(found.get(q)) for q in asked)))
    return table(["after", "parameters", "tokens", "distance", *asked], rows)
