"""Reasoning tasks as conversations: with true derivations, with thinking off, with thoughts cut short, over two turns.

Problems are those of `tandem.train.data.procedural`. A base model knows their bare questions, so every phrasing has the bare
question in it, word for word. The first `HELD_OUT` evaluation problems of a task, which pre-training's recipes keep out too,
are asked in evaluations and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from random import Random
from typing import Any

from tandem.align.data.draws import HELD_OUT, number_of, require_share, stream_rng
from tandem.align.sample import Ask, Message, Sample
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int
from tandem.train.data.procedural import EVALUATION_SEED, TASKS, Problem, evaluation_problems, problems

PHRASINGS = (
    "{question}",
    "{question}",
    "{question}",
    "Question: {question}",
    "Please solve this: {question}",
    "Hello! {question}",
    "Can you help me? {question}",
    "{question}\nWhat is the answer?",
    "I have a question.\n{question}",
    "{question}\nThank you.",
)
"""How users ask; the bare question is the commonest."""
SYSTEMS = ("You are a helpful assistant.", "Answer the user.", "Be exact.")
"""What a system message says, where there is one."""
ON, OFF = "/think", "/no_think"
_SYSTEM_SHARE = 0.2
_EXPLICIT_SHARE = 0.15


def reasoning_samples(
    tasks: Sequence[str],
    count: int,
    seed: int,
    *,
    off: float = 0.1,
    truncated: float = 0.0,
    two_turns: float = 0.1,
) -> Iterator[Sample]:
    """`count` conversations to learn reasoning from, the tasks in turn; fewer are the beginning of more.

    Of each 1, a share `off` has no thoughts (paper A: 10 %), and a share `truncated` has thoughts that break off at any
    character before the right answer (paper A's third stage: 5 %). Independent of that, a share `two_turns` asks a second
    question after a first. Raises SpecError for tasks, seeds (those of evaluations too) and shares that do not exist.
    """
    _require_training_seed(seed)
    require_share("off", off)
    require_share("truncated", truncated)
    require_share("two_turns", two_turns)
    if off + truncated > 1:
        raise SpecError(f"truncated={truncated}: off={off} leaves no more than {1 - off:g}")
    streams = problem_streams(tasks, seed, purpose="reasoning-samples")
    return islice(_samples(streams, stream_rng("reasoning-samples", seed), off, truncated, two_turns), _count(count))


def reasoning_asks(tasks: Sequence[str], count: int, seed: int, *, thinking: bool = True) -> Iterator[Ask]:
    """`count` questions that are verified, the tasks in turn.

    From `EVALUATION_SEED` on they are held-out problems: those of `evaluation_problems` in their order at that seed, in another
    order at each later one. Below, they are problems to train on. Raises SpecError for tasks that are not known and for more
    held-out problems than there are.
    """
    streams = problem_streams(tasks, seed, purpose="reasoning-asks")
    most = HELD_OUT * len(streams)
    if seed >= EVALUATION_SEED and _count(count) > most:
        raise SpecError(f"count={count}: only {most} problems are kept out of training, {HELD_OUT} of each task; ask for fewer")
    return _asks(streams, _count(count), seed, thinking)


def _samples(
    streams: Sequence[Iterator[Problem]], rng: Random, off: float, truncated: float, two_turns: float
) -> Iterator[Sample]:
    while True:
        for i, stream in enumerate(streams):
            share = rng.random()
            kind = "reasoning-off" if share < off else "truncated" if share < off + truncated else "reasoning"
            thinking = kind != "reasoning-off"
            asked = [next(stream)]
            if rng.random() < two_turns:
                asked.append(next(streams[rng.randrange(len(streams))] if len(streams) > 1 else streams[i]))
            messages: list[Message] = []
            for problem in asked:
                last = problem is asked[-1]
                thoughts = _cut(problem.derivation, rng) if kind == "truncated" and last else problem.derivation
                messages.append({"role": "user", "content": phrase(problem.question, rng)})
                messages.append(answer_message(problem.answer, thoughts if thinking else None))
            yield Sample(kind=kind, messages=switched(messages, thinking, rng), thinking=thinking)


def _asks(streams: Sequence[Iterator[Problem]], count: int, seed: int, thinking: bool) -> Iterator[Ask]:
    rng = stream_rng("reasoning-asks", seed)
    for i in range(count):
        problem = next(streams[i % len(streams)])
        yield Ask(
            id=f"reasoning:{problem.task}:{seed}:{i}",
            kind="reasoning",
            task=problem.task,
            messages=({"role": "user", "content": phrase(problem.question, rng)},),
            thinking=thinking,
            check=check_of(problem),
        )


def check_of(problem: Problem) -> Mapping[str, Any]:
    """What verifies an answer to a problem, as plain data that JSON can hold."""
    return {"task": problem.task, "question": problem.question, "answer": problem.answer, "entry": dict(problem.entry)}


def problem_of(check: Mapping[str, Any]) -> Problem:
    """The problem of `check_of`, without its derivation."""
    return Problem(derivation="", **{name: check[name] for name in ("task", "question", "answer", "entry")})


def phrase(question: str, rng: Random) -> str:
    """A question as one of the users asks it."""
    return rng.choice(PHRASINGS).replace("{question}", question)


def answer_message(content: str, thoughts: str | None) -> Message:
    """An assistant's turn; None: it did not think."""
    message = {"role": "assistant", "content": content}
    return message if thoughts is None else {**message, "reasoning_content": thoughts}


def switched(messages: Sequence[Message], thinking: bool, rng: Random) -> tuple[Message, ...]:
    """The conversation with or without a system message, and with the switch that `thinking` asks for.

    Off: by `/no_think` in the system's or the last user's message, or by the chat template's variable alone, a third each. On:
    mostly by nothing, as it is the default; sometimes by `/think` in either message, or by `/think` after a `/no_think`.
    """
    system = rng.choice(SYSTEMS) if rng.random() < _SYSTEM_SHARE else ""
    user = ""
    if not thinking:
        way = rng.randrange(3)
        system, user = (f"{system} {OFF}", "") if way == 0 else (system, OFF) if way == 1 else (system, "")
    elif rng.random() < _EXPLICIT_SHARE:
        way = rng.randrange(3)
        system = f"{system} {ON}" if way == 0 else f"{system} {OFF}" if way == 2 else system
        user = "" if way == 0 else ON
    found = [dict(message) for message in messages]
    if user:
        last = next(message for message in reversed(found) if message["role"] == "user")
        last["content"] = f"{last['content']} {user}"
    return (*([{"role": "system", "content": system.strip()}] if system else []), *found)


def _cut(text: str, rng: Random) -> str:
    """The beginning of a derivation, at least a character and never all of it (but for one of a single character)."""
    return text[: rng.randrange(1, max(2, len(text)))].rstrip()


def problem_streams(tasks: Sequence[str], seed: int, *, purpose: str) -> list[Iterator[Problem]]:
    """The problems of each task: from `EVALUATION_SEED` on held-out ones, below all others without end.

    Streams of other purposes have other problems. Raises SpecError for no task, for one that is not known, for a negative seed.
    """
    require_int("seed", seed, low=0, high=2**63)
    if not tasks:
        raise SpecError(f"tasks=[]: name one or more of {', '.join(TASKS)}")
    for task in tasks:
        if task not in TASKS:
            raise SpecError(f"task={task!r}: not known; {', '.join(TASKS)} are")
    if seed >= EVALUATION_SEED:
        return [_held_out(task, seed) for task in tasks]
    start = number_of(f"{purpose}:{seed}") % EVALUATION_SEED
    return [_trainable(task, start) for task in tasks]


def _require_training_seed(seed: int) -> None:
    if seed >= EVALUATION_SEED:
        raise SpecError(f"seed={seed}: seeds from {EVALUATION_SEED} on are for evaluation; train with a lower one")


def _count(count: int) -> int:
    require_int("count", count, low=0)
    return count


def _held_out(task: str, seed: int) -> Iterator[Problem]:
    found = list(_evaluation(task))
    if seed > EVALUATION_SEED:
        stream_rng(f"held-out:{task}", seed).shuffle(found)
    return iter(found)


def _trainable(task: str, seed: int) -> Iterator[Problem]:
    kept = _held_out_questions()
    return (problem for problem in problems(task, seed) if problem.question not in kept)


@cache
def _held_out_questions() -> frozenset[str]:
    """Of all tasks: `4 + 1 =` is a question of two of them."""
    return frozenset(problem.question for task in TASKS for problem in _evaluation(task))


@cache
def _evaluation(task: str) -> tuple[Problem, ...]:
    return tuple(evaluation_problems(task, HELD_OUT))
