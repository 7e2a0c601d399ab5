"""Duplicates: exact ones by a digest of their words, near ones by MinHash; the first stays."""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem.spec.errors import SpecError
from tandem.train.data.words import ngrams, plain_words

_PERMUTATIONS = 128
_NGRAM = 5


class ExactDuplicates:
    """Knows texts by the SHA-256 of what they say, whatever their case, blanks and compatibility characters."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def seen(self, text: str) -> bool:
        """Whether this text, or one that differs only in those, was asked about before; it is known from now on."""
        plain = " ".join(unicodedata.normalize("NFKC", text).lower().split())
        digest = hashlib.sha256(plain.encode()).digest()
        known = digest in self._seen
        self._seen.add(digest)
        return known


class NearDuplicates:
    """Knows texts by their word 5-grams.

    Candidates come from a MinHash index (datasketch, tuned so that few are missed) and are then compared exactly, so nothing
    below the threshold is called a duplicate.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise SpecError(f"data.clean.near_duplicates={threshold}: must be above 0 and at most 1, or null for none")
        try:
            import datasketch
        except ImportError:
            raise SpecError("data.clean.near_duplicates: needs datasketch; pip install 'tandem-lm[train]', or null") from None
        self._threshold = threshold
        self._new: Any = datasketch.MinHash
        self._index: Any = datasketch.MinHashLSH(threshold=0.9 * threshold, num_perm=_PERMUTATIONS, weights=(0.1, 0.9))
        self._kept: list[NDArray[np.uint64]] = []

    def seen(self, text: str) -> bool:
        """Whether a text that is kept has a Jaccard similarity at or above the threshold; if not, this one is kept."""
        grams = [hashlib.blake2b(gram.encode(), digest_size=8).digest() for gram in ngrams(plain_words(text), _NGRAM)]
        if not grams:
            return False
        own = np.sort(np.frombuffer(b"".join(grams), dtype="<u8")).astype(np.uint64)
        sketch = self._new(num_perm=_PERMUTATIONS, seed=1)
        sketch.update_batch(own.tobytes()[i : i + 8] for i in range(0, own.nbytes, 8))
        if any(jaccard(own, self._kept[i]) >= self._threshold for i in sorted(self._index.query(sketch))):
            return True
        self._index.insert(len(self._kept), sketch)
        self._kept.append(own)
        return False


def jaccard(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    """Share of two sets of numbers, each sorted and without repeats, that both hold."""
    both = np.intersect1d(a, b, assume_unique=True).size
    return float(both / (a.size + b.size - both))
