from __future__ import annotations

from dataclasses import replace

import pytest
from fake_engine import POISON, FakeEngine, FakeLink, FakeState, expected

from tandem.engine.types import EngineRequest, SamplingParams
from tandem.serve.messages import (
    Accept,
    Cancel,
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
    Refused,
    Release,
    Submit,
    Taken,
    WorkerStats,
)
from tandem.serve.worker import Worker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def request(name: str = "a", *, isl: int = 10, osl: int = 5) -> EngineRequest:
    return EngineRequest(id=name, prompt_ids=tuple(range(isl)), sampling=SamplingParams(max_tokens=osl))


def made(link: FakeLink | None = None, *, clock: Clock | None = None, **options: int) -> tuple[Worker, FakeEngine]:
    clock = clock or Clock()
    engine = FakeEngine(clock=clock, **options)
    return Worker(engine, engine.capacity(), clock=clock, link=link), engine


def after(worker: Worker, *commands: Command) -> list[Event]:
    """All that happens until the worker is idle."""
    for command in commands:
        worker.handle(command)
    events: list[Event] = []
    for _ in range(10_000):
        batch = worker.step()
        events.extend(batch.events if batch else ())
        if worker.idle and batch is None:
            return events
    raise AssertionError("never idle")


def tokens(events: list[Event], name: str = "a") -> list[int]:
    outputs = [o for e in events if isinstance(e, Outputs) for o in e.outputs if o.request_id == name]
    at = outputs[0].index
    for output in outputs:
        assert output.index == at
        at += len(output.token_ids)
    return [t for o in outputs for t in o.token_ids]


def test_a_request_is_served_and_its_life_comes_before_its_last_output() -> None:
    worker, _ = made()
    events = after(worker, Submit(request()))
    assert tokens(events) == expected(request())
    finished = [i for i, e in enumerate(events) if isinstance(e, Finished)]
    last = [i for i, e in enumerate(events) if isinstance(e, Outputs) and e.outputs[-1].finish_reason]
    assert len(finished) == len(last) == 1
    assert finished[0] < last[0]


def test_arrival_is_told_as_time_waited_so_that_clocks_may_differ() -> None:
    worker, engine = made()
    worker.handle(Submit(request(osl=2), waited_s=3.0))
    (life,) = [e.life for e in after(worker) if isinstance(e, Finished)]
    assert life.arrival_s == engine.clock() - 3.0


def test_what_can_never_be_served_is_an_output_and_no_death() -> None:
    worker, _ = made(max_context=20)
    events = after(worker, Submit(request(isl=30)), Submit(request("b")))
    (failed,) = [o for e in events if isinstance(e, Outputs) for o in e.outputs if o.request_id == "a"]
    assert failed.finish_reason == "error"
    assert failed.error is not None
    assert "30 tokens" in failed.error
    assert tokens(events, "b") == expected(request("b"))


def test_anything_else_that_goes_wrong_is_raised() -> None:
    worker, _ = made()
    worker.handle(Submit(EngineRequest(id="a", prompt_ids=(POISON,))))
    with pytest.raises(RuntimeError, match="poison"):
        worker.step()


@pytest.mark.parametrize("by_reference", [True, False])
def test_a_handoff_goes_on_elsewhere_with_the_same_tokens(by_reference: bool) -> None:
    link = None if by_reference else FakeLink(room=1)
    prefill, _ = made(link)
    decode, _ = made(None if by_reference else FakeLink())
    first = after(prefill, Submit(request(), hand_off=True))
    (handed,) = [e for e in first if isinstance(e, HandedOff)]
    assert (handed.handoff.state is None) == (not by_reference)
    assert handed.handoff.request.output_ids == tuple(tokens(first))
    second = after(decode, Accept(handed.handoff))
    assert tokens(first) + tokens(second) == expected(request())
    assert [e.request_id for e in second if isinstance(e, Taken)] == ["a"]
    after(prefill, Release("a"), Release("a"))
    if link is not None:
        assert link.open_sinks == 0


def test_prompts_wait_in_order_while_states_that_nobody_fetched_take_the_room() -> None:
    link = FakeLink(room=1)
    worker, engine = made(link)
    events = after(worker, *(Submit(request(name), hand_off=True) for name in "abc"), Submit(request("d")))
    assert [e.handoff.request.id for e in events if isinstance(e, HandedOff)] == ["a"]
    assert tokens(events, "d") == expected(request("d"))
    stats = [e for e in events if isinstance(e, WorkerStats)][-1]
    assert (stats.deferred, stats.deferred_tokens, stats.held_states) == (2, 20, 1)
    events = after(worker, Cancel("b"), Release("a"))
    assert [e.handoff.request.id for e in events if isinstance(e, HandedOff)] == ["c"]
    after(worker, Release("c"))
    assert link.open_sinks == 0
    assert not engine.has_work


def test_a_damaged_state_is_refused_and_let_go() -> None:
    prefill, _ = made()
    decode, _ = made()
    events = after(prefill, Submit(request(), hand_off=True))
    (handoff,) = [e.handoff for e in events if isinstance(e, HandedOff)]
    released: list[int] = []
    handoff.state = FakeState(0, 10)  # type: ignore[assignment]
    handoff.release = lambda: released.append(1)
    events = after(decode, Accept(handoff))
    (refused,) = [e for e in events if isinstance(e, Refused)]
    assert "damaged" in refused.reason
    assert released == [1]
    assert not any(isinstance(e, Outputs) for e in events)


