"""The step-by-step loop against loops that can be worked out by hand, and its laws."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_host_served import ENGINE, perf

from tandem.perf.backend import BackendFit
from tandem.perf.closed_loop import ONE, Loop, engine_loop, pools_loop

STEP, PROMPT = 0.01, 0.1
ALIKE = BackendFit(
    step_s=STEP, sequence_s=0.0, launch=0.0, gemm=0.0, quantised_gemm=0.0, moe=0.0, moe_compute=0.0, attention=0.0, other=0.0,
    prompt=1.0, prompt_s=PROMPT, host_s=0.0,
)  # fmt: skip
"""Every step takes STEP, whatever decodes; a prompt PROMPT and hardly anything for its kernels."""


def test_one_request_at_a_time() -> None:
    found = engine_loop(Loop.of(perf(ALIKE), 128, 11, 1), per_place=3)
    kernels = float(perf(ALIKE).prefill_kernels_s(ONE, 1.0, 128.0, 1.0))
    assert kernels > PROMPT
    assert found.ttft_s == pytest.approx(kernels)
    assert found.tpot_s == pytest.approx(STEP)
    assert found.requests_per_s == pytest.approx(1 / (kernels + 10 * STEP))


def test_prompts_that_fit_a_step_go_in_waves() -> None:
    """Two of 128 tokens are read in one step and decode on together: nobody waits for anybody's prompt while decoding."""
    found = engine_loop(Loop.of(perf(ALIKE), 128, 11, 2), per_place=4)
    kernels = float(perf(ALIKE).prefill_kernels_s(ONE, 1.0, 128.0, 1.0))
    assert found.ttft_s == pytest.approx(2 * kernels)
    assert found.tpot_s == pytest.approx(STEP)


def test_long_prompts_are_staggered() -> None:
    """Of two prompts of 512 tokens a step reads one: the first request decodes one token meanwhile, at a prompt's time."""
    found = engine_loop(Loop.of(perf(ALIKE), 512, 101, 2), per_place=1)
    kernels = float(perf(ALIKE).prefill_kernels_s(ONE, 1.0, 512.0, 1.0))
    first = kernels
    # Beside a request that decodes 511 tokens are left, whole passes of which are 256: the second prompt takes two steps.
    second = first + 2 * STEP + kernels
    assert found.ttft_s == pytest.approx((first + second) / 2)
    alone = 100 * STEP
    assert found.tpot_s == pytest.approx(((alone + kernels) + alone) / 200)


def test_a_prefill_worker_leaves_decoding_alone() -> None:
    found = pools_loop(Loop.of(perf(ALIKE, split=True), 512, 11, 2), per_place=4)
    assert STEP <= found.tpot_s < 3 * STEP  # at most a step's wait to join, and the state's way
    both = engine_loop(Loop.of(perf(ALIKE), 512, 11, 2), per_place=4)
    assert found.tpot_s < both.tpot_s


@settings(deadline=None, max_examples=25)
@given(
    isl=st.integers(1, 900), osl=st.integers(2, 60), concurrency=st.integers(1, 20), per_place=st.integers(1, 5),
    prefill=st.integers(1, 3), decode=st.integers(1, 3),
)  # fmt: skip
def test_every_request_is_served_once_and_no_sooner_than_it_can(
    isl: int, osl: int, concurrency: int, per_place: int, prefill: int, decode: int
) -> None:
    """No more than were sent are in flight on average (Little); nothing beats a request that is alone."""
    alone = engine_loop(Loop.of(perf(ENGINE), isl, osl, 1), per_place=1)
    found = engine_loop(Loop.of(perf(ENGINE), isl, osl, concurrency), per_place=per_place)
    assert found.ttft_s >= alone.ttft_s * (1 - 1e-9)
    assert found.tpot_s >= alone.tpot_s * (1 - 1e-9)
    request_s = found.ttft_s + found.tpot_s * (osl - 1)
    assert found.requests_per_s * request_s <= concurrency * (1 + 1e-9)
    split = perf(replace(ENGINE, prompt_s=0.0), split=True)
    pools = pools_loop(Loop.of(split, isl, osl, concurrency), prefill=prefill, decode=decode, per_place=per_place)
    assert pools.ttft_s > 0
    assert pools.tpot_s > 0
    limited = pools_loop(
        Loop.of(split, isl, osl, concurrency), prefill=prefill, decode=decode, batch_limit=1, per_place=per_place
    )
    assert limited.requests_per_s > 0
