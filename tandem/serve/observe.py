"""What a scaling policy is told of live pools: one `Observation` for each window, and the same as a line of JSON.

The server sees tokens, not steps: a request waits until its first token; prompts at workers count as these last told.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from tandem.sched.metrics import meets, tpot_s, ttft_s
from tandem.sched.observation import Lengths, Observation, PoolCount
from tandem.sched.request import Request
from tandem.sched.route import ROLES, Role
from tandem.serve.members import Member
from tandem.serve.messages import WorkerStats
from tandem.serve.pools import Pools
from tandem.spec.errors import TraceError
from tandem.spec.workload import Slo


class Observer:
    """Watches pools from its creation on; every call of `observe` ends a window and begins the next."""

    def __init__(self, pools: Pools, *, clock: Callable[[], float], slo: Slo | None = None) -> None:
        self._pools, self._clock, self._slo = pools, clock, slo
        self._began_s = clock()
        self._ended: list[Request] = []
        self._ended_tokens = self._tokens = 0
        pools.watch(self)

    def on_finish(self, life: Request) -> None:
        """A request has ended."""
        self._ended.append(life)
        self._ended_tokens += life.osl

    def on_stats(self, member: Member, stats: WorkerStats) -> None:
        """Kept by the member itself."""

    def on_retry(self, life: Request, reason: str) -> None:
        """It goes on, and counts when it ends."""

    def observe(self) -> Observation:
        """The window that ends now."""
        now, since_s = self._clock(), self._began_s
        ended, self._ended, self._began_s = self._ended, [], now
        there = list(self._pools.records)
        tokens = self._ended_tokens + sum(len(r.tokens) for r in there)
        generated, self._tokens = max(0, tokens - self._tokens), tokens
        waiting = [r for r in there if r.life.first_token_s is None]
        states = [r for r in there if r.handoff is not None]
        going = [r for r in there if r.life.first_token_s is not None and r.handoff is None]
        arrived = [r.isl for r in ended if r.arrival_s >= since_s]
        arrived += [r.life.isl for r in there if r.life.arrival_s >= since_s]
        judged = [r for r in ended if r.finish_reason != "cancelled"]
        good = [r for r in ended if r.finish_reason in ("stop", "length")]
        lives = [*ended, *(r.life for r in there)]
        firsts = [
            s for r in lives if r.first_token_s is not None and r.first_token_s >= since_s if (s := ttft_s(r)) is not None
        ]
        steps = [s for r in good if (s := tpot_s(r)) is not None]
        return Observation(
            at_s=now,
            window_s=now - since_s,
            pools=tuple(self._count(role) for role in ROLES if any(m.role == role for m in self._pools.workers.values())),
            arrived=len(arrived),
            isl=Lengths.of(arrived),
            osl=Lengths.of([r.osl for r in good]),
            waiting=len(waiting),
            waiting_tokens=sum(r.context for r in waiting),
            oldest_wait_s=max((now - r.life.arrival_s for r in waiting), default=0.0),
            waiting_decode=len(states),
            decoding=len(going),
            decoding_tokens=sum(r.context for r in going),
            decoded=Lengths.of([len(r.tokens) for r in going]),
            generated=generated,
            first_tokens=len(firsts),
            ttft_s=float(np.quantile(firsts, 0.9)) if firsts else None,
            tpot_s=float(np.mean(steps)) if steps else None,
            attainment=None if self._slo is None or not judged else sum(meets(r, self._slo) for r in judged) / len(judged),
        )

    def _count(self, role: Role) -> PoolCount:
        members = [m for m in self._pools.workers.values() if m.role == role]
        views = [m.view for m in members]
        return PoolCount(
            role=role,
            up=sum(m.accepting for m in members),
            starting=sum(not m.up and not m.draining for m in members),
            draining=sum(m.scaling for m in members),
            running=sum(view.running for view in views),
            queued_tokens=sum(view.queued_tokens for view in views),
        )


def to_line(observation: Observation) -> str:
    """One line of JSON, of which `of_line` makes the same observation again."""
    return json.dumps(asdict(observation), separators=(",", ":"))


def of_line(line: str) -> Observation:
    """The observation of a line. Raises TraceError for a line that holds none."""
    try:
        data: dict[str, Any] = json.loads(line)
        pools = tuple(PoolCount(**pool) for pool in data.pop("pools"))
        for name in ("isl", "osl", "decoded"):
            data[name] = None if data[name] is None else Lengths(**data[name])
        return Observation(pools=pools, **data)
    except (ValueError, KeyError, TypeError, AttributeError) as wrong:
        raise TraceError(f"observation={line[:60]!r}: is none ({wrong})") from None
