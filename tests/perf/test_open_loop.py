"""Queueing in closed form against an engine that is simulated step by step, and the laws that both must obey."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_queue import ChunkedEngine, Engine, mean_tpot_s, mean_ttft_s, run_closed, run_open, run_pools

from tandem.perf.backend import PHYSICS
from tandem.perf.costs import Layout
from tandem.perf.estimate import Instances, estimate, estimate_disaggregated, perf_model
from tandem.perf.open_loop import open_loop, open_loop_pools
from tandem.perf.phases import PerfModel
from tandem.perf.pools import DecodePool, PrefillPool, split_times
from tandem.spec.design import Parallelism
from tandem.spec.errors import SpecError
from tandem.spec.workload import Workload

ONE = Layout(1.0, 1.0, 1.0, 1.0, 1.0)
QWEN = perf_model("qwen3-8b", "h100-sxm", None, "vllm")
IDEAL = replace(QWEN, given_fit=replace(PHYSICS, host_s=0.0, pause=0.5))
"""A server that adds no latency of its own; a newcomer meets half of the step that is running."""
AGREE = 0.08
"""Means of some thousand simulated requests scatter by a few percent, near saturation more (seeds fixed, so it repeats)."""


def one(value: float) -> np.ndarray:
    return np.array([float(value)])


def step_of(perf: PerfModel, workload: Workload) -> Any:
    """Seconds of a decode step by number of sequences, from the same performance model that the closed form asks."""
    table = perf.decode_tpot_s(ONE, np.arange(1.0, 1025.0), workload)
    return lambda n: float(table[n - 1]) if n else 1e-6


def engine(perf: PerfModel, workload: Workload, spread: float = 0.0) -> Engine:
    prompt_s = perf.prompt_cost * float(perf.prefill_kernels_s(ONE, one(1), workload.mean_isl, 1.0)[0])
    return Engine(step_of(perf, workload), prompt_s, round(workload.mean_osl), spread)


@pytest.mark.parametrize(("isl", "osl", "share"), [(1024, 128, 0.3), (1024, 128, 0.6), (8192, 64, 0.5), (256, 512, 0.5)])
def test_a_rate_of_arrivals_agrees_with_the_simulation(isl: int, osl: int, share: float) -> None:
    workload = Workload.fixed(isl, osl)
    run = engine(IDEAL, workload)
    served = IDEAL.colocated(ONE, one(200), workload)
    rate = share * float(served.requests_per_s[0])
    jobs = run_open(run, rate, 3000, seed=1)
    found = open_loop(IDEAL, ONE, one(rate), workload, one(4000))
    assert found.tpot_s[0] == pytest.approx(mean_tpot_s(jobs), rel=AGREE)
    assert found.ttft_s[0] == pytest.approx(mean_ttft_s(jobs), rel=2 * AGREE)


@pytest.mark.parametrize(
    ("isl", "osl", "share", "tpot", "ttft"),
    [
        (1024, 128, 0.9, (-0.06, 0.0), (0.08, 0.2)),
        (256, 512, 0.85, (-0.03, 0.02), (0.0, 0.13)),
        (4096, 256, 0.85, (-0.13, -0.03), (-0.05, 0.1)),
        (8192, 64, 0.85, (-0.28, -0.15), (-0.1, 0.1)),
    ],
)
def test_near_saturation_tpot_is_low_and_ttft_high_as_the_concepts_page_says(
    isl: int, osl: int, share: float, tpot: tuple[float, float], ttft: tuple[float, float]
) -> None:
    workload = Workload.fixed(isl, osl)
    rate = share * float(IDEAL.colocated(ONE, one(200), workload).requests_per_s[0])
    jobs = [job for seed in (1, 2, 3) for job in run_open(engine(IDEAL, workload), rate, 1500, seed=seed)]
    found = open_loop(IDEAL, ONE, one(rate), workload, one(4000))
    assert tpot[0] <= found.tpot_s[0] / mean_tpot_s(jobs) - 1 <= tpot[1]
    assert ttft[0] <= found.ttft_s[0] / mean_ttft_s(jobs) - 1 <= ttft[1]


def test_arrivals_in_groups_agree_with_the_simulation() -> None:
    workload, rate = Workload.fixed(4096, 64), 5.0
    jobs = run_open(engine(IDEAL, workload), rate, 6000, seed=2, together=4)
    found = open_loop(IDEAL, ONE, one(rate), workload, one(4000), together=4)
    alone = open_loop(IDEAL, ONE, one(rate), workload, one(4000))
    assert found.ttft_s[0] == pytest.approx(mean_ttft_s(jobs), rel=2 * AGREE)
    assert found.ttft_s[0] > 1.3 * alone.ttft_s[0]


def test_chunked_prompts_agree_with_the_simulation() -> None:
    workload, rate, chunk = Workload.fixed(4096, 128), 4.0, 1024.0
    found = open_loop(IDEAL, ONE, one(rate), workload, one(4000), chunk_tokens=chunk)
    _, extra_s, chunks = IDEAL.chunk_step_s(ONE, found.batch + 1.0, workload, chunk)
    whole = round(float(chunks[0]))
    run = ChunkedEngine(step_of(IDEAL, workload), 0.0, 128, extra_s=float(extra_s[0] * chunks[0]) / whole, chunks=whole)
    jobs = run_open(run, rate, 3000, seed=3)
    assert found.tpot_s[0] == pytest.approx(mean_tpot_s(jobs), rel=AGREE)
    assert found.ttft_s[0] == pytest.approx(mean_ttft_s(jobs), rel=2 * AGREE)


@pytest.mark.parametrize(("isl", "osl", "concurrency"), [(1024, 256, 16), (1024, 256, 64), (4096, 128, 8), (256, 512, 128)])
def test_a_fixed_concurrency_agrees_with_the_simulation(isl: int, osl: int, concurrency: int) -> None:
    """Ten waves and lengths that vary by a fifth, as benchmarks run them: TPOT within a twentieth, TTFT within a fifth, since
    one share stands for the burst of the start and for the clumps of later waves, which loosen only slowly."""
    workload = Workload.fixed(isl, osl)
    jobs = run_closed(engine(IDEAL, workload, spread=0.2), concurrency, 10)
    found = IDEAL.colocated(ONE, one(concurrency), workload, closed_loop=True)
    assert found.tpot_s[0] == pytest.approx(mean_tpot_s(jobs), rel=0.05)
    assert found.ttft_s[0] == pytest.approx(mean_ttft_s(jobs), rel=0.2)


@settings(max_examples=60, deadline=None)
@given(st.integers(64, 16_000), st.integers(2, 1000), st.floats(0.05, 0.9))
def test_littles_law_and_what_grows_with_the_rate(isl: int, osl: int, share: float) -> None:
    workload = Workload.fixed(isl, osl)
    top = float(QWEN.colocated(ONE, one(64), workload).requests_per_s[0])
    rates = top * share * np.array([0.5, 1.0])
    found = open_loop(QWEN, ONE, rates, workload, one(2000))
    stable = np.isfinite(found.ttft_s)
    held = rates * found.tpot_s * (osl - 1)
    assert np.allclose(found.batch[stable], held[stable], rtol=1e-6, atol=1e-9) or osl <= 2
    if stable.all():
        assert found.ttft_s[0] <= found.ttft_s[1] * (1 + 1e-9)
        assert found.tpot_s[0] <= found.tpot_s[1] * (1 + 1e-9)
    assert stable[0] or not stable[1]


def test_an_idle_deployment_answers_as_one_that_serves_a_single_request() -> None:
    workload = Workload.fixed(2048, 128)
    found = open_loop(IDEAL, ONE, one(1e-6), workload, one(64))
    alone = IDEAL.colocated(ONE, one(1), workload)
    assert found.tpot_s[0] == pytest.approx(float(alone.tpot_s[0]), rel=1e-3)
    prompt_s = IDEAL.backend_fit.prompt * float(IDEAL.prefill_kernels_s(ONE, one(1), 2048.0, 1.0)[0])
    assert found.ttft_s[0] == pytest.approx(prompt_s, rel=1e-3)


SLOTS = [(2, 1, 256, 64), (1, 1, 256, 64), (4, 2, 16, 96), (1, 2, 64, 16)]


@pytest.mark.parametrize(("prefills", "decodes", "slots", "concurrency"), SLOTS)
def test_two_pools_at_a_fixed_concurrency_agree_with_the_simulation(
    prefills: int, decodes: int, slots: int, concurrency: int
) -> None:
    """Enough prefill, too little, too few decode slots, and little load: rate within a tenth, TPOT within a twentieth."""
    perf = replace(IDEAL, split=True, given_fit=replace(PHYSICS, host_s=0.0, pause=0.0))
    workload = Workload.fixed(4096, 256)
    prompt_s = float(perf.prefill_kernels_s(ONE, one(1), 4096.0, 1.0)[0])
    pools = {"prefills": prefills, "decodes": decodes, "slots": slots, "concurrency": concurrency}
    jobs = run_pools(step_of(perf, workload), prompt_s, 256, **pools, waves=10)
    found = split_times(
        perf, PrefillPool(ONE, one(1), one(prefills)), DecodePool(ONE, one(slots), one(decodes)), workload, one(concurrency)
    )
    assert found.tpot_s[0] == pytest.approx(mean_tpot_s(jobs), rel=0.06)
    each_s = float(np.mean([j.done_s - j.arrival_s for j in jobs]))
    assert concurrency / found.requests_per_s[0] == pytest.approx(each_s, rel=0.1)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 300),
    st.integers(1, 20_000),
    st.integers(64, 8192),
    st.integers(2, 1000),
)
def test_pools_never_outrun_their_decode_slots(
    prefills: int, decodes: int, slots: int, concurrency: int, isl: int, osl: int
) -> None:
    perf, workload = replace(QWEN, split=True), Workload.fixed(isl, osl)
    found = split_times(
        perf, PrefillPool(ONE, one(1), one(prefills)), DecodePool(ONE, one(slots), one(decodes)), workload, one(concurrency)
    )
    allowed = slots * decodes / (found.tpot_s[0] * (osl - 1))
    assert found.requests_per_s[0] <= allowed * (1 + 1e-3)
    assert found.batch[0] <= slots * (1 + 1e-9)
    served = found.requests_per_s[0] * (found.ttft_s[0] + found.tpot_s[0] * (osl - 1))
    assert served == pytest.approx(concurrency, rel=1e-9)


def test_pools_share_no_time_but_wait_for_prompts() -> None:
    perf = replace(QWEN, split=True)
    pools = PrefillPool(ONE, one(1), one(2)), DecodePool(ONE, one(256), one(1))
    workload = Workload.fixed(4096, 256)
    slow, fast = (open_loop_pools(perf, *pools, one(rate), workload) for rate in (1.0, 6.0))
    assert slow.ttft_s[0] < fast.ttft_s[0]
    assert slow.tpot_s[0] < fast.tpot_s[0]
    more = open_loop_pools(perf, pools[0]._replace(replicas=one(8)), pools[1], one(6.0), workload)
    assert more.ttft_s[0] < fast.ttft_s[0]
    assert more.tpot_s[0] == fast.tpot_s[0]
    prompt_s = float(perf.prefill_kernels_s(ONE, one(1), 4096.0, 1.0)[0])
    limit = 2 / prompt_s
    assert np.isinf(open_loop_pools(perf, *pools, one(limit * 1.01), workload).ttft_s[0])
    assert np.isfinite(open_loop_pools(perf, *pools, one(limit * 0.5), workload).ttft_s[0])


ASK: dict[str, Any] = {"model": "qwen3-8b", "hardware": "h100-sxm", "isl": 2048, "osl": 256}


def test_estimate_at_a_rate_is_that_rate() -> None:
    found = estimate(**ASK, requests_per_s=4.0)
    assert found.tokens_per_s_per_gpu.value == pytest.approx(4.0 * 256)
    assert found.tokens_per_s_per_gpu.low == found.tokens_per_s_per_gpu.high == found.tokens_per_s_per_gpu.value
    spread = estimate(**ASK, requests_per_s=16.0, gpus=4)
    assert spread.tpot_s == found.tpot_s
    chunked = estimate(**ASK, requests_per_s=4.0, mode="piggybacked")
    assert chunked.tpot_s.value < 2 * found.tpot_s.value


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"requests_per_s": 1000.0}, "requests_per_s=1000: more than this deployment sustains"),
        ({"requests_per_s": 0.0}, "requests_per_s=0.0: must be a number above 0"),
        ({"requests_per_s": -1.0}, "requests_per_s=-1.0"),
        ({"requests_per_s": float("nan")}, "requests_per_s=nan"),
        ({"requests_per_s": 1.0, "batch": 4}, "give exactly one of --concurrency, --batch and --rate"),
        ({}, "give exactly one of --concurrency, --batch and --rate"),
    ],
)
def test_impossible_rates(change: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text.replace("(", r"\(")):
        estimate(**ASK, **change)


def test_disaggregated_estimates_at_a_rate() -> None:
    pool = Instances(parallelism=Parallelism(), batch=64)
    found = estimate_disaggregated(**ASK, prefill=replace(pool, batch=1), decode=pool, requests_per_s=4.0)
    assert found.tokens_per_s_per_gpu.value == pytest.approx(4.0 * 256 / 2)
    with pytest.raises(SpecError, match="give one of them"):
        estimate_disaggregated(**ASK, prefill=pool, decode=pool, requests_per_s=4.0, concurrency=4)
    with pytest.raises(SpecError, match="more than this deployment sustains"):
        estimate_disaggregated(**ASK, prefill=replace(pool, batch=1), decode=pool, requests_per_s=400.0)
