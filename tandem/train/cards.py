"""Model and data cards in the Hugging Face format, written from what a run and its data report say of themselves.

Pure functions of data: no clock, no files. Each card begins with YAML that a hub reads and goes on with Markdown for people.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tandem.spec.errors import SpecError
from tandem.spec.mixers import MLP, Attention, Mamba2, MoE
from tandem.spec.model import ModelSpec
from tandem.train.card_text import bullets, card, code, table
from tandem.train.data.prepared import DataReport
from tandem.train.data_card import blend_table, data_card, notice_lines
from tandem.train.recipe import PrecisionPart, Recipe

__all__ = ["data_card", "model_card"]

CURVE_POINTS = 12
"""Rows of a card's loss curve."""
WEIGHTS_LICENCE = "apache-2.0"
_FORMATS = {
    "fp32": "fp32",
    "bf16": "bf16 operands, fp32 sums",
    "fp8-block": "FP8 (E4M3; weights in blocks of 128x128, activations and gradients in tiles of 1x128, fp32 scales)",
    "fp8-tensor": "FP8 with one current scale a tensor (E4M3 forward, E5M2 gradients)",
}


def model_card(
    recipe: Recipe,
    spec: ModelSpec,
    metrics: Mapping[str, Any],
    journal: Sequence[Mapping[str, Any]],
    data: DataReport,
    *,
    date: str,
    version: str,
    command: str | None = None,
    base: str | None = None,
    datasets: Sequence[str] = (),
    language: str = "en",
) -> str:
    """The card of a trained checkpoint.

    `metrics` and `journal` are a run's metrics.json and the lines of its metrics.jsonl, `date` and `version` (of Tandem) stand
    in the card as given. `command` makes the model again; default the recipe by its name. `base` names the model that the run
    went on from (a folder's path is not told: it means nothing elsewhere), `datasets` data sets of a hub beyond those that the
    recipe reads there. Raises SpecError where the run has no step.
    """
    steps = [line for line in journal if line["kind"] == "step"]
    if not steps:
        raise SpecError("journal: holds no step; a card describes a finished run")
    held_out = _last_held_out(journal)
    accuracy: Mapping[str, Mapping[str, Any]] = metrics.get("accuracy", {})
    hub = [source.path for source in recipe.data.sources.values() if source.kind == "hub" and source.path]
    front: dict[str, Any] = {
        "language": [language],
        "license": WEIGHTS_LICENCE,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tandem", "pre-training", *_kinds(spec), *sorted({_hub_format(recipe.precision)})],
    }
    if hub or datasets:
        front["datasets"] = sorted({*hub, *datasets})
    named = base is not None and not _is_path(base)
    begun = ""
    if base is not None:
        begun = f" It goes on from {base if named else 'the model of another run'}."
    if named:
        front["base_model"] = base
    results = _results(accuracy)
    if results:
        front["model-index"] = [{"name": recipe.name, "results": results}]
    run = command or f"tandem train {recipe.name}"
    parts = [
        f"# {recipe.name}",
        recipe.about.strip() + ("" if recipe.about.rstrip().endswith(".") else ".") if recipe.about else "",
        f"A base model of {spec.parameters:,} parameters: it continues text and has had no training in following instructions. "
        f"Trained {date} with Tandem {version}.{begun}",
        "## Make it again",
        code(run) + "\n\nThe same seed on the same machine and libraries gives the same weights; elsewhere rounding differs.",
        "## Use it",
        code(
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
            "python",
        ),
        f"`tandem.load_model(FOLDER)` and `tandem generate` read it too. {_prompt_note(recipe)}".strip(),
        "## Model",
        table(("", ""), _model_rows(recipe, spec)),
        "## Training",
        table(("", ""), _training_rows(recipe, steps, metrics, journal)),
        "### Loss",
        table(("step", "tokens", "training loss, nats a learned token", "learning rate"), _curve(steps)),
        "## Data",
        blend_table(recipe, data),
        _data_note(recipe, data),
        "## Evaluation",
        *_evaluation(held_out, accuracy, metrics.get("needles", {})),
        *_samples(metrics),
        "## Limits",
        _limits(spec),
        "## Licence",
        f"Weights: {WEIGHTS_LICENCE}. The text that they were trained on has licences of its own, which ask for these notices:",
        bullets(notice_lines(data)),
    ]
    return card(front, parts)


def _kinds(spec: ModelSpec) -> list[str]:
    kinds = {type(layer) for layer in spec.layers}
    return [name for kind, name in ((Mamba2, "mamba2"), (MoE, "moe")) if kind in kinds] + (
        ["hybrid"] if {Mamba2, Attention} <= kinds else []
    )


def _hub_format(part: PrecisionPart) -> str:
    return "fp8-training" if part.linears.startswith("fp8") else f"{part.linears}-training"


def _results(accuracy: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "task": {"type": "text-generation", "name": "verified answers"},
            "dataset": {"type": "reasoning-gym", "name": task},
            "metrics": [{"type": "accuracy", "name": "greedy, no example", "value": round(float(found["accuracy"]), 4)}],
        }
        for task, found in accuracy.items()
    ]


