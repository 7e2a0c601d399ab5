"""Laws of `plan_step`, each held at every step of small engines that are driven until all requests are done."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.sched.batch import BatchLimits, Chunk, Room, StepPlan, plan_step
from tandem.sched.fair import FairShare, by_age
from tandem.sched.request import Request
from tandem.spec.errors import SpecError


def request(name: str, isl: int = 10, *, arrival_s: float = 0.0, client: str = "", computed: int = 0, osl: int = 0) -> Request:
    return Request(id=name, isl=isl, max_tokens=99, arrival_s=arrival_s, client=client, computed=computed, osl=osl)


def limits(max_batch: int = 8, step_tokens: int = 64, pass_tokens: int = 8, block_size: int = 4) -> BatchLimits:
    return BatchLimits(max_batch=max_batch, step_tokens=step_tokens, pass_tokens=pass_tokens, block_size=block_size)


def plan(
    running: tuple[Request, ...] = (),
    waiting: tuple[Request, ...] = (),
    arrived: tuple[Request, ...] = (),
    *,
    bounds: BatchLimits | None = None,
    blocks: int = 100,
    slots: int = 100,
    served: dict[str, float] | None = None,
) -> StepPlan:
    room = Room(blocks=blocks, slots=slots)
    return plan_step(
        running=running, waiting=waiting, arrived=arrived, limits=bounds or limits(), room=room, served=served or {}
    )


# --- an engine without a model ---


@dataclass
class Pool:
    """Carries plans out as an engine would, and knows (as policies must not) how long each output gets."""

    limits: BatchLimits
    blocks: int
    slots: int
    final: dict[str, int]
    running: list[Request] = field(default_factory=list)
    waiting: list[Request] = field(default_factory=list)
    arrived: list[Request] = field(default_factory=list)
    done: list[Request] = field(default_factory=list)
    begun: list[tuple[str, str]] = field(default_factory=list)
    share: FairShare = field(default_factory=FairShare)

    def held(self, tokens: int) -> int:
        return -(-tokens // self.limits.block_size)

    @property
    def holders(self) -> list[Request]:
        return self.running + [one for one in self.waiting if one.computed]

    @property
    def room(self) -> Room:
        used = sum(self.held(one.computed) for one in self.holders)
        return Room(blocks=self.blocks - used, slots=self.slots - len(self.holders))

    def add(self, one: Request) -> None:
        (self.arrived if one.computed else self.waiting).append(one)
        self.share.arrive(one.client)

    def plan(self) -> StepPlan:
        return plan_step(
            running=self.running,
            waiting=self.waiting,
            arrived=self.arrived,
            limits=self.limits,
            room=self.room,
            served=self.share.served,
        )

    def step(self) -> StepPlan:
        before = self.plan()
        assert before == self.plan()  # deterministic, and changes nothing
        self.check(before)
        for one in before.preempt:
            (self.running if one in self.running else self.waiting).remove(one)
            one.computed, one.preemptions = 0, one.preemptions + 1
            self.waiting.append(one)
        for one in before.admit:
            self.arrived.remove(one)
            self.running.append(one)
        for one in before.decode:
            one.computed += 1
            self.token(one)
        for chunk in before.prefill:
            self.fill(chunk)
        assert self.room.blocks >= 0
        assert self.room.slots >= 0
        assert len(self.holders) <= self.limits.max_batch
        return before

    def fill(self, chunk: Chunk) -> None:
        one = chunk.request
        if not one.computed and not one.preemptions:
            self.begun.append((one.client, one.id))
        one.computed += chunk.tokens
        self.share.charge(one.client, chunk.tokens)
        if one.to_prefill == 0:
            self.waiting.remove(one)
            self.running.append(one)
            if one.osl == 0:
                self.token(one)

    def token(self, one: Request) -> None:
        one.osl += 1
        self.share.charge(one.client, 1)
        if one.osl >= self.final[one.id]:
            self.running.remove(one)
            self.done.append(one)
            self.share.leave(one.client)

    def check(self, step: StepPlan) -> None:
        """All that must hold of one plan."""
        filled = [chunk.request for chunk in step.prefill]
        assert set(step.preempt) <= set(self.holders)
        assert set(step.decode) == (set(self.running) - set(step.preempt)) | set(step.admit)
        assert list(step.admit) == self.arrived[: len(step.admit)]
        assert set(filled) <= set(self.waiting) - set(step.preempt)
        for part in (step.decode, step.admit, filled, step.preempt):
            assert len(part) == len(set(part))
        for chunk in step.prefill:
            end = chunk.request.computed + chunk.tokens
            assert 0 < chunk.tokens <= chunk.request.to_prefill
            assert end % self.limits.pass_tokens == 0 or chunk.tokens == chunk.request.to_prefill
        spent = sum(chunk.tokens for chunk in step.prefill)
        assert spent <= max(self.limits.step_tokens - len(step.decode), self.limits.pass_tokens)
        if self.holders:
            assert min(self.holders, key=by_age) not in step.preempt
        if step.preempt:
            kept = set(self.holders) - set(step.preempt)
            assert max(map(by_age, kept)) < min(map(by_age, step.preempt))
            assert not step.admit
            assert all(one.computed for one in filled)
        assert step or not (self.running or self.waiting or self.arrived)  # whoever has something to do does something

    def drain(self, most: int = 3000) -> None:
        for _ in range(most):
            if not (self.running or self.waiting or self.arrived):
                return
            self.step()
        raise AssertionError(f"starved: {self.running} {self.waiting} {self.arrived}")


@st.composite
def pools(draw: st.DrawFn) -> tuple[Pool, list[tuple[int, Request]]]:
    """A pool, and requests with the step in which each comes; some come with their state, some were served before."""
    bounds = limits(
        max_batch=draw(st.integers(1, 5)),
        step_tokens=draw(st.integers(1, 40)),
        pass_tokens=draw(st.integers(1, 12)),
        block_size=draw(st.integers(1, 6)),
    )
    coming, final, most = [], {}, 1
    for number in range(draw(st.integers(1, 12))):
        isl, osl = draw(st.integers(1, 40)), draw(st.integers(1, 20))
        got = draw(st.integers(0, osl - 1))
        computed = isl + got - 1 if got and draw(st.booleans()) else 0
        at = draw(st.integers(0, 30))
        one = request(f"r{number:02}", isl, arrival_s=at, client=draw(st.sampled_from("abc")), computed=computed, osl=got)
        final[one.id] = osl
        most = max(most, isl + osl)
        coming.append((at, one))
    blocks = -(-most // bounds.block_size) + draw(st.integers(0, 30))
    return Pool(bounds, blocks, draw(st.integers(1, 6)), final), coming


@given(case=pools())
@settings(max_examples=400, deadline=None)
def test_every_request_completes_and_every_step_keeps_the_laws(case: tuple[Pool, list[tuple[int, Request]]]) -> None:
    pool, coming = case
    for now in range(31):
        for at, one in coming:
            if at == now:
                pool.add(one)
        pool.step()
    pool.drain()
    assert sorted(one.id for one in pool.done) == sorted(pool.final)
    assert all(one.osl == pool.final[one.id] for one in pool.done)
    assert pool.room == Room(blocks=pool.blocks, slots=pool.slots)
    ages = {one.id: one.arrival_s for _, one in coming}
    for client in "abc":
        begun = [ages[name] for who, name in pool.begun if who == client]
        assert begun == sorted(begun)


@given(case=pools(), seed=st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_the_order_of_what_is_given_does_not_matter_except_for_arrivals(
    case: tuple[Pool, list[tuple[int, Request]]], seed: int
) -> None:
    pool, coming = case
    for _, one in coming:
        pool.add(one)
    other = copy.deepcopy(pool)
    for _ in range(20):
        random.Random(seed).shuffle(other.waiting)
        a, b = pool.step(), other.step()
        assert [one.id for one in a.preempt] == [one.id for one in b.preempt]
        assert [(c.request.id, c.tokens) for c in a.prefill] == [(c.request.id, c.tokens) for c in b.prefill]


# --- each rule by itself ---


def test_a_block_is_needed_only_where_the_last_one_is_full() -> None:
    full, half = request("full", computed=12, osl=3), request("half", arrival_s=1, computed=13, osl=4)
    assert plan((full, half), blocks=1).preempt == ()
    assert plan((full, half), blocks=0).preempt == (half,)
    assert plan((half,), blocks=0).preempt == ()


def test_the_youngest_give_way_first_whoever_asks_for_the_block() -> None:
    old, middle, young = (request(str(n), arrival_s=n, computed=12, osl=3) for n in range(3))
    assert plan((young, old, middle), blocks=0).preempt == (young,)
    partly = request("3", 40, arrival_s=3, computed=8)
    step = plan((young, old, middle), (partly,), blocks=1)
    assert step.preempt == (partly,)
    assert set(step.decode) == {old, middle, young}


def test_blocks_that_are_shared_do_not_come_free() -> None:
    holders = [request(str(n), arrival_s=n, computed=12, osl=3) for n in range(4)]
    for each, gone in ((3, 1), (1, 2), (0, 3)):
        step = plan_step(
            running=holders,
            waiting=(),
            arrived=(),
            limits=limits(),
            room=Room(blocks=1, slots=0),
            served={},
            frees=lambda _, each=each: each,
        )
        assert step.preempt == tuple(reversed(holders[4 - gone :]))


def test_partly_prefilled_alone_make_room_for_the_oldest() -> None:
    a, b = request("a", 40, computed=16), request("b", 40, arrival_s=1, computed=16)
    step = plan(waiting=(a, b), blocks=1)
    assert step.preempt == (b,)
    assert [(chunk.request, chunk.tokens) for chunk in step.prefill] == [(a, 16)]  # 5 blocks are free: 2 passes


def test_prefill_gets_one_pass_whatever_decodes() -> None:
    decoding = tuple(request(f"d{n}", computed=13, osl=4) for n in range(6))
    bounds = limits(step_tokens=4, max_batch=8)
    step = plan(decoding, (request("p", 30),), bounds=bounds)
    assert [chunk.tokens for chunk in step.prefill] == [8]
    assert len(step.decode) == 6


def test_the_budget_is_what_decode_leaves_and_is_used_in_whole_passes() -> None:
    bounds = limits(step_tokens=30)
    waiting = request("a", 19), request("b", 100, arrival_s=1), request("c", 1, arrival_s=2)
    step = plan((request("d", computed=13, osl=4),), waiting, bounds=bounds)
    assert [(chunk.request.id, chunk.tokens) for chunk in step.prefill] == [("a", 19), ("b", 8), ("c", 1)]


def test_a_partly_prefilled_one_goes_before_a_new_one_of_a_poorer_client() -> None:
    partly, new = request("p", 100, arrival_s=5, client="rich", computed=8), request("n", 8, client="poor")
    step = plan(waiting=(new, partly), bounds=limits(step_tokens=16), served={"rich": 1000.0})
    assert [chunk.request for chunk in step.prefill] == [partly]


def test_whoever_does_not_fit_is_not_overtaken() -> None:
    long, short = request("long", 60, client="a"), request("short", 4, arrival_s=1, client="b")
    held = request("d", computed=13, osl=4)
    assert plan((held,), (long, short), blocks=16).prefill == ()  # 61 tokens are 16 blocks, and one is kept for `d`
    assert [chunk.request for chunk in plan((held,), (long, short), blocks=17).prefill] == [long]
    assert [chunk.request for chunk in plan((), (long, short), blocks=16).prefill] == [long]


def test_a_new_one_leaves_what_the_partly_prefilled_still_need() -> None:
    partly, new = request("p", 40, computed=8), request("n", 11, arrival_s=1)
    begun = {
        blocks: [
            chunk.request.id for chunk in plan(waiting=(partly, new), bounds=limits(step_tokens=40), blocks=blocks).prefill
        ]
        for blocks in (11, 12)
    }
    assert begun == {11: ["p"], 12: ["p", "n"]}  # 41 tokens are 11 blocks, of which 2 are held, and 12 are 3


def test_the_oldest_partly_prefilled_goes_first_and_nobody_passes_one_that_stands_still() -> None:
    old, young = request("old", 24, arrival_s=1, computed=8), request("young", 24, arrival_s=2, computed=8)
    step = plan(waiting=(request("new", 3, arrival_s=3), young, old), bounds=limits(step_tokens=20))
    assert [(chunk.request.id, chunk.tokens) for chunk in step.prefill] == [("old", 16)]  # 4 are left: no pass of `young`


def test_no_prompt_overtakes_an_arrived_one_that_finds_no_room() -> None:
    large, new = request("large", 60, computed=60, osl=1), request("new", 4)
    assert not plan(arrived=(large,), waiting=(new,), blocks=10)
    assert plan(waiting=(new,), blocks=10)


def test_the_arrived_enter_in_order_and_decode_at_once() -> None:
    first, second = request("z", 60, computed=60, osl=1), request("a", 4, computed=4, osl=1)
    step = plan(arrived=(first, second), waiting=(request("n", 4),), blocks=18)
    assert step.admit == step.decode == (first,)  # 16 blocks; the other's 2 would leave none for `z`
    assert step.prefill == ()  # nobody overtakes an arrived one
    assert plan(arrived=(first, second), blocks=19).admit == (first, second)


def test_once_preempted_goes_before_the_arrived_and_the_poor() -> None:
    again = request("again", 60, arrival_s=9, client="rich")
    again.preemptions = 1
    handed = request("handed", 4, computed=4, osl=1)
    step = plan(arrived=(handed,), waiting=(request("new", client="poor"), again), served={"rich": 50.0}, blocks=10)
    assert not step
    step = plan(arrived=(handed,), waiting=(request("new", client="poor"), again), served={"rich": 50.0}, blocks=16)
    assert [chunk.request for chunk in step.prefill] == [again]
    assert step.admit == ()


def test_a_request_served_before_is_prefilled_up_to_its_newest_token() -> None:
    step = plan(waiting=(request("r", 10, osl=4),))
    assert [chunk.tokens for chunk in step.prefill] == [13]


@pytest.mark.parametrize("limit", ["slots", "max_batch"])
def test_slots_and_max_batch_bound_who_holds_state(limit: str) -> None:
    waiting = tuple(request(str(n), 4, arrival_s=n) for n in range(5))
    partly = request("p", 40, computed=8)
    kept = {"slots": 3} if limit == "slots" else {"bounds": limits(max_batch=4)}
    step = plan(waiting=(partly, *waiting), **kept)
    assert [chunk.request.id for chunk in step.prefill] == ["p", "0", "1", "2"]


def test_new_prompts_alternate_between_clients_by_tokens_served() -> None:
    waiting = [request(f"a{n}", 8, client="a", arrival_s=n) for n in range(4)]
    waiting += [request(f"b{n}", 4, client="b", arrival_s=10 + n) for n in range(4)]
    step = plan(waiting=tuple(waiting), bounds=limits(step_tokens=24))
    assert [chunk.request.id for chunk in step.prefill] == ["a0", "b0", "b1", "a1"]


@pytest.mark.parametrize("name", ["max_batch", "step_tokens", "pass_tokens", "block_size"])
@pytest.mark.parametrize("value", [0, True, 2.0])
def test_limits_are_valid_from_birth(name: str, value: object) -> None:
    with pytest.raises(SpecError, match=rf"^{name}={value!r}: must be"):
        BatchLimits(**{"max_batch": 1, "step_tokens": 1, name: value})
    with pytest.raises(SpecError, match=r"^blocks=-1: must be"):
        Room(blocks=-1, slots=0)


# --- fairness ---


def test_clients_that_always_ask_get_the_same_within_one_prompt() -> None:
    pool = Pool(limits(max_batch=2, step_tokens=16), 60, 8, {})
    for n in range(60):
        for client, isl in (("few", 40), ("many", 8), ("many", 8)):
            one = request(f"{client}{n}{isl}{len(pool.waiting)}", isl, client=client, arrival_s=n)
            pool.final[one.id] = 4
            pool.add(one)
    for _ in range(100):
        pool.step()
        levels = pool.share.served
        assert {one.client for one in pool.waiting} == {"few", "many"}
        # Each may be ahead by what it has in the batch: at most two requests of 44 tokens.
        assert abs(levels["few"] - levels["many"]) <= 2 * 44
