"""One engine: requests in, tokens out, one step at a time: schedule -> run -> emit. Read this first, then `sched.batch` (what a
step does), `memory.py` with `cache.py` and `prefix.py` (where state lies), `runner.py` (how it is computed), `choose.py` (which
token is next).

An engine is synchronous, has no threads of its own and reads time only from the clock it is given. Whether it is a prefill
worker or a decode worker is not its business: a request added with `hand_off` leaves it after its first token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from tandem.engine.choose import Choice, choose
from tandem.engine.config import EngineConfig, free_memory_bytes, size_cache
from tandem.engine.handoff import Handoff, StateSink
from tandem.engine.memory import Memory
from tandem.engine.runner import Runner
from tandem.engine.sequence import LiveSequence, StepResult, check_request, ids_of
from tandem.engine.types import EngineRequest, EngineStats, Generation, SamplingParams, TokenOutput
from tandem.engine.vocabulary import Vocabulary
from tandem.model.hybrid import Decoder
from tandem.model.state import SequenceState
from tandem.model.tokenizer import Tokenizer
from tandem.sched.batch import BatchLimits, Chunk, Room, plan_step
from tandem.sched.fair import FairShare
from tandem.sched.prefix import prefix_hashes
from tandem.sched.request import FinishReason, Request
from tandem.spec.errors import SpecError


class Engine:
    """Serves many requests on one decoder. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        model: Decoder,
        *,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config = config = config or EngineConfig()
        self.model, self.tokenizer, self._clock = model, tokenizer, clock
        spec = model.spec
        self.size = size_cache(spec, config, model.state_dtype, free_bytes=free_memory_bytes(model.device))
        self.max_context = min(config.max_context or spec.max_context, spec.max_context, self.size.max_tokens(config))
        """Most tokens of prompt and output: the model's, the config's, or all that the cache holds."""
        self.vocabulary = Vocabulary(tokenizer, spec.vocab_size, model.token_ids.eos)
        self._memory = Memory(
            spec, self.size, config, max_context=self.max_context, dtype=model.state_dtype, device=model.device
        )
        self._runner = Runner(model, self._memory.paged, threads=config.threads)
        self._limits = BatchLimits(
            max_batch=config.max_batch,
            step_tokens=config.step_tokens,
            pass_tokens=config.pass_tokens,
            block_size=config.block_size,
        )
        self._waiting: dict[str, LiveSequence] = {}
        self._arrived: dict[str, LiveSequence] = {}
        self._running: dict[str, LiveSequence] = {}
        self._share = FairShare()
        self._counts = {"steps": 0, "preemptions": 0, "prefix_tokens": 0, "prompt_tokens": 0}
        self._last_step = (0.0, 0, 0)

    # What is asked of it.

    def add(
        self, request: EngineRequest, *, hand_off: bool = False, arrival_s: float | None = None, sink: StateSink | None = None
    ) -> None:
        """Accept a request; raises SpecError, and keeps nothing of it, where it can never be served."""
        self._check(request)
        sampling, prompt = request.sampling, request.prompt_ids
        life = Request(
            id=request.id,
            isl=len(prompt),
            max_tokens=sampling.max_tokens,
            arrival_s=self._clock() if arrival_s is None else arrival_s,
            client=request.client,
            osl=len(request.output_ids),
        )
        self._waiting[request.id] = LiveSequence.of(request, life, self.vocabulary, hand_off=hand_off, sink=sink)
        self._share.arrive(request.client)

    def import_state(self, handoff: Handoff) -> None:
        """Go on with a request that another engine began; its state is copied once there is room, in order of arrival."""
        request = handoff.request
        self._check(request)
        if handoff.state is None:
            raise SpecError(f"request {request.id!r}: its state is missing; open the receipt first")
        if not request.output_ids:
            raise SpecError(f"request {request.id!r}: a request is handed over with its first token")
        handoff.state.check(self.model.spec, 1, self.model.device)
        known = int(handoff.state.lengths[0])
        if known != len(request.prompt_ids) + len(request.output_ids) - 1:
            raise SpecError(f"request {request.id!r}: its state has {known} tokens, all but the newest would be right")
        life = replace(handoff.life, computed=known, osl=len(request.output_ids))
        sequence = LiveSequence.of(request, life, self.vocabulary)
        sequence.state, sequence.arrived = handoff.state, handoff
        self._arrived[request.id] = sequence
        self._share.arrive(request.client)

    def export_state(self, request_id: str) -> Handoff:
        """Take a decoding request out of this engine, with its state. Raises SpecError for one that is not decoding."""
        sequence = self._running.pop(request_id, None)
        if sequence is None or sequence.slot is None:
            raise SpecError(f"request {request_id!r}: is not decoding here")
        state = self.model.new_state(1, capacity=sequence.life.computed)
        self._memory.read(sequence.slot, state, sequence.life.computed)
        self._leave(sequence)
        return self._handoff(sequence, state, None)

    def cancel(self, request_id: str, *, unless_begun: bool = False) -> bool:
        """Forget a request, or only one that holds nothing yet, and free all that it holds; whether that was done."""
        for place in (self._waiting, self._arrived, self._running):
            sequence = place.get(request_id)
            if sequence is not None and not (unless_begun and (place is not self._waiting or sequence.slot is not None)):
                del place[request_id]
                sequence.life.finish_reason, sequence.life.done_s = "cancelled", self._clock()
                self._leave(sequence)
                return True
        return False

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._waiting or self._arrived or self._running)

    def step(self) -> StepResult:
        """Schedule, run, emit: at most one token of each decoding request, and some passes over waiting prompts."""
        started = self._clock()
        result = StepResult([], [], [])
        plan = plan_step(
            running=[s.life for s in self._running.values()],
            waiting=[s.life for s in self._waiting.values()],
            arrived=[s.life for s in self._arrived.values()],
            limits=self._limits,
            room=Room(blocks=self._memory.free_blocks, slots=self._memory.free_slots),
            served=self._share.served,
            frees=self._frees,
        )
        for life in plan.preempt:
            self._preempt(life.id)
        for life in plan.admit:
            self._admit(self._arrived.pop(life.id))
        if plan.decode:
            self._decode([self._running[life.id] for life in plan.decode], result)
        tokens = sum(self._prefill(self._waiting[chunk.request.id], chunk, result) for chunk in plan.prefill)
        self._counts["steps"] += 1
        self._last_step = (self._clock() - started, len(plan.decode), tokens)
        return result

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Generation]:
        """The outputs of several prompts (texts or token ids), in their order; one `sampling` for all, or one each."""
        if isinstance(prompts, str):
            raise SpecError("prompts: must be a list of texts or of lists of token ids")
        if self.has_work:
            raise SpecError("generate: the engine is serving requests; add to them, or use another engine")
        each = list(sampling) if isinstance(sampling, Sequence) else [sampling or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise SpecError(f"sampling has {len(each)} entries: prompts has {len(prompts)}")
        requests = [
            EngineRequest(id=str(i), prompt_ids=ids_of(prompt, self.tokenizer), sampling=params)
            for i, (prompt, params) in enumerate(zip(prompts, each, strict=True))
        ]
        try:
            for request in requests:
                self.add(request)
            found: dict[str, list[TokenOutput]] = {request.id: [] for request in requests}
            while self.has_work:
                for output in self.step().outputs:
                    found[output.request_id].append(output)
        finally:
            for request in requests:
                self.cancel(request.id)
        return [Generation.of(outputs) for outputs in found.values()]

    # What it tells of itself.

    @property
    def stats(self) -> EngineStats:
        """Counts of this moment."""
        waiting = [s.life for s in self._waiting.values()]
        seconds, rows, tokens = self._last_step
        return EngineStats(
            waiting=len(waiting) + len(self._arrived),
            running=len(self._running),
            queued_tokens=sum(life.to_prefill for life in waiting),
            context_tokens=sum(s.life.context for s in self._running.values()),
            blocks=self._memory.num_blocks,
            free_blocks=self._memory.free_blocks if self.size.block_bytes else 0,
            slots=self.size.num_slots,
            free_slots=self._memory.free_slots,
            prefix_bytes=self._memory.prefixes.nbytes,
            last_step_s=seconds,
            last_step_rows=rows,
            last_step_tokens=tokens,
            **self._counts,
        )

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every block and slot is free or held by a request here or by the prefix cache."""
        everyone = [s for place in (self._waiting, self._arrived, self._running) for s in place.values()]
        slots = [s.slot for s in everyone if s.slot is not None]
        self._memory.check(slots)

    # Schedule.

    def _check(self, request: EngineRequest) -> None:
        if any(request.id in place for place in (self._waiting, self._arrived, self._running)):
            raise SpecError(f"request id={request.id!r}: is being served already")
        check_request(request, vocabulary=self.vocabulary, max_context=self.max_context)

    def _preempt(self, request_id: str) -> None:
        """Free what a request holds; it waits again, to be computed anew from its prompt and output."""
        sequence = self._running.pop(request_id, None) or self._waiting[request_id]
        self._release(sequence)
        if sequence.sink is not None:  # it has taken what will be computed again
            sequence.sink.abort()
            sequence.sink = None
        sequence.life.computed = 0
        sequence.life.preemptions += 1
        self._counts["preemptions"] += 1
        self._waiting[sequence.life.id] = sequence

    def _frees(self, life: Request) -> int:
        """Blocks that come free if a request gives its own back."""
        slot = (self._running.get(life.id) or self._waiting[life.id]).slot
        return 0 if slot is None else self._memory.frees(slot)

    def _leave(self, sequence: LiveSequence) -> None:
        """Free what a request holds and count its client's requests one less."""
        self._release(sequence)
        self._share.leave(sequence.life.client)
        if sequence.sink is not None:
            sequence.sink.abort()
        if sequence.arrived is not None:
            sequence.arrived.done()
        sequence.sink = sequence.arrived = None

    def _release(self, sequence: LiveSequence) -> None:
        if sequence.slot is not None:
            self._memory.drop(sequence.slot)
        sequence.slot = sequence.state = None

    # Run.

    def _admit(self, sequence: LiveSequence) -> None:
        """Copy a state that has come into blocks and a slot of our own."""
        life, state, arrived = sequence.life, sequence.state, sequence.arrived
        assert state is not None
        assert arrived is not None
        slot = sequence.slot = self._memory.take_slot()
        self._memory.reach(slot, life.computed)
        self._memory.write(slot, state, 0, life.computed)
        self._memory.paged.write_slot(state, slot)
        arrived.done()
        sequence.state = sequence.arrived = None
        if life.decode_start_s is None:  # else it has moved while it decoded: no transfer that a client waited for
            life.transfer_end_s = life.decode_start_s = self._clock()
        self._running[life.id] = sequence

    def _begin(self, sequence: LiveSequence) -> None:
        """The state that a prefill goes on from: empty, or that of a kept prefix."""
        life, cell = sequence.life, self.config.pass_tokens
        total = life.to_prefill
        sequence.hashes = prefix_hashes(sequence.tokens[:total], cell) if self.size.prefix_bytes else ()
        match = self._memory.prefixes.match(sequence.hashes[: (total - 1) // cell])
        sequence.known_cells = match.cells
        slot = sequence.slot = self._memory.take_slot()
        state = sequence.state = self.model.new_state(1, capacity=total)
        life.prefill_start_s = self._clock() if life.prefill_start_s is None else life.prefill_start_s
        life.computed = life.cached = self._memory.reuse(slot, state, match) if match.usable else 0
        if match.usable and sequence.sink is not None:
            for i, layer in enumerate(state.layers):
                sequence.sink.put(i, layer, 0, life.computed, final=False)
        self._counts["prompt_tokens"] += total
        self._counts["prefix_tokens"] += life.computed

    def _prefill(self, sequence: LiveSequence, chunk: Chunk, result: StepResult) -> int:
        """The passes of a chunk; tokens computed, which are fewer where a kept prefix had some."""
        life, cell = sequence.life, self.config.pass_tokens
        if sequence.state is None:
            self._begin(sequence)
        state, sink, total = sequence.state, sequence.sink, life.computed + life.to_prefill
        assert state is not None
        assert sequence.slot is not None
        until = min(life.computed + chunk.tokens, total)
        if until < total:  # a kept prefix may have moved the beginning; passes end on the grid all the same
            until -= until % cell
        logits, started = None, life.computed
        while life.computed < until:
            begin = life.computed
            end = min(begin - begin % cell + cell, total)
            after = None if sink is None else _sender(sink, state, begin, end, end == total)
            first = end == total and life.osl == 0
            logits = self._runner.prefill(sequence.tokens[begin:end], state, last=first, after_layer=after)
            self._memory.reach(sequence.slot, end)
            self._memory.write(sequence.slot, state, begin, end)
            life.computed = end
            self._share.charge(life.client, end - begin)
            if sequence.hashes and end % cell == 0:
                self._keep(sequence, end // cell, (total - 1) // cell)
        if life.computed == total:
            self._finish_prefill(sequence, logits, result)
        return until - started

    def _keep(self, sequence: LiveSequence, number: int, last: int) -> None:
        assert sequence.slot is not None
        wanted = self._memory.prefixes.wants_snapshot(number, last, min(sequence.known_cells, last))
        self._memory.keep(sequence.slot, sequence.hashes, number, sequence.state if wanted else None)

    def _finish_prefill(self, sequence: LiveSequence, logits: Tensor | None, result: StepResult) -> None:
        """A prompt is read: choose its first token, unless it had one before, and hand it off or let it decode."""
        life, state = sequence.life, sequence.state
        assert state is not None
        assert sequence.slot is not None
        del self._waiting[life.id]
        life.prefill_end_s = self._clock() if life.prefill_end_s is None else life.prefill_end_s
        sequence.state = None
        self._running[life.id] = sequence
        if logits is not None:
            (choice,) = choose(logits, [sequence.chooser])
            self._emit(sequence, choice, result)
        if life.id not in self._running:
            return
        if not sequence.hand_off:
            self._memory.paged.write_slot(state, sequence.slot)
            life.decode_start_s = self._clock() if life.decode_start_s is None else life.decode_start_s
            return
        del self._running[life.id]
        receipt = None
        if sequence.sink is not None:
            receipt, sequence.sink = sequence.sink.close(), None
        self._leave(sequence)
        result.handoffs.append(self._handoff(sequence, state if receipt is None else None, receipt))

    def _handoff(self, sequence: LiveSequence, state: SequenceState | None, receipt: Any) -> Handoff:
        if sequence.life.decode_start_s is None:
            sequence.life.transfer_start_s = self._clock()
        output = tuple(sequence.tokens[sequence.life.isl :])
        return Handoff(replace(sequence.request, output_ids=output), sequence.life, state, receipt)

    def _decode(self, sequences: list[LiveSequence], result: StepResult) -> None:
        slots = [s.slot for s in sequences if s.slot is not None]
        lengths = [s.life.computed for s in sequences]
        for slot, length in zip(slots, lengths, strict=True):
            self._memory.reach(slot, length + 1)
        logits = self._runner.decode([s.tokens[-1] for s in sequences], lengths, slots, self._memory.rows(slots))
        choices = choose(logits, [s.chooser for s in sequences])
        for sequence, choice in zip(sequences, choices, strict=True):
            sequence.life.computed += 1
            self._share.charge(sequence.life.client, 1)
            self._emit(sequence, choice, result)

    # Emit.

    def _emit(self, sequence: LiveSequence, choice: Choice, result: StepResult) -> None:
        life, sampling, token = sequence.life, sequence.request.sampling, choice.token_id
        now = self._clock()
        first = life.first_token_s is None
        life.first_token_s = now if first else life.first_token_s
        index, life.osl = life.osl, life.osl + 1
        sequence.tokens.append(token)
        ended = (token in self.vocabulary.eos and not sampling.ignore_eos) or token in sampling.stop_token_ids
        text, stopped = "", False
        if sequence.text is not None and not ended:
            piece = sequence.text.push(token)
            text, stopped = piece.text, piece.stopped
        reason: FinishReason | None = None
        if sequence.chooser.error is not None:
            reason = "error"
        elif ended or stopped or sequence.chooser.finished_by_grammar:
            reason = "stop"
        elif life.osl >= sampling.max_tokens or life.context >= self.max_context:
            reason = "length"
        if reason is not None:
            if sequence.text is not None and not stopped:
                text += sequence.text.flush()
            life.finish_reason, life.done_s = reason, now
            del self._running[life.id]
            self._leave(sequence)
            result.finished.append(life)
        logprobs = None if choice.logprobs is None else (choice.logprobs,)
        result.outputs.append(
            TokenOutput(
                life.id, index, (token,), text, logprobs, reason, sequence.chooser.error, life.cached if first else None
            )
        )


def _sender(sink: StateSink, state: SequenceState, begin: int, end: int, final: bool) -> Callable[[int], None]:
    return lambda layer: sink.put(layer, state.layers[layer], begin, end, final=final)
