"""A closed loop on Tandem's own engine, step by step: what its clients feel where so many requests are always in flight.

A step decodes one token of every running request and reads prompts with what that leaves of its tokens, in whole passes and at
least one, first come first served; a prompt that is read has its first token at the end of the step (tandem.sched.batch has
the same rule with memory and fairness). Whether requests go through in waves or staggered follows from that, and decides how
long prompts wait for one another; the closed form of other backends (phases.py, pools.py) has one coefficient for both.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tandem.perf.backend import PASS_TOKENS
from tandem.perf.host import ONE
from tandem.perf.phases import PerfModel
from tandem.spec.workload import Workload

STEP_TOKENS = 512
"""As tandem.engine.config has it."""
PER_PLACE = 8
"""Requests for each in flight, as `tandem bench` sends them."""


class LoopTime(NamedTuple):
    """Means over the requests of a loop in seconds, and requests a second."""

    ttft_s: float
    tpot_s: float
    requests_per_s: float


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Requests of one length, `concurrency` of them in flight, and what they take."""

    isl: int
    osl: int
    concurrency: int
    step_s: tuple[float, ...]
    """Of a step in which 0, 1, ... `concurrency` decode."""
    token_s: float
    """Of a prompt's token, kernels alone."""
    pass_s: float
    """Of a pass beside its kernels."""
    host_s: float
    """From a client until a worker can begin."""
    transfer_s: float
    """Of a prompt's state to another worker."""
    beside: float = 0.0
    """Share by which a decode step takes longer while a prefill worker reads."""

    @classmethod
    def of(cls, perf: PerfModel, isl: int, osl: int, concurrency: int) -> Loop:
        """As the performance model prices it."""
        fit, batches = perf.backend_fit, np.arange(1.0, concurrency + 1.0)
        steps = np.broadcast_to(perf.decode_tpot_s(ONE, batches, Workload.fixed(isl, osl)), batches.shape)
        kernels_s = float(perf.prefill_kernels_s(ONE, 1.0, float(isl), 1.0)) - math.ceil(isl / PASS_TOKENS) * fit.prompt_s
        return cls(
            isl=isl,
            osl=osl,
            concurrency=concurrency,
            step_s=(0.0, *steps.tolist()),
            token_s=fit.prompt * kernels_s / isl,
            pass_s=fit.prompt * fit.prompt_s,
            host_s=fit.host_s,
            beside=fit.beside,
            transfer_s=float(perf.memory.sequence_bytes(ONE, float(isl))) / perf.hardware.scale_out_bytes_per_s,
        )


class _Prompt(NamedTuple):
    sent_s: float
    there_s: float
    """When a worker can begin."""
    tokens: int
    """Still to be read."""


@dataclass
class _Worker:
    now_s: float = 0.0
    running: list[list[float]] = field(default_factory=list)
    """Tokens to come and time of the first, of each request that decodes here."""
    arriving: deque[tuple[float, list[float]]] = field(default_factory=deque)
    """States that come from a prefill worker, and when they are there."""

    @property
    def load(self) -> int:
        return len(self.running) + len(self.arriving)


class _Play:
    """A loop under way."""

    def __init__(self, loop: Loop, per_place: int) -> None:
        self._loop = loop
        self.left = loop.concurrency * (per_place - 1)
        self.waiting = deque(_Prompt(0.0, loop.host_s, loop.isl) for _ in range(loop.concurrency))
        self.first_s = self.decode_s = self.end_s = 0.0
        self.done = 0

    def read(self, now_s: float, decoding: int) -> tuple[float, list[float]]:
        """Seconds of the prompts in a step that begins now, and when the requests were sent whose prompts end in it."""
        loop, seconds, ended = self._loop, 0.0, []
        room = max(STEP_TOKENS - decoding, PASS_TOKENS)
        while self.waiting and self.waiting[0].there_s <= now_s and room > 0:
            head = self.waiting[0]
            tokens = head.tokens
            if tokens > room:
                tokens = room - (loop.isl - head.tokens + room) % PASS_TOKENS
            if tokens <= 0:
                break
            room -= tokens
            seconds += tokens * loop.token_s + math.ceil(tokens / PASS_TOKENS) * loop.pass_s
            if tokens < head.tokens:
                self.waiting[0] = head._replace(tokens=head.tokens - tokens)
                break
            self.waiting.popleft()
            ended.append(head.sent_s)
        return seconds, ended

    def begin(self, sent_s: float, now_s: float) -> list[float]:
        """A request has its first token."""
        self.first_s += now_s - sent_s
        return [self._loop.osl - 1.0, now_s]

    def decode(self, worker: _Worker) -> None:
        """All that run on a worker get a token; those that are done are followed by the next."""
        still = []
        for one in worker.running:
            one[0] -= 1
            if one[0] > 0:
                still.append(one)
                continue
            self.decode_s += worker.now_s - one[1]
            self.done += 1
            self.end_s = max(self.end_s, worker.now_s)
            if self.left:
                self.left -= 1
                self.waiting.append(_Prompt(worker.now_s, worker.now_s + self._loop.host_s, self._loop.isl))
        worker.running = still

    @property
    def times(self) -> LoopTime:
        steps = self._loop.osl - 1.0
        return LoopTime(self.first_s / self.done, self.decode_s / self.done / steps, self.done / self.end_s)


def engine_loop(loop: Loop, *, per_place: int = PER_PLACE) -> LoopTime:
    """One worker; `per_place` requests for each in flight, each sent when the one before it is done."""
    play, worker = _Play(loop, per_place), _Worker()
    while play.waiting or worker.running:
        if not worker.running:
            worker.now_s = max(worker.now_s, play.waiting[0].there_s)
        prompts_s, ended = play.read(worker.now_s, len(worker.running))
        worker.now_s += loop.step_s[len(worker.running)] + prompts_s
        play.decode(worker)
        worker.running += [play.begin(sent_s, worker.now_s) for sent_s in ended]
    return play.times


def pools_loop(
    loop: Loop, *, prefill: int = 1, decode: int = 1, batch_limit: int | None = None, per_place: int = PER_PLACE
) -> LoopTime:
    """`prefill` and `decode` workers; a state goes where the fewest are, and waits where `batch_limit` of them decode."""
    play = _Play(loop, per_place)
    readers, decoders = [0.0] * prefill, [_Worker() for _ in range(decode)]
    most = batch_limit or loop.concurrency
    while play.waiting or any(worker.load for worker in decoders):
        reader = min(range(prefill), key=readers.__getitem__)
        read_at = max(readers[reader], play.waiting[0].there_s) if play.waiting else math.inf
        begins = [
            (worker.now_s if worker.running else max(worker.now_s, worker.arriving[0][0]), number)
            for number, worker in enumerate(decoders)
            if worker.load
        ]
        step_at, number = min(begins, default=(math.inf, 0))
        if read_at <= step_at:
            prompts_s, ended = play.read(read_at, 0)
            readers[reader] = read_at + prompts_s
            for sent_s in ended:
                state = play.begin(sent_s, readers[reader])
                min(decoders, key=lambda worker: worker.load).arriving.append((readers[reader] + loop.transfer_s, state))
            continue
        worker = decoders[number]
        worker.now_s = step_at
        while worker.arriving and worker.arriving[0][0] <= step_at and len(worker.running) < most:
            worker.running.append(worker.arriving.popleft()[1])
        crowded = 1.0 + loop.beside if max(readers) > step_at else 1.0
        worker.now_s += crowded * loop.step_s[len(worker.running)]
        play.decode(worker)
    return play.times
