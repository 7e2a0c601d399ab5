from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tandem.sim.calibrate import (
    VLLM_0_19,
    AllReduce,
    GpuFactors,
    HostFactors,
    ServingFactors,
    calibrate,
    errors,
    kind_of_run,
    loss,
    replay,
)
from tandem.sim.measured import CALIBRATION, VALIDATION, MeasuredRun, load_run
from tandem.spec.errors import SpecError, TraceError

THROUGHPUT = {
    "RTX4090_Llama-3.1-8B": 1066.4,
    "RTXPRO6000_Llama-3.1-8B": 2969.3,
    "RTXPRO6000_Qwen3-32B": 1249.5,
    "RTXPRO6000_Qwen3-30B-A3B-Instruct-2507": 3116.1,
}
ALL = (*CALIBRATION, *VALIDATION)


@pytest.mark.parametrize("name", ALL)
def test_a_measured_run_is_whole(name: str) -> None:
    run = load_run(name)
    assert len(run.trace) == 300
    assert np.all(np.diff(run.trace.arrival_s) >= 0)
    assert np.all(run.ttft_s > 0)
    assert np.all(run.last_token_s >= run.first_token_s)
    assert run.step_tokens == 2048
    assert run.trace.osl.sum() / run.duration_s == pytest.approx(THROUGHPUT[name], rel=1e-3)


def test_settings_are_those_of_the_engine() -> None:
    small, grouped, pair = load_run("RTX4090_Llama-3.1-8B"), *(load_run(name) for name in reversed(VALIDATION))
    assert (small.blocks, small.max_batch) == (2588, 256)
    assert (grouped.parallelism.dp, grouped.parallelism.ep, grouped.max_batch) == (2, 2, 256)
    assert (pair.parallelism.tp, pair.parallelism.ep, pair.max_batch) == (2, 1, 128)


def test_an_unknown_run_is_refused() -> None:
    with pytest.raises(TraceError, match=r"run='nope': unknown; the measured runs are RTX4090"):
        load_run("nope")


@pytest.mark.parametrize("name", VALIDATION)
def test_runs_that_nothing_was_fitted_on_are_met(name: str) -> None:
    run = load_run(name)
    found = errors(run, replay(run, VLLM_0_19))
    assert abs(found.tpot) <= 0.10
    assert abs(found.ttft) <= 0.20
    assert abs(found.throughput) <= 0.08


@pytest.mark.parametrize("name", CALIBRATION)
def test_runs_of_the_calibration_are_met_closer(name: str) -> None:
    run = load_run(name)
    found = errors(run, replay(run, VLLM_0_19))
    assert max(abs(found.tpot), abs(found.ttft), abs(found.throughput)) <= 0.04


def test_a_replay_is_the_same_each_time_and_preempts_where_the_cache_is_small() -> None:
    run = load_run("RTX4090_Llama-3.1-8B")
    one, two = replay(run, VLLM_0_19).requests, replay(run, VLLM_0_19).requests
    assert one.done_s.tobytes() == two.done_s.tobytes()
    assert one.preemptions.sum() > 10
    assert replay(replace(run, blocks=100_000), VLLM_0_19).requests.preemptions.sum() == 0


def test_errors_of_a_run_against_its_own_simulation_are_none() -> None:
    run = load_run("RTXPRO6000_Llama-3.1-8B")
    result = replay(run, VLLM_0_19)
    itself = replace(run, first_token_s=result.requests.first_token_s, last_token_s=result.requests.done_s)
    found = errors(itself, result)
    assert (found.ttft, found.tpot, found.throughput) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
    assert loss(itself, result) == pytest.approx(0.0, abs=1e-20)
    late = replace(itself, last_token_s=itself.last_token_s * 2)
    assert errors(late, result).throughput == pytest.approx(1.0)
    assert errors(late, result).tpot < 0
    assert loss(late, result) > 1.0


def shifted(factors: ServingFactors, **host: float) -> ServingFactors:
    return replace(factors, host=replace(factors.host, **host))


@pytest.mark.parametrize("slower", ["step_s", "sequence_s", "chunk_step_s"])
def test_each_host_factor_slows_what_it_says(slower: str) -> None:
    run = load_run("RTXPRO6000_Llama-3.1-8B")
    base, more = (kind_of_run(run, f).times for f in (VLLM_0_19, shifted(VLLM_0_19, **{slower: 0.05})))
    decode = more.decode_s(10, 10_000) - base.decode_s(10, 10_000)
    chunk = more.prefill_step_s(512, 0) - base.prefill_step_s(512, 0)
    mixed = more.mixed_step_s(10, 10_000, 512, 0) - base.mixed_step_s(10, 10_000, 512, 0)
    added = {name: 0.05 - getattr(VLLM_0_19.host, name) for name in ("step_s", "sequence_s", "chunk_step_s")}[slower]
    sequences = {"step_s": (1, 1, 1), "sequence_s": (10, 1, 11), "chunk_step_s": (0, 1, 1)}[slower]
    assert (decode, chunk, mixed) == pytest.approx(tuple(n * added for n in sequences), rel=1e-6, abs=1e-12)


def test_a_slow_all_reduce_slows_only_those_who_need_one() -> None:
    slow = replace(VLLM_0_19, all_reduce=AllReduce(each_s=1e-4, bytes_per_s=5e9))
    for name in ALL:
        run = load_run(name)
        base, more = (kind_of_run(run, f).times for f in (VLLM_0_19, slow))
        decode = more.decode_s(100, 100_000) > base.decode_s(100, 100_000) * 1.05
        chunk = more.prefill_step_s(2048, 0) > base.prefill_step_s(2048, 0) * 1.05
        assert decode == chunk == (run.parallelism.tp > 1)


def as_measured(run: MeasuredRun, factors: ServingFactors) -> MeasuredRun:
    """The run as an engine with just these factors would have been measured."""
    simulated = replay(run, factors).requests
    return replace(run, first_token_s=simulated.first_token_s, last_token_s=simulated.done_s)


@pytest.mark.slow
def test_calibration_finds_the_factors_that_made_a_run() -> None:
    pytest.importorskip("scipy")
    truth = ServingFactors(
        host=HostFactors(step_s=2e-3, sequence_s=3e-5, chunk_step_s=5e-3),
        gpus={"rtx-4090": GpuFactors(compute=1.2, bandwidth=1.1)},
    )
    runs = [as_measured(load_run(name), truth) for name in CALIBRATION]
    found = calibrate(runs)
    assert sum(loss(run, replay(run, found)) for run in runs) < 0.01
    assert found.gpus["rtx-4090"].compute == pytest.approx(1.2, rel=0.05)
    assert found.gpus["rtx-4090"].bandwidth == pytest.approx(1.1, rel=0.05)
    assert found.host.sequence_s == pytest.approx(3e-5, rel=0.25)


@pytest.mark.slow
def test_the_shipped_factors_are_those_that_calibration_finds() -> None:
    pytest.importorskip("scipy")
    runs = [load_run(name) for name in CALIBRATION]
    found = calibrate(runs)
    losses = [sum(loss(run, replay(run, f)) for run in runs) for f in (found, VLLM_0_19)]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)  # which request is preempted hangs on the last digit


@pytest.mark.parametrize("name", ["step_s", "sequence_s", "chunk_step_s"])
def test_factors_below_zero_are_refused(name: str) -> None:
    with pytest.raises(SpecError, match=rf"{name}=-0\.1"):
        shifted(VLLM_0_19, **{name: -0.1})
    with pytest.raises(SpecError, match="compute=0"):
        GpuFactors(compute=0)
