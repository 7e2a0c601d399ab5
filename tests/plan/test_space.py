"""The design space: every parallelism divides the model and stays in the budget, and nothing that does so is left out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.perf.divide import refuse_parallelism
from tandem.plan.space import BATCHES, Points, grid, parallelisms
from tandem.spec.catalog import load_spec, model_names
from tandem.spec.design import Parallelism
from tandem.spec.errors import Infeasible, SpecError
from tandem.spec.model import MLA, MLP, Attention, GatedDeltaNet, Mamba2, ModelSpec, MoE

DENSE = "meta-llama/Meta-Llama-3.1-8B"
HYBRID = "nvidia/NVIDIA-Nemotron-Nano-9B-v2"
EXPERTS = "Qwen/Qwen3-30B-A3B"
budgets = st.sampled_from([1, 2, 3, 5, 8, 12, 16, 31, 64])
phases = st.sampled_from(["prefill", "decode"])


def specs() -> list[str]:
    names = []
    for name in model_names():
        try:
            load_spec(name)
        except SpecError:
            continue  # refused by the catalogue itself, with its reason; `tandem models` shows it
        names.append(name)
    return names


SPECS = specs()
models = st.sampled_from(SPECS)


def has_experts(model: ModelSpec) -> bool:
    return any(isinstance(m, MoE) for m, _ in model.mixers)


def heads_divide(model: ModelSpec, p: Parallelism) -> bool:
    """Divisibility said again, independently of the code under test."""
    for mixer, _ in model.mixers:
        if isinstance(mixer, Attention):
            kv = mixer.num_kv_heads
            good = mixer.num_heads % p.tp == 0 and (kv % p.tp == 0 or p.tp % kv == 0)
        elif isinstance(mixer, (MLA, Mamba2)):
            good = mixer.num_heads % p.tp == 0
            if isinstance(mixer, Mamba2) and mixer.groups > 1:
                good = good and mixer.groups % p.tp == 0
        elif isinstance(mixer, GatedDeltaNet):
            good = mixer.num_key_heads % p.tp == 0
        elif isinstance(mixer, MLP):
            good = mixer.ffn_size % p.tp == 0
        else:
            assert isinstance(mixer, MoE)
            good = mixer.num_experts % p.ep == 0 and mixer.ffn_size % (p.tp * p.dp // p.ep) == 0
        if not good:
            return False
    return True


@settings(deadline=None)
@given(models, budgets, phases)
def test_every_offered_parallelism_divides_the_model_and_stays_in_budget(name: str, budget: int, phase: str) -> None:
    model = load_spec(name)
    offered = parallelisms(model, budget, phase=phase)
    assert len(set(offered)) == len(offered)
    assert Parallelism() in offered
    for p in offered:
        assert p.gpus <= budget
        assert heads_divide(model, p)
        assert refuse_parallelism(model, p) is None
        assert p.pp * p.cpp <= len(model.layers)
        assert p.cpp == 1 or phase == "prefill"
        assert (p.dp == p.ep == 1) or has_experts(model)
        assert (p.tp * p.dp) % p.ep == 0


@settings(deadline=None, max_examples=20)
@given(models, st.sampled_from([1, 3, 8, 16]), phases)
def test_no_power_of_two_that_divides_the_model_is_left_out(name: str, budget: int, phase: str) -> None:
    model = load_spec(name)
    powers = [2**i for i in range(5)]
    expected = set()
    for tp, dp, ep, stages in itertools.product(powers, repeat=4):
        if tp * dp * stages > budget or (tp * dp) % ep or stages > len(model.layers):
            continue
        if not has_experts(model) and dp * ep > 1:
            continue
        for p in {Parallelism(tp=tp, dp=dp, ep=ep, pp=stages), Parallelism(tp=tp, dp=dp, ep=ep, cpp=stages)}:
            if heads_divide(model, p) and (p.cpp == 1 or phase == "prefill"):
                expected.add(p)
    assert set(parallelisms(model, budget, phase=phase)) == expected


@settings(deadline=None)
@given(models, st.tuples(budgets, budgets), phases)
def test_a_larger_budget_offers_all_that_a_smaller_one_does(name: str, two: tuple[int, int], phase: str) -> None:
    model = load_spec(name)
    small, large = (set(parallelisms(model, budget, phase=phase)) for budget in sorted(two))
    assert small <= large


@pytest.mark.parametrize(
    ("model", "parallelism", "reason"),
    [
        (DENSE, {"tp": 3}, "tp=3: does not divide num_heads=32"),
        (DENSE, {"tp": 64}, "tp=64: does not divide num_heads=32"),
        (DENSE, {"pp": 65}, "pp=65: the model has only 64 layers"),
        (DENSE, {"cpp": 65}, "cpp=65: the model has only 64 layers"),
        (DENSE, {"dp": 2}, "dp=2: attention data parallelism shares experts, and the model has none; use more replicas"),
        (DENSE, {"tp": 2, "ep": 2}, "ep=2: the model has no experts"),
        (HYBRID, {"tp": 16}, "tp=16: does not divide"),
        (EXPERTS, {"tp": 3}, "tp=3: does not divide num_heads=32"),
        (EXPERTS, {"dp": 3, "ep": 3}, "ep=3: does not divide num_experts=128"),
        (EXPERTS, {"dp": 512, "ep": 256}, "ep=256: does not divide num_experts=128"),
    ],
)
def test_a_refusal_names_the_axis_its_value_and_what_it_fails_to_divide(
    model: str, parallelism: dict[str, int], reason: str
) -> None:
    refused = refuse_parallelism(load_spec(model), Parallelism(**parallelism))
    assert isinstance(refused, Infeasible)
    assert not refused
    assert refused.reason.startswith(reason)


def test_a_refusal_names_the_axes_that_cut_the_experts() -> None:
    """Slices of an expert come from tp * dp / ep, so a message that says `tp` must be about tp."""
    refused = refuse_parallelism(load_spec(EXPERTS), Parallelism(tp=4, dp=256))
    assert isinstance(refused, Infeasible)
    assert "moe_ffn_size=768" in refused.reason
    assert "tp=1024" not in refused.reason.replace("moe_tp=1024", "")


@given(st.sampled_from([DENSE, EXPERTS]), budgets)
@settings(deadline=None, max_examples=20)
def test_a_grid_is_the_product_with_batches_of_whole_instances(name: str, budget: int) -> None:
    layouts = parallelisms(load_spec(name), budget, phase="decode")
    batches, chunks = np.array([1.0, 3.0, 8.0]), np.array([512.0, np.inf])
    points = grid(layouts, batches, chunks)
    rows = [(points.parallelism(i), points.batch[i], points.chunk_tokens[i]) for i in range(len(points))]
    assert rows == [(p, b * p.dp * p.pp, c) for p in layouts for b in batches for c in chunks]


def test_a_grid_of_nothing_is_empty() -> None:
    assert len(grid([], BATCHES, np.array([np.inf]))) == 0


def test_taking_rows_keeps_columns_together() -> None:
    points = grid(parallelisms(load_spec(EXPERTS), 8, phase="prefill"), np.array([1.0, 2.0]), np.array([np.inf]))
    rows = np.array([5, 0, 17])
    taken = points.take(rows)
    assert isinstance(taken, Points)
    assert [taken.parallelism(i) for i in range(3)] == [points.parallelism(int(r)) for r in rows]
    assert taken.batch.tolist() == points.batch[rows].tolist()


def test_batches_are_whole_rising_and_never_more_than_a_tenth_apart_beyond_small_sizes() -> None:
    assert BATCHES[0] == 1
    assert np.all(np.round(BATCHES) == BATCHES)
    assert np.all(np.diff(BATCHES) > 0)
    large = BATCHES[BATCHES >= 16]
    assert np.all(large[1:] / large[:-1] < 1.1)


def test_a_budget_beyond_the_largest_instance_goes_into_replicas() -> None:
    """An instance has 4,096 GPUs at most, whatever the budget: more of them are replicas."""
    model = load_spec("nvidia/NVIDIA-Nemotron-Nano-9B-v2")
    assert parallelisms(model, 16_384, phase="prefill") == parallelisms(model, 4096, phase="prefill")
