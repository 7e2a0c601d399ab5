"""A batch that decodes, with runs of equal steps taken at once.

While a batch only decodes, its step time is affine in its context, which grows by the batch each step: step j of b sequences
with C tokens takes a + s*b*j seconds, a = base + s*C, so m steps take m*a + s*b*m*(m-1)/2, and what happens next, a finish or
a batch that outgrows the blocks, is known in closed form.
"""

from __future__ import annotations

from heapq import heappush
from math import sqrt

from tandem.sched.request import Request
from tandem.sim.config import WorkerKind

UNBOUNDED = 1 << 40
"""What policies are told of an answer's length: nothing."""


class SimRequest(Request):
    """A request with what only the simulator knows."""

    __slots__ = ("hashes", "last_step", "prefix", "row", "target")

    row: int
    """Its place in the trace."""
    hashes: list[int]
    """Of its prompt's blocks; empty where nobody caches."""
    prefix: int
    """Prompt tokens that its worker had cached when its prefill last began; before, what the router believed of it."""
    target: int
    """Output tokens that it will have."""
    last_step: int
    """Count of its worker's decode steps after which it is done."""


class DecodeBatch:
    """Sequences that decode together on one worker, the blocks that they hold, and the run of steps that they are in."""

    __slots__ = (
        "_base_s",
        "_block_size",
        "_hist",
        "_slope_s",
        "_steps",
        "decode_only",
        "decoding_tokens",
        "finishes",
        "free_blocks",
        "running",
        "serial",
        "span",
        "start_s",
    )

    def __init__(self, kind: WorkerKind) -> None:
        self._base_s, self._slope_s = kind.times.base_s, kind.times.per_token_s
        self._block_size = kind.limits.block_size
        self.free_blocks = kind.blocks
        self.finishes: list[tuple[int, int, SimRequest]] = []
        """A heap of those that decode: the step after which each is done, in order of joining, and the request."""
        self.running = 0
        self.decoding_tokens = 0
        """Context of those that decode, when the present run began."""
        self._steps = 0
        self._hist = [0] * self._block_size
        """Of the running, how many take a new block in a step, by the step's number modulo the block's size, negated."""
        self.serial = 0
        self.start_s = 0.0
        self.span = 0
        """Decode steps of the present run; 0 where only prompts are prefilled, or nothing runs."""
        self.decode_only = True

    def steps_done(self, now_s: float) -> int:
        """Decode steps of the present run that had ended by then."""
        if not self.span or not self.decode_only or now_s <= self.start_s:
            return 0
        a = self._base_s[self.running] + self._slope_s[self.running] * self.decoding_tokens
        growth = self._slope_s[self.running] * self.running
        dt = now_s - self.start_s
        steps = steps_for(dt, a, growth)
        if steps * a + growth * steps * (steps - 1) / 2 > dt:
            steps -= 1
        return min(steps, self.span)

    def run_s(self, steps: int) -> float:
        """Seconds of the next so many decode steps."""
        running = self.running
        slope_s = self._slope_s[running]
        return steps * (self._base_s[running] + slope_s * self.decoding_tokens) + slope_s * running * steps * (steps - 1) / 2

    def blocks_of(self, steps: int) -> int:
        """Blocks that so many more decode steps take."""
        size, hist = self._block_size, self._hist
        whole, rest = divmod(steps, size)
        blocks, at = whole * self.running, -self._steps % size
        for j in range(at, at - rest, -1):  # a negative place counts from the end, as it should
            blocks += hist[j]
        return blocks

    def steps_within(self, steps: int, blocks: int) -> int:
        """How many of so many decode steps the free blocks allow."""
        if self.running * (steps // self._block_size + 1) <= blocks:
            return steps
        size, hist, first = self._block_size, self._hist, self._steps
        done = min(blocks // self.running, steps // size) * size
        blocks -= done // size * self.running
        while done < steps:
            blocks -= hist[-(first + done) % size]
            if blocks < 0:
                break
            done += 1
        return done

    def join(self, request: SimRequest) -> None:
        """It decodes from the next step on; its newest token is not yet computed."""
        request.last_step = self._steps + request.target - request.osl
        self.serial += 1
        heappush(self.finishes, (request.last_step, self.serial, request))
        self.running += 1
        self.decoding_tokens += request.context
        self._hist[(request.computed - self._steps) % self._block_size] += 1

    def leave(self, request: SimRequest) -> None:
        """It decodes no more, and its blocks are free."""
        self.running -= 1
        self.decoding_tokens -= request.context
        self._hist[(request.computed - self._steps) % self._block_size] -= 1
        self.free_blocks += -(-request.computed // self._block_size)

    def settle(self) -> None:
        """Write into every running request what the closed form knows of it."""
        for last, _, request in self.finishes:
            request.osl = request.target - (last - self._steps)
            request.computed = request.isl + request.osl - 1

    def steps_at(self, now_s: float) -> int:
        """Decode steps that it had taken by then; a sequence that is done after `last` of them has so many still to come."""
        return self._steps + self.steps_done(now_s)


def steps_for(dt: float, a: float, growth: float) -> int:
    """The least whole m with m*a + growth*m*(m-1)/2 >= dt."""
    if dt <= 0.0:
        return 0
    half = growth / 2
    linear = a - half
    root = dt / a if half == 0.0 else (sqrt(linear * linear + 4.0 * half * dt) - linear) / (2.0 * half)
    steps = int(root)
    while steps * a + half * steps * (steps - 1) < dt:
        steps += 1
    while steps > 0 and (steps - 1) * a + half * (steps - 1) * (steps - 2) >= dt:
        steps -= 1
    return steps
