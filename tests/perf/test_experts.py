"""Experts spread over GPUs: how many copies of a token travel, what busy groups cost, and that parts add up to the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from tandem.perf import op_tables, ops
from tandem.perf.costs import LayerCosts, Layout, StepLoad
from tandem.perf.efficiency import load_fits
from tandem.perf.estimate import perf_model
from tandem.perf.step import WORK_CLASSES
from tandem.spec.catalog import load_spec
from tandem.spec.design import Precision
from tandem.spec.units import itemsize

R1 = perf_model("deepseek-r1", "gb200", "fp8_block", "sglang")


@pytest.mark.parametrize(("top_k", "groups"), [(8, 4), (8, 8), (8, 32), (4, 8), (1, 16)])
def test_copies_are_those_of_a_drawn_token(top_k: int, groups: int) -> None:
    """Draw experts at random, without repeats, 32 in each group, and count the groups that they fall into."""
    rng = np.random.default_rng(0)
    experts = 32 * groups
    drawn = [len({int(e) // 32 for e in rng.choice(experts, top_k, replace=False)}) for _ in range(4000)]
    assert ops.distinct_groups(float(top_k), float(groups)) == pytest.approx(np.mean(drawn), rel=0.02)


@given(st.integers(1, 16), st.integers(1, 256))
def test_a_token_goes_to_at_least_one_group_and_to_no_more_than_it_picked(top_k: int, groups: int) -> None:
    copies = ops.distinct_groups(float(top_k), float(groups))
    assert 1 - 1e-9 <= copies <= min(top_k, groups) + 1e-9


def test_tokens_travel_in_the_format_of_the_experts_inputs_and_come_back_in_bf16() -> None:
    layout, load = Layout(1.0, 1.0, 16.0, 16.0, 1.0), StepLoad(decode_seqs=64.0, context=1024.0)
    for text in ("fp8_block", "bf16"):
        precision = Precision.parse(text)
        items = [i for i in LayerCosts(load_spec("deepseek-r1"), precision).step_items(layout, load) if i.op == "alltoall"]
        there, back = (float(np.sum(i.work.moved_bytes)) for i in items)
        assert there / back == pytest.approx(itemsize(precision.activations) / 2.0)


@given(st.floats(1, 512), st.sampled_from([1.0, 8.0, 32.0]), st.integers(0, 3))
def test_classes_of_a_step_add_up_to_its_kernels(seqs: float, dp: float, draft: int) -> None:
    layout = Layout(1.0, 1.0, dp, dp, 1.0)
    load = StepLoad(decode_seqs=seqs, context=2048.0, draft=float(draft))
    launch, work = R1.pricer.classes(layout, load)
    kernels = R1.pricer.kernels(layout, load)
    assert set(work) == set(WORK_CLASSES)
    assert float(launch) == pytest.approx(float(kernels.launch_s))
    assert sum(float(np.sum(w)) for w in work.values()) == pytest.approx(float(np.sum(kernels.work_s)))
    assert all(float(np.min(w)) >= 0 for w in work.values())


def test_curves_of_experts_are_sums_so_that_their_parts_are_exact() -> None:
    assert {fit.sharpness for (_, op, _), fit in load_fits().items() if op == "moe"} == {1}


def test_a_prompt_alone_is_cheaper_than_one_beside_busy_groups() -> None:
    layout, isl = Layout(1.0, 1.0, 8.0, 8.0, 1.0), 4096.0
    alone, half, all_busy = (float(R1.prefill_kernels_s(layout, 1.0, isl, 1.0, busy_groups=s)) for s in (1 / 8, 0.5, 1.0))
    assert alone < half < all_busy < 8 * alone


def test_kernels_of_an_nvlink_domain_are_read_with_their_formats(tmp_path: Path) -> None:
    """Both GPUs of one rack family read the table of the one that was measured; a dispatch counts its format's bytes."""
    folder = tmp_path / "data" / "gb200" / "comm" / "trtllm" / "1.0"
    folder.mkdir(parents=True)
    (tmp_path / "data" / "gb300").mkdir()
    names = ["alltoall_prepare", "alltoall_dispatch", "alltoall_dispatch", "alltoall_combine"]
    rows = {
        "op_name": names, "kernel_source": ["one"] * 4, "moe_dtype": ["fp8", "fp8", "bfloat16", "fp8"],
        "num_tokens": [256] * 4, "hidden_size": [7168] * 4, "topk": [8] * 4, "num_experts": [256] * 4, "moe_ep_size": [8] * 4,
        "distribution": ["balanced"] * 4, "latency": [0.01, 0.03, 0.05, 0.06],
    }  # fmt: skip
    parquet.write_table(pa.table(rows), folder / "trtllm_alltoall_perf.parquet")
    copies = ops.distinct_groups(8.0, 8.0)
    for system in ("gb200", "gb300"):
        (table,) = [t for t in op_tables.read_tables(tmp_path, system) if t.op == "alltoall"]
        message = np.asarray(table.work.moved_bytes) * 8 / 7 / (256 * 7168 * copies)
        assert sorted(zip(message.round(6).tolist(), table.seconds.tolist(), strict=True)) == [
            (1.0, pytest.approx(3e-5)), (2.0, pytest.approx(5e-5)), (2.0, pytest.approx(6e-5)),
        ]  # fmt: skip
