"""The card of an aligned checkpoint in the Hugging Face format, from what its run reports of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem._version import __version__
from tandem.align.recipe import AlignRecipe
from tandem.spec.model import ModelSpec
from tandem.train.card_text import bullets, card, code, score_cell, scores_by_question, table

_KINDS = {
    "sft": "supervised fine-tuning",
    "grpo": "reinforcement learning (GRPO)",
    "dpo": "preferences (DPO)",
    "reward_model": "a reward model",
    "merge": "merge of two checkpoints",
}


def model_card(
    recipe: AlignRecipe,
    spec: ModelSpec,
    reports: Mapping[str, Mapping[str, Any]],
    *,
    date: str,
    command: str | None = None,
) -> str:
    """The card of the last model of a run. `reports` are those of its stages, in order, the base's first."""
    front = {
        "language": ["en"],
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tandem", "alignment", "thinking-budget"],
        "base_model": recipe.base,
    }
    use = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
        'tokenizer.apply_chat_template([{"role": "user", "content": "12 + 30 ="}], add_generation_prompt=True)'
    )
    return card(
        front,
        [
            f"# {recipe.name}",
            recipe.about.rstrip(".") + "." if recipe.about else "",
            f"A chat model of {spec.parameters:,} parameters, aligned {date} with Tandem {__version__}, from {recipe.base}. "
            "It thinks before it answers, or not when the system or the user says `/no_think`; it calls tools; its "
            "thinking may be given a budget (`thinking_budget` of Tandem's server).",
            "## Make it again",
            code(command or f"tandem align {recipe.name}"),
            "## Use it",
            code(use, "python"),
            "`tandem serve FOLDER` answers OpenAI's API with it.",
            "## Stages",
            _stages(recipe, reports),
            "## Evaluation",
            "Held-out questions, greedy, verified: share right with its 95 % interval (Wilson) after each stage. `final` is "
            "this model, in bf16; stages go on in fp32.",
            _evaluation(reports),
            "## Limits",
            bullets(
                [
                    "Small as it is, it knows the tasks, forms and tools that it was trained on, and little else.",
                    "All its conversations were generated; questions come from few templates.",
                    "It was not trained to refuse anything harmful, and nothing it says should be relied upon.",
                ]
            ),
        ],
    )


def _stages(recipe: AlignRecipe, reports: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (
            name,
            _KINDS[stage.kind],
            reports[name]["after"] if stage.merge is None else f"{stage.merge.first}, {stage.merge.second}",
            f"{reports[name]['seconds'] / 60:.0f}",
        )
        for name, stage in recipe.stages.items()
    ]
    return table(["stage", "what", "goes on from", "minutes"], rows)


def _evaluation(reports: Mapping[str, Mapping[str, Any]]) -> str:
    found = {name: scores_by_question(report["evaluation"]) for name, report in reports.items() if "evaluation" in report}
    asked = list(dict.fromkeys(question for by in found.values() for question in by))
    rows = [(name, *(score_cell(by.get(question)) for question in asked)) for name, by in found.items()]
    return table(["after", *asked], rows)
