"""Fairness between clients: whoever was served least goes first (virtual token counters, Sheng et al., arXiv:2401.00588)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from heapq import heapify, heappop, heappush
from types import MappingProxyType

from tandem.sched.request import Request
from tandem.spec.units import require_int


def by_age(request: Request) -> tuple[float, str]:
    """Sorts the oldest arrival first; ties by id, so that an order never depends on chance."""
    return request.arrival_s, request.id


class FairShare:
    """Tokens served to each client, as counters that decide who is next.

    A client that comes back after a pause is lifted to the least of those that stayed: idle time earns no credit. So two
    clients that both always ask for more are served within a bounded number of tokens of each other.
    """

    def __init__(self, max_clients: int = 100_000) -> None:
        require_int("max_clients", max_clients)
        self._max_clients = max_clients
        self._served: dict[str, float] = {}
        self._requests: Counter[str] = Counter()
        self._last_left = 0.0

    @property
    def served(self) -> Mapping[str, float]:
        """The counters, a live view, for `plan_step`."""
        return MappingProxyType(self._served)

    def arrive(self, client: str) -> None:
        """A request of `client` has come; pair each with one `leave`."""
        if not self._requests[client]:
            others = (self._served[name] for name, count in self._requests.items() if count)
            self._served[client] = max(self._served.get(client, 0.0), min(others, default=self._last_left))
        self._requests[client] += 1

    def charge(self, client: str, tokens: float) -> None:
        """`client` was served `tokens` tokens, prompt and output alike, unless the caller weighs them."""
        self._served[client] = self._served.get(client, 0.0) + tokens

    def leave(self, client: str) -> None:
        """A request of `client` is done."""
        self._requests[client] -= 1
        if self._requests[client] <= 0:
            del self._requests[client]
            self._last_left = self._served.get(client, 0.0)
        if len(self._served) > max(self._max_clients, 2 * len(self._requests)):
            idle = sorted((name for name in self._served if name not in self._requests), key=self._served.__getitem__)
            for name in idle[: len(idle) // 2 + 1]:  # those that a return would lift furthest; many, for each look costs
                del self._served[name]


class FairQueue:
    """New requests in fair order: the oldest of the client served least, which is then charged for what it gets."""

    def __init__(self, requests: Iterable[Request], served: Mapping[str, float]) -> None:
        self._queues: dict[str, deque[Request]] = {}
        for request in sorted(requests, key=by_age):
            self._queues.setdefault(request.client, deque()).append(request)
        self._served = {client: served.get(client, 0.0) for client in self._queues}
        self._heap = [(level, client) for client, level in self._served.items()]
        heapify(self._heap)

    def pop(self) -> Request | None:
        """The next one; its client has no other turn before it is charged. None when no client is left."""
        if not self._heap:
            return None
        return self._queues[heappop(self._heap)[1]].popleft()

    def charge(self, client: str, tokens: float) -> None:
        """Count what the client's request got and let its next one queue."""
        self._served[client] += tokens
        if self._queues[client]:
            heappush(self._heap, (self._served[client], client))
