"""What a benchmark sends: prompts of token ids with stated lengths, each request at a stated time or as soon as one is done."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tandem.spec.errors import SpecError
from tandem.spec.units import require_int
from tandem.spec.workload import Trace

FIRST_ID, LAST_ID = 100, 256
"""Token ids of prompts lie from the first to below the last: small enough for any vocabulary, and none of them special."""

MOST_TOKENS = 10**9
"""Prompt tokens of a load, all of which are drawn before the first request is sent."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Load:
    """Requests to be sent. Open loop: at the trace's times. Closed loop: `concurrency` at any time, in the trace's order."""

    trace: Trace
    concurrency: int | None = None
    """None for the trace's times."""
    seed: int = 0
    """Of the prompts' tokens."""

    def __post_init__(self) -> None:
        if self.concurrency is not None:
            require_int("concurrency", self.concurrency, high=100_000)
            if self.concurrency > len(self.trace):
                raise SpecError(
                    f"concurrency={self.concurrency}: more than there are requests, {len(self.trace)}; send at least as many"
                )
        tokens = int(self.trace.isl.sum())
        if tokens > MOST_TOKENS:
            raise SpecError(
                f"requests={len(self.trace)}: have {tokens:,} prompt tokens; at most {MOST_TOKENS:,} are drawn for a run"
            )

    def prompt(self, number: int) -> list[int]:
        """Token ids of a request: other ones for each, but for prefixes that the trace says are shared."""
        trace, isl = self.trace, int(self.trace.isl[number])
        parts: list[np.ndarray] = []
        if trace.prefix_hash is not None and trace.prefix_end is not None:
            begin = int(trace.prefix_end[number - 1]) if number else 0
            for block in trace.prefix_hash[begin : int(trace.prefix_end[number])]:
                parts.append(_draw((self.seed, 1, int(block) & (2**63 - 1)), trace.prefix_block))
        held = sum(map(len, parts))
        if held < isl:
            parts.append(_draw((self.seed, 0, number), isl - held))
        return [int(token) for token in np.concatenate(parts)[:isl]]


def fixed_trace(isl: int, osl: int, requests: int) -> Trace:
    """So many requests of one length that may all be sent at once, for a closed loop."""
    for name, value in (("isl", isl), ("osl", osl), ("requests", requests)):
        require_int(name, value, high=10**7)
    return Trace(
        name=f"{isl} + {osl} tokens", arrival_s=np.zeros(requests), isl=np.full(requests, isl), osl=np.full(requests, osl)
    )


def _draw(seed: tuple[int, ...], count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(FIRST_ID, LAST_ID, count)
