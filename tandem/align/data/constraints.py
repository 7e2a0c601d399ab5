"""Constraints on the form of an answer that a program can verify, in the manner of IFEval (Zhou et al. 2023).

A constraint says in a sentence what it wants, puts an answer into that form (`apply`), sees whether a text has it (`holds`),
and takes it off again (`peel`), so that the answer itself can be verified: the form alone is worth nothing. Words and phrases
are compared without regard to case, as IFEval does. Several constraints are applied in the order of `KINDS`, from the inside
out, and taken off in the opposite one; which of them stand together, `compatible` says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import Any

from tandem.spec.errors import SpecError
from tandem.spec.units import require_int

_LEADS = {2: "Answer:", 3: "It is", 4: "The answer is", 5: "So the answer is", 6: "I think the answer is"}
_LEAD_WORDS = frozenset(("answer:", "it", "is", "the", "answer", "so", "i", "think"))
_MARKS = {"!": "an exclamation mark", "?": "a question mark", ".": "a full stop"}
_LONGEST_QUESTION = 120
_TRIES = 20
_AMOUNTS = (1, 1, 1, 1, 2, 2, 2, 3)
"""How many constraints an answer gets, one as likely as more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraint:
    """One demand on the form of an answer."""

    kind: str
    """One of `KINDS`."""
    value: str = ""
    """The word, phrase, mark or key; of kind question the question."""
    count: int = 0
    """How many words, times or points."""

    def __post_init__(self) -> None:
        form = _FORMS.get(self.kind)
        if form is None:
            raise SpecError(f"constraint={self.kind!r}: not known; {', '.join(_FORMS)} are")
        if form.values and self.value not in form.values:
            raise SpecError(f"{self.kind}.value={self.value!r}: must be one of {', '.join(form.values)}")
        if form.counts:
            require_int(f"{self.kind}.count", self.count, low=form.counts[0], high=form.counts[-1])

    def describe(self, variant: int = 0) -> str:
        """The demand in a sentence; each kind has two ways to say it, which even and odd variants choose."""
        sentences = _FORMS[self.kind].sentences
        return sentences[variant % len(sentences)].format(value=_MARKS.get(self.value, self.value), count=self.count)

    def apply(self, answer: str) -> str:
        """The answer in this form."""
        return _FORMS[self.kind].apply(answer, self.value, self.count)

    def holds(self, text: str) -> bool:
        """Whether a whole text has this form; an empty one has none."""
        return bool(text.strip()) and _FORMS[self.kind].holds(text.strip(), self.value, self.count)

    def peel(self, text: str) -> str:
        """The text without what `apply` added around the answer; the text itself where it was not added."""
        return _FORMS[self.kind].peel(text.strip(), self.value, self.count).strip()

    def plain(self) -> dict[str, Any]:
        """As data that JSON can hold, for `Constraint(**plain)`."""
        return {"kind": self.kind, "value": self.value, "count": self.count}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Form:
    slot: str
    """Constraints of one slot exclude each other."""
    sentences: tuple[str, ...]
    apply: Callable[[str, str, int], str]
    holds: Callable[[str, str, int], bool]
    peel: Callable[[str, str, int], str] = lambda text, value, count: text
    values: tuple[str, ...] = ()
    counts: range | None = None
    rewrites: bool = False
    """Whether it changes the answer itself, so that nothing can be taken off."""


def _bare(text: str) -> str:
    return text.strip('"').strip()


def _items(answer: str) -> list[str]:
    return re.findall(r"'([^']*)'", answer) if answer.startswith("[") else answer.split(", ")


def _numbered(answer: str, value: str, count: int) -> str:
    return "\n".join(f"{i}. {item}" for i, item in enumerate(_items(answer), 1))


def _is_numbered(text: str, value: str, count: int) -> bool:
    points = re.findall(r"^(\d+)\. \S", text, re.MULTILINE | re.ASCII)
    return points == [str(i) for i in range(1, count + 1)]


def _inside(text: str, before: str, after: str) -> str:
    found = re.fullmatch(rf"{re.escape(before)}(.+){re.escape(after)}", text, re.DOTALL)
    return found[1] if found else text