def _last_held_out(journal: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
    found = [line["loss"] for line in journal if line["kind"] == "held_out"]
    return found[-1] if found else {}


def _pattern(spec: ModelSpec) -> str:
    letters = {Mamba2: "M", Attention: "*", MLP: "-", MoE: "E"}
    return "".join(letters.get(type(layer), "?") for layer in spec.layers)


def _model_rows(recipe: Recipe, spec: ModelSpec) -> list[tuple[str, str]]:
    rope = any(isinstance(layer, Attention) and layer.rope is not None for layer in spec.layers)
    return [
        ("layers", f"`{_pattern(spec)}` (M Mamba-2, * attention, - MLP, E experts)"),
        ("hidden size", f"{spec.hidden_size:,}"),
        ("position embedding", "RoPE" if rope else "none"),
        ("vocabulary", f"{spec.vocab_size:,} (byte-level BPE)"),
        ("trained on sequences of", f"{recipe.batch.sequence_length:,} tokens"),
        ("stored as", "bf16"),
    ]


def _training_rows(
    recipe: Recipe, steps: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], journal: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    batch, part, last = recipe.batch, recipe.optimiser, steps[-1]
    constant = part.schedule == "constant"
    rate = (
        f"{part.lr:g}, constant" if constant else f"{part.lr:g} to {part.min_lr:g}: warm-up {part.warmup:.2%}, decay over the "
    )
    rows = [
        ("tokens", f"{last['tokens']:,}, {last['learned_tokens']:,} of them learned (the rest is prompts and padding)"),
        ("steps", f"{last['step']:,} of {batch.sequences} sequences of {batch.sequence_length:,} tokens"),
        ("learning rate", rate if constant else f"{rate}last {part.decay:.0%}"),
        (
            "optimiser",
            f"AdamW, betas {part.beta1:g} and {part.beta2:g}, weight decay {part.weight_decay:g} on matrices, gradients "
            f"clipped at {part.clip:g}",
        ),
        ("linears compute in", _precision_told(recipe.precision)),
        ("seed", str(recipe.seed)),
    ]
    if "steps_s" in metrics:
        rows.append(("time of the steps", f"{metrics['steps_s'] / 60:.0f} minutes"))
    back = sum(line["kind"] == "rollback" for line in journal)
    if back:
        rows.append(("returns to a checkpoint", f"{back}, for spikes of the loss"))
    return rows


def _precision_told(part: PrecisionPart) -> str:
    told = _FORMATS[part.linears]
    if part.linears.startswith("fp8"):
        told += f"; the first {part.keep_first} and the last {part.keep_last} in bf16"
    return told + "; master weights, optimiser and all else in fp32"


def _curve(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """The mean loss between one row and the next."""
    count = min(CURVE_POINTS, len(steps))
    rows = []
    for i in range(count):
        piece = steps[i * len(steps) // count : (i + 1) * len(steps) // count]
        loss = math.fsum(step["loss"] for step in piece) / len(piece)
        rows.append((f"{piece[-1]['step']:,}", f"{piece[-1]['tokens']:,}", f"{loss:.4f}", f"{piece[-1]['lr']:.2e}"))
    return rows


def _data_note(recipe: Recipe, data: DataReport) -> str:
    kept_out = ", ".join(recipe.data.clean.decontaminate)
    note = f"{data.tokens:,} tokens to learn from; sources repeat where a phase takes more of them than there are."
    return note + (f" Documents that share {recipe.data.clean.decontaminate_ngram} words in a row with {kept_out} were dropped."
                   if kept_out else "")  # fmt: skip


def _is_path(base: str) -> bool:
    """Whether a base model is named by where it lies: a hub's names have at most one slash, after a word."""
    return base.startswith((".", "/", "~")) or base.count("/") > 1 or "\\" in base


def _evaluation(
    held_out: Mapping[str, float],
    accuracy: Mapping[str, Mapping[str, Any]],
    needles: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> list[str]:
    parts = []
    if held_out:
        parts.append("Loss on documents that were never learned from:")
        parts.append(table(("source", "nats a learned token"), [(name, f"{loss:.4f}") for name, loss in held_out.items()]))
    if accuracy:
        parts.append("Answers to new problems, greedy and without an example, verified by the tasks themselves:")
        rows = [
            (task, f"{found['accuracy']:.1%}", f"{found['low']:.1%} to {found['high']:.1%}", f"{found['count']:,}")
            for task, found in accuracy.items()
        ]
        parts.append(table(("task", "right", "95 % interval (Wilson)", "problems"), rows))
    if needles:
        lengths = sorted({length for by in needles.values() for length in by}, key=int)
        counts = sorted({found["count"] for by in needles.values() for found in by.values()})
        many = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
        parts.append(f"Facts found in plain text of so many tokens ({many} questions each):")
        found_rows = [
            (kind, *(f"{by[length]['accuracy']:.0%}" if length in by else "-" for length in lengths))
            for kind, by in needles.items()
        ]
        parts.append(table(("kind", *(f"{int(length):,}" for length in lengths)), found_rows))
    return parts or ["None was asked for."]


def _samples(metrics: Mapping[str, Any]) -> list[str]:
    """Prompts with what the model makes of them, indented so that nothing in them is Markdown."""
    found: Mapping[str, str] = metrics.get("samples", {})
    shown = []
    for prompt, text in found.items():
        shown.append("\n".join(f"    {line}" for line in f"{prompt}{text}".splitlines()))
    return ["### Samples", "Greedy; each begins with its prompt.", *shown] if shown else []


def _prompt_note(recipe: Recipe) -> str:
    made = [source for source in recipe.data.sources.values() if source.kind == "procedural"]
    if not made:
        return ""
    return "Problems are asked as `question`, a new line, `<think>`, a new line; steps, `</think>` and the answer follow."


def _limits(spec: ModelSpec) -> str:
    small = (
        "It is far too small to know facts or to talk, and wrong answers look like right ones. "
        if spec.parameters < 100_000_000
        else ""
    )
    return (
        f"{small}It was trained on the texts and kinds of problems above; what it makes of others means nothing. It has had no "
        "training towards safety and repeats what its texts say, old views included. It is for studying training and serving, "
        "not for use."
    )
