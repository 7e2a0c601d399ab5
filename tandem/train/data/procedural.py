"""Reasoning tasks that are generated, worked out step by step, and verified.

Questions and scores are reasoning-gym's (without the wording that tells a chat model how to answer); the derivations are those
of `solvers`. A document reads

    question
    <think>
    steps
    </think>
    answer

and only what follows the opening mark is learned: nobody can predict a random question. Item i of seed s comes from a stream of
its own, far from that of any other seed, so evaluation problems (`EVALUATION_SEED`) are other draws than training ones; and a
question that happens to be the same is left out of training data (`prepare`).
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from functools import cache
from itertools import count as numbers_from
from itertools import islice
from random import Random
from typing import Any

from tandem.spec.errors import SpecError
from tandem.train.data import solvers
from tandem.train.data.document import Document
from tandem.train.data.solvers import Entry, Solver

OPEN, CLOSE = "<think>", "</think>"
EVALUATION_SEED = 10**9
"""Seeds from here on are for evaluation; recipes' sources use lower ones."""
_MAX_DRAWS = 50
_BLOCK = 1024
"""Problems of one data set of reasoning-gym, some of which hold as many objects as they have problems."""
_WHOLE = re.compile(r"\.0\b")


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A question with its worked answer."""

    task: str
    question: str
    derivation: str
    answer: str
    entry: Mapping[str, Any]
    """What reasoning-gym made, which its score looks at."""

    @property
    def text(self) -> str:
        """The whole document."""
        return f"{prompt_of(self)}{self.derivation}\n{CLOSE}\n{self.answer}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """How problems of one kind are made."""

    solve: Solver
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of reasoning-gym: small numbers and few terms, so that models of a few million parameters can learn it."""
    make: Callable[[Random], Entry] | None = None
    """Of a task of our own; None: reasoning-gym's of the same name."""


def _recall(rng: Random) -> Entry:
    keys = rng.sample([a + b for a in "abcdefghjk" for b in "mnpqrstuvw"], rng.randint(3, 8))
    pairs = {key: f"{rng.randrange(100):02d}" for key in keys}
    key = rng.choice(keys)
    question = f"{', '.join(f'{k}={v}' for k, v in pairs.items())}. {key}?"
    return {"question": question, "answer": pairs[key], "metadata": {"key": key, "pairs": pairs}}


