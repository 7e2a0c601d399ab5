"""What clients felt in the last minute, for people who watch a server."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from tandem.sched.metrics import Spread, tpot_s, ttft_s
from tandem.sched.request import Request

WINDOW_S = 60.0
_KEPT = 10_000
"""Ended requests that are remembered, however many end in a window."""


class Recent:
    """A `PoolObserver` that remembers the requests that have ended lately. `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began_s = clock()
        self._ended: deque[tuple[float, Request]] = deque(maxlen=_KEPT)

    def on_finish(self, life: Request) -> None:
        """A request has ended."""
        self._ended.append((self._clock(), life))

    def on_stats(self, member: Any, stats: Any) -> None:
        """Not asked here."""

    def on_retry(self, life: Request, reason: str) -> None:
        """It counts when it ends."""

    def to_json(self) -> dict[str, Any]:
        """Requests that ended within `window_s`, which is WINDOW_S or as long as the server runs: how many, output tokens a
        second, percentiles of TTFT and TPOT (seconds)."""
        now_s = self._clock()
        since_s = now_s - WINDOW_S
        while self._ended and self._ended[0][0] < since_s:
            self._ended.popleft()
        lives = [life for _, life in self._ended]
        window_s = max(1.0, now_s - max(since_s, self._ended[0][0] if len(lives) == _KEPT else self._began_s))
        return {
            "window_s": window_s,
            "requests": len(lives),
            "tokens_per_s": sum(life.osl for life in lives) / window_s,
            "ttft_s": _percentiles([s for life in lives if (s := ttft_s(life)) is not None]),
            "tpot_s": _percentiles([s for life in lives if (s := tpot_s(life)) is not None]),
        }


def _percentiles(values: list[float]) -> dict[str, float] | None:
    spread = Spread.of(values)
    return None if spread is None else {"p50": spread.p50, "p90": spread.p90}
