"""`tandem evaluate`: models side by side on tasks whose answers verify themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from tandem.cli.needed import need
from tandem.spec.errors import SpecError
from tandem.spec.files import require_folder, write_whole
from tandem.spec.local import usable_cores
from tandem.spec.units import require_int


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Checkpoint folders, GGUF files or names.")],
    suite: Annotated[
        str | None,
        typer.Option(
            help="reasoning, instructions, tools, needles, lm-eval, by commas. Default: all it can be asked but lm-eval."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Procedural tasks, and lm-eval's with that suite, by commas. Default: all procedural ones."),
    ] = None,
    problems: Annotated[
        int, typer.Option(help="Problems of each task; of the other suites, of all their kinds together.")
    ] = 100,
    budgets: Annotated[str | None, typer.Option(help="Thinking budgets in tokens, by commas: 0,8,16,32.")] = None,
    thinking: Annotated[str, typer.Option(help="on, off, or both as far as the model has them.")] = "both",
    samples: Annotated[int, typer.Option(help="Answers drawn for each problem; more than one needs a temperature.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of draws, constraints, scenarios and needles.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer, its thinking included.")] = 256,
    lengths: Annotated[
        str | None,
        typer.Option(help="Prompts with needles, in tokens, by commas. Default: a quarter, half and all of the context."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Requests that the engine serves at once.")] = 32,
    dtype: Annotated[
        str, typer.Option(help="Weights in memory: auto (as stored), float32, float16, bfloat16, int8.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu, or cuda for a GPU.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads, at most the cores; default: as torch finds.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report here.")] = None,
    answers: Annotated[Path | None, typer.Option(help="Write every answer here, one JSON object a line.")] = None,
    json_out: Annotated[bool, typer.Option("--json", help="Print one JSON object (SI units) on stdout.")] = False,
) -> None:
    """Measure how good models are: right answers with intervals, thinking budgets, and which is better (extra `[train]`)."""
    require_folder("report", report)
    require_folder("answers", answers)
    need("torch", "jaxtyping", "tokenizers", "jinja2", "reasoning_gym", doing="evaluating")
    from tandem.evaluation.settings import EvaluationSettings

    settings = EvaluationSettings(
        suites=_words(suite),
        tasks=_words(tasks),
        problems=problems,
        budgets=tuple(sorted(_numbers("budgets", budgets))),
        thinking=thinking,
        samples=samples,
        temperature=temperature,
        seed=seed,
        max_tokens=max_tokens,
        lengths=_numbers("lengths", lengths),
        batch=batch,
    )
    if threads is not None:
        import torch

        torch.set_num_threads(require_int("threads", threads, high=usable_cores()))
    data = _run(models, settings, dtype, device, answers)
    if report is not None:
        from tandem.report.evaluation_html import evaluation_page

        write_whole(report, evaluation_page(data))
    if json_out:
        from tandem.cli.app import emit

        return emit(_contract(data))
    from tandem.report import text
    from tandem.report.evaluation_text import evaluation_text

    return text.console().print(evaluation_text(data))


def _run(models: list[str], settings: Any, dtype: str, device: str, answers: Path | None) -> dict[str, Any]:
    from tandem.evaluation.run import evaluate_models
    from tandem.report import text

    with ExitStack() as stack:
        lines: list[str] = []
        show = stack.enter_context(text.progress("evaluating"))

        def keep(model: str, suite: str, mode: str, answer: Any) -> None:
            from dataclasses import asdict

            lines.append(json.dumps({"model": model, "suite": suite, "mode": mode, **asdict(answer), "right": answer.right}))

        data = evaluate_models(
            models, settings, dtype=dtype, device=device, listen=_listener(show), keep=keep if answers is not None else None
        )
    if answers is not None:
        write_whole(answers, "".join(line + "\n" for line in lines))
    return data


def _listener(show: Callable[[str], None]) -> Callable[[dict[str, Any]], None]:
    """Shows what is being done, and a line on stderr for every part that is."""
    from tandem.report.evaluation_text import interval
    from tandem.report.text import progress_console

    out = progress_console()

    def listen(event: dict[str, Any]) -> None:
        if event["kind"] == "load":
            show(f"{event['model']}: loading")
        elif event["kind"] == "progress":
            show(f"{event['model']}: {event['doing']}: {event['done']:,} of {event['total']:,}")
        else:
            line = f"{event['model']}: {event['suite']}, {event['mode']}: {interval(event)} of {event['count']:,}"
            out.print(line, markup=False, highlight=False, soft_wrap=True)

    return listen


def _contract(data: dict[str, Any]) -> dict[str, Any]:
    """The object that is printed: of one model its own fields beside the settings, of several a list."""
    if len(data["models"]) > 1:
        return data
    return {**data["models"][0], "settings": data["settings"], "seconds": data["seconds"]}


def _words(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(name: str, text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in _words(text))
    except ValueError:
        raise SpecError(f"{name}={text!r}: must be whole numbers with commas between them, for example 0,8,16") from None
