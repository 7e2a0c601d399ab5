"""Procedural reasoning tasks, judged by their verifiers, and accuracy against the thinking budget."""

from __future__ import annotations

import hashlib
from typing import Any

from tandem.evaluation.score import Answered, Records
from tandem.evaluation.subject import Subject
from tandem.evaluation.writer import Written
from tandem.train.data.procedural import CLOSE, Problem, evaluation_problems, verify


def reasoning(subject: Subject) -> Records:
    """The tasks with thinking on, off or both, and with it on at each budget of the settings."""
    settings = subject.settings
    problems = [p for task in settings.reasoning_tasks for p in evaluation_problems(task, settings.problems)]
    modes = subject.form.wanted(settings.thinking)
    found: Records = {}
    for mode in modes:
        found["reasoning", f"thinking {mode}"] = _ask(subject, problems, mode, None)
    if "on" in modes:
        for budget in settings.budgets:
            found["budgets", str(budget)] = _ask(subject, problems, "on", budget)
    elif settings.budgets:
        subject.notes.append("no budgets: its template does not know thinking")
    return found


def _ask(subject: Subject, problems: list[Problem], mode: str, budget: int | None) -> list[Answered]:
    doing = f"reasoning, thinking {mode}" if budget is None else f"budget {budget}"
    names = [problem_id(problem) for problem in problems]
    prompts = [subject.form.question(problem.question, mode) for problem in problems]
    written = subject.write(doing, prompts, names, budget=budget)
    return [
        judged(problem, name, answer, mode, k)
        for problem, name, answers in zip(problems, names, written, strict=True)
        for k, answer in enumerate(answers)
    ]


def judged(problem: Problem, name: str, written: Written, mode: str, sample: int = 0) -> Answered:
    """One answer, right where the task's verifier takes what follows the closing mark, or all of it with thinking off.

    As in alignment, only an answer that was ended, and that is what its text shows, is right.
    """
    text = written.text if mode == "on" else CLOSE + written.text
    right = written.fits and written.finished and not written.hidden and verify(problem.task, problem, text)
    return Answered(
        problem=name,
        task=problem.task,
        question=problem.question,
        expected=problem.answer,
        worth=float(right),
        sample=sample,
        **of_writing(written, mode),
    )


def of_writing(written: Written, mode: str) -> dict[str, Any]:
    """What an answer's record takes from how it was written."""
    one_mark = written.closing_marks == (1 if mode == "on" else 0)
    return {
        "text": written.text,
        "one_mark": one_mark,
        "one_mark_unaided": one_mark and written.unaided is not False,
        "finished": written.finished,
        "forced": written.forced,
        "thinking_tokens": written.thinking_tokens,
        "answer_tokens": written.answer_tokens,
    }


def problem_id(problem: Problem) -> str:
    """A name that is the same wherever the question is."""
    return f"{problem.task}:{hashlib.sha256(problem.question.encode()).hexdigest()[:12]}"
