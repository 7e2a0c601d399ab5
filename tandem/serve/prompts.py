"""Requests that wait for a worker: the client that was served least goes first, and its oldest request."""

from __future__ import annotations

from bisect import insort

from tandem.sched.fair import FairShare, by_age
from tandem.serve.records import Record


class PromptQueue:
    """Waiting requests in fair order. `share` counts what each client was served."""

    def __init__(self, share: FairShare) -> None:
        self._share = share
        self._clients: dict[str, list[Record]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, record: Record) -> None:
        """Let it wait, among its client's requests by arrival."""
        insort(self._clients.setdefault(record.life.client, []), record, key=lambda r: by_age(r.life))
        self._count += 1

    def remove(self, record: Record) -> None:
        """It does not wait any more."""
        waiting = self._clients[record.life.client]
        waiting.remove(record)
        self._count -= 1
        if not waiting:
            del self._clients[record.life.client]

    def head(self, *, skip_after: int | None = None) -> Record | None:
        """Who is next; of those tried `skip_after` times or more nobody, where that is given."""
        served = self._share.served
        best: tuple[float, float, str] | None = None
        found: Record | None = None
        for client, waiting in self._clients.items():
            record = next((r for r in waiting if skip_after is None or r.attempt < skip_after), None)
            if record is None:
                continue
            key = (served.get(client, 0.0), *by_age(record.life))
            if best is None or key < best:
                best, found = key, record
        return found
