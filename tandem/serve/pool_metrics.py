"""What pools tell, as metrics: by role while workers work, and by request when one has ended."""

from __future__ import annotations

from typing import Any

from tandem.sched.request import Request
from tandem.sched.route import ROLES
from tandem.serve.messages import WorkerStats
from tandem.serve.metrics import Metrics


class PoolMetrics:
    """A `PoolObserver`. What workers say is kept, and summed up when somebody reads the metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._latest: dict[str, tuple[Any, WorkerStats]] = {}
        self._taken_bytes: dict[tuple[str, int], int] = {}
        self._used: set[str] = set()
        metrics.before_text.append(self._refresh)

    def on_stats(self, member: Any, stats: WorkerStats) -> None:
        """A worker (`Member`) has said how busy it is."""
        self._latest[member.id] = member, stats
        life = member.id, member.lives
        new = stats.taken_bytes - self._taken_bytes.get(life, 0)
        if new > 0:
            self._taken_bytes[life] = stats.taken_bytes
            self._metrics.count_handoff_bytes(new)

    def on_finish(self, life: Request) -> None:
        """A request has ended: how long it waited in each pool, and how long its state was on its way."""
        start_s, moved_s = life.prefill_start_s, life.transfer_end_s
        if start_s is not None:
            self._metrics.observe_queue("colocated" if moved_s is None else "prefill", start_s - life.arrival_s)
        if moved_s is not None and life.transfer_start_s is not None:
            self._metrics.observe_handoff(moved_s - life.transfer_start_s)
            if life.decode_start_s is not None:
                self._metrics.observe_queue("decode", life.decode_start_s - moved_s)

    def on_retry(self, life: Request, reason: str) -> None:
        """A request goes on elsewhere."""
        self._metrics.observe_retry()

    def _refresh(self) -> None:
        for role in ROLES:
            told = [stats for member, stats in self._latest.values() if member.role == role and member.up]
            if told:
                self._used.add(role)
            if role in self._used:  # also where it has no worker any more
                waiting = sum(stats.deferred + stats.arriving for stats in told)
                self._metrics.set_pool(role, [stats.engine for stats in told], waiting=waiting)
