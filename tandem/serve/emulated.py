"""`EmulatedEngine`: schedules as the real engine does and computes nothing; a step takes the time that a table predicts.

It has a clock of its own: `now_s` stands where the caller set it, and a step moves it to where that step ends. Answers are
letters that follow from seed and position, `max_tokens` of them. A state is its size; it can be admitted once it has had the
time that its transfer is predicted to take. Links are not shared, and what an end token or a grammar would do is not known.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tandem.engine.handoff import Handoff, StateSink
from tandem.engine.types import EngineRequest, EngineStats, TokenOutput
from tandem.sched.batch import BatchLimits, Chunk, Room, StepPlan, plan_step
from tandem.sched.fair import FairShare
from tandem.sched.prefix import prefix_hashes
from tandem.sched.request import Request
from tandem.serve.emulated_state import EmulatedState, EmulatedStep, Letters
from tandem.sim.times import StepTable
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int


@dataclass(slots=True, eq=False)
class _Sequence:
    request: EngineRequest
    life: Request
    hand_off: bool = False
    shift: int = 0
    arrived: Handoff | None = None
    ready_s: float = 0.0
    hashes: tuple[int, ...] = ()


class EmulatedEngine:
    """A `ServedEngine` that takes time and nothing else.

    `blocks` of `limits.block_size` tokens are what its memory holds. `prefix_tokens` of prompts stay known for later prompts
    that begin alike, beside its blocks, in cells of `cell_tokens`. `stride_s` lets steps that only decode be taken several at
    once, up to so many seconds: their tokens come together, which costs the host less.
    """

    def __init__(
        self,
        *,
        times: StepTable,
        limits: BatchLimits,
        blocks: int,
        max_context: int,
        letters: Letters,
        prefix_tokens: int = 0,
        cell_tokens: int = 256,
        stride_s: float = 0.0,
    ) -> None:
        require_int("blocks", blocks, high=10**12)
        require_int("max_context", max_context)
        require_int("prefix_tokens", prefix_tokens, low=0, high=10**12)
        require_int("cell_tokens", cell_tokens)
        if not 0.0 <= stride_s <= 10.0:
            raise SpecError(f"stride_s={stride_s!r}: must be from 0 to 10 seconds")
        self.now_s = 0.0
        """Seconds on the caller's clock."""
        self.max_context = max_context
        self._times, self._limits, self._blocks, self._letters = times, limits, blocks, letters
        self._cell, self._cells, self._stride_s = cell_tokens, prefix_tokens // cell_tokens, stride_s
        self._sent_s: dict[str, float] = {}
        self._known: OrderedDict[int, None] = OrderedDict()
        self._waiting: dict[str, _Sequence] = {}
        self._arrived: dict[str, _Sequence] = {}
        self._running: dict[str, _Sequence] = {}
        self._lives: dict[str, Request] = {}  # of those that run
        self._context = 0
        self._free_blocks, self._free_slots = blocks, limits.max_batch
        self._share = FairShare()
        self._counts = {"steps": 0, "preemptions": 0, "prefix_tokens": 0, "prompt_tokens": 0}
        self._last_step = (0.0, 0, 0)

    # What is asked of it.

    def add(
        self, request: EngineRequest, *, hand_off: bool = False, arrival_s: float | None = None, sink: StateSink | None = None
    ) -> None:
        """Accept a request; raises SpecError, and keeps nothing of it, where it can never be served."""
        self._check(request)
        if sink is not None:
            raise SpecError(f"request {request.id!r}: emulated workers hand states over by reference; give no sink")
        life = Request(
            id=request.id,
            isl=len(request.prompt_ids),
            max_tokens=request.sampling.max_tokens,
            arrival_s=self.now_s if arrival_s is None else arrival_s,
            client=request.client,
            osl=len(request.output_ids),
        )
        self._waiting[request.id] = self._sequence(request, life, hand_off)
        self._share.arrive(request.client)

    def announce_state(self, request_id: str, at_s: float) -> None:
        """A state sets out now, though `import_state` comes only between two steps."""
        self._sent_s[request_id] = at_s

    def import_state(self, handoff: Handoff) -> None:
        """Go on with a request of another engine, once its state has had the time to come."""
        request, state = handoff.request, handoff.state
        sent_s = self._sent_s.pop(request.id, self.now_s)
        self._check(request)
        known = len(request.prompt_ids) + len(request.output_ids) - 1
        if not isinstance(state, EmulatedState) or state.tokens != known or not request.output_ids:
            raise SpecError(f"request {request.id!r}: its state is not that of an emulated worker with {known} tokens")
        life = replace(handoff.life, computed=known, osl=len(request.output_ids))
        sequence = self._sequence(request, life, False)
        sequence.arrived = handoff
        sequence.ready_s = sent_s + self._times.transfer_s(known)
        self._arrived[request.id] = sequence
        self._share.arrive(request.client)

    def export_state(self, request_id: str) -> Handoff:
        """Take a decoding request out. Raises SpecError for one that is not decoding."""
        sequence = self._running.get(request_id)
        if sequence is None:
            raise SpecError(f"request {request_id!r}: is not decoding here")
        return self._handoff(sequence)

    def cancel(self, request_id: str, *, unless_begun: bool = False) -> bool:
        """Forget a request, or only one that holds nothing yet, and free all that it holds; whether that was done."""
        sequence = self._waiting.get(request_id) or self._arrived.get(request_id) or self._running.get(request_id)
        if sequence is None or (unless_begun and (request_id not in self._waiting or sequence.life.computed)):
            return False
        sequence.life.finish_reason, sequence.life.done_s = "cancelled", self.now_s
        self._leave(sequence)
        return True

    @property
    def has_work(self) -> bool:
        """Whether a step would do something, now or once a state has come."""
        return bool(self._running or self._waiting or self._arrived)

    @property
    def next_state_s(self) -> float | None:
        """When the first of the states that are on their way will have come."""
        return min((s.ready_s for s in self._arrived.values()), default=None)

    def step(self) -> EmulatedStep:
        """Schedule, let the time pass, emit. Nothing happens where all that is here are states on their way."""
        result, plan = EmulatedStep(), self._plan()
        if not plan:
            return result
        for life in plan.preempt:
            self._preempt(life)
        for life in plan.admit:
            self._admit(life)
        batch, context, began_s = len(plan.decode), self._context, self.now_s
        chunks = [self._begin(chunk) for chunk in plan.prefill]
        steps = 1
        if chunks:
            self.now_s += self._times.chunks_s(batch, context, chunks)
        else:
            step_s = self._times.decode_s(batch, context)
            steps = self._steps(plan.decode, step_s)
            self.now_s += step_s if steps == 1 else steps * self._times.decode_s(batch, context + batch * (steps - 1) / 2.0)
        for life in plan.decode:
            self._emit(self._running[life.id], steps, result)
            self._share.charge(life.client, steps)
        for chunk in chunks:
            self._prefill(chunk, result)
        self._counts["steps"] += steps
        self._last_step = ((self.now_s - began_s) / steps, batch, sum(chunk.tokens for chunk in chunks))
        return result

    # What it tells of itself.

    @property
    def stats(self) -> EngineStats:
        """Counts of this moment."""
        seconds, rows, tokens = self._last_step
        return EngineStats(
            waiting=len(self._waiting) + len(self._arrived),
            running=len(self._running),
            queued_tokens=sum(s.life.to_prefill for s in self._waiting.values()),
            context_tokens=self._context,
            blocks=self._blocks,
            free_blocks=self._free_blocks,
            slots=self._limits.max_batch,
            free_slots=self._free_slots,
            prefix_bytes=0,
            last_step_s=seconds,
            last_step_rows=rows,
            last_step_tokens=tokens,
            **self._counts,
        )

    def check_integrity(self) -> None:
        """Raise RuntimeError unless what is free and what requests hold add up."""
        holders = [*self._running.values(), *(s for s in self._waiting.values() if s.life.computed)]
        held = sum(self._held(s.life.computed) for s in holders)
        if self._free_blocks + held != self._blocks or self._free_slots + len(holders) != self._limits.max_batch:
            raise RuntimeError(
                f"{len(holders)} requests hold {held} blocks; {self._free_blocks} of {self._blocks} blocks and "
                f"{self._free_slots} of {self._limits.max_batch} slots are free"
            )
        context = sum(s.life.context for s in self._running.values())
        if context != self._context:
            raise RuntimeError(f"{self._context} tokens of context are counted, {context} are there")

    # Schedule.

    def _plan(self) -> StepPlan:
        arrived = [s.life for s in self._arrived.values() if s.ready_s <= self.now_s]
        running = tuple(self._lives.values())
        if not arrived and not self._waiting and len(running) <= self._free_blocks:
            return StepPlan(running)
        return plan_step(
            running=running,
            waiting=[s.life for s in self._waiting.values()],
            arrived=arrived,
            limits=self._limits,
            room=Room(blocks=self._free_blocks, slots=self._free_slots),
            served=self._share.served,
        )

    def _steps(self, decode: Sequence[Request], step_s: float) -> int:
        """Steps to be taken at once: until the first of them ends, within the stride and what is free."""
        most = int(self._stride_s / step_s) if step_s > 0.0 else 1
        if most <= 1 or self._waiting or self._arrived:
            return 1
        block = self._limits.block_size
        most = min(most, self._free_blocks // len(decode) * block, *(life.max_tokens - life.osl for life in decode))
        return max(1, min(most, *(self.max_context - life.context for life in decode)))

    def _check(self, request: EngineRequest) -> None:
        prompt, output, sampling = len(request.prompt_ids), len(request.output_ids), request.sampling
        if request.id in self._running or request.id in self._waiting or request.id in self._arrived:
            raise SpecError(f"request id={request.id!r}: is being served already")
        if not prompt:
            raise SpecError("prompt: has no tokens; give some text")
        if prompt + output >= self.max_context:
            raise SpecError(f"prompt: has {prompt + output:,} tokens; this server reads fewer than {self.max_context:,}")
        if output >= sampling.max_tokens:
            raise SpecError(f"output_ids: has {output} tokens; max_tokens={sampling.max_tokens} are done")
        if sampling.grammar is not None or sampling.logprobs is not None:
            name = "logprobs" if sampling.grammar is None else "response_format"
            raise SpecError(f"{name}: emulated workers compute no answer that could have it; leave it out")
        whole = min(prompt + sampling.max_tokens, self.max_context)
        if self._held(whole + 1) > self._blocks:
            room = self._blocks * self._limits.block_size
            raise SpecError(f"prompt: with max_tokens it may take {whole:,} tokens; an emulated worker holds {room:,}")

    def _sequence(self, request: EngineRequest, life: Request, hand_off: bool) -> _Sequence:
        return _Sequence(request, life, hand_off, (request.sampling.seed + len(request.prompt_ids)) % len(self._letters.ids))

    def _held(self, tokens: int) -> int:
        return -(-tokens // self._limits.block_size)

    def _reach(self, life: Request, computed: int) -> None:
        block = self._limits.block_size
        self._free_blocks += -(-life.computed // block) - -(-computed // block)
        life.computed = computed

    # Run.

    def _preempt(self, life: Request) -> None:
        name = life.id
        sequence = self._running.pop(name, None)
        if sequence is not None:
            self._context -= life.context
            del self._lives[name]
            self._waiting[name] = sequence
        self._reach(life, 0)
        self._free_slots += 1
        life.preemptions += 1
        self._counts["preemptions"] += 1

    def _admit(self, life: Request) -> None:
        sequence = self._arrived.pop(life.id)
        tokens, life.computed = life.computed, 0
        self._reach(life, tokens)
        self._free_slots -= 1
        assert sequence.arrived is not None
        sequence.arrived.done()
        sequence.arrived = None
        if life.decode_start_s is None:
            life.transfer_end_s = life.decode_start_s = self.now_s
        self._run(sequence)

    def _run(self, sequence: _Sequence) -> None:
        life = sequence.life
        self._running[life.id], self._lives[life.id] = sequence, life
        self._context += life.context

    def _begin(self, chunk: Chunk) -> Chunk:
        """What a chunk has still to compute: less than was planned where the prompt's beginning is known."""
        life = chunk.request
        if life.computed:
            return chunk
        sequence, total = self._waiting[life.id], life.to_prefill
        self._free_slots -= 1
        life.prefill_start_s = self.now_s if life.prefill_start_s is None else life.prefill_start_s
        if self._cells:
            sequence.hashes = prefix_hashes((*sequence.request.prompt_ids, *self._output(sequence)), self._cell)
            cells = 0
            for known in sequence.hashes[: (total - 1) // self._cell]:
                if known not in self._known:
                    break
                self._known.move_to_end(known)
                cells += 1
            life.cached = cells * self._cell
            self._reach(life, life.cached)
        self._counts["prompt_tokens"] += total
        self._counts["prefix_tokens"] += life.cached
        return Chunk(life, min(chunk.tokens, life.to_prefill))

    def _prefill(self, chunk: Chunk, result: EmulatedStep) -> None:
        life = chunk.request
        sequence = self._waiting[life.id]
        self._share.charge(life.client, chunk.tokens)
        self._reach(life, life.computed + chunk.tokens)
        if life.to_prefill:
            return
        for known in reversed(sequence.hashes):
            self._known[known] = None
            self._known.move_to_end(known)
        while len(self._known) > self._cells:
            self._known.popitem(last=False)
        del self._waiting[life.id]
        life.prefill_end_s = self.now_s if life.prefill_end_s is None else life.prefill_end_s
        self._run(sequence)
        if not life.osl:
            self._emit(sequence, 1, result)
        if life.id not in self._running:
            return
        if sequence.hand_off:
            result.handoffs.append(self._handoff(sequence))
        elif life.decode_start_s is None:
            life.decode_start_s = self.now_s

    def _emit(self, sequence: _Sequence, count: int, result: EmulatedStep) -> None:
        """`count` more tokens of a running request: the last of them at this moment."""
        life, letters = sequence.life, self._letters
        index, first = life.osl, life.first_token_s is None
        if first:
            life.first_token_s = self.now_s
        life.osl += count
        self._context += count
        if life.computed < life.context - 1:
            self._reach(life, life.context - 1)
        places = [(sequence.shift + i) % len(letters.ids) for i in range(index, life.osl)]
        text = "".join([letters.texts[i] for i in places])
        ended = life.osl >= life.max_tokens or life.context >= self.max_context
        if ended:
            life.finish_reason, life.done_s = "length", self.now_s
            self._leave(sequence)
            result.finished.append(life)
        result.outputs.append(
            TokenOutput(
                life.id,
                index,
                tuple([letters.ids[i] for i in places]),
                text,
                finish_reason="length" if ended else None,
                cached_tokens=life.cached if first else None,
            )
        )

    def _output(self, sequence: _Sequence) -> tuple[int, ...]:
        ids, given = self._letters.ids, sequence.request.output_ids
        more = range(len(given), sequence.life.osl)
        return (*given, *(ids[(sequence.shift + i) % len(ids)] for i in more))

    def _handoff(self, sequence: _Sequence) -> Handoff:
        life = sequence.life
        tokens = life.computed
        self._leave(sequence)
        if life.decode_start_s is None:
            life.transfer_start_s = self.now_s
        state: Any = EmulatedState(tokens, int(self._times.transfer_bytes(tokens)))
        return Handoff(replace(sequence.request, output_ids=self._output(sequence)), life, state)

    def _leave(self, sequence: _Sequence) -> None:
        """Free what a request holds, wherever it is."""
        life, name = sequence.life, sequence.life.id
        if self._running.pop(name, None) is not None:
            del self._lives[name]
            self._context -= life.context
        waited = self._waiting.pop(name, None) is not None
        came = self._arrived.pop(name, None) is not None
        if not came and (life.computed or not waited):
            computed = life.computed
            self._reach(life, 0)
            life.computed = computed
            self._free_slots += 1
        if sequence.arrived is not None:
            sequence.arrived.done()
            sequence.arrived = None
        self._share.leave(life.client)
