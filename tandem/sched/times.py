"""How long steps take, for routing: out of the performance model, or learned from what steps took.

Both answer within microseconds, since a router asks for every worker at every request.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tandem.perf.costs import Layout
from tandem.perf.phases import PerfModel
from tandem.perf.pools import exposed_transfer_s
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int, require_number
from tandem.spec.workload import Workload

LONGEST = 2**20
"""Tokens up to which times are tabulated; beyond, they go on in a straight line."""
LARGEST = 4096
"""Sequences, likewise."""
PER_OCTAVE = 4
"""Nodes of a table for each doubling: a quadratic cost is then overstated by at most 0.75 % between two of them."""


def _nodes(highest: int) -> NDArray[np.float64]:
    """Whole numbers from 0 to `highest`, whose steps grow with them."""
    powers = np.round(2.0 ** (np.arange(PER_OCTAVE * math.ceil(math.log2(highest)) + 1) / PER_OCTAVE))
    return np.unique(np.concatenate(([0.0], powers)))


class _Table:
    """A function of two numbers, linear between nodes and beyond the last; monotone where its values are."""

    def __init__(self, rows: NDArray[np.float64], columns: NDArray[np.float64], values: NDArray[np.float64]) -> None:
        monotone = np.maximum.accumulate(np.maximum.accumulate(values, axis=0), axis=1)
        self._rows: list[float] = rows.tolist()
        self._columns: list[float] = columns.tolist()
        self._values: list[list[float]] = monotone.tolist()

    def at(self, x: float, y: float) -> float:
        """The value at row x and column y."""
        i = min(max(bisect_right(self._rows, x) - 1, 0), len(self._rows) - 2)
        j = min(max(bisect_right(self._columns, y) - 1, 0), len(self._columns) - 2)
        left, top = self._rows[i], self._columns[j]
        u = (x - left) / (self._rows[i + 1] - left)
        v = (y - top) / (self._columns[j + 1] - top)
        upper, lower = self._values[i], self._values[i + 1]
        a = upper[j] + v * (upper[j + 1] - upper[j])
        b = lower[j] + v * (lower[j + 1] - lower[j])
        return a + u * (b - a)


@dataclass(frozen=True)
class PredictedTimes:
    """`route.StepTimes` of an instance as the performance model predicts them: what an emulated worker takes, and what routes
    requests on hardware that has been calibrated."""

    perf: PerfModel
    layout: Layout
    step_tokens: int = 2048
    """Longest piece in which an engine prefills: each reads all weights once."""

    def __post_init__(self) -> None:
        require_int("step_tokens", self.step_tokens)
        if any(np.ndim(degree) for degree in self.layout):
            raise SpecError(f"layout={self.layout!r}: must be of one design point, not arrays of several")

    def prefill_s(self, tokens: int, context: int) -> float:
        """Seconds in which an instance prefills `tokens` tokens after `context` others whose state is there; 0 for none."""
        return self._prefill.at(tokens, context) if tokens > 0 else 0.0

    def decode_s(self, batch: int, context_tokens: int) -> float:
        """Seconds of a decode step of `batch` sequences that are `context_tokens` long in all; 0 for none."""
        return self._decode.at(batch, context_tokens / batch) if batch > 0 else 0.0

    def transfer_s(self, tokens: int) -> float:
        """Seconds of moving a state of `tokens` tokens that stick out of their prefill; 0 for none."""
        return self._transfer.at(tokens, 0.0) if tokens > 0 else 0.0

    def direct_prefill_s(self, tokens: NDArray[np.float64], context: NDArray[np.float64]) -> NDArray[np.float64]:
        """What `prefill_s` tabulates, for arrays, straight from the model; `tokens` must be at least 1."""
        pieces = np.maximum(tokens / self.step_tokens, 1.0)  # not rounded: what queues is many prompts, cut anywhere
        new = tokens / pieces
        prior = context + (tokens - new) / 2.0
        # A piece in the middle of a prompt that is cut so that its mean piece has just this much before it.
        isl = 2.0 * prior + new
        chunks = isl / new
        kernels_s = self.perf.prefill_kernels_s(self.layout, 1.0, isl, chunks) / chunks
        fit = self.perf.backend_fit
        return np.asarray(pieces * (self.perf.prompt_cost * kernels_s + fit.step_s + fit.sequence_s))

    def direct_decode_s(self, batch: NDArray[np.float64], context: float) -> NDArray[np.float64]:
        """What `decode_s` tabulates, for arrays of batches at one mean context, straight from the model."""
        length = max(context - 0.5, 1.0)  # an output of one token: the context in mid-output is that of the step
        lengths = Workload(name="step", isl=(length,), osl=(1.0,), weight=(1.0,))
        return self.perf.decode_tpot_s(self.layout, batch, lengths) * self.perf.tokens_per_step

    def direct_transfer_s(self, tokens: int) -> float:
        """What `transfer_s` tabulates, straight from the model."""
        prompt_s = self.direct_prefill_s(np.array([float(tokens)]), np.array([0.0]))
        return float(exposed_transfer_s(self.perf, self.layout, Workload.fixed(tokens, 1), prompt_s)[0])

    @cached_property
    def _prefill(self) -> _Table:
        rows = columns = _nodes(LONGEST)
        tokens, context = np.meshgrid(rows[1:], columns, indexing="ij")
        values = self.direct_prefill_s(tokens, context)
        # A straight line through the first two nodes meets 0 tokens at what even the shortest prompt costs.
        none = np.maximum(2.0 * values[:1] - values[1:2], 0.0)
        return _Table(rows, columns, np.concatenate((none, values)))

    @cached_property
    def _decode(self) -> _Table:
        rows, columns = _nodes(LARGEST)[1:], _nodes(LONGEST)[1:]
        return _Table(rows, columns, np.stack([self.direct_decode_s(rows, float(c)) for c in columns], axis=1))

    @cached_property
    def _transfer(self) -> _Table:
        rows = _nodes(LONGEST)[1:]
        values = np.array([[self.direct_transfer_s(int(tokens))] * 2 for tokens in rows])
        return _Table(rows, np.array([0.0, 1.0]), values)


class MeasuredTimes:
    """`route.StepTimes` that begin with given constants and learn from what steps took, for machines without fits.

    Prefill and transfer take seconds for each token, a decode step some, some for each sequence and some for each token of
    context. Of each of the three one factor is learned, smoothed exponentially on a logarithmic scale. A sample counts as at
    most 4 times more or less than expected, so that a cold start or a pause of the machine does not spoil what was known.
    """

    def __init__(
        self,
        *,
        prefill_s_per_token: float,
        decode_s_per_step: float,
        decode_s_per_sequence: float = 0.0,
        decode_s_per_context_token: float = 0.0,
        transfer_s_per_token: float = 0.0,
        smoothing: float = 0.1,
    ) -> None:
        require_number("prefill_s_per_token", prefill_s_per_token)
        require_number("decode_s_per_step", decode_s_per_step)
        given = (decode_s_per_sequence, decode_s_per_context_token, transfer_s_per_token)
        names = ("decode_s_per_sequence", "decode_s_per_context_token", "transfer_s_per_token")
        for name, value in zip(names, given, strict=True):
            if value != 0:
                require_number(name, value)
        require_number("smoothing", smoothing, high=1.0)
        self._prefill_s_per_token, self._decode_s_per_step = float(prefill_s_per_token), float(decode_s_per_step)
        self._decode_s_per_sequence, self._decode_s_per_context_token, self._transfer_s_per_token = map(float, given)
        self._smoothing = smoothing
        self._factors = {"prefill": 1.0, "decode": 1.0, "transfer": 1.0}

    def prefill_s(self, tokens: int, context: int) -> float:
        """Seconds of prefilling `tokens` tokens, however many came before."""
        return self._factors["prefill"] * self._prefill_s_per_token * tokens

    def decode_s(self, batch: int, context_tokens: int) -> float:
        """Seconds of a decode step of `batch` sequences that are `context_tokens` long in all; 0 for none."""
        if batch <= 0:
            return 0.0
        sequences_s = self._decode_s_per_sequence * batch + self._decode_s_per_context_token * context_tokens
        return self._factors["decode"] * (self._decode_s_per_step + sequences_s)

    def transfer_s(self, tokens: int) -> float:
        """Seconds of moving the state of `tokens` tokens."""
        return self._factors["transfer"] * self._transfer_s_per_token * tokens

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """Prefilling `tokens` tokens took `seconds`."""
        self._learn("prefill", self.prefill_s(tokens, 0), seconds)

    def observe_decode(self, batch: int, context_tokens: int, seconds: float) -> None:
        """A decode step took `seconds`."""
        self._learn("decode", self.decode_s(batch, context_tokens), seconds)

    def observe_transfer(self, tokens: int, seconds: float) -> None:
        """Moving the state of `tokens` tokens took `seconds`."""
        self._learn("transfer", self.transfer_s(tokens), seconds)

    def _learn(self, what: str, expected_s: float, seconds: float) -> None:
        if expected_s <= 0.0 or not 0.0 < seconds < math.inf:
            return
        surprise = min(max(seconds / expected_s, 0.25), 4.0)  # bounded first: the quotient may be 0 or infinite
        self._factors[what] *= surprise**self._smoothing
