"""Long documents that only a reader of the whole can continue: prose with facts in it, and questions with answers at its end.

Paper A (section 2, phase LC) takes long academic documents, cuts them into chunks of 1,024 tokens, lets a language model make
questions about a tenth of the chunks and appends these at the end. Here no language model is needed: facts whose answers are
known are put between the sentences (`tandem.train.needles`), and of a tenth of the chunks it is asked how they go on. What
follows the text is learned, the questions too; the text itself is not, as other sources have it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from math import ceil
from pathlib import Path
from random import Random

from tandem.spec.errors import SpecError
from tandem.spec.units import require_int
from tandem.train.data.document import BadRows, Document
from tandem.train.data.procedural import EVALUATION_SEED
from tandem.train.needles import KINDS, TRAINING_KEYS, Question, Things, fact, make_question, scatter, units
from tandem.train.recipe import SourceKind, SourcePart

LONG_KINDS = (*(kind for kind in KINDS if kind != "single"), "count", "continue")
"""Kinds of questions, which `tasks` of a recipe's source may name: those of the needles (a `single` among others is a
`multi-key`), how many values a thing has, and how a passage goes on."""
QUESTIONS = "Questions"
"""The line between the text and what is asked about it."""
_CHUNK_UNITS = 3
_SAMPLED = 0.1
_SHARE, _FEW, _MOST = 0.3, 100, 0.8
"""Of a document's tokens for facts and what is asked about them: a share, but a few questions' in short documents."""
_QUOTED, _CONTINUED = 4, 4
_SPECIAL_TOKENS = 2
_FACT = re.compile(r"Remember \w+(?:=\d+| like \w+)\.")
_WORD = re.compile(r"[^\W\d_]+")


def estimated_tokens(text: str) -> int:
    """Tokens of a text before there is a tokenizer, on the high side for byte-level BPE of 2,048 tokens and English prose: a
    document that is longer than a sequence would lose its questions. Fitted to the texts that come with the recipes.
    """
    words = _WORD.findall(text)
    letters = sum(map(len, words))
    rare = sum(max(0, len(word) - 4) for word in words)
    spaces, digits = text.count(" "), sum(map(str.isdigit, text))
    marks = len(text) - letters - spaces - digits
    return ceil(1.4 * len(words) + 0.18 * rare + digits + 1.6 * marks)


def read_long_documents(name: str, source: SourcePart, folder: Path, bad: BadRows) -> Iterator[Document]:
    """The long documents of a recipe's source; the prose is what lies at its path: files named .txt, .jsonl or .parquet, else
    a data set of the hub, which are read as sources of those kinds are.

    `tasks` chooses kinds of questions; without it all of them are asked. Raises SpecError for a field that cannot be.
    """
    from tandem.train.data.rows import read_rows

    field = f"data.sources.{name}"
    if source.documents is None or source.length is None:
        missing = "documents" if source.documents is None else "length"
        raise SpecError(
            f"{field}.{missing}=None: say how {'many are generated' if missing == 'documents' else 'long they are'}"
        )
    if source.seed >= EVALUATION_SEED:
        raise SpecError(f"{field}.seed={source.seed}: must be below {EVALUATION_SEED:,}; evaluations draw from there on")
    for kind in source.tasks:
        if kind not in LONG_KINDS:
            raise SpecError(f"{field}.tasks={kind!r}: no such question; {', '.join(LONG_KINDS)} are there")
    prose = replace(source, kind=_prose_kind(source.path or ""), prompt=None, documents=None, tasks=(), length=None)
    texts, tokens = [], 0
    for document in read_rows(name, prose, folder, bad):
        texts.append(document.text)
        tokens += estimated_tokens(document.text)
        if tokens > source.documents * source.length:  # what a large source has beyond that would not be used
            break
    return long_documents(texts, length=source.length, seed=source.seed, kinds=source.tasks or LONG_KINDS)


def prose_of(document: Document) -> str:
    """The prose that a long document is made of, as it was before sentences were put into it."""
    lines = document.text[: document.prompt_chars].removesuffix(f"\n\n{QUESTIONS}\n").split("\n")
    return "\n".join(line for line in lines if not _FACT.fullmatch(line))


def _prose_kind(path: str) -> SourceKind:
    if ".jsonl" in path:
        return "jsonl"
    if ".parquet" in path:
        return "parquet"
    return "text" if ".txt" in path else "hub"


def long_documents(
    texts: Sequence[str],
    *,
    length: int,
    seed: int,
    kinds: Sequence[str] = LONG_KINDS,
    count_tokens: Callable[[str], int] = estimated_tokens,
) -> Iterator[Document]:
    """Documents of up to `length` tokens without end, each of consecutive pieces of prose from a random place in `texts`.

    Document i depends on i and `seed`, not on how many there are. `count_tokens` is a tokenizer's, where one is known. About
    three tenths of a document are questions. Raises SpecError where the texts hold nothing or the length is too short.
    """
    require_int("length", length, low=64)
    hay = [unit for text in texts for unit in units(text)]
    if not hay:
        raise SpecError("texts: hold no text; name files that do")
    sizes = [count_tokens(unit + "\n") for unit in hay]
    return (_document(hay, sizes, length, kinds, count_tokens, seed, i) for i in count())


def _document(
    hay: list[str],
    sizes: list[int],
    length: int,
    kinds: Sequence[str],
    count_tokens: Callable[[str], int],
    seed: int,
    number: int,
) -> Document:
    rng = Random(f"long documents {seed} {number}")
    room = length - _SPECIAL_TOKENS - count_tokens(f"\n{QUESTIONS}\n")
    asked = _facts(kinds, max(int(_SHARE * room), min(_FEW, int(_MOST * room))), count_tokens, rng)
    room -= sum(_cost(question, count_tokens) for question in asked)
    body: list[str] = []
    start = rng.randrange(len(hay))
    quotes = 0 if "continue" not in kinds else max(1, round(_SAMPLED * room / _mean(sizes) / _CHUNK_UNITS))
    room -= quotes * count_tokens(_go_on("word " * _QUOTED, "word " * _CONTINUED).line + "\n") * 3 // 2
    while (size := sizes[(start + len(body)) % len(hay)]) <= room:
        body.append(hay[(start + len(body)) % len(hay)])
        room -= size
    asked += _continued(body, quotes, rng)
    rng.shuffle(asked)
    text = "\n".join(scatter(body, [question.needles for question in asked], rng)) + f"\n\n{QUESTIONS}\n"
    return Document(
        text=text + "\n".join(question.line for question in asked), prompt_chars=len(text), id=f"long:{seed}:{number}"
    )


def _mean(sizes: Sequence[int]) -> float:
    return sum(sizes) / len(sizes)


def _cost(question: Question, count_tokens: Callable[[str], int]) -> int:
    return sum(count_tokens(line + "\n") for line in (question.line, *question.needles))


def _facts(kinds: Sequence[str], budget: int, count_tokens: Callable[[str], int], rng: Random) -> list[Question]:
    """Questions about facts of all kinds in turn, as many as the budget of tokens allows and nouns are there for."""
    things = Things(rng, TRAINING_KEYS)
    asked: list[Question] = []
    order = [kind for kind in kinds if kind != "continue"]
    rng.shuffle(order)
    while order and things.enough:
        kind = order[len(asked) % len(order)]
        question = _counted(things, rng) if kind == "count" else make_question(kind, things, rng)
        budget -= _cost(question, count_tokens)
        if budget < 0 and asked:
            break
        asked.append(question)
    return asked


def _counted(things: Things, rng: Random) -> Question:
    key, number = things.key(), rng.randint(1, 3)
    return Question(
        kind="count",
        prompt=f"Count {key}: ",
        ending=str(number),
        answers=(str(number),),
        needles=tuple(fact(key, things.value()) for _ in range(number)),
    )


def _go_on(quoted: str, continued: str) -> Question:
    return Question(kind="continue", prompt=f"Go on: {quoted}", ending=f" {continued}", answers=(continued,), needles=())


def _continued(body: Sequence[str], wanted: int, rng: Random) -> list[Question]:
    """Questions how lines of the body go on after words that stand there once."""
    lines = [line for unit in body for line in unit.split("\n")]
    text = "\n".join(body)
    asked: list[Question] = []
    for line in rng.sample(lines, len(lines)):
        words = re.findall(r"\S+", line)
        if len(asked) == wanted:
            break
        if len(words) < _QUOTED + _CONTINUED:
            continue
        at = rng.randrange(len(words) - _QUOTED - _CONTINUED + 1)
        quoted = " ".join(words[at : at + _QUOTED])
        continued = " ".join(words[at + _QUOTED : at + _QUOTED + _CONTINUED])
        if text.count(quoted) == 1 and f"{quoted} {continued}" in text:
            asked.append(_go_on(quoted, continued))
    return asked
