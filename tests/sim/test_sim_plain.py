"""Skipping over steps changes nothing: the simulator against one that takes every step and asks the whole policy each time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plain_simulator import simulate
from sim_fixtures import kind, pools, shared, traffic

from tandem.sched.metrics import check_causality, tpot_s, ttft_s
from tandem.sched.route import RoutingLimits
from tandem.sim.config import SimConfig
from tandem.sim.simulate import run
from tandem.spec.workload import Trace


def assert_equal(config: SimConfig, trace: Trace) -> int:
    """Every request's TTFT and TPOT; how often somebody was preempted."""
    found, plain = run(config, trace, checked=True).requests, simulate(config, trace)
    for request in plain:
        check_causality(request)
    np.testing.assert_array_equal(found.osl, [request.osl for request in plain])
    np.testing.assert_array_equal(found.preemptions, [request.preemptions for request in plain])
    np.testing.assert_allclose(found.ttft_s, [ttft_s(request) for request in plain], rtol=1e-6, atol=1e-9)
    each = [np.nan if tpot_s(request) is None else tpot_s(request) for request in plain]
    np.testing.assert_allclose(found.tpot_s, each, rtol=1e-6, atol=1e-9)
    for name in ("prefill_start_s", "prefill_end_s", "transfer_end_s", "decode_start_s", "done_s"):
        expected = [np.nan if getattr(request, name) is None else getattr(request, name) for request in plain]
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-6, err_msg=name)
    return int(found.preemptions.sum())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    prefill=st.integers(0, 3),
    decode=st.integers(1, 3),
    blocks=st.sampled_from([90, 120, 4000]),
    rate=st.sampled_from([2.0, 10.0, 60.0]),
    clients=st.sampled_from([None, 3]),
    pass_tokens=st.sampled_from([1, 64]),
    max_batch=st.sampled_from([3, 32]),
    step_tokens=st.sampled_from([64, 512]),
    local=st.sampled_from([16, 300, None]),
)
@example(
    seed=658788, prefill=3, decode=3, blocks=90, rate=10.0, clients=None, pass_tokens=1, max_batch=3, step_tokens=512, local=16
)
@example(
    seed=457339, prefill=0, decode=1, blocks=120, rate=10.0, clients=3, pass_tokens=1, max_batch=3, step_tokens=512, local=16
)
@example(
    seed=672846, prefill=0, decode=2, blocks=4000, rate=10.0, clients=3, pass_tokens=64, max_batch=3, step_tokens=64, local=16
)
def test_runs_of_steps_are_the_steps(
    seed: int,
    prefill: int,
    decode: int,
    blocks: int,
    rate: float,
    clients: int | None,
    pass_tokens: int,
    max_batch: int,
    step_tokens: int,
    local: int | None,
) -> None:
    each = kind(blocks=blocks, pass_tokens=pass_tokens, max_batch=max_batch, step_tokens=step_tokens)
    config = pools(prefill, decode, of=each) if prefill else shared(decode, of=each)
    config = replace(config, routing=RoutingLimits(max_local_tokens=local))
    assert_equal(config, traffic(40, rate, seed=seed, clients=clients))


@pytest.mark.parametrize("seed", range(3))
def test_under_pressure_too(seed: int) -> None:
    trace = traffic(60, 50.0, seed=seed, isl=300, osl=150)
    assert assert_equal(shared(1, of=kind(blocks=80)), trace) > 0
    assert_equal(pools(1, 2, of=kind(blocks=80), workers_per_link=3), trace)