def _in_brackets(text: str, value: str, count: int) -> bool:
    return text.count("[") == text.count("]") == 1 and bool(re.search(r"\[[^\[\]]+\]", text))


def _without(pattern: str, text: str) -> str:
    return re.sub(pattern, "", text, count=1, flags=re.IGNORECASE)


def _keyword_peeled(text: str, value: str, count: int) -> str:
    """Words before or behind the answer go, words in its midst stay."""
    return _without(rf"(?:\s+{value})+$", _without(rf"^(?:{value}\s+)+", text))


def _begins(text: str, start: str) -> bool:
    return _bare(text).casefold().startswith(start.casefold())


def _words_peeled(text: str, value: str, count: int) -> str:
    *lead, last = text.split() or [""]
    return last if all(word.casefold() in _LEAD_WORDS for word in lead) else text


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found = list(pairs)
    if len(dict(found)) != len(found):
        raise ValueError("a key stands twice")
    return dict(found)


def _json_value(text: str, key: str) -> str | None:
    try:
        read = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return None
    if not isinstance(read, dict) or list(read) != [key]:
        return None
    value = read[key]
    return value if isinstance(value, str) else str(value) if type(value) in (int, float) else None


def _repeated(text: str, value: str, count: int) -> bool:
    lines = text.split("\n")
    return len(lines) == count and len(set(lines)) == 1


