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
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_BITS = 35
_SCALE = np.float32(2**_BITS)
_HEAD_NATS, _HEAD_TOKENS = 8.0, 8192
_ID_BITS, _ID_MASK = np.uint64(32), np.uint64(2**32 - 1)
_BINS_PER_NAT = 40.0
_BINS = math.ceil((_BITS + 1) * math.log(2) * _BINS_PER_NAT) + 1

Row = NDArray[np.float32]
Rows = NDArray[np.float32]
Ids = NDArray[np.intp]
Masses = NDArray[np.float64]


def uniform(seed: int, position: int) -> int:
    """The number, from 0 to 2^64 - 1, that decides the token at one output position: a hash of seed and position alone."""
    key = seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    return int.from_bytes(blake2b(key, digest_size=8, person=b"tandem.draw").digest(), "little")


def _weights(below: Row) -> Row:
    """Whole numbers in proportion to the probabilities of logits that lie `below` the largest."""
    weights: Row = np.exp(below)
    weights *= _SCALE
    return np.rint(weights, out=weights)


class _Ranking:
    """Tokens in descending order of weight (ties: by id) and their masses, that is, their own weight and all before them.

    Mostly the head is asked for, the tokens within `_HEAD_NATS` of the likeliest, and is sorted at once where it is short.
    For the rest, weights are put into bins, and of these only the one that is asked for is sorted.
    """

    def __init__(self, below: Row) -> None:
        self._below = below
        head = np.flatnonzero(below >= -_HEAD_NATS)
        self._head, self.masses = self._order(head if len(head) <= _HEAD_TOKENS else head[:0], 0.0)

    @cached_property
    def total(self) -> int:
        """The mass of all tokens."""
        return int(self._all_weights.sum(dtype=np.float64))

    def mass_of_first(self, count: int) -> int:
        """The mass of `count` tokens, which must not be more than there are."""
        if count <= len(self._head):
            return int(self.masses[count - 1])
        counts = np.cumsum(np.bincount(self._bins, minlength=_BINS))
        index = int(np.searchsorted(counts, count))
        _, masses = self._bin(index)
        return int(masses[count - 1 - (int(counts[index - 1]) if index else 0)])

    def mass_of_heaviest(self, least: float) -> int:
        """The mass of the tokens that weigh at least `least` times the largest."""
        if len(self._head) and least > 2 * math.exp(-_HEAD_NATS):
            weights = _weights(self._below[self._head])
        else:
            weights = self._all_weights
        return int(weights[weights >= least * _SCALE].sum(dtype=np.float64))

    def at(self, mass: int) -> tuple[int, int]:
        """The first token whose mass is above `mass`, and that mass. Needs mass < total."""
        if len(self._head) and mass < self.masses[-1]:
            ids, masses = self._head, self.masses
        else:
            ids, masses = self._bin(int(np.searchsorted(self._bin_masses, mass, side="right")))
        index = int(np.searchsorted(masses, mass, side="right"))
        return int(ids[index]), int(masses[index])

    @cached_property
    def _all_weights(self) -> Row:
        return _weights(self._below)

    @cached_property
    def _bins(self) -> Ids:
        near = np.maximum(self._below, np.float32(-_BINS / _BINS_PER_NAT))  # what lies far below would overflow
        return np.minimum(near * np.float32(-_BINS_PER_NAT), np.float32(_BINS - 1)).astype(np.intp)

    @cached_property
    def _bin_masses(self) -> Masses:
        return np.cumsum(np.bincount(self._bins, weights=self._all_weights, minlength=_BINS))

    def _bin(self, index: int) -> tuple[Ids, Masses]:
        return self._order(np.flatnonzero(self._bins == index), self._bin_masses[index - 1] if index else 0.0)

    def _order(self, ids: Ids, before: float) -> tuple[Ids, Masses]:
        # Whole numbers are sorted several times faster than floats: the bits of what a token lies below, then its id.
        keys = np.abs(self._below[ids]).view(np.uint32).astype(np.uint64)
        keys <<= _ID_BITS
        keys |= ids.astype(np.uint64)
        keys.sort()
        below = -(keys >> _ID_BITS).astype(np.uint32).view(np.float32)
        return (keys & _ID_MASK).astype(np.intp), before + np.cumsum(_weights(below), dtype=np.float64)


def draw(row: Row, *, number: int, temperature: float, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0) -> int:
    """The token that `number` (0 to 2^64 - 1) draws from a row of logits. Temperature is above 0; -inf is never drawn."""
    below = row - row.max()
    with np.errstate(over="ignore"):
        below *= np.float32(min(1.0 / temperature, 1e30))
    ranking = _Ranking(below)
    kept = ranking.total if top_k is None or top_k >= len(row) else ranking.mass_of_first(top_k)
    if top_p < 1.0:
        above, parts = top_p.as_integer_ratio()
        _, kept = ranking.at((kept * above + parts - 1) // parts - 1)
    if min_p > 0.0:
        kept = min(kept, ranking.mass_of_heaviest(min_p))
    return ranking.at(kept * number >> 64)[0]


def draw_rows(rows: Rows, *, numbers: Sequence[int], temperatures: Sequence[float]) -> list[int]:
    """`draw` of every row [rows, vocabulary] with its number and temperature and all tokens kept: the same tokens.

    Worth it for small vocabularies: all of a row is sorted, which costs less than what numpy takes for calls on single rows.
    """
    heat = np.array([min(1.0 / temperature, 1e30) for temperature in temperatures], dtype=np.float32)
    below = rows - rows.max(1, keepdims=True)
    with np.errstate(over="ignore"):
        below *= heat[:, None]
    keys = np.abs(below).view(np.uint32).astype(np.uint64)
    keys <<= _ID_BITS
    keys |= np.arange(rows.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    masses = np.cumsum(_weights(-(keys >> _ID_BITS).astype(np.uint32).view(np.float32)), axis=1, dtype=np.float64)
    found = []
    for own, ids, number in zip(masses, keys, numbers, strict=True):
        index = own.searchsorted(int(own[-1]) * number >> 64, side="right")
        found.append(int(ids[index] & _ID_MASK))
    return found
