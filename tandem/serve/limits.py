"""How much may run or wait at once, in all and of one client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tandem.serve.config import ServeConfig
from tandem.serve.errors import ApiError


class Limits:
    """Counts answers in flight and turns away, with 429 and Retry-After, what goes beyond."""

    def __init__(self, config: ServeConfig, *, others: Callable[[], int] = lambda: 0) -> None:
        self._config = config
        self._others = others
        self._of: Counter[str] = Counter()
        self.in_flight = 0

    @contextmanager
    def admit(self, client: str, answers: int) -> Iterator[None]:
        """Hold room for `answers` of one client. `others` counts what the pools still hold; whichever is more, counts."""
        config = self._config
        if max(self.in_flight, self._others()) + answers > config.max_in_flight:
            raise self._refused(f"{config.max_in_flight} answers run or wait already")
        most = config.max_in_flight_per_client
        if most is not None and self._of[client] + answers > most:
            raise self._refused(f"a client may have {most} answers at once")
        self.in_flight += answers
        self._of[client] += answers
        try:
            yield
        finally:
            self.in_flight -= answers
            self._of[client] -= answers
            if not self._of[client]:
                del self._of[client]

    def _refused(self, why: str) -> ApiError:
        wait = self._config.retry_after_s
        message = f"too many requests: {why}; try again in {wait} s"
        return ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": str(wait)})
