"""`Worker`: one engine that is told what to do by commands and answers with events. It knows of no thread, socket or Ray.

Any host does the same with it: handle the commands that have come, make one step, send the events on; see `inbox.run_worker`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from tandem.engine.handoff import Handoff, StateSink
from tandem.engine.transfer import OpenedState
from tandem.engine.types import EngineRequest, EngineStats, TokenOutput
from tandem.sched.request import Request
from tandem.serve.messages import (
    Accept,
    Batch,
    Cancel,
    Capacity,
    Command,
    Event,
    Export,
    Finished,
    HandedOff,
    Inspect,
    Inspected,
    Outputs,
    Ping,
    Pong,
    Recall,
    Refused,
    Release,
    Returned,
    Stop,
    Submit,
    Taken,
    WorkerStats,
)
from tandem.spec.errors import Infeasible, SpecError

STATS_INTERVAL_S = 0.05
"""A worker tells how busy it is at most this often while it works, and once more when it falls idle."""


class StepOutcome(Protocol):
    """What a step of an engine brings."""

    @property
    def outputs(self) -> list[TokenOutput]:
        """Tokens, in order."""
        ...

    @property
    def handoffs(self) -> list[Handoff]:
        """Requests whose prefill is done and that are to be decoded elsewhere."""
        ...

    @property
    def finished(self) -> list[Request]:
        """Lives of the requests that finished in this step."""
        ...


class ServedEngine(Protocol):
    """What a worker needs of an engine: `tandem.engine.Engine`, or one that only takes time."""

    def add(self, request: EngineRequest, *, hand_off: bool, arrival_s: float | None, sink: StateSink | None) -> None:
        """Accept a request."""
        ...

    def import_state(self, handoff: Handoff) -> None:
        """Go on with a request of another engine."""
        ...

    def export_state(self, request_id: str) -> Handoff:
        """Take a decoding request out, with its state."""
        ...

    def cancel(self, request_id: str, *, unless_begun: bool = False) -> bool:
        """Forget a request, or only one that holds nothing yet; whether that was done."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        ...

    def step(self) -> StepOutcome:
        """Schedule, run, emit."""
        ...

    @property
    def stats(self) -> EngineStats:
        """Counts of this moment."""
        ...

    def check_integrity(self) -> None:
        """Raise RuntimeError where blocks or slots leak."""
        ...


