"""A plain step-by-step engine, slow and obvious: the judge of the closed forms of queueing. It shares no formula with them.

One attention group. A waiting prompt goes before decoding (in-flight batching), or rides along with decode steps in chunks;
a step of n sequences takes `step_s(n)` seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Job:
    arrival_s: float
    first_s: float = 0.0
    done_s: float = 0.0
    osl: int = 0
    left: int = 0
    """Output tokens to come."""


@dataclass
class Engine:
    step_s: Callable[[int], float]
    prompt_s: float
    osl: int
    spread: float = 0.0
    """Output lengths vary evenly by this share of the mean, up and down, as benchmarks vary them."""
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    clock_s: float = 0.0
    waiting: deque[Job] = field(default_factory=deque)
    decoding: list[Job] = field(default_factory=list)
    done: list[Job] = field(default_factory=list)

    def admit(self, job: Job) -> None:
        job.osl = max(2, round(self.osl * (1 + self.spread * self.random.uniform(-1, 1))))
        self.waiting.append(job)

    def run_one(self) -> None:
        """One prompt, or one decode step of all."""
        if self.waiting:
            job = self.waiting.popleft()
            self.clock_s += self.prompt_s
            job.first_s = job.done_s = self.clock_s
            job.left = job.osl - 1
            self.decoding.append(job)
            return
        self.advance(self.step_s(len(self.decoding)))

    def advance(self, seconds: float) -> None:
        self.clock_s += seconds
        for job in self.decoding:
            job.left -= 1
            job.done_s = self.clock_s
        self.done += [j for j in self.decoding if not j.left]
        self.decoding = [j for j in self.decoding if j.left]

    def idle(self) -> bool:
        return not self.waiting and not self.decoding


@dataclass
class ChunkedEngine(Engine):
    """Prompts in `chunks` equal chunks, one a decode step, each of which adds `extra_s`; `prompt_s` is not used."""

    extra_s: float = 0.0
    chunks: int = 1
    chunks_done: int = 0

    def run_one(self) -> None:
        """One step of all that decode, with the next chunk of the first prompt that waits."""
        carried = bool(self.waiting)
        self.advance(self.step_s(len(self.decoding)) + (self.extra_s if carried else 0.0))
        if carried:
            self.chunks_done += 1
            if self.chunks_done == self.chunks:
                self.chunks_done, job = 0, self.waiting.popleft()
                job.first_s = job.done_s = self.clock_s
                job.left = job.osl - 1
                self.decoding.append(job)


def run_open(engine: Engine, requests_per_s: float, requests: int, seed: int, together: int = 1) -> list[Job]:
    """Poisson arrivals of `together` requests at a time; the first fifth warms up and is not returned."""
    gaps = np.random.default_rng(seed).exponential(together / requests_per_s, requests // together)
    arrivals = deque(float(t) for t in np.repeat(np.cumsum(gaps), together))
    count = len(arrivals)
    while len(engine.done) < count:
        if engine.idle() and arrivals:
            engine.clock_s = max(engine.clock_s, arrivals[0])
        while arrivals and arrivals[0] <= engine.clock_s:
            engine.admit(Job(arrivals.popleft()))
        engine.run_one()
    return sorted(engine.done, key=lambda j: j.arrival_s)[count // 5 :]


def run_closed(engine: Engine, concurrency: int, waves: int) -> list[Job]:
    """A benchmark: `concurrency` requests start at once, and whenever one is done the next one starts."""
    left = concurrency * (waves - 1)
    for _ in range(concurrency):
        engine.admit(Job(0.0))
    seen = 0
    while not engine.idle():
        engine.run_one()
        for _ in range(min(len(engine.done) - seen, left)):
            engine.admit(Job(engine.clock_s))
            left -= 1
        seen = len(engine.done)
    return engine.done


def run_pools(
    step_s: Callable[[int], float],
    prompt_s: float,
    osl: int,
    *,
    prefills: int,
    decodes: int,
    slots: int,
    concurrency: int,
    waves: int,
) -> list[Job]:
    """A benchmark of `prefills` servers that take one prompt at a time and `decodes` engines of at most `slots` sequences.

    A prompt that is done waits for a slot of the emptiest engine; its first token counts from then, as the decode engine sends
    it. Time moves in the smallest steps: one event, the earliest, at a time.
    """
    random = np.random.default_rng(0)

    def start(at_s: float) -> Job:
        return Job(at_s, osl=max(2, round(osl * (1 + 0.2 * random.uniform(-1, 1)))))

    queue: deque[Job] = deque(start(0.0) for _ in range(concurrency))
    left = concurrency * (waves - 1)
    prompts: list[tuple[float, Job]] = []
    idle, ready, done = prefills, deque[Job](), list[Job]()
    engines: list[tuple[float, list[Job]]] = [(float("inf"), []) for _ in range(decodes)]
    clock_s = 0.0
    while len(done) < concurrency * waves:
        while idle and queue:
            idle, job = idle - 1, queue.popleft()
            prompts.append((clock_s + prompt_s, job))
        while ready and min(len(jobs) for _, jobs in engines) < slots:
            i = min(range(decodes), key=lambda k: len(engines[k][1]))
            job = ready.popleft()
            job.first_s, job.left = clock_s, job.osl - 1
            next_s, jobs = engines[i]
            jobs.append(job)
            engines[i] = (clock_s + step_s(len(jobs)) if len(jobs) == 1 else next_s, jobs)
        clock_s = min([t for t, _ in prompts] + [t for t, _ in engines])
        for t, job in [p for p in prompts if p[0] <= clock_s]:
            prompts.remove((t, job))
            idle += 1
            ready.append(job)
        for i, (t, jobs) in enumerate(engines):
            if t > clock_s:
                continue
            for job in jobs:
                job.left, job.done_s = job.left - 1, clock_s
            ended = [j for j in jobs if not j.left]
            done += ended
            for _ in ended[: max(left, 0)]:
                queue.append(start(clock_s))
                left -= 1
            going = [j for j in jobs if j.left]
            engines[i] = (clock_s + step_s(len(going)) if going else float("inf"), going)
    return done


def mean_ttft_s(jobs: list[Job]) -> float:
    return float(np.mean([j.first_s - j.arrival_s for j in jobs]))


def mean_tpot_s(jobs: list[Job]) -> float:
    return float(np.mean([(j.done_s - j.first_s) / (j.osl - 1) for j in jobs]))
