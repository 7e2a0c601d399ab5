"""Drawing a token from logits: temperature, top-k, top-p, min-p, and which number decides.

    weight(token) = round(2^35 exp((logit - largest) / temperature))        a whole number
    kept          = the first top_k by weight (ties: lowest id), of them the fewest that hold top_p of their mass,
                    of them those of at least min_p times the largest weight
    drawn         = the token at which the kept weights, added in that order, pass (u / 2^64) of their sum

Weights are whole numbers whose sums stay below 2^53, so float64 adds them without rounding and in any order to the same sum:
what is drawn depends on the row alone and equals what a full sort would give, though almost nothing is sorted. Tokens less
likely than 2^-36 of the likeliest are never drawn; with 2^18 tokens that is at most 4e-6 of the mass.
"""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BITS = 35
_SCALE = float(2**_BITS)
_BINS_PER_NAT = 40.0
_BINS = math.ceil((_BITS + 1) * math.log(2) * _BINS_PER_NAT) + 1

Row = NDArray[np.float32]


def uniform(seed: int, position: int) -> int:
    """The number, from 0 to 2^64 - 1, that decides the token at one output position: a hash of seed and position alone."""
    key = seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    return int.from_bytes(blake2b(key, digest_size=8, person=b"tandem.draw").digest(), "little")


class _Ranking:
    """Weights in descending order (ties: by id), of which only the bin that is asked for is ever sorted."""

    def __init__(self, below: Row, weights: NDArray[np.float64]) -> None:
        self._below, self._weights = below, weights
        self._bins = np.minimum(below * np.float32(-_BINS_PER_NAT), np.float32(_BINS - 1)).astype(np.intp)
        self._masses = np.cumsum(np.bincount(self._bins, weights=weights, minlength=_BINS))
        self.total = int(self._masses[-1])

    def _sorted(self, index: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Tokens of one bin in order, and the mass up to and including each."""
        ids = np.flatnonzero(self._bins == index)
        ids = ids[np.argsort(-self._below[ids], kind="stable")]
        before = self._masses[index - 1] if index else 0.0
        return ids, before + np.cumsum(self._weights[ids])

    def mass_of_first(self, count: int) -> int:
        """What the first `count` tokens weigh."""
        counts = np.cumsum(np.bincount(self._bins, minlength=_BINS))
        index = int(np.searchsorted(counts, count))
        _, masses = self._sorted(index)
        return int(masses[count - 1 - (int(counts[index - 1]) if index else 0)])

    def at(self, mass: int) -> tuple[int, int]:
        """The token whose addition brings the mass above `mass`, and the mass then. Needs mass < total."""
        ids, masses = self._sorted(int(np.searchsorted(self._masses, mass, side="right")))
        index = int(np.searchsorted(masses, mass, side="right"))
        return int(ids[index]), int(masses[index])


def draw(row: Row, *, number: int, temperature: float, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0) -> int:
    """The token that `number` (0 to 2^64 - 1) draws from a row of logits. Temperature is above 0; -inf is never drawn."""
    with np.errstate(over="ignore"):
        below = (row - row.max()) * np.float32(min(1.0 / temperature, 1e30))
    weights: NDArray[Any] = np.exp(below).astype(np.float64)
    weights *= _SCALE
    np.rint(weights, out=weights)
    ranking = _Ranking(below, weights)
    kept = ranking.total if top_k is None or top_k >= len(row) else ranking.mass_of_first(top_k)
    if top_p < 1.0:
        above, parts = top_p.as_integer_ratio()
        _, kept = ranking.at((kept * above + parts - 1) // parts - 1)
    if min_p > 0.0:
        kept = min(kept, int(weights[weights >= min_p * _SCALE].sum()))
    return ranking.at(kept * number >> 64)[0]