_FORMS: Mapping[str, _Form] = {
    "no-commas": _Form(
        slot="shape",
        sentences=("Use no commas.", "Do not write commas."),
        apply=lambda t, v, n: t.replace(",", ""),
        holds=lambda t, v, n: "," not in t,
        rewrites=True,
    ),
    "numbered": _Form(
        slot="shape",
        sentences=("Write a numbered list of {count} points.", "Number the {count} points, one a line."),
        apply=_numbered,
        holds=_is_numbered,
        counts=range(2, 13),
        rewrites=True,
    ),
    "bullets": _Form(
        slot="shape",
        sentences=("Write a list of {count} lines that begin with -.", "Put - before each of the {count} points, one a line."),
        apply=lambda t, v, n: "\n".join(f"- {item}" for item in _items(t)),
        holds=lambda t, v, n: len(re.findall(r"^- \S", t, re.MULTILINE)) == n,
        counts=range(2, 13),
        rewrites=True,
    ),
    "words": _Form(
        slot="size",
        sentences=("Answer in exactly {count} words.", "Use {count} words, no more and no fewer."),
        apply=lambda t, v, n: f"{_LEADS[n]} {t}",
        holds=lambda t, v, n: len(t.split()) == n,
        peel=_words_peeled,
        counts=range(2, 7),
    ),
    "repeat": _Form(
        slot="size",
        sentences=("Write the answer {count} times, one a line.", "Give {count} lines, each with the answer."),
        apply=lambda t, v, n: "\n".join([t] * n),
        holds=_repeated,
        peel=lambda t, v, n: t.split("\n")[0] if _repeated(t, v, n) else t,
        counts=range(2, 5),
    ),
    "brackets": _Form(
        slot="wrap",
        sentences=("Put the answer in square brackets.", "Write the answer between [ and ]."),
        apply=lambda t, v, n: f"[{t}]",
        holds=_in_brackets,
        peel=lambda t, v, n: _inside(t, "[", "]"),
    ),
    "bold": _Form(
        slot="wrap",
        sentences=("Make the answer bold with **.", "Put ** before and after the answer."),
        apply=lambda t, v, n: f"**{t}**",
        holds=lambda t, v, n: t.count("**") == 2 and bool(re.search(r"\*\*[^*]+\*\*", t)),
        peel=lambda t, v, n: _inside(t, "**", "**"),
    ),
    "keyword": _Form(
        slot="keyword",
        sentences=("Add the word {value} {count} times.", "Say {value} exactly {count} times."),
        apply=lambda t, v, n: t + f" {v}" * n,
        holds=lambda t, v, n: len(re.findall(rf"\b{v}\b", t, re.IGNORECASE)) == n,
        peel=_keyword_peeled,
        values=("blue", "green", "river", "music", "winter", "lemon"),
        counts=range(1, 4),
    ),
    "begin": _Form(
        slot="first",
        sentences=("Begin with the word {value}.", "Let your first word be {value}."),
        apply=lambda t, v, n: f"{v}: {t}",
        holds=lambda t, v, n: bool(re.match(rf"{v}\b", _bare(t), re.IGNORECASE)),
        peel=lambda t, v, n: _without(rf"^{v}[:,.!]?\s+", t),
        values=("Sure", "Well", "Hello", "Indeed", "Result"),
    ),
    "title": _Form(
        slot="first",
        sentences=("Put the title <<{value}>> on a line above.", "Write <<{value}>> in the first line."),
        apply=lambda t, v, n: f"<<{v}>>\n{t}",
        holds=lambda t, v, n: _bare(t).split("\n")[0].strip().casefold() == f"<<{v}>>".casefold(),
        peel=lambda t, v, n: _without(rf"^<<{v}>>[ \t]*\n", t),
        values=("Answer", "Result", "Solution"),
    ),
    "question": _Form(
        slot="first",
        sentences=("Repeat the question first.", "First write the question again."),
        apply=lambda t, v, n: f"{v}\n{t}",
        holds=lambda t, v, n: _begins(t, v),
        peel=lambda t, v, n: t[len(v) :] if t[: len(v)].casefold() == v.casefold() and t[len(v) :][:1].isspace() else t,
    ),
    "end": _Form(
        slot="last",
        sentences=('End with "{value}"', 'Let "{value}" be the end.'),
        apply=lambda t, v, n: f"{t} {v}",
        holds=lambda t, v, n: _bare(t).casefold().endswith(v.casefold()),
        peel=lambda t, v, n: _without(rf"\s+{re.escape(v)}$", t),
        values=("Done.", "That is all.", "Is that clear?", "Good luck!"),
    ),
    "mark": _Form(
        slot="last",
        sentences=("End with {value}.", "Let {value} be the end."),
        apply=lambda t, v, n: f"{t}{v}",
        holds=lambda t, v, n: _bare(t).endswith(v),
        peel=lambda t, v, n: t.removesuffix(v),
        values=tuple(_MARKS),
    ),
    "separator": _Form(
        slot="last",
        sentences=("Put a line {value} below.", "Close with a line {value}."),
        apply=lambda t, v, n: f"{t}\n{v}",
        holds=lambda t, v, n: len(re.findall(rf"^{v}$", _bare(t), re.MULTILINE)) == 1 and _bare(t).endswith(v),
        peel=lambda t, v, n: _without(rf"\n{v}$", t),
        values=("---", "===", "~~~"),
    ),
    "quotes": _Form(
        slot="whole",
        sentences=("Put all of it in double quotes.", 'Begin and end with ".'),
        apply=lambda t, v, n: f'"{t}"',
        holds=lambda t, v, n: bool(re.fullmatch(r'"[^"]+"', t)),
        peel=lambda t, v, n: _inside(t, '"', '"'),
    ),
    "json": _Form(
        slot="whole",
        sentences=("Reply with a JSON object whose key is {value}.", "Write JSON with the key {value}."),
        apply=lambda t, v, n: json.dumps({v: t}, ensure_ascii=False),
        holds=lambda t, v, n: _json_value(t, v) is not None,
        peel=lambda t, v, n: t if (value := _json_value(t, v)) is None else value,
        values=("answer", "result", "value"),
    ),
    "upper": _Form(
        slot="case",
        sentences=("Use capital letters only.", "Write no small letters."),
        apply=lambda t, v, n: t.upper(),
        holds=lambda t, v, n: t == t.upper(),
        rewrites=True,
    ),
    "lower": _Form(
        slot="case",
        sentences=("Use small letters only.", "Write no capital letters."),
        apply=lambda t, v, n: t.lower(),
        holds=lambda t, v, n: t == t.lower(),
        rewrites=True,
    ),
}
KINDS: tuple[str, ...] = tuple(_FORMS)
"""Kinds of constraints, in the order in which they are applied."""
_LISTS = ("numbered", "bullets")
_ON_ONE_LINE = ("words", "repeat", "brackets", "bold", "keyword", "begin", "end", "mark", "quotes")
_APART: frozenset[frozenset[str]] = frozenset(
    frozenset(pair)
    for pair in (
        *(("json", other) for other in KINDS if other != "json"),
        *((kind, other) for kind in _LISTS for other in _ON_ONE_LINE),
        *(("repeat", other) for other in KINDS if other not in ("repeat", "upper", "lower", "no-commas")),
        *(("words", other) for other in KINDS if other not in ("words", "upper", "lower", "mark", "quotes")),
        ("question", "no-commas"),
    )
)


