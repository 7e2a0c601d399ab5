"""Words as duplicates and evaluation sets are compared by: without case, punctuation and the ways to write one letter."""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"\w+")


def plain_words(text: str) -> list[str]:
    """Words of a text in NFKC and lower case."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def ngrams(words: list[str], n: int) -> set[str]:
    """All runs of `n` words, each once; the whole text where it is shorter, nothing where it has no words."""
    if len(words) <= n:
        return {" ".join(words)} if words else set()
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}
