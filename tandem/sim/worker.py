"""One simulated worker: the step loop of an engine.

Decode steps run in closed form (decoding.py) until something leaves; an arrival cuts a run at the next boundary between two
steps. A step with prompt chunks is planned by `tandem.sched.batch`, as the engine plans it, and taken by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop
from math import inf, isnan
from typing import Any, Literal, cast

from tandem.sched.batch import Chunk, Room, StepAccount, fill_step, plan_step
from tandem.sched.fair import FairQueue, by_age
from tandem.sched.route import Role
from tandem.sim.config import WorkerKind
from tandem.sim.decoding import DecodeBatch, SimRequest, steps_for
from tandem.sim.queues import ClientTurns, Fifo, PrefixCache
from tandem.sim.result import Columns

Status = Literal["starting", "up", "draining", "flipping", "gone"]


class SimWorker(DecodeBatch):
    """State of one worker between two boundaries of steps. Also what `tandem.sched.route` asks of a WorkerView."""

    def __init__(
        self,
        number: int,
        kind: WorkerKind,
        role: Role,
        columns: Columns,
        *,
        fair: bool,
        cache: PrefixCache | None,
        on_prefilled: Callable[[SimWorker, SimRequest, float], None],
        on_done: Callable[[SimRequest, float], None],
    ) -> None:
        super().__init__(kind)
        self.number, self.id, self.kind, self.role = number, f"w{number:06d}", kind, role
        self.times, self.limits, self.max_batch = kind.times, kind.limits, kind.limits.max_batch
        self.status: Status = "up"
        self.flip_to: Role | None = None
        self.on_prefilled, self.on_done = on_prefilled, on_done
        self._columns, self._cache = columns, cache
        self._share = ClientTurns() if fair else None
        self.waiting: deque[SimRequest] = deque()
        self.resumed: list[SimRequest] = []
        self.begun: list[SimRequest] = []
        self.arrived: deque[SimRequest] = deque()
        self.incoming = 0
        """Sequences whose state is here or on its way, and that do not decode yet."""
        self.incoming_tokens = 0
        self.pending_tokens = 0
        """Tokens of theirs and of the prompts that have not begun."""
        self.queued_tokens = 0
        self.chunks: list[Chunk] = []
        self.end_s = inf
        self.epoch = 0
        self.pushed = 0
        """The epoch of which the loop knows the end."""
        self.busy_s = 0.0
        self.floor_s = self.times.decode_s(1, 0)
        """A decode step here with one more sequence, its own context left out, when the present run began; infinite where the
        batch is full."""

    # What the router asks.

    @property
    def accepting(self) -> bool:
        """Whether it takes new requests."""
        return self.status == "up"

    def context_at(self, now_s: float) -> int:
        """Tokens of all sequences here or on their way, at the last boundary before `now_s`."""
        return self.decoding_tokens + self.running * self.steps_done(now_s) + self.incoming_tokens

    def free_tokens_at(self, now_s: float) -> int:
        """Tokens for which there was room then, less what waits for it."""
        used = self.blocks_of(self.steps_done(now_s)) if self.span > 1 else 0
        return max(0, (self.free_blocks - used) * self.limits.block_size - self.pending_tokens)

    def has_room(self, tokens: int, now_s: float) -> bool:
        """Whether there is room for more than so many tokens, `free_tokens_at`."""
        size = self._block_size
        blocks = self.free_blocks - self.running * (self.span // size + 1)  # at the end of the present run, at least
        return blocks * size - self.pending_tokens > tokens or self.free_tokens_at(now_s) > tokens

    @property
    def empty(self) -> bool:
        """Whether nothing is left here, or on its way here."""
        return not (self.running or self.incoming or self.waiting or self.begun or self.resumed)

    # Requests come.

    def submit(self, request: SimRequest, now_s: float) -> None:
        """A prompt, to be prefilled from its first token on."""
        if self._share is not None:
            self._share.comes(request.client, self.steps_done(now_s))
        self.stays(request)
        self.disturb(now_s)

    def join(self, request: SimRequest) -> None:
        """It decodes from the next step on; its newest token is not yet computed."""
        super().join(request)
        if self._share is not None:
            self._share.starts(request.client)

    def leave(self, request: SimRequest) -> None:
        """It decodes no more, and its blocks are free."""
        super().leave(request)
        if self._share is not None:
            self._share.stops(request.client)

    def recall(self) -> list[SimRequest]:
        """The prompts that have not begun, oldest first; each is then told to `stays` or `leaves`."""
        prompts = list(self.waiting)
        self.waiting.clear()
        for request in prompts:
            self.queued_tokens -= request.to_prefill
            self.pending_tokens -= request.to_prefill
        return prompts

    def stays(self, request: SimRequest) -> None:
        """It waits here as before."""
        self.waiting.append(request)
        tokens = request.to_prefill
        self.queued_tokens += tokens
        self.pending_tokens += tokens

    def leaves(self, request: SimRequest) -> None:
        """It goes on elsewhere, or is done."""
        if self._share is not None:
            self._share.leave(request.client)

    def expect(self, request: SimRequest) -> None:
        """Its state is on its way here."""
        self.incoming += 1
        self.incoming_tokens += request.context
        self.pending_tokens += request.context
        self.set_floor()

    def accept(self, request: SimRequest, now_s: float) -> None:
        """Its state is here."""
        if self._share is not None:
            self._share.comes(request.client, self.steps_done(now_s))
        self.arrived.append(request)
        self.disturb(now_s)

    def set_floor(self) -> None:
        """`floor_s` as of now; only where sequences decode does anybody ask."""
        batch = self.running + self.incoming
        if batch >= self.max_batch:
            self.floor_s = inf
        else:
            self.floor_s = self.times.decode_s(batch + 1, self.decoding_tokens + self.incoming_tokens)

    def disturb(self, now_s: float) -> None:
        """Something came, or the queue has another head: plan at the next boundary, which is now if nothing runs."""
        if self.end_s == inf:
            self._plan(now_s)
        elif self.span > 1:
            self._cut(now_s)

    def _cut(self, now_s: float) -> None:
        """End a run of decode steps with the one that is under way."""
        steps = max(1, steps_for(now_s - self.start_s, self.run_s(1), self._slope_s[self.running] * self.running))
        if steps < self.span:
            self.span = steps
            self.end_s = self.start_s + self.run_s(steps)
            self.epoch += 1

    # Steps.

    def wake(self) -> None:
        """The present run, or step, is over."""
        now_s = self.end_s
        self.busy_s += now_s - self.start_s
        if self.span:
            self._decode(self.span, now_s)
        if self.chunks:
            self._prefill(now_s)
        self._plan(now_s)

    def _decode(self, steps: int, now_s: float) -> None:
        self._take(steps)
        finishes = self.finishes
        while finishes and finishes[0][0] <= self._steps:
            request = heappop(finishes)[2]
            request.osl = request.target
            request.computed = request.isl + request.osl - 1
            self.leave(request)
            self.leaves(request)
            self.on_done(request, now_s)

    def _take(self, steps: int) -> None:
        """So many decode steps are over; those who are done still stand in the batch."""
        self.free_blocks -= self.blocks_of(steps)
        self._steps += steps
        self.decoding_tokens += self.running * steps
        if self._share is not None:
            self._share.end_run(steps)

    def _plan(self, now_s: float) -> None:
        """What runs from this boundary on."""
        self._choose(now_s)
        if self.role != "prefill":
            self.set_floor()

    def _choose(self, now_s: float) -> None:
        self.start_s = now_s
        self.epoch += 1
        self.decode_only, self.chunks = True, []
        running, prompts = self.running, self.waiting or self.begun or self.resumed
        if prompts or self.arrived:
            size = self.limits.block_size
            demand = self._hist[-self._steps % size]
            if demand > self.free_blocks or (not running and self.begun and self.free_blocks * size < self.limits.step_tokens):
                self._plan_short(now_s)
            elif prompts:
                self._plan_ample(now_s, demand)
            else:
                self._admit_all(now_s, demand)
            running = self.running
        if self.chunks:
            self.decode_only = False
            self.span = 1 if running else 0
            self.end_s = now_s + self.times.chunks_s(self.running, self.decoding_tokens, self.chunks)
            return
        if not running:
            self.span, self.end_s = 0, inf
            return
        steps = self.finishes[0][0] - self._steps
        steps = self.steps_within(steps, self.free_blocks)
        if not steps:
            self._plan_short(now_s)
            if self.chunks:  # room came back, but those who gave it up wait a step
                raise RuntimeError(f"worker {self.id}: a step that preempts must not prefill new prompts")
            running = self.running
            steps = self.steps_within(self.finishes[0][0] - self._steps, self.free_blocks)
        # Whoever found no room finds none before a finish either, for free blocks only shrink until then; but of several
        # clients another may come first after the next step, and its prompt may fit.
        if self._share is not None and len(self.waiting) > 1:
            steps = 1
        self.span = steps
        self.end_s = now_s + self.run_s(steps)

    def _plan_ample(self, now_s: float, demand: int) -> None:
        """There are blocks for all that decode: fill the step by the policy's own account, without a list of who decodes."""
        slots = self.max_batch - self.running - len(self.begun)
        account = StepAccount(
            self.limits, blocks=self.free_blocks - demand, slots=slots, decoding=self.running, begun=self.begun
        )
        new = Fifo(self.waiting) if self._share is None else FairQueue(self.waiting, self._share.served)
        admit, chunks = fill_step(account, begun=self.begun, resumed=self.resumed, arrived=self.arrived, new=new)
        self._carry_out(admit, chunks, now_s)

    def _admit_all(self, now_s: float, demand: int) -> None:
        """The same where no prompt is there."""
        slots, blocks = self.max_batch - self.running, self.free_blocks - demand
        account = StepAccount(self.limits, blocks=blocks, slots=slots, decoding=self.running, begun=())
        while self.arrived and account.admit(self.arrived[0]):
            self._admit(self.arrived.popleft(), now_s)

    def _plan_short(self, now_s: float) -> None:
        """Somebody may have to give room back: the whole policy decides."""
        self.settle()
        decoding = [request for _, _, request in self.finishes]
        plan = plan_step(
            running=decoding,
            waiting=[*self.begun, *self.resumed, *self.waiting],
            arrived=list(self.arrived),
            limits=self.limits,
            room=Room(blocks=self.free_blocks, slots=self.max_batch - self.running - len(self.begun)),
            served={} if self._share is None else self._share.served,
        )
        for request in plan.preempt:
            self._preempt(cast(SimRequest, request))
        self._carry_out(plan.admit, plan.prefill, now_s)

    def _preempt(self, request: SimRequest) -> None:
        if request in self.begun:
            self.begun.remove(request)
            self.free_blocks += -(-request.computed // self.limits.block_size)
            self.queued_tokens -= request.to_prefill
        else:
            self.finishes = [entry for entry in self.finishes if entry[2] is not request]
            heapify(self.finishes)
            self.leave(request)
        request.computed = 0
        request.preemptions += 1
        self._columns.preemptions[request.row] += 1
        self.queued_tokens += request.to_prefill
        self.pending_tokens += request.to_prefill
        self.resumed.append(request)
        self.resumed.sort(key=by_age)

    def _carry_out(self, admit: Iterable[Any], chunks: Sequence[Chunk], now_s: float) -> None:
        """Admit and begin: room is taken as the step begins."""
        size = self.limits.block_size
        for request in admit:
            self.arrived.remove(request)
            self._admit(request, now_s)
        self.chunks = []
        for chunk in chunks:
            request, tokens = cast(SimRequest, chunk.request), chunk.tokens
            if request.computed == 0:
                self.pending_tokens -= request.to_prefill
                if request.preemptions and request in self.resumed:
                    self.resumed.remove(request)
                elif self.waiting[0] is request:
                    self.waiting.popleft()
                else:
                    self.waiting.remove(request)
                self.begun.append(request)
                self._begin(request, now_s)
                tokens = min(tokens, request.to_prefill)
            held = 0 if request.computed == request.prefix else -(-request.computed // size)
            self.free_blocks -= -(-(request.computed + tokens) // size) - held
            self.chunks.append(Chunk(request, tokens))

    def _admit(self, request: SimRequest, now_s: float) -> None:
        tokens = request.context
        self.incoming -= 1
        self.incoming_tokens -= tokens
        self.pending_tokens -= tokens
        self.free_blocks -= -(-request.computed // self.limits.block_size)
        self._columns.decode_start_s[request.row] = now_s
        self.join(request)

    def _begin(self, request: SimRequest, now_s: float) -> None:
        columns, row = self._columns, request.row
        if isnan(columns.prefill_start_s[row]):
            columns.prefill_start_s[row] = now_s
        request.prefix = 0
        if self._cache is not None:
            request.prefix = min(self._cache.match(request.hashes), request.isl - 1)
            request.computed = columns.cached[row] = request.prefix
            self.queued_tokens -= request.prefix

    def _prefill(self, now_s: float) -> None:
        for chunk in self.chunks:
            request = cast(SimRequest, chunk.request)
            request.computed += chunk.tokens
            self.queued_tokens -= chunk.tokens
            if self._share is not None:
                self._share.charge(request.client, chunk.tokens)
            if request.to_prefill:
                continue
            self.begun.remove(request)
            if request.osl:
                self.join(request)
                continue
            self._first_token(request, now_s)

    def _first_token(self, request: SimRequest, now_s: float) -> None:
        columns, row = self._columns, request.row
        request.osl = 1
        columns.prefill_end_s[row] = now_s
        if self._cache is not None:
            self._cache.add(request.hashes)
        columns.first_token_s[row] = first_s = now_s + self.times.first_token_s
        columns.ttfts_s.append(first_s - request.arrival_s)
        if self._share is not None:
            self._share.charge(request.client, 1)
        if request.target > 1 and self.role != "prefill":
            columns.decode_start_s[row] = now_s
            self.join(request)
            return
        self.free_blocks += -(-request.computed // self.limits.block_size)
        if request.target == 1:
            self.leaves(request)
            self.on_done(request, now_s)
        else:
            self.leaves(request)
            self.on_prefilled(self, request, now_s)

    # The end.

    def take_all(self) -> list[SimRequest]:
        """Everything that was here or on its way, oldest first, as it was at the last boundary; the worker is empty then."""
        self.settle()
        everyone = [*self.recall(), *self.begun, *self.resumed, *self.arrived, *(request for _, _, request in self.finishes)]
        self.arrived.clear()
        self.begun, self.resumed, self.finishes, self.chunks = [], [], [], []
        self.running = self.decoding_tokens = self.incoming = self.incoming_tokens = self.pending_tokens = (
            self.queued_tokens
        ) = 0
        self._hist = [0] * self.limits.block_size
        self.free_blocks = self.kind.blocks
        self.span, self.end_s = 0, inf
        self.set_floor()
        self.epoch += 1
        self._share = None if self._share is None else ClientTurns()
        if self._cache is not None:
            self._cache.clear()
        return sorted(everyone, key=by_age)
