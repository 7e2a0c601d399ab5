"""Penalties for tokens that are already there, and the client's own bias."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from tandem.engine.types import SamplingParams

_LEAST = 1e-20
"""Of repetition penalties: a logit divided by less would overflow, and what was said before wins by far all the same."""


class Penalties:
    """Counts one request's tokens and lowers their logits.

    The repetition penalty divides positive logits and multiplies negative ones of every token in prompt or output
    (CTRL, arXiv:1909.05858, section 4.1); presence is subtracted once and frequency for each time that a token is in the output
    (OpenAI API). The bias is added last.
    """

    def __init__(self, sampling: SamplingParams, prompt: Iterable[int]) -> None:
        self._repetition = np.float32(max(sampling.repetition_penalty, _LEAST))
        self._presence = np.float32(sampling.presence_penalty)
        self._frequency = np.float32(sampling.frequency_penalty)
        self._slots: dict[int, int] = {}
        self._ids = np.zeros(64, dtype=np.intp)
        self._counts = np.zeros(64, dtype=np.float32)
        self._biased = np.array(list(sampling.logit_bias), dtype=np.intp)
        self._bias = np.array(list(sampling.logit_bias.values()), dtype=np.float32)
        self._counting = bool(sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty)
        if sampling.repetition_penalty != 1:
            for token in prompt:
                self._slot(token)

    @staticmethod
    def asked(sampling: SamplingParams) -> bool:
        """Whether these parameters change any logit."""
        return bool(
            sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty or sampling.logit_bias
        )

    def accept(self, token: int) -> None:
        """Count an output token."""
        if self._counting:
            slot = self._slot(token)  # first: it may replace the array of counts
            self._counts[slot] += 1

    def apply(self, row: NDArray[np.float32]) -> None:
        """Change a row of logits in place."""
        used = len(self._slots)
        if used:
            ids, counts = self._ids[:used], self._counts[:used]
            values = row[ids]
            values = np.where(values > 0, values / self._repetition, values * self._repetition)
            row[ids] = values - self._frequency * counts - self._presence * (counts > 0)
        row[self._biased] += self._bias

    def _slot(self, token: int) -> int:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        return slot
