"""Laws of a full-load sweep on reduced spaces: frontiers, balance, fixed ratios, transfer, areas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.spec.errors import SpecError
from tandem.spec.workload import Workload
from tandem.study.sweep import Curve, Sweep, Swept, area_gain, largest_gain, whole_numbers


@pytest.fixture(scope="module")
def swept() -> Swept:
    return Sweep.of(
        "llama-3.1-70b", "gb200", Workload.fixed(16384, 2048), precision="fp4", backend="tandem", max_instance_gpus=8
    ).price()


def curve(x: list[float], y: list[float]) -> Curve:
    return Curve(
        mode="colocated",
        tokens_per_s_per_user=np.array(x),
        tokens_per_s_per_gpu=np.array(y),
        row=np.arange(len(x)),
        mode_of=("colocated",) * len(x),
    )


def test_frontiers_rise_in_interactivity_and_fall_in_throughput(swept: Swept) -> None:
    for found in (swept.shared(), swept.split(), swept.fixed_ratio(0.5)):
        assert len(found) > 5
        assert np.all(np.diff(found.tokens_per_s_per_user) > 0)
        assert np.all(np.diff(found.tokens_per_s_per_gpu) < 0)


def test_shared_frontier_is_the_better_of_both_kinds(swept: Swept) -> None:
    both, plain, chunked = swept.shared(), swept.shared(modes=["colocated"]), swept.shared(modes=["piggybacked"])
    for x in (1.0, *both.tokens_per_s_per_user.tolist()):
        assert both.at(x) == pytest.approx(max(plain.at(x), chunked.at(x)))


def test_pools_balance_exactly(swept: Swept) -> None:
    split = swept.split()
    assert split.ratio is not None
    prefill, decode = swept.space.priced["prefill"], swept.space.priced["decode"]
    taken = float(prefill.requests_per_s[split.prefill_row] / prefill.gpus[split.prefill_row])
    given_out = decode.requests_per_s[split.row] / decode.gpus[split.row]
    assert split.ratio * taken == pytest.approx(given_out)
    served = split.tokens_per_s_per_gpu * (1 + split.ratio) / 2048
    assert served == pytest.approx(given_out)
    assert np.all(np.diff(split.ratio) < 0)  # the faster each token, the fewer prefill GPUs (Figure 9)


def test_whole_instances_balance_within_three_percent(swept: Swept) -> None:
    split = swept.split()
    prefill, decode = swept.space.priced["prefill"], swept.space.priced["decode"]
    for i in range(0, len(split), 7):
        n_prefill, n_decode = swept.instances(split, i)
        taken = n_prefill * prefill.requests_per_s[split.prefill_row]
        assert taken / (n_decode * decode.requests_per_s[split.row[i]]) == pytest.approx(1.0, abs=0.031)
    with pytest.raises(SpecError, match="two kinds"):
        swept.instances(swept.shared(), 0)


def test_a_fixed_ratio_never_beats_the_matched_one_and_meets_it_where_it_matches(swept: Swept) -> None:
    split = swept.split()
    assert split.ratio is not None
    middle = len(split) // 2
    fixed = swept.fixed_ratio(float(split.ratio[middle]))
    x = split.tokens_per_s_per_user
    assert all(fixed.at(v) <= split.at(v) * (1 + 1e-9) for v in x)
    assert fixed.at(float(x[middle])) == pytest.approx(split.at(float(x[middle])))


def test_a_longer_cutoff_never_lowers_a_frontier(swept: Swept) -> None:
    tight, loose = swept.split(ttft_cutoff_s=1.0), swept.split(ttft_cutoff_s=30.0)
    assert all(loose.at(x) >= tight.at(x) * 0.998 for x in tight.tokens_per_s_per_user)
    assert len(swept.split(ttft_cutoff_s=1e-6)) == 0 == swept.split(ttft_cutoff_s=1e-6).top


def test_what_leaves_the_prefill_pool_arrives_in_the_decode_pool(swept: Swept) -> None:
    split = swept.split()
    assert split.ratio is not None
    need = swept.transfer(split)
    # Both pools hold every head once (tp <= 8 KV heads), so bytes out of one pool are bytes into the other.
    assert need.egress_bytes_per_s * split.ratio == pytest.approx(need.ingress_bytes_per_s)
    model = swept.sweep.model
    per_request = model.kv_bytes(16384, kv="fp8")
    rate = split.tokens_per_s_per_gpu * (1 + split.ratio) / 2048
    assert need.ingress_bytes_per_s == pytest.approx(rate * per_request, rel=1e-6)


def test_a_wider_domain_never_loses() -> None:
    tops = []
    for domain in (8, 72):
        found = Sweep.of(
            "llama-3.1-8b", "gb200", Workload.fixed(2048, 512), precision="fp4", domain_gpus=domain, max_instance_gpus=16
        ).price()
        tops.append(found.split())
    assert all(tops[1].at(x) >= tops[0].at(x) * (1 - 1e-9) for x in tops[0].tokens_per_s_per_user)


def test_area_and_gain_of_step_functions() -> None:
    low, high = curve([1.0, 3.0], [4.0, 1.0]), curve([2.0, 4.0], [5.0, 2.0])
    assert low.area(10.0) == 4.0 + 2.0 * 1.0
    assert high.area(3.0) == 10.0 + 2.0
    assert area_gain(high, low) == pytest.approx(14.0 / 6.0)
    assert area_gain(high, curve([], [])) is None
    assert largest_gain(high, low, share=1.0) == (5.0, 2.0)
    assert low.at(3.5) == 0.0
    assert low.index(2.0) == 1
    assert low.ratio_at(1.0) is None


@given(st.floats(1e-3, 1e3), st.floats(0.005, 0.2))
def test_whole_numbers_are_the_smallest_terms_within_the_tolerance(ratio: float, tolerance: float) -> None:
    above, below = whole_numbers(ratio, tolerance)
    assert 1 / (1 + tolerance) - 1e-12 <= above / below / ratio <= 1 + tolerance + 1e-12
    low, high = ratio / (1 + tolerance), ratio * (1 + tolerance)
    smaller = [q for q in range(1, below) if np.ceil(low * q - 1e-12) <= high * q + 1e-12 and np.ceil(low * q) >= 1]
    assert not [q for q in smaller if np.ceil(low * q + 1e-9) <= high * q - 1e-9]


def test_impossible_questions_are_refused(swept: Swept) -> None:
    with pytest.raises(SpecError, match="ratio=0"):
        swept.fixed_ratio(0)
    with pytest.raises(SpecError, match="ratio=inf"):
        whole_numbers(float("inf"))
    with pytest.raises(SpecError, match="osl=1"):
        Sweep.of("llama-3.1-8b", "gb200", Workload.fixed(64, 1))
    with pytest.raises(SpecError, match="only pools"):
        swept.transfer(swept.shared())
