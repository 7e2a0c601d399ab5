"""The pools' state machine under any interleaving: commands and events that are still on their way, deaths, cancellations."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any

import pytest
from fake_engine import FakeEngine, FakeLink, FakeSink, FakeState, expected
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_cases import PREFILL_ELSEWHERE, Log, request, times

from tandem.engine.types import EngineRequest, TokenOutput
from tandem.sched.route import Role
from tandem.serve.hosts import Listener
from tandem.serve.members import Member, Roster
from tandem.serve.messages import Accept, Batch, Capacity, Command
from tandem.serve.pool_limits import PoolLimits
from tandem.serve.records import Record
from tandem.serve.traffic import Traffic
from tandem.serve.worker import Worker
from tandem.spec.errors import SpecError

ROLES: dict[str, Role] = {"p": "prefill", "d": "decode", "c": "colocated"}


class Clock:
    """Moves a little whenever it is read, so that no two things happen at once."""

    def __init__(self, offset_s: float = 0.0) -> None:
        self.now = offset_s

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@dataclass(frozen=True)
class MortalReceipt:
    state: FakeState
    link: MortalLink


class MortalLink(FakeLink):
    """A state can be had while its owner lives."""

    def __init__(self) -> None:
        super().__init__(room=2)

    def sink(self, request: EngineRequest) -> Any:
        sink = super().sink(request)
        if isinstance(sink, FakeSink):
            close = sink.close
            sink.close = lambda: MortalReceipt(close(), self)  # type: ignore[method-assign, return-value, assignment]
        return sink

    def open(self, receipt: Any) -> Any:
        if receipt.link.closed:
            raise SpecError("its owner is gone")
        return super().open(receipt.state)


class Hand:
    """A worker that does what it is told when the test says so; what is sent and answered waits in between."""

    def __init__(self, name: str, *, by_reference: bool, clock: Clock) -> None:
        self.id, self.by_reference, self.alive = name, by_reference, True
        self.clock = clock
        self.revive()

    def revive(self) -> None:
        self.alive = True
        self.engine = FakeEngine(max_batch=1, pass_tokens=16, clock=self.clock)
        self.link = None if self.by_reference else MortalLink()
        self.worker = Worker(self.engine, self.engine.capacity(), clock=self.clock, link=self.link)
        self.commands: deque[Command] = deque()
        self.batches: deque[Batch] = deque()

    def die(self) -> None:
        self.alive = False
        if self.link is not None:
            self.link.closed = True

    def send(self, command: Command) -> None:
        if self.alive:
            self.commands.append(command)

    async def start(self, listener: Listener) -> Capacity:
        raise AssertionError

    async def stop(self, deadline_s: float) -> None:
        raise AssertionError

    def kill(self, reason: str) -> None:
        raise AssertionError


class World:
    def __init__(self, roles: str, *, by_reference: bool, skewed: bool) -> None:
        self.log = Log()
        clock = Clock(1e6)
        self.hands = [
            Hand(f"{role}{i}", by_reference=by_reference, clock=Clock(1e3 * i) if skewed else clock)
            for i, role in enumerate(roles)
        ]
        self.members = [Member(hand, ROLES[role]) for hand, role in zip(self.hands, roles, strict=True)]
        for member, hand in zip(self.members, self.hands, strict=True):
            member.began(hand.engine.capacity())
        limits = PoolLimits(queued_tokens=64, held_states=5, max_retries=1000, prefix_tokens=16, routing=PREFILL_ELSEWHERE)
        self.traffic = Traffic(Roster(self.members), times=times(), limits=limits, clock=clock, observer=self.log)
        self.records: list[Record] = []
        self.left: set[int] = set()

    def submit(self, isl: int, osl: int) -> None:
        self.records.append(self.traffic.admit(request(len(self.records), isl=isl, osl=osl)))

    def cancel(self, number: int) -> None:
        if number < len(self.records) and not self.records[number].finished:
            self.left.add(number)
            self.traffic.leave(self.records[number])

    def step(self, i: int, commands: int) -> None:
        hand = self.hands[i]
        if not hand.alive:
            return
        for _ in range(min(commands, len(hand.commands))):
            hand.worker.handle(hand.commands.popleft())
        batch = hand.worker.step()
        if batch is not None:
            hand.batches.append(batch)

    def deliver(self, i: int) -> None:
        hand = self.hands[i]
        if hand.alive and hand.batches:
            self.traffic.on_events(self.members[i], hand.batches.popleft())

    def turn(self) -> None:
        for i in range(len(self.hands)):
            self.step(i, 100)
            self.deliver(i)

    def kill(self, i: int) -> None:
        """What it had answered may have come before, or never: here it is lost."""
        if self.hands[i].alive:
            self.hands[i].die()
            self.members[i].ended()
            self.traffic.on_death(self.members[i], "killed")

    def revive(self, i: int) -> None:
        if not self.hands[i].alive:
            self.hands[i].revive()
            self.members[i].began(self.hands[i].engine.capacity())
            self.traffic.dispatch()

    def spread(self, i: int) -> None:
        if self.hands[i].alive:
            self.traffic.spread(self.members[i])

    def recall(self, i: int) -> None:
        self.traffic.recall(self.members[i])

    def settle(self) -> None:
        for i in range(len(self.hands)):
            self.revive(i)
        for _ in range(20_000):
            for i in range(len(self.hands)):
                self.step(i, 100)
                self.deliver(i)
            if not any(hand.commands or hand.batches or not hand.worker.idle for hand in self.hands):
                return
        raise AssertionError(f"never settles: {self.traffic.in_flight} in flight, {self.traffic.held_states} held")

    def check(self) -> None:
        traffic = self.traffic
        assert (traffic.in_flight, traffic.waiting, traffic.held_states) == (0, 0, 0)
        for member, hand in zip(self.members, self.hands, strict=True):
            assert not member.records
            assert traffic.states_of(member) == 0
            stats = hand.worker._stats()
            engine = stats.engine
            assert (engine.waiting, engine.running, stats.arriving, stats.deferred, stats.held_states) == (0, 0, 0, 0, 0)
            assert hand.link is None or hand.link.open_sinks == 0
            assert not traffic._leaving
            view = member.view
            assert (view.queued_tokens, view.running, view.context_tokens, view.free_tokens) == (0, 0, 0, 100_000)
        assert len(self.log.lives) == len(self.records)
        for number, record in enumerate(self.records):
            outputs = read(record)
            found = [token for output in outputs for token in output.token_ids]
            wanted = expected(record.request)
            if number in self.left:
                assert found == wanted[: len(found)]
            else:
                assert found == wanted
                assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
                assert outputs[-1].finish_reason == "length"
            at = 0
            for output in outputs:
                assert output.index == at
                at += len(output.token_ids)


def read(record: Record) -> list[TokenOutput]:
    async def main() -> list[TokenOutput]:
        found = []
        while record.channel._outputs:
            found.append(await record.channel.next())
        return found

    return asyncio.run(main())


WORKER = st.integers(0, 3)
STEP = st.tuples(st.just("step"), WORKER, st.sampled_from((0, 1, 2, 100)))
DELIVER = st.tuples(st.just("deliver"), WORKER)
SUBMIT = st.tuples(st.just("submit"), st.integers(1, 40), st.integers(1, 12))
TURN = st.tuples(st.just("turn"))
REVIVE = st.tuples(st.just("revive"), WORKER)
ACTION = st.one_of(
    *(TURN, TURN, TURN, STEP, STEP, DELIVER, DELIVER, SUBMIT, REVIVE, REVIVE),
    st.tuples(st.just("kill"), WORKER),
    st.tuples(st.just("spread"), WORKER),
    st.tuples(st.just("recall"), WORKER),
    st.tuples(st.just("cancel"), st.integers(0, 12)),
)


@settings(max_examples=300, deadline=None)
@given(
    actions=st.lists(ACTION, min_size=20, max_size=150),
    roles=st.sampled_from(("ppdd", "pddd", "pdcc", "dddd")),
    by_reference=st.booleans(),
    skewed=st.booleans(),
)
def test_every_request_ends_right_and_nothing_is_left(
    actions: list[tuple],  # type: ignore[type-arg]
    roles: str,
    by_reference: bool,
    skewed: bool,
) -> None:
    world = World(roles, by_reference=by_reference, skewed=skewed)
    for _ in range(6):
        world.submit(20, 8)
    for name, *arguments in actions:
        getattr(world, name)(*arguments)
    world.settle()
    world.check()


def test_clocks_of_other_machines_are_told_from_ours() -> None:
    """Times are checked for causality by the log; here that they are near what happened, whatever the other clock says."""
    world = World("ppdd", by_reference=False, skewed=True)
    world.submit(40, 5)
    world.settle()
    (life,) = world.log.lives
    assert life.prefill_start_s is not None
    assert life.prefill_end_s is not None
    assert life.done_s is not None
    assert life.arrival_s <= life.prefill_start_s < life.prefill_end_s <= life.done_s < life.arrival_s + 1.0


def test_a_request_whose_client_has_gone_is_stopped_and_not_only_ignored() -> None:
    world = World("pd", by_reference=True, skewed=False)
    world.submit(20, 9000)
    for _ in range(10):
        world.turn()
    assert world.hands[1].engine.running
    world.cancel(0)
    world.step(1, 1)
    assert not world.hands[1].engine.has_work


def test_a_prompt_counts_once_on_its_way_through_a_prefill_worker() -> None:
    world = World("pdd", by_reference=True, skewed=False)  # room for 5 states
    for _ in range(12):
        world.submit(10, 9000)
    for _ in range(100):
        world.turn()
    # Each decode worker has one that decodes and one that waits there; with those that wait here they are 5 on their way.
    assert [len(hand.engine.running) + len(hand.engine.arrived) for hand in world.hands[1:]] == [2, 2]
    assert world.traffic.held_states == 5
    assert world.traffic.in_flight - world.traffic.waiting == 2 + 5


def test_prompts_that_have_not_begun_move_to_a_worker_that_comes_up() -> None:
    world = World("ppd", by_reference=True, skewed=False)
    world.kill(1)
    for _ in range(6):
        world.submit(10, 3)
    world.step(0, 100)  # the first one is prefilled, four wait there, and one here
    assert len(world.members[0].records) == 5
    world.revive(1)
    world.spread(1)
    assert not world.members[1].records
    world.step(0, 100)
    world.deliver(0)
    world.deliver(0)
    there = [len(member.records) for member in world.members[:2]]
    assert sum(there) == 4
    assert min(there) >= 2
    assert world.traffic.retries == 0
    world.settle()
    assert world.traffic._share.served[""] == 6 * 10 + 6 * 3  # nobody pays twice
    world.check()
    assert all(record.attempt == 0 for record in world.records)


def test_what_has_begun_stays_where_it_is() -> None:
    world = World("ppd", by_reference=True, skewed=False)
    world.kill(1)
    world.submit(200, 3)
    world.step(0, 100)
    assert 0 < world.hands[0].engine.waiting["r0"].life.computed < 200
    world.revive(1)
    world.spread(1)
    world.step(0, 100)
    world.deliver(0)
    assert list(world.members[0].records) == ["r0"]
    world.settle()
    world.check()


def test_retried_requests_go_before_those_that_came_later() -> None:
    world = World("c", by_reference=True, skewed=False)
    for _ in range(20):
        world.submit(16, 5)
    world.turn()
    world.kill(0)
    world.settle()
    world.check()
    order = [life.id for life in world.log.lives]
    assert order == [f"r{i}" for i in range(20)]


def test_a_state_that_comes_for_nobody_is_released() -> None:
    world = World("pd", by_reference=False, skewed=False)
    world.submit(10, 9)
    world.step(0, 100)
    world.cancel(0)  # while it is on its way here
    world.settle()
    world.check()


def test_a_state_that_waits_here_is_released_when_its_client_goes() -> None:
    world = World("pd", by_reference=False, skewed=False)
    assert world.hands[0].link is not None
    world.hands[0].link.room = 8
    for _ in range(4):
        world.submit(10, 9)
    for _ in range(4):
        world.step(0, 100)
        world.deliver(0)
    assert world.traffic.held_states == 4  # two of them at the decode worker
    world.cancel(3)
    world.cancel(2)
    world.settle()
    world.check()


def test_a_state_whose_owner_died_before_it_was_opened_is_made_again() -> None:
    world = World("pd", by_reference=False, skewed=False)
    world.submit(10, 9)
    world.step(0, 100)
    world.deliver(0)
    assert world.hands[1].commands  # the receipt is on its way
    world.kill(0)
    world.settle()
    assert world.traffic.retries == 1
    world.check()


def test_a_state_that_its_receiver_refuses_is_released_and_made_again() -> None:
    world = World("pd", by_reference=False, skewed=False)
    world.submit(10, 9)
    world.step(0, 100)
    world.deliver(0)
    accept = world.hands[1].commands.pop()
    assert isinstance(accept, Accept)
    receipt = accept.handoff.receipt
    accept.handoff.receipt = MortalReceipt(FakeState(0, 10), receipt.link)  # other bytes than were sent
    world.hands[1].commands.append(accept)
    world.settle()
    assert world.traffic.retries == 1
    world.check()


@pytest.mark.parametrize(("prompt", "why"), [((), "no tokens"), ((1, 2**70), "no token id"), ((1, 1.5), "no token id")])
def test_a_prompt_that_is_none_is_refused_before_it_can_stand_in_the_way(prompt: tuple[int, ...], why: str) -> None:
    world = World("pd", by_reference=True, skewed=False)
    with pytest.raises(SpecError, match=why):
        world.traffic.admit(EngineRequest(id="bad", prompt_ids=prompt))
    world.submit(10, 9)
    world.settle()
    world.check()
