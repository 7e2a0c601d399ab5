"""Needles in prose: facts that stand somewhere in a long prompt and are asked for at its end."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from tandem.evaluation.score import Answered, Records
from tandem.evaluation.subject import Subject
from tandem.spec.errors import SpecError
from tandem.train.evaluate import samples
from tandem.train.needles import KINDS, is_right, needle_suite

_ANSWER_TOKENS = 24
_LONGEST = 4096
"""Of prompts whose length nobody has named."""
_SHORTEST = 160


def needles(subject: Subject) -> Records:
    """Every kind of needle at every length, asked as a base model is: the model goes on with the text, greedily.

    The settings' problems of a length are shared by the kinds. Raises SpecError for a length that does not hold the facts.
    """
    settings = subject.settings
    longest = subject.decoder.spec.max_context - _ANSWER_TOKENS
    found: Records = {}
    for length in settings.lengths or default_lengths(longest):
        cases = needle_suite(subject.tokenizer, None, (length,), -(-settings.problems // len(KINDS)), settings.seed)
        answers = []
        for begin in range(0, len(cases), settings.batch):
            some = [case.prompt for case in cases[begin : begin + settings.batch]]
            answers += samples(subject.decoder, subject.tokenizer, some, max_tokens=_ANSWER_TOKENS, batch=8)
            subject.tell(f"needles, {length:,} tokens", len(answers), len(cases))
        found["needles", f"{length} tokens"] = [
            Answered(
                problem=f"{case.kind}:{length}:{i}:{hashlib.sha256(case.prompt.encode()).hexdigest()[:12]}",
                task=case.kind,
                question=case.prompt,
                expected=", ".join(case.answers),
                text=text,
                worth=float(is_right(case, text)),
            )
            for i, (case, text) in enumerate(zip(cases, answers, strict=True))
        ]
    return found


def check_lengths(lengths: Sequence[int], name: str, context: int) -> None:
    """Raise SpecError for a prompt that is longer than a model's context of so many tokens leaves room for."""
    for length in lengths:
        if length > context - _ANSWER_TOKENS:
            raise SpecError(f"lengths={length}: {name} has room for {context - _ANSWER_TOKENS:,} tokens; give shorter ones")


def default_lengths(longest: int) -> tuple[int, ...]:
    """A quarter, a half and all of a context of `longest` tokens, at most 4,096; without those that hold little but facts."""
    end = min(longest, _LONGEST)
    return tuple(length for length in (end // 4, end // 2, end) if length >= _SHORTEST) or (end,)
