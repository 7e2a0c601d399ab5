"""`evaluate_models`: every suite for every model, side by side."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tandem.evaluation.form import Form
from tandem.evaluation.score import Answered, Records, compare, score, scores, tasks_of
from tandem.evaluation.settings import CHAT_SUITES, EvaluationSettings
from tandem.evaluation.subject import Listen, Subject
from tandem.model.load import load_model
from tandem.model.tokenizer import load_tokenizer
from tandem.spec.catalog import find_weights, load_spec
from tandem.spec.errors import SpecError

_SAMPLES = 3
"""Right answers, and wrong ones, that the result shows of each suite."""
Keep = Callable[[str, str, str, Answered], None]
"""Told every answer: model, suite, how it was asked, the answer."""


def evaluate_models(
    models: Sequence[str],
    settings: EvaluationSettings,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    listen: Listen = lambda _: None,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Ask every model the same problems; plain numbers: `models[]`, `comparisons[]`, `settings`, `seconds`.

    A model is a checkpoint's folder, a GGUF file or a name. Its `metrics` are scores by suite, by how it was asked and by task
    (`metrics["reasoning"]["thinking on"]["chain_sum"]["accuracy"]`), and `metrics["budgets"]`, the curve. What cannot be asked
    is refused with a SpecError before any model is loaded. Models are loaded one after the other.
    """
    started = time.perf_counter()
    if not models:
        raise SpecError("models: none given; name one")
    names = _names(models)
    plans = [_check(model, name, settings) for model, name in zip(models, names, strict=True)]
    index = None
    if "lm-eval" in settings.suites:
        from tandem.evaluation.harness import task_index

        index = task_index(settings.harness_tasks)
    entries, records = [], {}
    for model, name, suites in zip(models, names, plans, strict=True):
        entry, records[name] = _evaluate(model, name, suites, settings, index, listen, dtype=dtype, device=device)
        entries.append(entry)
        if keep is not None:
            for (suite, mode), answers in records[name].items():
                for answer in answers:
                    keep(name, suite, mode, answer)
    return {
        "models": entries,
        "comparisons": [found.to_json() for found in compare(records)],
        "settings": asdict(settings),
        "seconds": time.perf_counter() - started,
    }


def _names(models: Sequence[str]) -> list[str]:
    """The last part of each path where these differ, else the paths as they are given."""
    short = [Path(model).name or model for model in models]
    names = short if len(set(short)) == len(short) else list(models)
    if len(set(names)) < len(names):
        raise SpecError(f"models={','.join(models)}: names one twice; name each once")
    return names


def _check(model: str, name: str, settings: EvaluationSettings) -> tuple[str, ...]:
    """The suites that a model is asked. Raises SpecError for one that it cannot be asked."""
    context = load_spec(find_weights(model)).max_context
    form = Form(name, load_tokenizer(model))
    suites = settings.suites or ("reasoning", *(CHAT_SUITES if form.chat else ()), "needles")
    for suite in suites:
        if suite in CHAT_SUITES and not form.chat:
            raise SpecError(f"suite={suite!r}: {name} has no chat template to be asked by; leave it out, or align it first")
        if suite in ("reasoning", *CHAT_SUITES):
            form.wanted(settings.thinking)
        if suite == "needles":
            from tandem.evaluation.needles import check_lengths

            check_lengths(settings.lengths, name, context)
    return suites


def _evaluate(
    model: str,
    name: str,
    suites: Sequence[str],
    settings: EvaluationSettings,
    index: Any,
    listen: Listen,
    **loading: str,
) -> tuple[dict[str, Any], Records]:
    """One model's entry and all its answers; its weights are given back."""
    started = time.perf_counter()
    listen({"kind": "load", "model": name})
    decoder = load_model(model, **loading)
    subject = Subject(name, decoder, load_tokenizer(model), settings, listen)
    records: Records = {}
    results: dict[str, Any] = {}
    for suite in suites:
        found = _suite(suite, subject, index, results)
        records |= found
        for (part, mode), answers in found.items():
            listen({"kind": "score", "model": name, "suite": part, "mode": mode, **score(answers)})
    entry = {
        "checkpoint": str(find_weights(model)),
        "name": name,
        "chat": subject.form.chat,
        "parameters": decoder.spec.parameters,
        "metrics": metrics(records),
        "samples": examples(records),
        "notes": subject.notes,
        **({"lm_eval": results} if results else {}),
        "seconds": time.perf_counter() - started,
    }
    del subject, decoder
    gc.collect()
    return entry, records


def _suite(suite: str, subject: Subject, index: Any, results: dict[str, Any]) -> Records:
    """One suite's answers; lm-eval's own numbers go into `results`. What a suite needs is imported when it is asked."""
    if suite == "reasoning":
        from tandem.evaluation.reasoning import reasoning

        return reasoning(subject)
    if suite == "needles":
        from tandem.evaluation.needles import needles

        return needles(subject)
    if suite == "lm-eval":
        from tandem.evaluation.harness import harness

        found, numbers = harness(subject, index)
        results |= numbers
        return found
    from tandem.evaluation import asks

    if suite == "instructions":
        return asks.instructions(subject)
    if not subject.form.own:
        subject.notes.append("tools: calls are read in the format of Nemotron Nano 2, which its template may not ask for")
    return asks.tools(subject)


def metrics(records: Records) -> dict[str, Any]:
    """Scores by suite, by how it was asked, and by task; those of budgets as a list, smallest first."""
    found: dict[str, Any] = {}
    for (suite, mode), answers in records.items():
        if suite == "budgets":
            by_task = {task: score(some) for task, some in list(tasks_of(answers).items())[1:]}
            found.setdefault(suite, []).append({"budget": int(mode), **score(answers), "tasks": by_task})
        else:
            found.setdefault(suite, {})[mode] = scores(answers)
    if "budgets" in found:
        found["budgets"].sort(key=lambda point: point["budget"])
    return found


def examples(records: Records) -> list[dict[str, Any]]:
    """Some right and some wrong answers of each suite, of as many tasks as there are, the first ones of each."""
    found = []
    for (suite, mode), answers in records.items():
        if suite == "budgets":
            continue
        for right in (True, False):
            firsts: dict[str, Answered] = {}
            for answer in answers:
                if answer.right is right and answer.sample == 0:
                    firsts.setdefault(answer.task, answer)
            for answer in list(firsts.values())[:_SAMPLES]:
                found.append(
                    {
                        "suite": suite,
                        "mode": mode,
                        "task": answer.task,
                        "right": right,
                        "question": answer.question,
                        "expected": answer.expected,
                        "text": answer.text,
                    }
                )
    return found