TASKS: Mapping[str, Task] = {
    "chain_sum": Task(solve=solvers.chain_sum, settings={"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2}),
    "basic_arithmetic": Task(
        solve=solvers.basic_arithmetic,
        settings={
            "min_terms": 2,
            "max_terms": 4,
            "min_digits": 1,
            "max_digits": 1,
            "operators": ("+", "-", "*"),
            "allow_negation": False,
        },
    ),
    "letter_counting": Task(solve=solvers.letter_counting, settings={"min_words": 2, "max_words": 6}),
    "leg_counting": Task(
        solve=solvers.leg_counting, settings={"min_animals": 2, "max_animals": 4, "min_instances": 1, "max_instances": 9}
    ),
    "spell_backward": Task(solve=solvers.spell_backward, settings={"min_word_len": 3, "max_word_len": 8}),
    "number_sorting": Task(
        solve=solvers.number_sorting,
        settings={"min_numbers": 3, "max_numbers": 5, "max_decimals": 0, "min_value": 0.0, "max_value": 99.0},
    ),
    "word_sequence_reversal": Task(solve=solvers.word_sequence_reversal, settings={"min_words": 3, "max_words": 6}),
    "gsm_symbolic": Task(solve=solvers.gsm_symbolic),
    "count_bits": Task(solve=solvers.count_bits, settings={"min_n": 1, "max_n": 1023}),
    "number_filtering": Task(
        solve=solvers.number_filtering,
        settings={"min_numbers": 3, "max_numbers": 6, "max_decimals": 0, "min_value": 0.0, "max_value": 99.0},
    ),
    "gcd": Task(solve=solvers.gcd, settings={"min_value": 1, "max_value": 99}),
    "recall": Task(solve=solvers.recall, make=_recall),
}
"""The tasks that a recipe may name."""


def problems(task: str, seed: int) -> Iterator[Problem]:
    """Problems without end; the same for the same task and seed. Raises SpecError for a task that is not known."""
    kind = _task(task)
    start = int.from_bytes(hashlib.sha256(f"{task}:{seed}".encode()).digest()[:7], "big")
    make = kind.make
    dataset: Any = None
    for i in numbers_from():
        if make is None and i % _BLOCK == 0:
            dataset = _gym().create_dataset(task, seed=start + i, size=_BLOCK, **kind.settings)
        entry = make(Random(start + i)) if make else _short_numbers(dataset[i % _BLOCK])
        solved = kind.solve(entry)
        if solved is not None:
            question, derivation = solved
            yield Problem(task=task, question=question, derivation=derivation, answer=str(entry["answer"]), entry=entry)


def _short_numbers(entry: Entry) -> Entry:
    """Numbers that number_sorting writes as 65.0 become 65: half the tokens, the same score."""
    if entry["metadata"]["source_dataset"] != "number_sorting":
        return entry
    numbers = [_WHOLE.sub("", str(number)) for number in entry["metadata"]["original_numbers"]]
    return {**entry, "answer": _WHOLE.sub("", entry["answer"]), "metadata": {**entry["metadata"], "original_numbers": numbers}}


def make_problems(task: str, count: int, seed: int) -> list[Problem]:
    """`count` problems with different questions; fewer are the beginning of more.

    Raises SpecError for a task that is not known or that has fewer questions.
    """
    found: dict[str, Problem] = {}
    for problem in islice(problems(task, seed), count * _MAX_DRAWS):
        found.setdefault(problem.question, problem)
        if len(found) == count:
            return list(found.values())
    raise SpecError(f"count={count}: {task} has only about {len(found)} different questions; ask for fewer")


def evaluation_problems(task: str, count: int) -> list[Problem]:
    """The problems that `task` is evaluated with. `prepare` keeps their questions out of training data."""
    return make_problems(task, count, EVALUATION_SEED)


def read_problems(tasks: tuple[str, ...], seed: int) -> Iterator[Document]:
    """Documents of several tasks in turn, without end. Raises SpecError for a task that is not known."""
    streams = [problems(task, seed) for task in tasks]
    for task in tasks:
        _task(task)
    for i in numbers_from():
        for stream in streams:
            problem = next(stream)
            yield Document(text=problem.text, prompt_chars=len(prompt_of(problem)), id=f"{problem.task}:{i}")


def prompt_of(problem: Problem) -> str:
    """What a model is given: the question and the opening mark."""
    return f"{problem.question}\n{OPEN}\n"


def verify(task: str, problem: Problem, text: str) -> bool:
    """Whether a model's text solves a problem: one closing mark, and the right answer after it.

    `text` is what the model wrote, with or without the prompt. The answer must have reasoning-gym's full score and be the
    expected one as text or as a number: some of its scores forgive more (a wrong sign, numbers that are off by one).
    """
    if text.count(CLOSE) != 1:
        return False
    answer = text.rpartition(CLOSE)[2].strip()
    if not _same(answer, problem.answer):
        return False
    return _task(task).make is not None or float(_scorer(task)(answer, dict(problem.entry))) >= 1.0


def _same(answer: str, expected: str) -> bool:
    if answer == expected:
        return True
    try:
        return Decimal(answer.replace(",", "")) == Decimal(expected)
    except InvalidOperation:
        return False


def _task(name: str) -> Task:
    if name not in TASKS:
        raise SpecError(f"task={name!r}: not known; {', '.join(TASKS)} are")
    return TASKS[name]


@cache
def _scorer(task: str) -> Callable[[str, Entry], float]:
    score: Callable[[str, Entry], float] = _gym().get_score_answer_fn(task)
    return score


def _gym() -> Any:
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError:
        raise SpecError("kind='procedural': needs reasoning-gym; pip install 'tandem-lm[train]'") from None