class StateLink(Protocol):
    """How states leave and enter a worker that shares no memory with its peers; see `build.ModelStates`."""

    def sink(self, request: EngineRequest) -> StateSink | Infeasible:
        """Takes the state of one request while it is prefilled; Infeasible until states that lie there have been fetched.
        Raises SpecError where it can never fit."""
        ...

    def open(self, receipt: Any) -> OpenedState:
        """The state behind another worker's receipt. Raises SpecError where it is damaged or gone."""
        ...

    def release(self, receipt: Any) -> None:
        """Free a state that its receiver has taken or will not read; doing so twice does nothing."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


@dataclass(slots=True)
class _Arriving:
    tokens: int
    bytes: int
    came_s: float


class Worker:
    """Hosts an engine. An error of one request becomes its output; anything else that goes wrong is raised: the worker dies.

    `link` None hands states over by reference, within one process.
    """

    def __init__(
        self,
        engine: ServedEngine,
        capacity: Capacity,
        *,
        clock: Callable[[], float],
        link: StateLink | None = None,
        stats_interval_s: float = STATS_INTERVAL_S,
    ) -> None:
        self.capacity = capacity
        self._engine, self._clock, self._link = engine, clock, link
        self._interval_s = stats_interval_s
        self._events: list[Event] = []
        self._deferred: deque[tuple[Submit, float]] = deque()  # with their arrival; until there is room for their states
        self._unsent: deque[Handoff] = deque()  # likewise
        self._held: dict[str, Any] = {}  # receipts of states that peers may still read
        self._arriving: dict[str, _Arriving] = {}
        self._wanted: set[str] = set()  # to be exported as soon as they decode
        self._handled = 0
        self._taken, self._taken_bytes, self._taken_s = 0, 0, 0.0
        self._told: WorkerStats | None = None
        self._told_s: float | None = None

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing and there is nothing to tell; a new worker has to tell that it is there."""
        return not self._engine.has_work and not self._events and self._told is not None

    def handle(self, command: Command) -> None:
        """Do, or begin, what a command says. What it brings comes with the next step."""
        match command:
            case Submit():
                self._handled += 1
                self._deferred.append((command, self._clock() - command.waited_s))
            case Accept(handoff):
                self._handled += 1
                self._accept(handoff)
            case Export(request_id):
                self._wanted.add(request_id)
            case Recall(request_id):
                self._recall(request_id)
            case Cancel(request_id):
                self._cancel(request_id)
            case Release(request_id):
                receipt = self._held.pop(request_id, None)
                if receipt is not None and self._link is not None:
                    self._link.release(receipt)
            case Ping(number):
                self._events.append(Pong(number))
            case Inspect(number):
                self._events.append(Inspected(number, self._inspect()))
            case Stop():
                raise RuntimeError("Stop is for the host")

    def step(self) -> Batch | None:
        """One step of the engine, if it has work; all events since the last one, None where there are none."""
        while self._unsent and self._sent(self._unsent[0]):
            self._unsent.popleft()
        self._submit()
        self._export()
        if self._engine.has_work:
            result = self._engine.step()
            self._events.extend(Finished(life) for life in result.finished)
            self._wanted.difference_update(life.id for life in result.finished)
            if result.outputs:
                self._events.append(Outputs(tuple(result.outputs)))
            for handoff in result.handoffs:
                self._give(handoff)
        self._export()
        now = self._clock()
        stats = self._news(now)
        if stats is not None:
            self._events.append(stats)
        if not self._events:
            return None
        events, self._events = tuple(self._events), []
        return Batch(now, events)

    def close(self) -> None:
        """Free what peers could still read."""
        self._held.clear()
        if self._link is not None:
            self._link.close()

    def _submit(self) -> None:
        """Add what was submitted; what is to be handed off waits, in order, until its state has somewhere to go."""
        waiting: deque[tuple[Submit, float]] = deque()
        while self._deferred:
            command, arrival_s = self._deferred.popleft()
            request = command.request
            sink: StateSink | None = None
            try:
                if command.hand_off and self._link is not None:
                    answer = self._link.sink(request) if not waiting else Infeasible("others were here before")
                    if isinstance(answer, Infeasible):
                        waiting.append((command, arrival_s))
                        continue
                    sink = answer
                self._engine.add(request, hand_off=command.hand_off, arrival_s=arrival_s, sink=sink)
            except SpecError as wrong:
                if sink is not None:
                    sink.abort()
                failed = TokenOutput(request.id, len(request.output_ids), (), "", finish_reason="error", error=str(wrong))
                self._events.append(Outputs((failed,)))
        self._deferred = waiting

    def _export(self) -> None:
        """Give away what is to leave: at once what decodes, later what will."""
        for name in list(self._wanted):
            with suppress(SpecError):
                self._give(self._engine.export_state(name))
                self._wanted.discard(name)
        if not self._engine.has_work and not self._deferred:
            self._wanted.clear()  # they are not here

    def _cancel(self, name: str) -> None:
        self._deferred = deque(pair for pair in self._deferred if pair[0].request.id != name)
        self._unsent = deque(handoff for handoff in self._unsent if handoff.request.id != name)
        self._wanted.discard(name)
        self._engine.cancel(name)

    def _recall(self, name: str) -> None:
        deferred = len(self._deferred)
        self._deferred = deque(pair for pair in self._deferred if pair[0].request.id != name)
        if len(self._deferred) < deferred or self._engine.cancel(name, unless_begun=True):
            self._wanted.discard(name)
            self._events.append(Returned(name))
            self._told_s = None  # it is routed anew at once, by what this worker has left

    def _accept(self, handoff: Handoff) -> None:
        name = handoff.request.id
        try:
            if handoff.state is None:
                if self._link is None:
                    raise SpecError(f"request {name!r}: came with a receipt; this worker takes states by reference")
                opened = self._link.open(handoff.receipt)
                handoff.state, handoff.release = opened.state, opened.release
            tokens = len(handoff.request.prompt_ids) + len(handoff.request.output_ids)
            self._arriving[name] = _Arriving(tokens, handoff.state.nbytes, self._clock())
            handoff.release = partial(self._take, name, handoff.release)
            self._engine.import_state(handoff)
        except SpecError as wrong:
            handoff.done()
            self._events.append(Refused(name, str(wrong)))

    def _take(self, name: str, release: Callable[[], None] | None) -> None:
        """The state of a hand-off has been copied, or is not needed."""
        if release is not None:
            release()
        arrived = self._arriving.pop(name)
        self._taken += 1
        self._taken_bytes += arrived.bytes
        self._taken_s += self._clock() - arrived.came_s
        self._events.append(Taken(name))

    def _give(self, handoff: Handoff) -> None:
        if not self._sent(handoff):
            self._unsent.append(handoff)

    def _sent(self, handoff: Handoff) -> bool:
        """Offer a request to the others, with its state or the receipt of it; False while there is no room for that."""
        if self._link is not None:
            if handoff.receipt is None:
                receipt = self._copied(handoff)
                if receipt is None:
                    return False
                handoff.receipt = receipt
            handoff.state = None
            self._held[handoff.request.id] = handoff.receipt
        self._events.append(HandedOff(handoff))
        return True

    def _copied(self, handoff: Handoff) -> Any:
        """Receipt of a state that no sink took while it was made: exported, or computed anew after it was preempted."""
        request, state = handoff.request, handoff.state
        assert self._link is not None
        assert state is not None
        sink = self._link.sink(request)
        if isinstance(sink, Infeasible):
            return None
        for i, layer in enumerate(state.layers):
            sink.put(i, layer, 0, int(state.lengths[0]), final=True)
        return sink.close()

    def _inspect(self) -> str | None:
        try:
            self._engine.check_integrity()
        except RuntimeError as wrong:
            return str(wrong)
        return None

    def _news(self, now: float) -> WorkerStats | None:
        working = self._engine.has_work and self._told_s is not None
        if working and now - (self._told_s or 0.0) < self._interval_s:
            return None
        stats = self._stats()
        if stats == self._told:
            return None
        self._told, self._told_s = stats, now
        return stats

    def _stats(self) -> WorkerStats:
        engine = self._engine.stats
        arriving_tokens = sum(a.tokens for a in self._arriving.values())
        if engine.blocks:
            free = engine.free_blocks * self.capacity.tokens // engine.blocks
        else:
            free = engine.free_slots * self.capacity.max_context
        return WorkerStats(
            handled=self._handled,
            engine=engine,
            free_tokens=max(0, free - arriving_tokens),
            deferred=len(self._deferred),
            deferred_tokens=sum(len(c.request.prompt_ids) + len(c.request.output_ids) for c, _ in self._deferred),
            arriving=len(self._arriving),
            arriving_tokens=arriving_tokens,
            held_states=len(self._held),
            taken=self._taken,
            taken_bytes=self._taken_bytes,
            taken_s=self._taken_s,
        )
