"""Tasks of lm-eval-harness, asked through the transformers adapter. Those in `tasks/` bring their own questions."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from tandem.evaluation.score import Answered, Records
from tandem.evaluation.subject import Subject
from tandem.spec.errors import SpecError

OWN_TASKS = ("gsm8k_numbers", "gsm8k_choice")
"""Tasks that come with Tandem: problems of GSM8K's test part, answered with a number or by choosing one of four."""
FOLDER = Path(__file__).parent / "tasks"
_EXTRA = "lm-eval is not installed, and the suite lm-eval needs it; `pip install 'tandem-lm[eval]'`"


def task_index(names: Sequence[str]) -> Any:
    """lm-eval's index of tasks, a `TaskManager`: made once, for it takes some 20 s where it holds more than our own.

    Raises SpecError without lm-eval, and for a name that it does not know.
    """
    with _quiet():
        try:
            tasks = importlib.import_module("lm_eval.tasks")
        except ModuleNotFoundError:
            raise SpecError(_EXTRA) from None
        foreign = [name for name in names if name not in OWN_TASKS]
        index = tasks.TaskManager(include_path=str(FOLDER), include_defaults=bool(foreign), metadata=_metadata(()))
    known = set(index.all_tasks)
    for name in foreign:
        if name not in known:
            near = next((task for task in sorted(known) if name in task or task in name), None)
            raise SpecError(
                f"tasks={name!r}: neither a procedural task nor one of lm-eval's {len(known):,}"
                f"{f'; did you mean {near}' if near else f'; {chr(44).join(OWN_TASKS)} come with Tandem'}"
            )
    return index


def harness(subject: Subject, index: Any) -> tuple[Records, dict[str, Any]]:
    """The answers to the tasks, one record a question, and lm-eval's own results; `index` is `task_index` of them.

    Our decoder runs; lm-eval asks it as it asks any model of transformers, without a chat template. Raises SpecError where a
    task's questions cannot be had.
    """
    settings = subject.settings
    names = list(settings.harness_tasks or OWN_TASKS)
    context = subject.decoder.spec.max_context
    index.metadata.update(_metadata(settings.lengths or (min(4096, context // 2),), subject.decoder.source))
    subject.tell(f"lm-eval: {', '.join(names)}", 0, len(names))
    with _quiet():
        evaluator = importlib.import_module("lm_eval.evaluator")
        try:
            results = evaluator.simple_evaluate(
                model=_adapter(subject),
                tasks=names,
                limit=settings.problems,
                task_manager=index,
                bootstrap_iters=0,
                random_seed=settings.seed,
                numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
            )
        except (OSError, ImportError, ValueError, RuntimeError, AssertionError, LookupError) as wrong:
            raise SpecError(f"tasks={','.join(names)}: lm-eval cannot run them ({_first_line(wrong)})") from None
    found = [record for name, some in results["samples"].items() for record in _records(name, some)]
    silent = [name for name, some in results["samples"].items() if not _records(name, some)]
    if silent:
        subject.notes.append(f"lm-eval: {', '.join(silent)} do not say which answers are right; see lm_eval in the JSON")
    subject.tell(f"lm-eval: {', '.join(names)}", len(names), len(names))
    return ({("lm-eval", "as text"): found} if found else {}), _numbers(results["results"])


def _metadata(lengths: Sequence[int], source: Path | None = None) -> dict[str, Any]:
    """What tasks that make their own prompts go by. The index holds it by reference, as it does where it is not empty."""
    return {"max_seq_lengths": list(lengths), "tokenizer": None if source is None else str(source)}


def _adapter(subject: Subject) -> Any:
    """lm-eval's model of transformers over our decoder, at the context that the model has."""
    from transformers import PreTrainedTokenizerFast

    from tandem.model.hf import TandemForCausalLM

    special = {name: text for name, text in subject.tokenizer.special.items() if text}
    special.setdefault("pad_token", special.get("eos_token", special.get("bos_token", "<pad>")))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=subject.tokenizer.backend, **special)
    models = importlib.import_module("lm_eval.models.huggingface")
    model = TandemForCausalLM.from_decoder(subject.decoder)
    asked = models.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=min(8, subject.settings.batch))
    if not sys.stderr.isatty():
        for name in ("generate_until", "loglikelihood", "loglikelihood_rolling"):
            setattr(asked, name, partial(getattr(asked, name), disable_tqdm=True))
    return asked


def _records(task: str, entries: Sequence[Mapping[str, Any]]) -> list[Answered]:
    """One record for each question, by the first of its measures that is a share."""
    kept: dict[str, Answered] = {}
    for entry in entries:
        worth = next((float(entry[name]) for name in entry["metrics"] if _is_share(entry.get(name))), None)
        problem = f"{task}:{entry['doc_id']}:{entry['doc_hash'][:12]}"
        if worth is None or problem in kept:  # a second filter of the same answer
            continue
        expected, text = _texts(entry)
        kept[problem] = Answered(
            problem=problem,
            task=task,
            question=str(entry["arguments"][0][0]),
            expected=expected,
            text=text,
            worth=worth,
        )
    return list(kept.values())


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 <= float(value) <= 1


def _texts(entry: Mapping[str, Any]) -> tuple[str, str]:
    """What was expected and what the model wrote, or, where it had to choose, the likeliest choice."""
    target, first = entry["target"], entry["resps"][0][0]
    if isinstance(first, str):
        return str(target), first
    choices = [str(choice).strip() for _, choice in entry["arguments"]]
    values = [float(found[0]) for found in entry["filtered_resps"]]
    known = isinstance(target, int) and 0 <= target < len(choices)
    return choices[target] if known else str(target), choices[values.index(max(values))]


def _numbers(results: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's results without what JSON cannot hold."""
    return {
        task: {
            name.replace(",none", ""): value
            for name, value in row.items()
            if isinstance(value, (int, float)) and isfinite(value)
        }
        for task, row in results.items()
    }


def _first_line(wrong: BaseException) -> str:
    lines = [line.strip() for line in str(wrong).splitlines() if line.strip()]
    return f"{type(wrong).__name__}{': ' + lines[0][:200] if lines else ''}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log lines and warnings of lm-eval and of what it reads with; what they print goes to standard error."""
    import warnings

    logs = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers", "huggingface_hub", "fsspec")]
    before = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)
