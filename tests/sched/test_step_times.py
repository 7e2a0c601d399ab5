"""Times for routing: tables against the performance model itself, and what is learned against a hidden truth."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandem.perf.costs import Layout
from tandem.perf.estimate import perf_model
from tandem.sched.route import Route, RoutingLimits, StepTimes, WorkerView, route_decode, route_prompt
from tandem.sched.times import MeasuredTimes, PredictedTimes
from tandem.spec.errors import SpecError
from tandem.spec.workload import Workload

ONE = Layout(1.0, 1.0, 1.0, 1.0, 1.0)
NANO = "nvidia/NVIDIA-Nemotron-Nano-9B-v2"
NAMES = [NANO, "Qwen/Qwen3-8B", "openai/gpt-oss-20b", "Qwen/Qwen3-30B-A3B"]
TIMES = {name: PredictedTimes(perf_model(name, "h100-sxm", "bf16", "vllm"), ONE) for name in NAMES}
names = st.sampled_from(NAMES)
lengths = st.integers(1, 200_000)


@given(name=names, tokens=lengths, context=st.integers(0, 200_000))
@settings(max_examples=150, deadline=None)
def test_prefill_is_the_models_within_its_nodes(name: str, tokens: int, context: int) -> None:
    times = TIMES[name]
    direct = float(times.direct_prefill_s(np.array([float(tokens)]), np.array([float(context)]))[0])
    assert times.prefill_s(tokens, context) == pytest.approx(direct, rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_prompt_takes_what_a_prefill_instance_takes(name: str) -> None:
    times = TIMES[name]
    fit = times.perf.backend_fit
    for isl in (128, 512, 2048):
        kernels_s = float(times.perf.prefill_kernels_s(ONE, 1.0, float(isl), 1.0))
        assert times.prefill_s(isl, 0) == pytest.approx(
            times.perf.prompt_cost * kernels_s + fit.step_s + fit.sequence_s, rel=1e-6
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("pieces", "context"), [(2, 0), (7, 0), (5, 30_000)])
def test_a_long_prompt_takes_as_long_as_its_pieces_one_by_one(name: str, pieces: int, context: int) -> None:
    times = TIMES[name]
    each = float(times.step_tokens)
    before = context + each * np.arange(pieces)
    whole = times.direct_prefill_s(np.array([each * pieces]), np.array([float(context)]))[0]
    assert whole == pytest.approx(float(np.sum(times.direct_prefill_s(np.full(pieces, each), before))), rel=0.02)


def test_a_step_that_drafts_takes_its_whole_time_whatever_it_yields() -> None:
    perf = replace(perf_model("deepseek-ai/DeepSeek-R1", "h200-sxm", "fp8", "vllm"), draft_tokens=2)
    layout = ONE._replace(tp=8.0)
    each_s = float(perf.decode_tpot_s(layout, np.array([8.0]), Workload(name="x", isl=(999.5,), osl=(1.0,), weight=(1.0,)))[0])
    assert PredictedTimes(perf, layout).decode_s(8, 8 * 1000) == pytest.approx(each_s * (1 + 0.7 + 0.49), rel=0.02)


@given(name=names, batch=st.integers(1, 2000), context=lengths)
@settings(max_examples=100, deadline=None)
def test_decode_is_the_models_within_its_nodes(name: str, batch: int, context: int) -> None:
    times = TIMES[name]
    workload = Workload(name="x", isl=(float(context),), osl=(1.0,), weight=(1.0,))
    direct = float(times.perf.decode_tpot_s(ONE, np.array([float(batch)]), workload)[0])
    assert times.decode_s(batch, batch * context) == pytest.approx(direct, rel=0.02)


@given(name=names, tokens=lengths)
@settings(max_examples=60, deadline=None)
def test_transfer_is_the_models_within_its_nodes(name: str, tokens: int) -> None:
    times = TIMES[name]
    assert times.transfer_s(tokens) == pytest.approx(times.direct_transfer_s(tokens), rel=0.02)


@given(name=names, a=lengths, b=lengths, c=lengths, more=st.integers(1, 10**7))
@settings(max_examples=300, deadline=None)
def test_predicted_times_grow_with_what_is_to_be_done(name: str, a: int, b: int, c: int, more: int) -> None:
    times, near = TIMES[name], 1 + 1e-9
    assert 0 < times.prefill_s(a, b) <= times.prefill_s(a + more, b) * near
    assert times.prefill_s(a, b) <= times.prefill_s(a, b + more) * near
    assert 0 < times.decode_s(c, c * b) <= times.decode_s(c, c * b + more) * near
    assert times.decode_s(c, c * b) <= times.decode_s(c + 1, c * b + b) * near
    assert 0 <= times.transfer_s(a) <= times.transfer_s(a + more) * near
    assert times.prefill_s(0, b) == times.decode_s(0, 0) == times.transfer_s(0) == 0.0


def test_a_hybrids_transfer_hardly_grows_where_a_transformers_does() -> None:
    growth = {name: TIMES[name].transfer_s(100_000) / TIMES[name].transfer_s(1000) for name in (NANO, "Qwen/Qwen3-8B")}
    assert growth[NANO] < growth["Qwen/Qwen3-8B"] / 2


def test_a_layout_of_many_points_is_refused() -> None:
    with pytest.raises(SpecError, match=r"^layout=.*: must be of one design point"):
        PredictedTimes(TIMES[NANO].perf, ONE._replace(tp=np.array([1.0, 2.0])))


# --- learned ---


def measured(smoothing: float = 0.1) -> MeasuredTimes:
    return MeasuredTimes(
        prefill_s_per_token=1e-3,
        decode_s_per_step=1e-2,
        decode_s_per_sequence=1e-3,
        decode_s_per_context_token=1e-6,
        transfer_s_per_token=1e-5,
        smoothing=smoothing,
    )


@given(truth=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
@settings(max_examples=50)
def test_a_constant_truth_is_found_from_a_thousandth_to_a_thousandfold(truth: float, seed: int) -> None:
    times, chance = measured(), random.Random(seed)
    for _ in range(200):
        tokens, batch = chance.randint(1, 512), chance.randint(1, 64)
        times.observe_prefill(tokens, truth * 1e-3 * tokens)
        times.observe_decode(batch, 100 * batch, truth * (1e-2 + 1e-3 * batch + 1e-4 * batch))
        times.observe_transfer(tokens, truth * 1e-5 * tokens)
    assert times.prefill_s(1000, 0) == pytest.approx(truth, rel=0.01)
    assert times.decode_s(10, 1000) == pytest.approx(truth * 2.1e-2, rel=0.01)
    assert times.transfer_s(1000) == pytest.approx(truth * 1e-2, rel=0.01)


@given(seconds=st.floats(allow_nan=True, allow_infinity=True), tokens=st.integers(-5, 10**6))
@example(seconds=5e-324, tokens=10**6)  # over what was expected, 0
@example(seconds=1.7e308, tokens=1)  # and infinite
def test_no_single_sample_moves_what_is_known_by_more_than_a_sixth(seconds: float, tokens: int) -> None:
    times = measured()
    times.observe_prefill(tokens, seconds)
    times.observe_decode(tokens, 0, seconds)
    times.observe_transfer(tokens, seconds)
    for now, before in ((times.prefill_s(1, 0), 1e-3), (times.decode_s(1, 0), 1.1e-2), (times.transfer_s(1), 1e-5)):
        assert before / 1.15 < now < before * 1.15


def test_a_cold_start_is_forgotten_and_drift_is_followed() -> None:
    times = measured()
    times.observe_decode(1, 0, 60.0)
    for _ in range(30):
        times.observe_decode(1, 0, 1.1e-2)
    assert times.decode_s(1, 0) == pytest.approx(1.1e-2, rel=0.01)
    for _ in range(60):
        times.observe_decode(1, 0, 3.3e-2)
    assert times.decode_s(1, 0) == pytest.approx(3.3e-2, rel=0.01)


@pytest.mark.parametrize(
    ("given_values", "message"),
    [
        ({"prefill_s_per_token": 0}, r"^prefill_s_per_token=0: must be"),
        ({"decode_s_per_step": -1.0}, r"^decode_s_per_step=-1.0: must be"),
        ({"decode_s_per_sequence": -1.0}, r"^decode_s_per_sequence=-1.0: must be"),
        ({"transfer_s_per_token": math.nan}, r"^transfer_s_per_token=nan: must be"),
        ({"smoothing": 1.5}, r"^smoothing=1.5: must be"),
    ],
)
def test_constants_that_cannot_be_are_refused(given_values: dict[str, float], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        MeasuredTimes(**{"prefill_s_per_token": 1.0, "decode_s_per_step": 1.0, **given_values})


@pytest.mark.parametrize("times", [TIMES[NANO], measured()], ids=["predicted", "measured"])
def test_routing_goes_by_either(times: StepTimes) -> None:
    fleet = [
        WorkerView(id="p", role="prefill"),
        WorkerView(id="d", role="decode", running=8, context_tokens=8000, max_batch=64, free_tokens=10**6),
        WorkerView(id="e", role="decode", max_batch=64, free_tokens=10**6),
    ]
    found = route_prompt(8000, {}, fleet[:2], times, RoutingLimits())
    assert isinstance(found, Route)
    assert found.hand_off
    assert route_decode(8000, fleet, times).worker_id == "e"
