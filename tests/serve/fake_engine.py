"""An engine that computes nothing: its tokens follow from prompt and position, so that lost, doubled or mixed-up ones show."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any

from tandem.engine.handoff import Handoff, StateSink
from tandem.engine.types import EngineRequest, EngineStats, TokenOutput
from tandem.sched.request import Request
from tandem.serve.messages import Capacity
from tandem.serve.worker import Worker
from tandem.spec.errors import Infeasible, SpecError

POISON = 666
"""A prompt that begins with it kills whoever prefills it."""
STUCK = 667
"""A prompt that begins with it makes the step hang, as far as anybody can tell."""


def digest(*parts: object) -> int:
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


def token_at(request: EngineRequest, index: int) -> int:
    return digest(request.prompt_ids, request.sampling.seed, index) % 50_000


def expected(request: EngineRequest) -> list[int]:
    return [token_at(request, i) for i in range(request.sampling.max_tokens)]


@dataclass(frozen=True)
class FakeState:
    """Stands for keys and values: says of which tokens it is."""

    of: int
    tokens: int

    @property
    def nbytes(self) -> int:
        return 16 * self.tokens


@dataclass(slots=True, eq=False)
class Going:
    request: EngineRequest
    life: Request
    hand_off: bool
    output: list[int]
    sink: Any = None
    arrived: Handoff | None = None

    def state(self) -> FakeState:
        ids = [*self.request.prompt_ids, *self.output]
        return FakeState(digest(ids[:-1]), len(ids) - 1)


@dataclass
class FakeResult:
    outputs: list[TokenOutput]
    handoffs: list[Handoff]
    finished: list[Request]


class FakeEngine:
    def __init__(
        self,
        *,
        max_batch: int = 16,
        tokens: int = 100_000,
        max_context: int = 10_000,
        pass_tokens: int = 64,
        step_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_batch, self.tokens, self.max_context, self.pass_tokens = max_batch, tokens, max_context, pass_tokens
        self.step_s, self.clock = step_s, clock
        self.waiting: dict[str, Going] = {}
        self.arrived: dict[str, Going] = {}
        self.running: dict[str, Going] = {}
        self.steps = 0
        self.prompt_tokens = 0
        self.leaked = 0

    def capacity(self) -> Capacity:
        return Capacity(max_context=self.max_context, max_batch=self.max_batch, tokens=self.tokens)

    @property
    def held_tokens(self) -> int:
        everyone = [*self.waiting.values(), *self.running.values()]
        return sum(len(g.request.prompt_ids) + len(g.output) for g in everyone if g.life.computed)

    def check(self, request: EngineRequest) -> None:
        if request.id in self.waiting or request.id in self.running or request.id in self.arrived:
            raise SpecError(f"request id={request.id!r}: is being served already")
        if not request.prompt_ids:
            raise SpecError("prompt: has no tokens; give some text")
        if len(request.prompt_ids) + request.sampling.max_tokens > self.max_context:
            raise SpecError(f"prompt: has {len(request.prompt_ids)} tokens; too many")

    def add(self, request: EngineRequest, *, hand_off: bool, arrival_s: float | None, sink: StateSink | None) -> None:
        self.check(request)
        life = Request(
            id=request.id,
            isl=len(request.prompt_ids),
            max_tokens=request.sampling.max_tokens,
            arrival_s=self.clock() if arrival_s is None else arrival_s,
            client=request.client,
            osl=len(request.output_ids),
        )
        self.waiting[request.id] = Going(request, life, hand_off, list(request.output_ids), sink)

    def import_state(self, handoff: Handoff) -> None:
        self.check(handoff.request)
        going = Going(handoff.request, replace(handoff.life), False, list(handoff.request.output_ids), arrived=handoff)
        if handoff.state != going.state():
            raise SpecError(f"request {handoff.request.id!r}: its state is damaged")
        self.arrived[handoff.request.id] = going

    def export_state(self, request_id: str) -> Handoff:
        if request_id not in self.running:
            raise SpecError(f"request {request_id!r}: is not decoding here")
        return self.handoff(self.running.pop(request_id))

    def cancel(self, request_id: str, *, unless_begun: bool = False) -> bool:
        if unless_begun and (request_id not in self.waiting or self.waiting[request_id].life.computed):
            return False
        for place in (self.waiting, self.arrived, self.running):
            going = place.pop(request_id, None)
            if going is not None:
                self.release(going)
                return True
        return False

    def release(self, going: Going) -> None:
        if going.sink is not None:
            going.sink.abort()
        if going.arrived is not None:
            going.arrived.done()

    def handoff(self, going: Going) -> Handoff:
        going.life.transfer_start_s = self.clock()
        request = replace(going.request, output_ids=tuple(going.output))
        state: Any = going.state()
        if going.sink is None:
            return Handoff(request, going.life, state)
        going.sink.state = state
        return Handoff(request, going.life, None, going.sink.close())

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.arrived or self.running)

    def step(self) -> FakeResult:
        if self.step_s:
            time.sleep(self.step_s)  # a step takes time; nothing is waited for
        self.steps += 1
        result = FakeResult([], [], [])
        for name, going in list(self.arrived.items()):
            if len(self.running) < self.max_batch and self.held_tokens < self.tokens:
                del self.arrived[name]
                assert going.arrived is not None
                going.arrived.done()
                going.arrived = None
                going.life.transfer_end_s = going.life.decode_start_s = self.clock()
                self.running[name] = going
        for going in list(self.running.values()):
            self.emit(going, result)
        for going in list(self.waiting.values())[:1]:
            self.prefill(going, result)
        return result

    def prefill(self, going: Going, result: FakeResult) -> None:
        life = going.life
        if len(self.running) >= self.max_batch:
            return
        if going.request.prompt_ids[0] == POISON:
            raise RuntimeError("the poison has been eaten")
        while going.request.prompt_ids[0] == STUCK:
            time.sleep(0.01)
        if life.prefill_start_s is None:
            life.prefill_start_s = self.clock()
        life.computed = min(life.computed + self.pass_tokens, life.context)
        if life.computed < life.context:
            return
        self.prompt_tokens += life.context
        life.prefill_end_s = self.clock()
        del self.waiting[life.id]
        self.running[life.id] = going
        self.emit(going, result)
        if life.id in self.running and going.hand_off:
            result.handoffs.append(self.handoff(self.running.pop(life.id)))
        elif life.id in self.running:
            life.decode_start_s = life.prefill_end_s

    def emit(self, going: Going, result: FakeResult) -> None:
        life, index = going.life, len(going.output)
        token = token_at(going.request, index)
        going.output.append(token)
        life.osl += 1
        life.computed = life.context - 1
        if life.first_token_s is None:
            life.first_token_s = self.clock()
        reason: Any = None
        if life.osl >= life.max_tokens:
            reason, life.done_s = "length", self.clock()
            life.finish_reason = reason
            self.release(going)
            result.finished.append(self.running.pop(life.id).life)
        result.outputs.append(TokenOutput(life.id, index, (token,), f" {token}", finish_reason=reason))

    @property
    def stats(self) -> EngineStats:
        free = max(0, self.tokens - self.held_tokens)
        return EngineStats(
            waiting=len(self.waiting) + len(self.arrived),
            running=len(self.running),
            queued_tokens=sum(g.life.context - g.life.computed for g in self.waiting.values()),
            context_tokens=sum(g.life.context for g in self.running.values()),
            blocks=self.tokens,
            free_blocks=free,
            slots=self.max_batch,
            free_slots=self.max_batch - len(self.running),
            prefix_bytes=0,
            last_step_s=self.step_s,
            last_step_rows=len(self.running),
            last_step_tokens=0,
            steps=self.steps,
            preemptions=0,
            prompt_tokens=self.prompt_tokens,
            prefix_tokens=0,
        )

    def check_integrity(self) -> None:
        if self.leaked:
            raise RuntimeError(f"{self.leaked} blocks leaked")


@dataclass
class FakeOpened:
    state: FakeState
    release: Callable[[], None]


@dataclass
class FakeSink:
    link: FakeLink
    state: FakeState | None = None

    def put(self, layer: int, state: object, begin: int, end: int, *, final: bool) -> None:
        raise AssertionError("a fake state has no layers")

    def close(self) -> FakeState:
        assert self.state is not None
        return self.state

    def abort(self) -> None:
        self.link.open_sinks -= 1


class FakeLink:
    """Room for a number of states; receipts are the states themselves."""

    def __init__(self, room: int = 8) -> None:
        self.room, self.open_sinks, self.closed = room, 0, False

    def sink(self, request: EngineRequest) -> Any:
        if self.open_sinks >= self.room:
            return Infeasible("full of states that nobody has fetched")
        self.open_sinks += 1
        return FakeSink(self)

    def open(self, receipt: FakeState) -> Any:
        return FakeOpened(receipt, lambda: None)

    def release(self, receipt: FakeState) -> None:
        self.open_sinks -= 1

    def close(self) -> None:
        self.closed = True


def build(by_reference: bool = True, **options: Any) -> Worker:
    engine = FakeEngine(**options)
    link = None if by_reference else FakeLink()
    return Worker(engine, engine.capacity(), clock=time.monotonic, link=link)


def builder(by_reference: bool = True, **options: Any) -> Callable[[], Worker]:
    return partial(build, by_reference, **options)
