"""Preference pairs out of a model's own answers: to each question, one that a verifier takes and one that it does not.

Answers come from the model that is trained (on-policy), so the pairs teach what it does wrong now. Nothing is learned from a
question whose answers are all right or all wrong, nor from the same answer twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Generic, Literal, TypeVar

from tandem.align.data.episodes import Episode
from tandem.align.data.tools import verify_tools
from tandem.align.sample import Answer, Ask, Pair, Verifier
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int


@dataclass(frozen=True, kw_only=True, slots=True)
class PairCounts:
    """What became of the answers, and why the others are in no pair."""

    asks: int
    answers: int
    paired_asks: int
    """With at least one pair."""
    all_right: int
    """Asks without a wrong answer."""
    all_wrong: int
    """Asks without a right answer."""
    repeated: int
    """Answers that an ask had already."""
    cut: int
    """Wrong answers that only ended at a limit: the end that would be learned from is none of the model's."""
    hidden: int
    """Wrong answers with tokens that their text leaves out: the text that would be learned from may be right."""
    unused: int
    """Answers beyond the pairs that an ask may have, or without a partner."""
    same_deed: int
    """Candidate pairs of episodes that part in thoughts only, so that what went wrong came later."""
    right_turn: int
    """Candidate pairs whose wrong episode parts from the right one by a turn that is exactly right, and fails later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """Pairs, and what was left out."""

    pairs: tuple[Pair, ...]
    counts: PairCounts


def choose_pairs(
    asks: Sequence[Ask], answers: Sequence[Sequence[Answer]], verify: Verifier, *, per_ask: int = 1, seed: int = 0
) -> Chosen:
    """At most `per_ask` pairs to each ask out of its sampled answers; right is worth 1, everything below is wrong.

    No answer is in two pairs. Which are taken depends on the seed and the ask's id alone, not on the order of asks. Raises
    SpecError where there is not one list of answers for each ask.
    """
    if len(asks) != len(answers):
        raise SpecError(f"answers={len(answers)}: lists of answers, of {len(asks)} asks; give one for each")
    groups = [
        (ask, [_Candidate(worth=verify(ask, a), answers=(a,), cut=not a.finished, of=a) for a in sampled])
        for ask, sampled in zip(asks, answers, strict=True)
    ]
    return _choose(groups, lambda ask, right, wrong: Pair(ask=ask, chosen=right.text, rejected=wrong.text), per_ask, seed)


def episode_pairs(
    episodes: Sequence[Sequence[Episode]], verify: Callable[[Episode], float], *, per_ask: int = 1, seed: int = 0
) -> Chosen:
    """Pairs of turns out of several episodes of each ask: of a right one and a wrong one, at the first turn where they differ.

    Up to there both have the same conversation, which becomes the pair's ask. Where they first differ in thoughts only, with
    the same calls and words, there is no pair: that turn was as good as the other. Nor where the wrong episode's turn is the
    expert's, exactly: the right one made a detour there. Raises SpecError where episodes of different asks are in one list.
    """
    for group in episodes:
        if any(episode.ask != group[0].ask for episode in group):
            raise SpecError(f"episodes of {group[0].ask.id!r}: are of several asks; give a list for each")
    groups = [
        (
            group[0].ask,
            [_Candidate(worth=verify(e), answers=e.answers, cut=e.ended == "cut", of=e) for e in group],
        )
        for group in episodes
        if group
    ]
    return _choose(groups, _parting, per_ask, seed)


_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate(Generic[_T]):
    worth: float
    answers: tuple[Answer, ...]
    cut: bool
    of: _T

    @property
    def key(self) -> tuple[tuple[str, bool], ...]:
        return tuple((answer.text, answer.hidden) for answer in self.answers)

    @property
    def hidden(self) -> bool:
        return any(answer.hidden for answer in self.answers)


_Unpaired = Literal["same_deed", "right_turn"]


def _parting(ask: Ask, right: Episode, wrong: Episode) -> Pair | _Unpaired:
    for messages, one, other in zip(right.prompts, right.answers, wrong.answers, strict=False):
        if one.text != other.text:
            if _deed(one) == _deed(other):
                return "same_deed"
            asked = replace(ask, messages=messages)
            if verify_tools(asked, other) == 1:
                return "right_turn"
            return Pair(ask=asked, chosen=one.text, rejected=other.text)
    return "same_deed"


def _deed(answer: Answer) -> tuple[object, ...]:
    """A turn without its thoughts."""
    return answer.calls, answer.content, answer.malformed, answer.closing_marks


def _choose(
    groups: Sequence[tuple[Ask, Sequence[_Candidate[_T]]]],
    make: Callable[[Ask, _T, _T], Pair | _Unpaired],
    per_ask: int,
    seed: int,
) -> Chosen:
    require_int("per_ask", per_ask)
    pairs: list[Pair] = []
    counts: Counter[str] = Counter(asks=len(groups), answers=sum(len(sampled) for _, sampled in groups))
    for ask, sampled in groups:
        distinct = list({candidate.key: candidate for candidate in reversed(sampled)}.values())[::-1]
        counts["repeated"] += len(sampled) - len(distinct)
        right = [c.of for c in distinct if c.worth >= 1]
        wrong = [c.of for c in distinct if c.worth < 1 and not c.cut and not c.hidden]
        counts["cut"] += sum(c.worth < 1 and c.cut for c in distinct)
        counts["hidden"] += sum(c.worth < 1 and not c.cut and c.hidden for c in distinct)
        counts["all_right"] += not any(c.worth < 1 for c in distinct)
        counts["all_wrong"] += bool(distinct) and not right
        rng = Random(f"{seed}:{ask.id}")
        rng.shuffle(right)
        rng.shuffle(wrong)
        found: list[Pair] = []
        for chosen in right:
            if len(found) == per_ask:
                break
            for i, rejected in enumerate(wrong):
                pair = make(ask, chosen, rejected)
                if isinstance(pair, str):
                    counts[pair] += 1
                elif pair not in found:
                    found.append(pair)
                    del wrong[i]
                    break
        counts["paired_asks"] += bool(found)
        counts["unused"] += len(distinct) - 2 * len(found)
        pairs += found
    counts["unused"] -= counts["cut"] + counts["hidden"]
    return Chosen(pairs=tuple(pairs), counts=PairCounts(**{f.name: counts[f.name] for f in fields(PairCounts)}))
