"""Routing against the search of all choices, its laws, and what it says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.sched.route import Role, Route, RoutingLimits, WorkerView, prompt_cost, route_decode, route_prompt
from tandem.spec.errors import Infeasible, SpecError


@dataclass(frozen=True)
class Linear:
    """Times that are sums of products, so that a test can add them up by hand."""

    token_s: float = 1e-4
    step_s: float = 5e-3
    sequence_s: float = 1e-4
    context_s: float = 1e-7
    moved_s: float = 1e-5

    def prefill_s(self, tokens: int, context: int) -> float:
        return tokens * (self.token_s + self.context_s * context)

    def decode_s(self, batch: int, context_tokens: int) -> float:
        return (self.step_s + self.sequence_s * batch + self.context_s * context_tokens) if batch else 0.0

    def transfer_s(self, tokens: int) -> float:
        return self.moved_s * tokens


TIMES, LIMITS = Linear(), RoutingLimits()


def worker(name: str, role: Role = "decode", **known: int | bool) -> WorkerView:
    return WorkerView(**{"id": name, "role": role, "max_batch": 64, "free_tokens": 10**6, **known})


@st.composite
def fleets(draw: st.DrawFn) -> list[WorkerView]:
    return [
        WorkerView(
            id=f"w{number}",
            role=draw(st.sampled_from(("prefill", "decode", "colocated"))),
            accepting=draw(st.booleans()) or draw(st.booleans()),
            queued_tokens=draw(st.sampled_from([0, 0, 100, 5000])),
            running=draw(st.integers(0, 8)),
            context_tokens=draw(st.integers(0, 20_000)),
            max_batch=draw(st.integers(4, 10)),
            free_tokens=draw(st.sampled_from([0, 500, 100_000])),
        )
        for number in range(draw(st.integers(1, 6)))
    ]


times = st.builds(
    Linear,
    token_s=st.sampled_from([1e-5, 1e-3]),
    step_s=st.sampled_from([1e-3, 1e-1]),
    sequence_s=st.sampled_from([0.0, 1e-3]),
    context_s=st.sampled_from([0.0, 1e-6]),
    moved_s=st.sampled_from([0.0, 1e-6, 1e-3]),
)
bounds = st.builds(
    RoutingLimits,
    step_tokens=st.integers(1, 1000),
    pause_weight=st.sampled_from([0.0, 0.1, 1.0]),
    max_local_tokens=st.sampled_from([None, 0, 300]),
)
caches = st.dictionaries(st.sampled_from([f"w{n}" for n in range(7)]), st.integers(0, 5000))


def cost_by_hand(isl: int, cached: int, w: WorkerView, t: Linear, limits: RoutingLimits) -> float:
    left = max(1, isl - cached)
    own = left * (t.token_s + t.context_s * (isl - left))
    total = w.queued_tokens * t.token_s + own + limits.pause_weight * w.running * own
    if w.running:
        waits = (w.queued_tokens + left + limits.step_tokens - 1) // limits.step_tokens
        total += waits * (t.step_s + w.running * t.sequence_s + w.context_tokens * t.context_s)
    return total + (isl * t.moved_s if w.role == "prefill" else 0.0)


def fits(w: WorkerView, tokens: int) -> bool:
    return w.role == "prefill" or (w.running < w.max_batch and tokens + 1 <= w.free_tokens)


@given(isl=st.integers(1, 4000), cached=caches, fleet=fleets(), t=times, limits=bounds)
@settings(max_examples=500)
def test_the_choice_is_the_best_of_all(
    isl: int, cached: dict[str, int], fleet: list[WorkerView], t: Linear, limits: RoutingLimits
) -> None:
    found = route_prompt(isl, cached, fleet, t, limits)
    usable = [w for w in fleet if w.accepting]
    if all(w.role == "prefill" for w in usable):
        assert isinstance(found, Infeasible)
        return
    if limits.max_local_tokens is not None and any(w.role == "prefill" for w in usable):
        usable = [w for w in usable if w.role != "decode" or isl - cached.get(w.id, 0) <= limits.max_local_tokens]
    assert isinstance(found, Route)
    chosen = next(w for w in usable if w.id == found.worker_id)
    assert found.hand_off == (chosen.role == "prefill")
    here = cost_by_hand(isl, cached.get(chosen.id, 0), chosen, t, limits)
    for other in usable:
        there = cost_by_hand(isl, cached.get(other.id, 0), other, t, limits)
        assert fits(chosen, isl) >= fits(other, isl)
        if fits(chosen, isl) == fits(other, isl):
            assert here <= there * (1 + 1e-9)
    assert ("none has room" in found.reason) == (not fits(chosen, isl))
    assert found.reason.startswith(f"{chosen.id}: ")
    assert "\n" not in found.reason


@given(isl=st.integers(1, 4000), cached=caches, fleet=fleets(), t=times, limits=bounds, data=st.data())
@settings(max_examples=300)
def test_the_order_of_workers_does_not_matter(
    isl: int, cached: dict[str, int], fleet: list[WorkerView], t: Linear, limits: RoutingLimits, data: st.DataObject
) -> None:
    turned = data.draw(st.permutations(fleet))
    assert route_prompt(isl, cached, fleet, t, limits) == route_prompt(isl, cached, turned, t, limits)
    assert route_decode(isl, fleet, t) == route_decode(isl, turned, t)


@given(isl=st.integers(1, 4000), cached=caches, fleet=fleets(), t=times, limits=bounds, more=st.integers(1, 9000))
@settings(max_examples=300)
def test_less_work_or_more_cache_never_lose_a_worker_the_prompt(
    isl: int, cached: dict[str, int], fleet: list[WorkerView], t: Linear, limits: RoutingLimits, more: int
) -> None:
    found = route_prompt(isl, cached, fleet, t, limits)
    if not found:
        return
    chosen = next(w for w in fleet if w.id == found.worker_id)
    others = [w for w in fleet if w is not chosen]
    idle = [*others, replace(chosen, queued_tokens=0)]
    assert route_prompt(isl, cached, idle, t, limits).worker_id == chosen.id
    busier = [*(replace(w, queued_tokens=w.queued_tokens + more) for w in others), chosen]
    assert route_prompt(isl, cached, busier, t, limits).worker_id == chosen.id
    if limits.max_local_tokens is None and t.context_s == 0.0:
        known = {**cached, chosen.id: cached.get(chosen.id, 0) + more}
        assert route_prompt(isl, known, fleet, t, limits).worker_id == chosen.id


@given(isl=st.integers(1, 4000), fleet=fleets(), t=times, limits=bounds, more=st.integers(1, 20))
@settings(max_examples=300)
def test_those_who_decode_never_draw_a_prompt(
    isl: int, fleet: list[WorkerView], t: Linear, limits: RoutingLimits, more: int
) -> None:
    found = route_prompt(isl, {}, fleet, t, limits)
    if found and found.hand_off:
        busier = [w if w.role == "prefill" else replace(w, running=w.running + more) for w in fleet]
        assert route_prompt(isl, {}, busier, t, limits).hand_off


# --- conditional remote prefill ---


def route(isl: int, fleet: Sequence[WorkerView], limits: RoutingLimits = LIMITS, **cached: int) -> Route:
    found = route_prompt(isl, cached, fleet, TIMES, limits)
    assert isinstance(found, Route)
    return found


def test_a_short_prompt_stays_and_a_long_one_is_prefilled_elsewhere() -> None:
    fleet = [worker("p", "prefill", queued_tokens=2000), worker("d", running=4, context_tokens=4000)]
    local, remote = route(100, fleet), route(3000, fleet)
    assert (local.worker_id, local.hand_off) == ("d", False)
    assert (remote.worker_id, remote.hand_off) == ("p", True)


def test_a_long_prompt_stays_where_most_of_it_is_cached() -> None:
    fleet = [worker("p", "prefill"), worker("d", running=4)]
    assert route(3000, fleet).worker_id == "p"
    assert route(3000, fleet, d=2990).worker_id == "d"


def test_local_prefill_can_be_forbidden_but_not_where_nothing_else_is_there() -> None:
    never = RoutingLimits(max_local_tokens=0)
    fleet = [worker("p", "prefill", queued_tokens=10**6), worker("d")]
    assert route(10, fleet).worker_id == "d"
    assert route(10, fleet, never).worker_id == "p"
    assert route(10, fleet[1:], never).worker_id == "d"
    assert route(10, [replace(fleet[0], accepting=False), fleet[1]], never).worker_id == "d"


def test_colocated_workers_keep_what_they_prefill() -> None:
    fleet = [worker("a", "colocated", queued_tokens=500), worker("b", "colocated", queued_tokens=400)]
    found = route(5000, fleet)
    assert (found.worker_id, found.hand_off) == ("b", False)
    assert route(5000, fleet, a=4900).worker_id == "a"
    assert route_decode(5000, fleet, TIMES).worker_id == "a"


def test_equal_costs_go_to_the_first_id() -> None:
    assert route(10, [worker("b"), worker("a"), worker("c")]).worker_id == "a"
    assert route_decode(10, [worker("b"), worker("a")], TIMES).worker_id == "a"


def test_the_reason_says_what_was_weighed() -> None:
    fleet = [worker("p", "prefill", queued_tokens=100), worker("d", running=4)]
    assert route(3000, fleet, p=1000).reason == (
        "p: 0.01 s queued + 0.4 s prefill (1000 tokens cached) + 0.03 s transfer; d would cost 1.53 s"
    )
    assert route(1, [worker("d", running=1, max_batch=1)]).reason == (
        "d: 0.0001 s prefill + 0.0051 s decode steps between + 0.0001 s pauses of others; none has room, so it waits"
    )


def test_a_prompt_that_is_cached_whole_still_computes_one_token() -> None:
    cost = prompt_cost(100, 100, worker("d"), TIMES, LIMITS)
    assert cost.own_s == TIMES.prefill_s(1, 99) == cost.total_s


# --- where a sequence decodes ---


@given(context=st.integers(1, 4000), fleet=fleets(), t=times)
@settings(max_examples=300)
def test_a_sequence_goes_where_the_step_stays_shortest(context: int, fleet: list[WorkerView], t: Linear) -> None:
    found = route_decode(context, fleet, t)
    usable = [w for w in fleet if w.accepting and w.role != "prefill"]
    if not usable:
        assert isinstance(found, Infeasible)
        return
    assert isinstance(found, Route)
    assert not found.hand_off
    chosen = next(w for w in usable if w.id == found.worker_id)
    assert ("none has room" in found.reason) == (not any(fits(w, context) for w in usable))
    for other in usable:
        assert fits(chosen, context) >= fits(other, context)
        if fits(chosen, context) == fits(other, context):
            here, there = (t.decode_s(w.running + 1, w.context_tokens + context) for w in (chosen, other))
            assert here <= there


def test_a_sequence_fits_only_with_its_next_token() -> None:
    small = [worker("a", free_tokens=100), worker("b", free_tokens=101, running=1)]
    assert [route_decode(tokens, small, TIMES).worker_id for tokens in (99, 100, 101)] == ["a", "b", "a"]


def test_many_equal_sequences_are_spread_evenly() -> None:
    fleet = {name: worker(name) for name in "abcd"}
    for _ in range(40):
        found = route_decode(1000, list(fleet.values()), TIMES)
        w = fleet[found.worker_id]
        fleet[w.id] = replace(w, running=w.running + 1, context_tokens=w.context_tokens + 1000)
    assert {w.running for w in fleet.values()} == {10}


# --- refusals ---


def test_nobody_there_is_answered_with_the_reason() -> None:
    assert route_prompt(1, {}, [worker("p", "prefill")], TIMES, LIMITS) == Infeasible(
        "none of 1 workers decodes; start one of role decode or colocated"
    )
    closed = [worker("d", accepting=False), worker("c", "colocated", accepting=False), worker("p", "prefill")]
    assert route_decode(1, closed, TIMES) == Infeasible("none of the 2 workers that could accepts: c, d")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: worker("w", "both"), r"^role='both': must be prefill, decode or colocated"),
        (lambda: worker("w", running=-1), r"^running=-1: must be"),
        (lambda: worker("w", max_batch=0), r"^max_batch=0: must be"),
        (lambda: RoutingLimits(step_tokens=0), r"^step_tokens=0: must be"),
        (lambda: RoutingLimits(pause_weight=-0.5), r"^pause_weight=-0.5: must be"),
        (lambda: RoutingLimits(max_local_tokens=-1), r"^max_local_tokens=-1: must be"),
        (lambda: route_prompt(0, {}, [worker("d")], TIMES, LIMITS), r"^isl=0: must be"),
        (lambda: route_decode(0, [worker("d")], TIMES), r"^context_tokens=0: must be"),
    ],
)
def test_what_cannot_be_is_refused(make: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()
