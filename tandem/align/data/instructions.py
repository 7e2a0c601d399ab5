"""Instructions about the form of an answer, on top of questions whose answers are verified.

The substance is a procedural problem or words to be copied, the form one to three constraints of
`tandem.align.data.constraints`. What is thought is the derivation, then the answer, then the answer in each form but the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from tandem.align.data.constraints import Constraint, draw_constraints, stages
from tandem.align.data.draws import require_share, stream_rng
from tandem.align.data.reasoning import answer_message, check_of, phrase, problem_streams, switched
from tandem.align.sample import Ask, Sample
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int
from tandem.train.data.procedural import EVALUATION_SEED, Problem
from tandem.train.needles import EVALUATION_KEYS, TRAINING_KEYS

COPY = "copy"
"""The name of the task whose answer is in the question."""
COPY_QUESTIONS = ("Write these words: {words}", "Copy: {words}", "Say {words}")
"""How words to be copied are asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Instruction:
    content: str
    answer: str
    derivation: str
    constraints: tuple[Constraint, ...]
    check: Mapping[str, Any]


def instruction_samples(
    tasks: Sequence[str], count: int, seed: int, *, off: float = 0.1, copies: float = 0.3, most: int = 3
) -> Iterator[Sample]:
    """`count` conversations to learn from, the tasks in turn; fewer are the beginning of more.

    A share `copies` has words to be copied instead of a problem, a share `off` no thoughts; each answer has up to `most`
    constraints. Raises SpecError for tasks, shares and seeds (those of evaluations too) that do not exist.
    """
    if seed >= EVALUATION_SEED:
        raise SpecError(f"seed={seed}: seeds from {EVALUATION_SEED} on are for evaluation; train with a lower one")
    require_share("off", off)
    made = _instructions(tasks, count, seed, "instruction-samples", copies, most)
    return _samples(made, stream_rng("instruction-switches", seed), off)


def instruction_asks(
    tasks: Sequence[str], count: int, seed: int, *, thinking: bool = True, copies: float = 0.3, most: int = 3
) -> Iterator[Ask]:
    """`count` instructions that are verified, the tasks in turn.

    From `EVALUATION_SEED` on with held-out problems and with words that no training copies. Raises SpecError as
    `instruction_samples` does, and for more held-out problems than there are.
    """
    made = _instructions(tasks, count, seed, "instruction-asks", copies, most)
    return (
        Ask(
            id=f"instructions:{instruction.check['task']}:{seed}:{i}",
            kind="instructions",
            task="+".join(constraint.kind for constraint in instruction.constraints),
            messages=({"role": "user", "content": instruction.content},),
            thinking=thinking,
            check=instruction.check,
        )
        for i, instruction in enumerate(made)
    )


def constraints_of(check: Mapping[str, Any]) -> tuple[Constraint, ...]:
    """The constraints of an ask, from its check."""
    return tuple(Constraint(**plain) for plain in check["constraints"])


def _samples(made: Iterator[_Instruction], rng: Random, off: float) -> Iterator[Sample]:
    for instruction in made:
        thinking = rng.random() >= off
        texts = stages(instruction.constraints, instruction.answer)
        thoughts = [instruction.derivation] if instruction.derivation else []
        thoughts += [text for text, before in zip(texts[:-1], ["", *texts], strict=False) if text != before]
        messages = [
            {"role": "user", "content": instruction.content},
            answer_message(texts[-1], "\n".join(thoughts) if thinking else None),
        ]
        yield Sample(kind="instructions", messages=switched(messages, thinking, rng), thinking=thinking)


def _instructions(
    tasks: Sequence[str], count: int, seed: int, purpose: str, copies: float, most: int
) -> Iterator[_Instruction]:
    require_int("count", count, low=0)
    require_int("most", most)
    require_share("copies", copies)
    streams = problem_streams(tasks, seed, purpose=purpose)
    words = EVALUATION_KEYS if seed >= EVALUATION_SEED else TRAINING_KEYS
    return _made(streams, count, stream_rng(purpose, seed), copies, most, words)


def _made(
    streams: Sequence[Iterator[Problem]], count: int, rng: Random, copies: float, most: int, words: Sequence[str]
) -> Iterator[_Instruction]:
    turn = 0
    for _ in range(count):
        if rng.random() < copies:
            check = _copy_check(rng, words)
            question, derivation = check["question"], ""
        else:
            problem = next(streams[turn % len(streams)], None)
            if problem is None:
                raise SpecError(f"count={count}: the held-out problems of {len(streams)} tasks do not reach; ask for fewer")
            turn += 1
            check, question, derivation = check_of(problem), phrase(problem.question, rng), problem.derivation
        constraints = draw_constraints(rng, check["question"], check["answer"], most=most)
        yield _Instruction(
            content=_worded(question, constraints, rng),
            answer=check["answer"],
            derivation=derivation,
            constraints=constraints,
            check={**check, "constraints": [constraint.plain() for constraint in constraints]},
        )


def _copy_check(rng: Random, words: Sequence[str]) -> Mapping[str, Any]:
    chosen = rng.sample(words, rng.randint(1, 5))
    if rng.random() < 0.3:
        chosen = [word.capitalize() for word in chosen]
    answer = ", ".join(chosen)
    return {"task": COPY, "question": rng.choice(COPY_QUESTIONS).format(words=answer), "answer": answer, "entry": {}}


def _worded(question: str, constraints: Sequence[Constraint], rng: Random) -> str:
    """Question and demands as a user writes them: demands behind it mostly, before it sometimes."""
    demands = " ".join(constraint.describe(rng.randrange(3)) for constraint in constraints)
    return f"{demands}\n{question}" if rng.random() < 0.2 else f"{question}\n{demands}"
