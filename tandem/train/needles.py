"""Facts whose answers are known, scattered in prose and asked for at its end: needles in a haystack, after RULER.

RULER (Hsieh et al. 2024) asks for values of single keys, of keys among others, for several values, for several keys and for
variables that are set to each other. So do these, in sentences that a model of a few million parameters can learn:
`Remember ship=47.`, whose key is a common noun and whose value, a number of two digits, stands within four tokens of it, the
width of a Mamba-2 convolution. As in RULER, a prompt ends with the beginning of the answer. `tandem.train.long` makes
training documents of the same sentences about other nouns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from textwrap import wrap
from typing import Literal

from tandem.model.hybrid import Decoder
from tandem.model.tokenizer import Tokenizer
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int
from tandem.train.data.procedural import EVALUATION_SEED
from tandem.train.evaluate import Accuracy, prompt_ids, samples

Kind = Literal["single", "multi-key", "multi-value", "multi-query", "chain"]
KINDS: tuple[Kind, ...] = ("single", "multi-key", "multi-value", "multi-query", "chain")
"""What is asked: one value where no other stands, one among many, all values of a thing, those of two things, and that of a
thing which is like another (RULER's variable tracking, asked from its far end)."""

_WORDS = (
    "age air ant apple army art bag ball bar bear bed bee beetle bell bird boat body book box boy bread bridge brother"
    " budget bus butter butterfly cake candy cap car card cat chair chicken child church city class clock cloud coat cock"
    " cook cost country course cow crab cricket crown cup daughter day death deer desk dinner doctor dog door dream dress"
    " duck ear earth egg elephant eye face family farm father field fire fish flag floor flower food foot forest friend"
    " future game garden gate giraffe girl goat gold grass grasshopper ground group hand hat head health heart hill history"
    " home hope horse hour house island job judge key king kitchen lab lady lake lamp land law leaf letter level life light"
    " line lion lobster lord love map mark market mind mirror money month moon mother mountain mouse name nation night nose"
    " ocean orange order page paper park part party peace pen person pizza place plan plant plate point policy pound power"
    " price prince problem program queen question rabbit rain rest ring river road roof room rose salt school scorpion sea"
    " season second sheep ship shirt shoe shop shrimp sister slug snake snow soldier son song soul spider spirit spoon star"
    " starfish state store storm street student sugar sun sword table tax team tiger time tower town trade train tree trip"
    " truck village voice wall war wasp watch water week wheel wind window winter wolf wood word work world year"
)
_NOUNS = _WORDS.split()
EVALUATION_KEYS = tuple(_NOUNS[3::4])
TRAINING_KEYS = tuple(noun for noun in _NOUNS if noun not in EVALUATION_KEYS)
"""No thing that is asked for in training is asked for in an evaluation, nor the other way round."""
_LEAST_VALUE, _VALUES = 10, 90
_DISTRACTORS = 5
_FILLER = (
    "The rain has stopped. The road is dry again.\nNobody is at home. The door stays shut.\n"
    "A cart goes by. Its wheels are old.\nThe light is low. It is late in the year.\n"
)
_UNIT_CHARS = 160
_LONGEST_UNIT = 400
_PIECE = re.compile(r"\S[^\n]*?(?:[.!?;:](?=\s)|(?=\n)|$)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question in words with what is right, and the sentences from which it follows."""

    kind: str
    prompt: str
    """Ends with the beginning of the answer."""
    ending: str
    """What a perfect reader writes after the prompt."""
    answers: tuple[str, ...]
    """Words or numbers that an answer has to contain."""
    needles: tuple[str, ...] = ()
    """Sentences for the text, in the order in which they have to stand there."""

    @property
    def line(self) -> str:
        """Question and answer."""
        return self.prompt + self.ending


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A prompt that holds the facts and asks for some of them."""

    prompt: str
    answers: tuple[str, ...]
    kind: str
    length: int
    """Tokens that the prompt may have; it falls short of them by less than a sentence or two."""
    depth: float
    """Where the first needle stands: 0 at the beginning of the text, 1 at its end."""


class Things:
    """Nouns and values as they are drawn for one text: none comes twice."""

    def __init__(self, rng: Random, keys: Sequence[str]) -> None:
        self._keys = rng.sample(list(keys), len(keys))
        self._values = [str(value) for value in rng.sample(range(_LEAST_VALUE, _LEAST_VALUE + _VALUES), _VALUES)]

    @property
    def enough(self) -> bool:
        """Whether a question of any kind can still be made."""
        return len(self._keys) >= 2 and len(self._values) >= 3

    def key(self) -> str:
        """A noun that has not been drawn. Raises SpecError where none is left."""
        if not self._keys:
            raise SpecError("questions: more things than there are nouns; ask fewer questions of one text")
        return self._keys.pop()

    def value(self) -> str:
        """A number of two digits, likewise."""
        if not self._values:
            raise SpecError(f"questions: more than {_VALUES} values; ask fewer questions of one text")
        return self._values.pop()


def make_question(kind: str, things: Things, rng: Random) -> Question:
    """A question of a kind about things that have not been used. Raises SpecError for a kind that is not known."""
    makers = {"single": _one, "multi-key": _one, "multi-value": _values, "multi-query": _query, "chain": _chain}
    if kind not in makers:
        raise SpecError(f"kind={kind!r}: no such question; {', '.join(KINDS)} are there")
    maker: Callable[[str, Things, Random], Question] = makers[kind]
    return maker(kind, things, rng)


def fact(key: str, value: str) -> str:
    """The sentence that gives a thing a value."""
    return f"Remember {key}={value}."


def _one(kind: str, things: Things, rng: Random) -> Question:
    key, value = things.key(), things.value()
    prompt = f"Recall {key}: {key}="
    return Question(kind=kind, prompt=prompt, ending=value, answers=(value,), needles=(fact(key, value),))


def _values(kind: str, things: Things, rng: Random) -> Question:
    key, values = things.key(), tuple(things.value() for _ in range(rng.randint(2, 3)))
    needles = tuple(fact(key, value) for value in values)
    return Question(kind=kind, prompt=f"Recall all of {key}: {key}=", ending=",".join(values), answers=values, needles=needles)


def _query(kind: str, things: Things, rng: Random) -> Question:
    (first, a), (second, b) = ((things.key(), things.value()) for _ in range(2))
    return Question(
        kind=kind,
        prompt=f"Recall {first}, {second}: {first}=",
        ending=f"{a}, {second}={b}",
        answers=(a, b),
        needles=(fact(first, a), fact(second, b)),
    )


def _chain(kind: str, things: Things, rng: Random) -> Question:
    first, second, value = things.key(), things.key(), things.value()
    return Question(
        kind=kind,
        prompt=f"Recall {second}: {second} like",
        ending=f" {first}={value}",
        answers=(value,),
        needles=(fact(first, value), f"Remember {second} like {first}."),
    )


def units(text: str) -> list[str]:
    """Prose as sentences or lines, short ones joined to 160 characters and long ones cut at 400: needles stand between them."""
    joined: list[str] = []
    for found in _PIECE.finditer(text):
        gap = "\n" if "\n" in text[max(0, found.start() - 2) : found.start()] else " "
        for part in wrap(found.group(), _LONGEST_UNIT, break_on_hyphens=False):
            piece = part.strip()
            if joined and len(joined[-1]) + len(piece) < _UNIT_CHARS:
                joined[-1] += gap + piece
            elif piece:
                joined.append(piece)
    return joined


def scatter(body: Sequence[str], needles: Sequence[Sequence[str]], rng: Random) -> list[str]:
    """The units of a text with sentences put between them at random, each group of sentences in its order."""
    placed: list[tuple[float, int, str]] = []
    for group in needles:
        places = sorted(rng.random() for _ in group)
        placed += [(place, len(placed) + i, needle) for i, (place, needle) in enumerate(zip(places, group, strict=True))]
    return insert(body, [(place, needle) for place, _, needle in sorted(placed)])


def insert(body: Sequence[str], placed: Sequence[tuple[float, str]]) -> list[str]:
    """The units of a text with sentences put between them at the depths given, 0 before the first and 1 after the last."""
    lines: list[str] = []
    waiting = list(placed)
    for i in range(len(body) + 1):
        while waiting and waiting[0][0] * len(body) < i + 0.5:
            lines.append(waiting.pop(0)[1])
        if i < len(body):
            lines.append(body[i])
    return lines


def needle_suite(
    tokenizer: Tokenizer,
    text: str | None,
    lengths: Sequence[int],
    count: int,
    seed: int,
    kinds: Sequence[str] = KINDS,
) -> list[Case]:
    """`count` cases of each kind at each length (tokens of the prompt), their depths evenly spread from beginning to end.

    `text` is prose that the model has not learned from, begun at a random place and repeated where it is too short; None:
    a few plain sentences over and over, as in RULER's simplest haystack. The same arguments make the same cases. Raises
    SpecError for a length that does not hold the facts and the question.
    """
    require_int("count", count)
    hay = units(text or _FILLER)
    sizes = [_tokens(tokenizer, unit + "\n") for unit in hay]
    cases = []
    for kind in kinds:
        for length in lengths:
            for i in range(count):
                rng = Random(f"needles {seed} {kind} {length} {i}")
                cases.append(_case(tokenizer, hay, sizes, kind, length, (i + 0.5) / count, rng))
    return cases


def _case(tokenizer: Tokenizer, hay: list[str], sizes: list[int], kind: str, length: int, depth: float, rng: Random) -> Case:
    things = Things(rng, EVALUATION_KEYS)
    question = make_question(kind, things, rng)
    distractors = 0 if kind == "single" else _DISTRACTORS
    others = [needle for _ in range(distractors) for needle in _one("multi-key", things, rng).needles]
    fixed = "\n".join([*question.needles, *others, "", question.prompt])
    room = length - len(prompt_ids(tokenizer, fixed))
    start = rng.randrange(len(hay))
    body: list[str] = []
    while (size := sizes[(start + len(body)) % len(hay)]) <= room:
        body.append(hay[(start + len(body)) % len(hay)])
        room -= size
    if not body:
        raise SpecError(f"lengths={length}: holds the facts and the question but no text; ask for a longer one")
    later = sorted(rng.uniform(depth, 1.0) for _ in question.needles[1:])
    placed = [*zip([depth, *later], question.needles, strict=True), *((rng.random(), other) for other in others)]
    lines = insert(body, sorted(placed, key=lambda pair: pair[0]))
    prompt = "\n".join([*lines, "", question.prompt])
    return Case(prompt=prompt, answers=question.answers, kind=kind, length=length, depth=depth)


def _tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


def is_right(case: Case, continuation: str) -> bool:
    """Whether every answer stands in the first line of a continuation, as a whole word: `47` is not in `147`."""
    line = continuation.strip().partition("\n")[0]
    return all(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", line) for answer in case.answers)


def answer_cases(
    model: Decoder, tokenizer: Tokenizer, cases: Sequence[Case], *, batch: int = 8, max_tokens: int = 24
) -> list[bool]:
    """Which cases the model answers rightly in a short greedy continuation.

    Chance is to name some value of the text: 1 in 6 of `multi-key` and `chain`, far less where two are asked for. A `single`
    has one value only, so it shows that a needle is found at all.
    """
    texts = samples(model, tokenizer, [case.prompt for case in cases], max_tokens=max_tokens, batch=batch)
    return [is_right(case, text) for case, text in zip(cases, texts, strict=True)]


def needle_shares(
    model: Decoder, tokenizer: Tokenizer, lengths: Sequence[int], cases: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Facts found in prose of our own, by kind and length: `accuracy` with its interval `low` to `high`, and `count`."""
    asked = needle_suite(tokenizer, None, lengths, cases, seed=EVALUATION_SEED)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (kind, length), share in accuracy_by(asked, answer_cases(model, tokenizer, asked), "kind", "length").items():
        row = {"accuracy": share.share, "low": share.low, "high": share.high, "count": share.count}
        found.setdefault(str(kind), {})[str(length)] = row
    return found


def accuracy_by(cases: Sequence[Case], right: Sequence[bool], *fields: str) -> dict[tuple[str | int | float, ...], Accuracy]:
    """Accuracy of the cases that agree in the fields named (`kind`, `length`, `depth`), in order of appearance."""
    groups: dict[tuple[str | int | float, ...], list[bool]] = {}
    for case, answer in zip(cases, right, strict=True):
        groups.setdefault(tuple(getattr(case, field) for field in fields), []).append(answer)
    return {group: Accuracy(correct=sum(answers), count=len(answers)) for group, answers in groups.items()}
