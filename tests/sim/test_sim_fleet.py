"""Workers that come, go, die and change their roles while requests run: nothing is lost, and nobody is counted twice."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_fixtures import FAR, Script, kind, pools, shared, traffic

from tandem.sched.route import RoutingLimits
from tandem.sim.config import Death, Group, SimConfig
from tandem.sim.result import TIMES, SimResult
from tandem.sim.simulate import run
from tandem.spec.errors import SpecError
from tandem.spec.workload import Slo, Trace

CHAIN = ("arrival_s", "prefill_start_s", "prefill_end_s", "transfer_start_s", "transfer_end_s", "decode_start_s", "done_s")


def assert_sound(result: SimResult, trace: Trace) -> None:
    """All is served, once, in the order of causes and effects."""
    table = result.requests
    assert len(table) == len(trace)
    assert table.completed.all()
    np.testing.assert_array_equal(table.osl, trace.osl)
    assert result.simulated_tokens == trace.osl.sum()
    last = table.arrival_s
    for name in CHAIN[1:]:
        at = getattr(table, name)
        there = ~np.isnan(at)
        assert (at[there] >= last[there] - 1e-9).all(), name
        last = np.where(there, at, last)
    assert (table.first_token_s >= table.prefill_end_s).all()


def digest(result: SimResult) -> str:
    data = b"".join(np.ascontiguousarray(getattr(result.requests, name)).tobytes() for name in TIMES)
    return hashlib.sha256(data + b"".join(column.tobytes() for column in result.series.values())).hexdigest()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    prefill=st.integers(0, 3),
    decode=st.integers(1, 3),
    blocks=st.sampled_from([90, 150, 4000]),
    rate=st.sampled_from([2.0, 10.0, 60.0]),
    clients=st.sampled_from([None, 3]),
    pass_tokens=st.sampled_from([1, 64]),
    deaths=st.lists(st.tuples(st.floats(0.1, 8.0), st.integers(0, 5)), max_size=3),
    changes=st.lists(
        st.tuples(st.floats(0.1, 60.0), st.integers(1, 4), st.integers(1, 4), st.sampled_from([None, "k", "other"])), max_size=4
    ),
)
def test_whatever_happens_every_request_is_served_once(
    seed: int,
    prefill: int,
    decode: int,
    blocks: int,
    rate: float,
    clients: int | None,
    pass_tokens: int,
    deaths: list[tuple[float, int]],
    changes: list[tuple[float, int, int, str | None]],
) -> None:
    each = kind(blocks=blocks, pass_tokens=pass_tokens)
    told = tuple(Death(at_s=at_s, worker=worker) for at_s, worker in deaths)
    other = kind("other", blocks=blocks, pass_tokens=pass_tokens, gpus=2)
    if prefill:
        config = pools(prefill, decode, of=each, deaths=told, window_s=2.0, kinds=(other,))
    else:
        config = shared(decode, of=each, deaths=told, window_s=2.0, kinds=(other,))
    trace = traffic(60, rate, seed=seed, clients=clients)
    steps = [(at_s, {"prefill": p, "decode": d} if prefill else {"colocated": d}) for at_s, p, d, _ in changes]
    kinds = {at_s: name for at_s, _, _, name in changes if name is not None}
    result = run(config, trace, policy=Script(*steps, kinds=kinds), checked=True)
    assert_sound(result, trace)
    assert digest(result) == digest(run(config, trace, policy=Script(*steps, kinds=kinds)))


def test_a_request_that_outgrows_every_worker_is_refused_and_the_others_are_served() -> None:
    trace = traffic(20, 5.0)
    trace.isl[7] = 100_000
    table = run(pools(), trace).requests
    assert table.finish[7] == 3
    assert np.delete(table.completed, 7).all()


def test_tight_blocks_preempt_and_nobody_starves() -> None:
    trace = traffic(80, 50.0, isl=300, osl=200)
    result = run(shared(1, of=kind(blocks=80)), trace, checked=True)
    assert_sound(result, trace)
    assert result.requests.preemptions.sum() > 0


def test_a_dead_workers_requests_go_on_elsewhere_and_another_starts() -> None:
    trace = traffic(300, 10.0)
    result = run(pools(2, 2, deaths=(Death(at_s=10.0, worker=3),), window_s=1.0), trace, checked=True)
    assert_sound(result, trace)
    assert result.requests.retries.sum() > 0
    decoders = result.series["decode_workers"]
    assert (decoders[:9] == 2).all()
    assert decoders[12] == 1
    assert decoders[-1] == 2  # 20 s later


@pytest.mark.parametrize("dies", [0, 1, 2])
def test_a_state_on_its_way_to_a_worker_that_dies_is_made_again(dies: int) -> None:
    each = kind()
    slow = replace(each, times=replace(each.times, link_bytes_per_s=2e7))  # two seconds or so a state
    trace = traffic(40, 5.0)
    result = run(pools(1, 2, of=slow, deaths=(Death(at_s=4.0, worker=dies),), window_s=1.0), trace, checked=True)
    assert_sound(result, trace)
    assert dies == 0 or result.requests.retries.sum() > 0


def test_a_run_that_nobody_is_left_to_serve_ends() -> None:
    trace = traffic(60, 2.0)
    script = Script((5.0, {"prefill": 0, "decode": 0}))
    result = run(pools(1, 1, window_s=1.0), trace, policy=script)
    stats = result.stats()
    assert 0 < stats.completed < len(trace)
    assert stats.completed + stats.unfinished == len(trace)


def test_a_worker_changes_its_role_only_when_drained() -> None:
    script = Script((10.0, {"prefill": 1, "decode": 3}))
    trace = traffic(400, 12.0)
    config = pools(2, 2, window_s=1.0)
    result = run(config, trace, policy=script, checked=True)
    assert_sound(result, trace)
    assert result.series["prefill_workers"][-1] == 1
    assert result.series["decode_workers"][-1] == 3
    assert (result.series["gpus"] == 4).all()  # a flip holds on to its GPU
    for seen in script.seen:  # while it drains it is still of its old role, and beside the others of it
        for pool in seen.pools:
            assert pool.up + pool.starting + pool.draining <= 3


def test_prompts_that_have_not_begun_move_to_a_worker_that_comes_up_and_from_one_that_drains() -> None:
    at_once = Trace(name="heap", arrival_s=np.zeros(400), isl=np.full(400, 4000), osl=np.full(400, 5))
    grows = run(pools(1, 1, window_s=1.0), at_once, policy=Script((1.0, {"prefill": 3, "decode": 1})), checked=True)
    assert_sound(grows, at_once)
    stays = run(pools(1, 1), at_once).requests
    begun_s, before_s = grows.requests.prefill_start_s, stays.prefill_start_s
    up_s = 1.0 + kind().start_up_s
    assert before_s.max() > up_s + 10.0
    old = before_s <= up_s
    np.testing.assert_allclose(begun_s[old], before_s[old])
    left_s = before_s.max() - up_s
    assert begun_s.max() - up_s == pytest.approx(left_s / 3, rel=0.2)  # three share what one had left
    shrinks = run(pools(2, 1, window_s=1.0), at_once, policy=Script((2.0, {"prefill": 1, "decode": 1})), checked=True)
    assert_sound(shrinks, at_once)
    gpus, at_s = shrinks.series["gpus"], shrinks.series["at_s"]
    assert at_s[np.argmax(gpus == 2)] <= 4.0  # what it had not begun did not hold it up
    assert shrinks.requests.retries.sum() == 0


def test_workers_are_replaced_one_after_another() -> None:
    other = kind("other", gpus=2)
    script = Script((5.0, {"prefill": 1, "decode": 2}), kinds={5.0: "other"})
    trace = traffic(1500, 10.0)
    result = run(pools(2, 4, window_s=1.0, kinds=(other,)), trace, policy=script, checked=True)
    assert_sound(result, trace)
    assert result.requests.retries.sum() == 0
    counts = [{(p.role, p.kind): (p.up, p.starting) for p in seen.pools} for seen in script.seen]
    assert counts[5] == {
        ("prefill", "k"): (2, 0),
        ("prefill", "other"): (0, 1),
        ("decode", "k"): (4, 0),
        ("decode", "other"): (0, 1),
    }
    half = next(c for c in counts if c.get(("decode", "other"), (0, 0))[0] == 1)
    assert half["decode", "k"][0] == 2  # the first of two new ones lets half of the old ones go
    assert counts[-1] == {("prefill", "other"): (1, 0), ("decode", "other"): (2, 0)}


def test_a_replacement_never_leaves_fewer_workers_than_it_began_with() -> None:
    other = kind("other")
    trace = traffic(6000, 10.0)
    script = Script((5.0, {"colocated": 8}), kinds={5.0: "other"})
    result = run(shared(8, window_s=1.0, kinds=(other,)), trace, policy=script, checked=True)
    assert_sound(result, trace)
    assert result.series["colocated_workers"].min() == 8
    assert result.series["gpus"].max() <= 10  # one more, beside one that drains
    assert {p.kind for p in script.seen[-1].pools} == {"other"}


def test_workers_start_after_their_start_up_and_are_paid_from_the_decision() -> None:
    script = Script((10.0, {"prefill": 1, "decode": 2}))
    trace = traffic(600, 12.0)
    result = run(pools(1, 1, window_s=1.0), trace, policy=script, checked=True)
    at_s, decoders, gpus = (result.series[name] for name in ("at_s", "decode_workers", "gpus"))
    up_s = at_s[np.argmax(decoders == 2)]
    assert 30.0 <= up_s <= 31.0
    np.testing.assert_array_equal(gpus[at_s <= 10.0], 2)
    expected = 2 * result.duration_s + (result.duration_s - 10.0)
    assert result.gpu_seconds == pytest.approx(expected)
    assert result.price_usd == pytest.approx(expected / 3600.0 * 2.0)


def test_a_worker_that_is_removed_ends_its_work_first() -> None:
    trace = traffic(300, 10.0)
    result = run(pools(1, 3, window_s=1.0), trace, policy=Script((5.0, {"prefill": 1, "decode": 1})), checked=True)
    assert_sound(result, trace)
    assert result.requests.retries.sum() == 0
    assert result.series["gpus"][-1] == 2


def test_what_starts_is_given_up_first_and_what_drains_is_kept_if_needed_after_all() -> None:
    trace = traffic(300, 10.0)
    script = Script((3.0, {"prefill": 1, "decode": 3}), (6.0, {"prefill": 1, "decode": 1}), (8.0, {"prefill": 1, "decode": 1}))
    result = run(pools(1, 1, window_s=1.0), trace, policy=script, checked=True)
    assert_sound(result, trace)
    assert result.series["gpus"].max() == 4
    assert result.series["decode_workers"].max() == 1


def test_workers_of_two_kinds_serve_together() -> None:
    fast, slow = kind("fast", gpus=2), kind("slow", max_batch=4)
    groups = (
        Group(kind=fast, role="prefill", count=1),
        Group(kind=fast, role="decode", count=1),
        Group(kind=slow, role="decode", count=2),
    )
    trace = traffic(200, 10.0)
    script = Script()
    result = run(SimConfig(groups=groups, routing=FAR, window_s=1.0), trace, policy=script, checked=True)
    assert_sound(result, trace)
    assert result.gpu_seconds == pytest.approx(6 * result.duration_s)
    assert {(pool.role, pool.kind, pool.up) for pool in script.seen[0].pools} == {
        ("prefill", "fast", 1),
        ("decode", "fast", 1),
        ("decode", "slow", 2),
    }


def test_prompts_that_begin_alike_are_prefilled_from_what_is_kept() -> None:
    trace = traffic(40, 2.0, isl=600)
    isl = np.maximum(trace.isl, 300)
    hashes = np.tile(np.arange(4), len(trace))  # four blocks of 64 tokens that all share
    end = 4 * np.arange(1, len(trace) + 1)
    same = Trace(
        name="alike", arrival_s=trace.arrival_s, isl=isl, osl=trace.osl, prefix_hash=hashes, prefix_end=end, prefix_block=64
    )
    cold = run(pools(1, 1), same).requests
    warm = run(pools(1, 1, prefix_cache_tokens=10_000), same, checked=True).requests
    assert not cold.cached.any()
    assert warm.cached[0] == 0
    assert (warm.cached[5:] == 256).all()
    assert warm.ttft_s.mean() < cold.ttft_s.mean()
    none = run(pools(1, 1, prefix_cache_tokens=64), same, checked=True).requests
    assert none.cached.max() <= 64


def test_states_share_a_link_one_after_another() -> None:
    trace = Trace(name="two", arrival_s=np.zeros(2), isl=np.full(2, 4000), osl=np.full(2, 20))
    each = kind(step_tokens=4096)
    alone = run(pools(2, 2, of=each), trace).requests
    together = run(pools(2, 2, of=each, workers_per_link=4), trace).requests
    moved_s = (1e6 + 1e5 * 4000) / 1e10
    assert alone.transfer_end_s - alone.transfer_start_s == pytest.approx(np.full(2, 0.1 * moved_s))
    last = np.sort(together.transfer_end_s - together.transfer_start_s)
    assert last[1] > last[0]


def test_a_window_tells_what_happened_in_it_and_never_what_will() -> None:
    script = Script()
    trace = traffic(200, 10.0)
    result = run(pools(1, 2, window_s=2.0), trace, policy=script, slo=Slo(ttft_s=1.0, tpot_s=0.05))
    assert result.series["arrived"].sum() == result.series["finished"].sum() == len(trace)
    np.testing.assert_array_equal(result.series["arrived"][:-1], [seen.arrived for seen in script.seen])
    first = script.seen[0]
    arrived = trace.isl[trace.arrival_s <= first.at_s]
    assert first.isl is not None
    assert first.isl.mean == pytest.approx(arrived.mean())
    other = Trace(name="t", arrival_s=trace.arrival_s, isl=trace.isl, osl=trace.osl.copy())
    unfinished = result.requests.done_s > 6.0
    other.osl[unfinished] += 50
    again = Script()
    run(pools(1, 2, window_s=2.0), other, policy=again, slo=Slo(ttft_s=1.0, tpot_s=0.05))
    assert [s for s in again.seen if s.at_s < 6.0] == [s for s in script.seen if s.at_s < 6.0]


def test_a_run_that_is_cut_off_counts_what_is_unfinished() -> None:
    trace = traffic(100, 10.0)
    result = run(pools(1, 1, until_s=4.0), trace)
    stats = result.stats(Slo(ttft_s=1.0))
    assert result.duration_s == 4.0
    assert 0 < stats.unfinished < 100
    assert stats.arrived == stats.completed + stats.unfinished
    assert 0 < result.simulated_tokens < trace.osl.sum()


def test_impossible_traces_and_configurations_are_refused() -> None:
    late = traffic(3, 1.0)
    late.arrival_s[0] = 99.0
    with pytest.raises(SpecError, match="in order"):
        run(pools(), late)
    with pytest.raises(SpecError, match="holds no requests"):
        run(pools(), traffic(0, 1.0))
    with pytest.raises(SpecError, match="prefix_cache_tokens"):
        pools(prefix_cache_tokens=-1)
    with pytest.raises(SpecError, match="worker"):
        Death(at_s=1.0, worker=-1)
    with pytest.raises(SpecError, match="none of them decodes"):
        SimConfig(groups=(Group(kind=kind(), role="prefill", count=1),), routing=RoutingLimits())
