"""A load sent to a server, and what its requests came to."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from tandem.bench.client import Target, ask, clock_from, session
from tandem.bench.load import Load
from tandem.sched.metrics import RunStats, Spread, summarise
from tandem.sched.request import Request
from tandem.spec.errors import SpecError
from tandem.spec.workload import Slo

Listen = Callable[[int, int], None]
"""Requests that are done, and all."""


@dataclass(frozen=True, kw_only=True)
class BenchRun:
    """One pass of a load. Times of requests are seconds from its beginning."""

    requests: tuple[Request, ...]
    failures: dict[str, int]
    """Why requests failed, and how many for each reason."""
    duration_s: float
    """From the first request to the last answer."""
    sent_late_s: Spread | None
    """How long after their times requests of an open loop were sent: this client's own lag, which its TTFT contains."""

    def stats(self, slo: Slo | None = None) -> RunStats:
        """In numbers, by the definitions of `tandem.sched.metrics`, which the simulator and the server use too."""
        return summarise(self.requests, self.duration_s, slo)

    def to_json(self, slo: Slo | None = None) -> dict[str, Any]:
        """As `tandem simulate --json` has a run, with `failures`, and without what only a server knows."""
        row = self.stats(slo).to_json()
        for unknown in ("queue_s", "prefill_s", "transfer_s"):
            del row[unknown]
        late = self.sent_late_s
        return {**row, "failures": self.failures, "sent_late_p99_s": None if late is None else late.p99}


async def run(target: Target, load: Load, *, warmup: int = 1, listen: Listen = lambda done, all: None) -> BenchRun:
    """Send the load once, after `warmup` requests like its first that are not counted.

    Closed loop: a request arrives when it is sent. Open loop: at its time in the trace, whether or not this client can send
    it then. Raises SpecError where a request of the warm-up fails.
    """
    async with session(target) as http:
        for number in range(warmup):
            first = _request(load, 0, f"warm-up {number}", 0.0)
            why = await ask(http, target, first, load.prompt(0)[::-1], time.perf_counter)
            if why is not None:
                raise SpecError(f"url={target.url!r}: a first request of {first.isl} + {first.max_tokens} tokens failed: {why}")
        return await _Pass(http, target, load, listen).run()


def _request(load: Load, number: int, id: str, at_s: float) -> Request:
    isl, osl = int(load.trace.isl[number]), int(load.trace.osl[number])
    return Request(id=id, isl=isl, max_tokens=osl, arrival_s=at_s)


class _Pass:
    def __init__(self, http: aiohttp.ClientSession, target: Target, load: Load, listen: Listen) -> None:
        self._http, self._target, self._load, self._listen = http, target, load, listen
        self._clock = clock_from(time.perf_counter())
        self._requests: list[Request] = []
        self._late: list[float] = []
        self._failures: Counter[str] = Counter()
        self._done = 0

    async def run(self) -> BenchRun:
        prompts = [self._load.prompt(number) for number in range(len(self._load.trace))]
        self._clock = clock_from(time.perf_counter())
        if self._load.concurrency is None:
            await self._open(prompts)
        else:
            await self._closed(prompts, self._load.concurrency)
        ends = [request.done_s for request in self._requests if request.done_s is not None]
        first = min(request.arrival_s for request in self._requests)
        return BenchRun(
            requests=tuple(self._requests),
            failures=dict(self._failures),
            duration_s=max(max(ends) - first, 1e-9),
            sent_late_s=Spread.of(self._late),
        )

    async def _closed(self, prompts: list[list[int]], concurrency: int) -> None:
        waiting = iter(range(len(prompts)))

        async def turn() -> None:
            for number in waiting:
                await self._send(number, prompts[number], self._clock())

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(turn())

    async def _open(self, prompts: list[list[int]]) -> None:
        async with asyncio.TaskGroup() as group:
            for number, prompt in enumerate(prompts):
                at_s = float(self._load.trace.arrival_s[number])
                await asyncio.sleep(max(0.0, at_s - self._clock()))
                self._late.append(self._clock() - at_s)
                group.create_task(self._send(number, prompt, at_s))

    async def _send(self, number: int, prompt: list[int], at_s: float) -> None:
        request = _request(self._load, number, str(number), at_s)
        self._requests.append(request)
        why = await ask(self._http, self._target, request, prompt, self._clock)
        if why is not None:
            self._failures[why] += 1
        self._done += 1
        self._listen(self._done, len(self._load.trace))
