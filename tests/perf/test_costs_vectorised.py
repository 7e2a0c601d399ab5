"""An array of N design points is N points, and a load averaged over a growing context is the mean of its steps."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tandem.perf.costs import LayerCosts, Layout, StepLoad
from tandem.perf.phases import PerfModel, mean_attended
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.design import Precision
from tandem.spec.model import Attention, ModelSpec
from tandem.spec.workload import Workload

NAMES = [
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2",
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8",
    "Qwen/Qwen3.5-397B-A17B",
    "deepseek-ai/DeepSeek-R1",
    "deepseek-ai/DeepSeek-V3.2",
    "openai/gpt-oss-120b",
]
POINTS = [(1, 1, 1, 1, 1), (2, 1, 1, 1, 1), (1, 2, 4, 4, 1), (2, 1, 8, 4, 1), (4, 1, 1, 2, 1), (1, 1, 8, 8, 4)]


def totals(costs: LayerCosts, layout: Layout, load: StepLoad) -> dict[str, NDArray[np.float64]]:
    found: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(()))
    for item in costs.step_items(layout, load):
        found[f"{item.op} flops"] = found[f"{item.op} flops"] + item.work.flops * item.count
        found[f"{item.op} bytes"] = found[f"{item.op} bytes"] + item.work.moved_bytes * item.count
    return found


@pytest.mark.parametrize("name", NAMES)
def test_an_array_of_points_costs_what_each_costs_alone(name: str) -> None:
    """Layouts, decode batch, prompts and chunks all differ from point to point, and some points lack a phase."""
    costs = LayerCosts(load_spec(name), Precision.parse(None, native=load_spec(name).native_precision))
    layouts = np.array(POINTS, dtype=np.float64)
    decode, context = np.array([1.0, 0, 7, 64, 0, 3]), np.array([10.0, 5, 4000, 100, 9, 77])
    prompts, isl, chunks = (
        np.array([0.0, 1, 2, 0, 3, 1]),
        np.array([64.0, 640, 128, 1, 99, 4096]),
        np.array([1.0, 5, 1, 1, 3, 8]),
    )
    together = totals(costs, Layout(*layouts.T), StepLoad(decode, context, prompts, isl, chunks))
    for i, point in enumerate(layouts):
        alone = totals(costs, Layout(*point), StepLoad(decode[i], context[i], prompts[i], isl[i], chunks[i]))
        for key, array in together.items():
            value = float(np.broadcast_to(array, len(POINTS))[i])
            assert value == pytest.approx(float(alone[key]) if key in alone else 0.0, rel=1e-12, abs=1e-12), (key, point)


@pytest.mark.parametrize("name", NAMES)
def test_an_array_of_points_takes_the_time_that_each_takes_alone(name: str) -> None:
    spec = load_spec(name)
    perf = PerfModel(spec, load_hardware("b200-sxm"), Precision.parse(None, native=spec.native_precision))
    layouts, batch, workload = np.array(POINTS, dtype=np.float64), np.array([1.0, 2, 16, 64, 5, 24]), Workload.fixed(900, 70)
    chunk = np.array([np.inf, 512, 2048, 100, 900, 300])
    prefill = perf.prefill(Layout(*layouts.T), batch, workload, chunk)
    served = perf.colocated(Layout(*layouts.T), batch, workload)
    riding = perf.piggybacked(Layout(*layouts.T), batch, workload, np.minimum(chunk, 2048.0))
    for i, p in enumerate(layouts):
        one = batch[i : i + 1]
        each = (
            *perf.prefill(Layout(*p), one, workload, chunk[i]),
            *perf.colocated(Layout(*p), one, workload),
            *perf.piggybacked(Layout(*p), one, workload, np.minimum(chunk[i : i + 1], 2048.0)),
        )
        for array, value in zip((*prefill, *served, *riding), each, strict=True):
            assert array[i] == pytest.approx(float(np.ravel(value)[0]), rel=1e-12)


@given(st.integers(1, 300), st.integers(2, 200), st.integers(1, 600))
def test_mean_attended_is_the_mean_over_every_decode_step(isl: int, osl: int, window: int) -> None:
    """Prefill gives the first token; each of osl - 1 decode steps feeds one more, which sees all before it and itself."""
    seen = [min(isl + fed, window) for fed in range(1, osl)]
    assert float(mean_attended(float(isl), float(osl), window)) == pytest.approx(sum(seen) / len(seen), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 120), st.integers(2, 120), st.none() | st.integers(1, 200), st.integers(1, 9))
def test_decode_averaged_over_the_output_is_the_mean_of_its_steps(isl: int, osl: int, window: int | None, b: int) -> None:
    """`min(mean context, window)` overstates a filling window; the load must carry the mean of the minimum."""
    layer = Attention(num_heads=4, num_kv_heads=2, head_dim=8, window=window)
    model = ModelSpec(name="toy", vocab_size=64, hidden_size=16, layers=(layer,))
    perf = PerfModel(model, load_hardware("h100-sxm"), Precision())
    one = Layout(1.0, 1.0, 1.0, 1.0, 1.0)
    load = perf.decode_load(one, np.array([float(b)]), Workload.fixed(isl, osl))
    found = totals(LayerCosts(model, Precision()), one, load)
    flops = moved = 0.0
    for fed in range(1, osl):
        for _ in range(b):
            seen = isl + fed if window is None else min(isl + fed, window)
            flops += 2 * 2 * 4 * 8 * seen
            moved += 2 * 2 * 4 * 8 + 2 * 2 * 2 * 8 * seen
    assert float(found["attention_decode flops"][0]) == pytest.approx(flops / (osl - 1), rel=1e-9)
    assert float(found["attention_decode bytes"][0]) == pytest.approx(moved / (osl - 1), rel=1e-9)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 200))
def test_keys_of_windowed_chunks_are_bounded(new: int, chunks: int, window: int) -> None:
    """Keys re-read by a windowed chunk are taken at its mean prefix: never too few, at most a quarter of a window too many."""
    layer = Attention(num_heads=4, num_kv_heads=2, head_dim=8, window=window)
    model = ModelSpec(name="toy", vocab_size=64, hidden_size=16, layers=(layer,))
    load = StepLoad(prefill_seqs=1.0, isl=float(new * chunks), chunks=float(chunks))
    found = totals(LayerCosts(model, Precision()), Layout(1.0, 1.0, 1.0, 1.0, 1.0), load)
    exact = sum(new + min(i * new, window) for i in range(chunks)) / chunks
    keys = (float(found["attention_prefill bytes"]) - 2 * 2 * 4 * 8 * new) / (2 * 2 * 2 * 8)
    assert exact - 1e-9 <= keys <= exact + window / 4 + new
