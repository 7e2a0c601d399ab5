"""Laws of single operations: exact sums against loops, probabilities against counting, and what must grow with work."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.perf import ops
from tandem.perf.costs import LayerCosts, Layout, StepLoad
from tandem.perf.efficiency import SHARPNESS, bind, load_fits, overlap
from tandem.perf.ops import OP_CLASSES, Work
from tandem.perf.step import StepPricer
from tandem.spec.catalog import hardware_names, load_hardware, load_spec
from tandem.spec.design import Precision

seconds = st.floats(1e-12, 1e3)
sharp = st.sampled_from(SHARPNESS)


@given(st.integers(0, 80), st.integers(0, 80), st.none() | st.integers(1, 120))
def test_attended_pairs_count_what_every_token_sees(new: int, prior: int, window: int | None) -> None:
    pairs = 0
    for position in range(prior, prior + new):
        pairs += sum(1 for key in range(position + 1) if window is None or key > position - window)
    assert float(ops.attended_pairs(float(new), float(prior), window)) == pairs


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 50), st.none() | st.integers(1, 90))
def test_attended_pairs_of_two_chunks_are_those_of_the_whole(a: int, b: int, prior: int, window: int | None) -> None:
    parts = ops.attended_pairs(a, prior, window) + ops.attended_pairs(b, prior + a, window)
    assert float(ops.attended_pairs(a + b, prior, window)) == pytest.approx(float(parts))


@pytest.mark.parametrize(("experts", "k", "tokens"), [(4, 1, 3), (4, 2, 3), (5, 3, 2), (3, 3, 2), (6, 1, 4)])
def test_touched_experts_is_the_expectation_over_all_choices(experts: int, k: int, tokens: int) -> None:
    """Every token picks k different experts; list all the ways in which `tokens` tokens can pick and count."""
    picks = list(itertools.combinations(range(experts), k))
    counts = [len(set().union(*way)) for way in itertools.product(picks, repeat=tokens)]
    exact = sum(counts) / len(counts)
    assert float(ops.touched_experts(float(tokens), float(experts), float(k), experts)) == pytest.approx(exact, rel=1e-9)


@given(st.integers(1, 512), st.integers(1, 64), st.integers(1, 10**6))
def test_touched_experts_is_bounded_and_grows(experts: int, k: int, tokens: int) -> None:
    k = min(k, experts)
    touched = float(ops.touched_experts(float(tokens), float(experts), float(k), experts))
    slack = 1e-9 * experts
    assert k - slack <= touched <= min(experts, tokens * k) + slack
    assert touched <= float(ops.touched_experts(tokens + 1.0, float(experts), float(k), experts)) + slack
    assert float(ops.touched_experts(0.0, float(experts), float(k), experts)) == 0


@given(seconds, seconds, sharp)
def test_overlap_lies_between_the_longer_and_the_sum(a: float, b: float, p: int) -> None:
    found = float(overlap(np.asarray(a), np.asarray(b), p))
    assert max(a, b) * (1 - 1e-9) <= found <= (a + b) * (1 + 1e-9)
    assert found == pytest.approx((a**p + b**p) ** (1 / p), rel=1e-9)


@given(seconds, seconds)
def test_sharper_overlap_is_shorter(a: float, b: float) -> None:
    times = [float(overlap(np.asarray(a), np.asarray(b), p)) for p in SHARPNESS]
    assert times == sorted(times, reverse=True)
    assert times[-1] < times[0]


@given(st.floats(1, 1e15), st.floats(1, 1e12), st.floats(1.01, 50), sharp)
def test_more_work_takes_longer(flops: float, moved: float, factor: float, p: int) -> None:
    gpu = load_hardware("h100-sxm")
    for op in OP_CLASSES:
        timer = bind(gpu, op, "bf16")
        base = float(timer.work_s(Work(flops, moved)))
        assert base > 0
        assert float(timer.work_s(Work(flops, moved * factor))) >= base
        assert float(timer.work_s(Work(flops * factor, moved))) >= base
        assert float(timer.work_s(Work(flops * factor, moved * factor))) == pytest.approx(base * factor)


@pytest.mark.parametrize("name", hardware_names())
def test_no_operation_beats_the_peaks(name: str) -> None:
    """Whatever the fit says, seconds are at least FLOPs over peak and bytes over bandwidth."""
    gpu, work = load_hardware(name), Work(3e12, 5e9)
    for op in OP_CLASSES:
        found = float(bind(gpu, op, "bf16").work_s(work))
        wire = gpu.scale_up_bytes_per_s if op in ops.NETWORK else gpu.memory_bytes_per_s
        assert found >= work.moved_bytes / wire
        if op not in ops.NETWORK and op != "memory":
            assert found >= work.flops / gpu.peak("bf16")


@given(st.integers(2, 512), st.floats(1, 1e12))
def test_allreduce_sends_twice_all_but_the_own_part(n: int, message: float) -> None:
    """A ring: n - 1 steps of reduce-scatter and n - 1 of all-gather, each one n-th of the message."""
    sent = sum(message / n for _ in range(2 * (n - 1)))
    assert float(ops.allreduce(message, n).moved_bytes) == pytest.approx(sent)
    assert float(ops.alltoall(message, n).moved_bytes) == pytest.approx(sent / 2)
    assert float(ops.allreduce(message, 1).moved_bytes) == 0
    assert float(ops.send(message).moved_bytes) == message


@given(st.integers(1, 64), st.sampled_from([1.0, 2.0, 4.0]))
def test_recurrent_decode_reads_and_writes_the_state(b: int, size: float) -> None:
    """Paper A: 128 heads x 80 x 128 in fp32 are 5 MiB a layer, so 10 MiB move for every token of every sequence."""
    state = 128 * 80 * 128 * size
    inputs = 2 * (3 * 128 * 80 + 2 * 8 * 128)
    assert float(ops.scan_decode(b, 128, 80, 128, 8, size).moved_bytes) == b * (2 * state + inputs)


def test_steps_across_boxes_use_the_slower_link() -> None:
    """Sixteen H100s do not fit one NVLink domain of eight; the same all-reduce bytes then take the scale-out link."""
    gpu = load_hardware("h100-sxm")
    pricer = StepPricer(load_spec("meta-llama/Meta-Llama-3.1-405B"), gpu, Precision())
    load = StepLoad(prefill_seqs=1.0, isl=4096.0)
    times = {}
    for tp in (8.0, 16.0):
        classes = pricer.breakdown(Layout(tp, 1.0, 1.0, 1.0, 1.0), load)["allreduce"]
        items = LayerCosts(pricer.model, Precision()).step_items(Layout(tp, 1.0, 1.0, 1.0, 1.0), load)
        sent = sum(float(i.work.moved_bytes * i.count) for i in items if i.op == "allreduce")
        times[tp] = (classes["seconds"] - classes["fixed"]) / sent
    assert times[16.0] / times[8.0] == pytest.approx(gpu.scale_up_bytes_per_s / gpu.scale_out_bytes_per_s)


def test_every_shipped_curve_is_for_a_known_operation() -> None:
    assert {op for _, op, _ in load_fits()} <= set(OP_CLASSES)