def test_a_running_request_can_be_given_away_and_others_cannot() -> None:
    here, _ = made()
    there, _ = made()
    here.handle(Submit(request(osl=9)))
    events = list((here.step() or pytest.fail("nothing")).events)
    events += after(here, Export("a"), Export("nobody"))
    (handoff,) = [e.handoff for e in events if isinstance(e, HandedOff)]
    events += after(there, Accept(handoff))
    assert tokens(events) == expected(request(osl=9))


def test_a_request_to_be_given_away_before_it_decodes_goes_as_soon_as_it_does() -> None:
    prefill, _ = made()
    here, _ = made()
    there, _ = made()
    events = after(prefill, Submit(request(osl=9), hand_off=True))
    (handoff,) = [e.handoff for e in events if isinstance(e, HandedOff)]
    moved = after(here, Accept(handoff), Submit(request("b", osl=9)), Export("a"), Export("b"))
    handoffs = [e.handoff for e in moved if isinstance(e, HandedOff)]
    assert sorted(h.request.id for h in handoffs) == ["a", "b"]
    rest = after(there, *map(Accept, handoffs))
    assert tokens(events + moved + rest) == expected(request(osl=9))
    assert tokens(moved + rest, "b") == expected(request("b", osl=9))
    assert tokens(after(here, Submit(request(osl=9)))) == expected(request(osl=9))  # it may come back, and stays


def test_numbers_say_which_commands_they_include() -> None:
    clock = Clock()
    worker, _ = made(clock=clock)
    for name in "ab":
        worker.handle(Submit(request(name, osl=50)))
    batch = worker.step()
    assert batch is not None
    (stats,) = [e for e in batch.events if isinstance(e, WorkerStats)]
    assert stats.handled == 2
    assert (stats.engine.waiting, stats.engine.running, stats.engine.queued_tokens) == (1, 1, 10)
    batch = worker.step()
    assert batch is not None
    assert not any(isinstance(e, WorkerStats) for e in batch.events)  # told a moment ago
    clock.now += 0.06
    batch = worker.step()
    assert batch is not None
    (stats,) = [e for e in batch.events if isinstance(e, WorkerStats)]
    assert stats.engine.running == 2
    events = after(worker)
    stats = [e for e in events if isinstance(e, WorkerStats)][-1]
    assert (stats.engine.running, stats.engine.waiting) == (0, 0)  # falling idle is told whatever the clock says


def test_questions_are_answered_after_what_came_before() -> None:
    worker, engine = made()
    engine.leaked = 3
    events = after(worker, Submit(request()), Cancel("a"), Ping(7), Inspect(8))
    assert [e for e in events if isinstance(e, (Pong, Inspected))] == [Pong(7), Inspected(8, "3 blocks leaked")]


def test_states_that_arrive_and_find_no_room_count_as_taken() -> None:
    prefill, _ = made()
    decode, engine = made(max_batch=1)
    for name in "ab":
        prefill.handle(Submit(request(name, osl=3), hand_off=True))
    handoffs = [e.handoff for e in after(prefill) if isinstance(e, HandedOff)]
    for handoff in handoffs:
        decode.handle(Accept(handoff))
    batch = decode.step()
    assert batch is not None
    (stats,) = [e for e in batch.events if isinstance(e, WorkerStats)]
    assert (stats.arriving, stats.arriving_tokens) == (1, 11)
    assert stats.free_tokens == engine.stats.free_blocks - 11
    stats = [e for e in after(decode) if isinstance(e, WorkerStats)][-1]
    assert (stats.arriving, stats.taken, stats.taken_bytes) == (0, 2, 2 * 160)


def test_a_handoff_without_a_sink_is_copied_once_there_is_room() -> None:
    """As after a preemption, which ends the sink; the fake engine's states have no layers, so a stand-in has one."""

    class Layers(FakeLink):
        def sink(self, asked: EngineRequest) -> object:
            found = super().sink(asked)
            if found:
                found.state = FakeState(0, len(asked.prompt_ids) + max(0, len(asked.output_ids) - 1))
            return found

    link = Layers(room=1)
    worker, _ = made(link)
    after(worker, Submit(request("a"), hand_off=True))
    for name in "bx":
        worker.handle(Submit(request(name, osl=30)))
    for _ in range(3):
        worker.step()

    class State:
        layers = ()
        lengths = (11,)
        nbytes = 1

    exported = worker._engine.export_state
    worker._engine.export_state = lambda name: replace(exported(name), state=State())  # type: ignore[method-assign, arg-type, return-value]
    events = after(worker, Export("x"), Export("b"), Cancel("x"))
    assert not any(isinstance(e, HandedOff) for e in events)
    worker.handle(Cancel("x"))
    events = after(worker, Release("a"))
    (handoff,) = [e.handoff for e in events if isinstance(e, HandedOff)]
    assert handoff.receipt == FakeState(0, 9 + len(handoff.request.output_ids))  # all but the newest token
