"""How good a text looks, from rules that need no model.

The rules are those of Gopher (Rae and others 2021, appendix A.1.1) and C4 (Raffel and others 2020, section 2.2), with their
thresholds where they give one; the score is the share of rules that hold. English function words are counted, so text of
another language loses that rule.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Literal

Bucket = Literal["low", "medium", "high"]
BUCKETS: tuple[Bucket, ...] = ("low", "medium", "high")

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with", "a", "in", "is", "it", "for", "you", "how"))
_ENDS = tuple(".!?\"'”’:;)")
_BOILERPLATE = ("lorem ipsum", "javascript", "cookie policy", "terms of use", "{")


def quality_score(text: str) -> float:
    """Share of ten rules that a text keeps, 0 to 1: 1 is ordinary prose, an empty text has 0."""
    words = [word.lower() for word in _WORD.findall(text)]
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not words or not lines:
        return 0.0
    letters = sum(map(len, words))
    kept = (
        3 <= letters / len(words) <= 10,
        _share(text, "#…•") < 0.1 and text.count("#") / len(words) < 0.1,
        sum(line.endswith(("…", "...")) for line in lines) / len(lines) < 0.3,
        sum(line.startswith(("•", "-", "*")) for line in lines) / len(lines) < 0.9,
        sum(any(c.isalpha() for c in word) for word in words) / len(words) >= 0.8,
        len(_STOP_WORDS.intersection(words)) >= 2,
        sum(map(len, lines)) - sum(map(len, set(lines))) <= 0.2 * sum(map(len, lines)),
        _repeated(words, 2) <= 0.2 and _repeated(words, 3) <= 0.18,
        lines[-1].endswith(_ENDS) or any(line.endswith(_ENDS) for line in lines),
        not any(mark in text.lower() for mark in _BOILERPLATE),
    )
    return sum(kept) / len(kept)


def quality_bucket(score: float) -> Bucket:
    """Its name: low below 0.7, high from 0.9."""
    return "low" if score < 0.7 else "medium" if score < 0.9 else "high"


def _share(text: str, characters: str) -> float:
    return sum(map(text.count, characters)) / len(text)


def _repeated(words: list[str], n: int) -> float:
    """Share of a text's words that its most frequent n-gram covers, where that occurs more than once."""
    if len(words) < n:
        return 0.0
    top = max(Counter(zip(*(words[i:] for i in range(n)), strict=False)).values())
    return top * n / len(words) if top > 1 and len(words) >= 10 * n else 0.0