def compatible(first: str, second: str) -> bool:
    """Whether constraints of two kinds can be had in one text. The same for both orders; False for the same slot."""
    return _FORMS[first].slot != _FORMS[second].slot and frozenset((first, second)) not in _APART


def in_order(constraints: Iterable[Constraint]) -> tuple[Constraint, ...]:
    """From the inside out."""
    return tuple(sorted(constraints, key=lambda constraint: KINDS.index(constraint.kind)))


def stages(constraints: Sequence[Constraint], answer: str) -> list[str]:
    """The answer, and what each constraint in turn makes of it; the last one has every form."""
    texts = [answer]
    for constraint in in_order(constraints):
        texts.append(constraint.apply(texts[-1]))
    return texts


def peeled(constraints: Sequence[Constraint], text: str) -> str:
    """What is left of a text once all forms that can be taken off are gone."""
    for constraint in reversed(in_order(constraints)):
        text = constraint.peel(text)
    return text.strip()


def rewritten(constraints: Sequence[Constraint], answer: str) -> set[str]:
    """The answer in every way that the constraints which change it allow, alone or together: as it is, too."""
    changing = [constraint for constraint in in_order(constraints) if _FORMS[constraint.kind].rewrites]
    chosen = (some for n in range(len(changing) + 1) for some in combinations(changing, n))
    return {stages(some, answer)[-1] for some in chosen}


def fits(constraints: Sequence[Constraint], answer: str) -> bool:
    """Whether an answer can have all forms at once, none of them for nothing, and can be read out of them again."""
    text = stages(constraints, answer)[-1]
    if not all(constraint.holds(text) for constraint in constraints) or peeled(constraints, text) not in rewritten(
        constraints, answer
    ):
        return False
    others = ([c for c in constraints if c is not constraint] for constraint in constraints)
    return not any(c.holds(stages(rest, answer)[-1]) for c, rest in zip(constraints, others, strict=True))


def draw_constraints(rng: Random, question: str, answer: str, *, most: int = 3) -> tuple[Constraint, ...]:
    """Up to `most` constraints that fit an answer, in the order in which a user may name them."""
    for _ in range(_TRIES):
        found: list[Constraint] = []
        wanted = min(most, rng.choice(_AMOUNTS))
        for kind in rng.sample(KINDS, len(KINDS)):
            if all(compatible(kind, other.kind) for other in found) and _possible(kind, question, answer):
                found.append(_draw(kind, rng, question, answer))
                if len(found) == wanted:
                    break
        if found and fits(found, answer):
            return tuple(found)
    return (Constraint(kind="begin", value=rng.choice(_FORMS["begin"].values)),)


def _possible(kind: str, question: str, answer: str) -> bool:
    """What `fits` would find out later: most draws shall succeed."""
    match kind:
        case "numbered" | "bullets":
            return 2 <= len(_items(answer)) <= 12
        case "words":
            return len(answer.split()) == 1
        case "question":
            return len(question) <= _LONGEST_QUESTION
        case "no-commas":
            return "," in answer
        case "brackets":
            return "[" not in answer
        case _:
            return True


def _draw(kind: str, rng: Random, question: str, answer: str) -> Constraint:
    form = _FORMS[kind]
    value = question if kind == "question" else rng.choice(form.values) if form.values else ""
    count = len(_items(answer)) if kind in _LISTS else rng.choice(form.counts) if form.counts else 0
    return Constraint(kind=kind, value=value, count=count)
