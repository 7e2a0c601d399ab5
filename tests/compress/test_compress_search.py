"""Depth first, then width, within a budget: laws of the search, and the paper's three candidates."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.compress.objective import Prediction
from tandem.compress.recipe import search_recipe
from tandem.compress.recipe_files import load_recipe
from tandem.compress.search import Candidate, Found, Selection, kept_importance, search_shapes
from tandem.compress.shape import Shape, pruned_spec, total_bytes
from tandem.compress.space import Budget, Depth, Width, kept_layers, standin_order
from tandem.spec.catalog import load_spec
from tandem.spec.design import Deployment, Estimate, Parallelism, Pool
from tandem.spec.errors import Infeasible, SpecError
from tandem.spec.model import MLP, Attention, Mamba2, ModelSpec
from tandem.spec.units import GIB

MAMBA = Mamba2(num_heads=8, head_dim=4, state_dim=8, groups=2)
FFN = MLP(ffn_size=64, gated=False)
ATTENTION = Attention(num_heads=4, num_kv_heads=2, head_dim=8)
TEACHER = ModelSpec(name="toy", vocab_size=96, hidden_size=32, layers=(MAMBA, FFN, ATTENTION, FFN, MAMBA, FFN, ATTENTION, FFN))
WIDTH = Width(hidden_size=(32, 24, 16), ffn_multiple=(2.0, 1.5), mamba_heads=(8, 6, 4))
DEPTH = Depth(layers=(6, 7), joint=True)
WHOLE = total_bytes(TEACHER, context=64)  # 87,840


def budget(share: float = 0.6, **more: Any) -> Budget:
    return Budget(share=share, context=64, **more)


def prediction(model: ModelSpec, rate: float) -> Prediction:
    def sure(value: float) -> Estimate:
        return Estimate(value=value, low=value, high=value, evidence="roofline")

    pool = Pool(parallelism=Parallelism(), batch=1)
    deployment = Deployment(model=model.name, hardware="a10g", colocated=pool)
    return Prediction(tokens_per_s=sure(rate), ttft_s=sure(1.0), tpot_s=sure(1 / rate), deployment=deployment)


def by_heads(model: ModelSpec) -> Prediction | Infeasible:
    """A made-up objective: fewer Mamba heads and fewer layers are faster, whatever else."""
    heads = next(m.num_heads for m in model.layers if isinstance(m, Mamba2))
    return prediction(model, 1000.0 / (heads * len(model.layers)))


def found(**changes: Any) -> Found:
    given: dict[str, Any] = {"budget": budget(), "depth": DEPTH, "width": WIDTH}
    return search_shapes(TEACHER, **{**given, **changes})


# --- what fits ---


def brute_force(share: float, counts: tuple[int, ...]) -> set[Shape]:
    """Every combination by hand that takes at most a share of the teacher's bytes."""
    shapes = set()
    for count, hidden, multiple, heads in product(counts, (32, 24, 16), (2.0, 1.5), (8, 6, 4)):
        layers = kept_layers(TEACHER, count, DEPTH)
        shape = Shape(layers=layers, hidden_size=hidden, ffn_size=round(multiple * hidden), mamba_heads=heads)
        if total_bytes(pruned_spec(TEACHER, shape), context=64) <= int(share * WHOLE):
            shapes.add(shape)
    return shapes


@settings(max_examples=8, deadline=None)
@given(st.floats(0.45, 0.95))
def test_the_search_finds_what_a_walk_through_all_combinations_finds(share: float) -> None:
    result = found(budget=budget(share), selection=Selection(take=1000))
    wanted = brute_force(share, (6, 7))
    assert {c.shape for c in result.candidates} == wanted
    assert (result.fitting, result.considered) == (len(wanted), 36)
    assert result.fitting + result.refused.get("total_bytes", 0) == result.considered
    sizes = [c.total_bytes for c in result.candidates]
    assert sizes == sorted(sizes, reverse=True)
    assert [c.total_bytes for c in found(budget=budget(share)).candidates] == sizes[:3]


def test_every_limit_that_is_stated_holds() -> None:
    result = found(budget=budget(0.9, parameters=28_000, active_parameters=20_000), selection=Selection(take=1000))
    assert result.candidates
    assert all(c.spec.parameters <= 20_000 for c in result.candidates)
    assert result.limits == {"total_bytes": int(0.9 * WHOLE), "parameters": 28_000, "active_parameters": 20_000}


def test_overhead_counts_for_every_model() -> None:
    plain, padded = found(budget=Budget(total_bytes=WHOLE - 1, context=64)), None
    with pytest.raises(SpecError, match=r"total_bytes=87839: allows 87,839; the least of 36"):
        padded = found(budget=Budget(total_bytes=WHOLE - 1, context=64, overhead_bytes=WHOLE))
    assert padded is None
    assert plain.candidates[0].total_bytes == total_bytes(plain.candidates[0].spec, context=64)


# --- depth ---


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(8)), st.integers(1, 8), st.sampled_from((None, 0, 1, 2)), st.sampled_from((1, 2)))
def test_layers_leave_in_order_and_as_many_as_asked(order: list[int], count: int, attention: int | None, block: int) -> None:
    depth = Depth(layers=(count,), attention_layers=attention, order=tuple(order), block=block)
    others = (8 - count) / block - (0 if attention is None else 2 - attention)  # blocks that leave and hold no attention
    if others != int(others) or (attention is not None and not 0 <= others <= 8 / block - 2):
        with pytest.raises(SpecError, match=f"depth.layers={count}: cannot be had"):
            kept_layers(TEACHER, count, depth)
        return
    kept = kept_layers(TEACHER, count, depth)
    assert len(kept) == count
    assert list(kept) == sorted(set(kept))
    if attention is not None:
        assert sum(isinstance(TEACHER.layers[i], Attention) for i in kept) == attention
    if block == 2:
        assert all((i in kept) == (i + 1 in kept) for i in range(0, 8, 2))
    if attention is None and block == 1:
        assert set(kept) == set(order[8 - count :])


def test_an_attention_layer_that_must_stay_is_passed_over() -> None:
    depth = Depth(layers=(6,), order=(2, 6, 1, 0))
    assert kept_layers(TEACHER, 6, depth) == (0, 1, 3, 4, 5, 7)
    assert kept_layers(TEACHER, 6, Depth(layers=(6,), order=(2, 6, 1, 0), attention_layers=1)) == (0, 3, 4, 5, 6, 7)
    assert kept_layers(TEACHER, 6, Depth(layers=(6,), order=(2, 6, 1, 0), attention_layers=2)) == (2, 3, 4, 5, 6, 7)
    assert kept_layers(TEACHER, 6, depth, order=(7, 5)) == (0, 1, 2, 3, 4, 6)


def test_layers_that_are_too_few_to_leave_are_refused() -> None:
    with pytest.raises(SpecError, match=r"depth.layers=5: cannot be had of the 8 layers of toy.*2 layers may leave"):
        kept_layers(TEACHER, 5, Depth(layers=(5,), order=(1, 2)))
    with pytest.raises(SpecError, match=r"depth\.order=8"):
        kept_layers(TEACHER, 7, Depth(layers=(7,), order=(8,)))


def test_without_scores_layers_leave_from_the_back_and_the_ends_stay() -> None:
    assert standin_order(TEACHER) == (5, 4, 3, 2)
    assert kept_layers(TEACHER, 6, Depth(layers=(6,))) == (0, 1, 2, 3, 6, 7)


def test_the_best_depth_that_some_width_fits_at_comes_first() -> None:
    one = found(depth=Depth(layers=(6, 7)), selection=Selection(take=1000))
    assert {len(c.spec.layers) for c in one.candidates} == {7}
    assert one.considered == 18
    tight = found(depth=Depth(layers=(6, 7)), budget=budget(0.36), selection=Selection(take=1000))
    assert {len(c.spec.layers) for c in tight.candidates} == {6}
    assert tight.considered == 36
    six = Shape(layers=kept_layers(TEACHER, 6, DEPTH))
    distilled = found(depth=Depth(layers=(6, 7)), losses={six: 1.0}, selection=Selection(take=1000))
    assert {len(c.spec.layers) for c in distilled.candidates} == {6}


# --- what is best ---


def dominated(candidate: Candidate, others: tuple[Candidate, ...], worth: Callable[[Candidate], float]) -> bool:
    rate = candidate.tokens_per_s or 0.0
    return any(
        worth(o) >= worth(candidate)
        and (o.tokens_per_s or 0.0) >= rate
        and (worth(o), o.tokens_per_s) != (worth(candidate), rate)
        for o in others
    )


def test_the_frontier_is_what_nothing_beats_in_quality_and_throughput() -> None:
    result = found(predict=by_heads, selection=Selection(take=1000))
    for candidate in result.candidates:
        assert candidate.on_frontier != dominated(candidate, result.candidates, lambda c: c.quality)
    assert {c.shape for c in result.frontier} == {c.shape for c in result.candidates if c.on_frontier}
    assert 1 < len(result.frontier) < len(result.candidates)


@pytest.mark.parametrize("by", ["total_bytes", "quality", "throughput"])
def test_the_rule_of_selection_takes_its_largest_and_the_fastest_of_them_comes_first(by: Any) -> None:
    everything = found(predict=by_heads, selection=Selection(take=1000)).candidates
    taken = found(predict=by_heads, selection=Selection(take=4, by=by)).candidates
    worth = {"throughput": "tokens_per_s"}.get(by, by)
    left = [c for c in everything if c.shape not in {t.shape for t in taken}]
    assert len(taken) == 4
    assert min(getattr(c, worth) for c in taken) >= max(getattr(c, worth) for c in left)
    rates = [c.tokens_per_s or 0.0 for c in taken]
    assert rates == sorted(rates, reverse=True)


def test_losses_of_short_distillations_decide_once_all_that_were_taken_have_one() -> None:
    first = found(predict=by_heads)
    losses = {c.shape: float(i) for i, c in enumerate(reversed(first.candidates))}
    again = found(predict=by_heads, losses=losses)
    assert [c.shape for c in again.candidates] == [c.shape for c in reversed(first.candidates)]
    assert [c.loss for c in again.candidates] == [0.0, 1.0, 2.0]


def test_only_those_taken_are_predicted_where_the_recipe_says_so() -> None:
    asked: list[str] = []

    def counted(model: ModelSpec) -> Prediction | Infeasible:
        asked.append(model.name)
        return by_heads(model)

    some = found(predict=counted, selection=Selection(predict="taken"))
    assert len(asked) == 1 + 3
    assert {c.shape for c in some.candidates} == {c.shape for c in found(predict=by_heads).candidates}


def test_shapes_that_cannot_be_served_or_not_fast_enough_are_no_candidates_and_are_counted() -> None:
    def narrow_only(model: ModelSpec) -> Prediction | Infeasible:
        return by_heads(model) if model.hidden_size == 16 else Infeasible("too wide")

    ways: tuple[Literal["all", "taken"], ...] = ("all", "taken")
    for predict in ways:
        result = found(predict=narrow_only, selection=Selection(predict=predict))
        assert {c.spec.hidden_size for c in result.candidates} == {16}
        assert result.refused["no deployment"] > 0
    fast = found(predict=by_heads, budget=budget(0.9, tokens_per_s=30.0), selection=Selection(take=1000))
    assert min(c.tokens_per_s or 0.0 for c in fast.candidates) >= 30.0
    assert fast.refused["tokens_per_s"] > 0


# --- what cannot be ---


def test_a_budget_that_nothing_meets_says_the_least_and_what_it_leaves() -> None:
    least = min(total_bytes(pruned_spec(TEACHER, s), context=64) for s in brute_force(1.0, (6, 7)))
    with pytest.raises(SpecError) as refused:
        found(budget=budget(0.1))
    with pytest.raises(SpecError, match=r"width\.ffn_multiple: gives no size up to the teacher"):
        found(width=Width(ffn_multiple=(3.0,)))
    said = str(refused.value)
    assert said.startswith(f"budget.share=0.1: allows {int(0.1 * WHOLE):,}; the least of 36 shapes is {least:,} (layers 6, ")
    assert "of the parameters left)" in said
    with pytest.raises(SpecError, match=r"budget\.parameters=10: allows 10; the least of 36 shapes is"):
        found(budget=Budget(parameters=10, context=64))
    with pytest.raises(SpecError, match=r"budget.tokens_per_s=1e\+06: the fastest shape that fits is predicted"):
        found(predict=by_heads, budget=budget(tokens_per_s=1e6))
    with pytest.raises(SpecError, match="objective: none of the 21 shapes that fit can be served: no"):
        found(predict=lambda _: Infeasible("no"))


def test_a_budget_that_is_met_already_is_refused() -> None:
    with pytest.raises(SpecError, match=f"budget: toy is within it already .total_bytes {WHOLE:,} of {WHOLE:,}"):
        found(budget=Budget(total_bytes=WHOLE, context=64))
    with pytest.raises(SpecError, match=r"budget: toy is within it already .15.6 tokens/s"):
        found(predict=by_heads, budget=Budget(tokens_per_s=15.0, context=64))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": Width(hidden_size=(33,))}, "hidden_size=33: must be at most the 32"),
        ({"width": Width(ffn_size=(65,))}, "ffn_size=65: must be at most the 64"),
        ({"width": Width(mamba_heads=(5,))}, "mamba_heads=5: must be a multiple of 2"),
        ({"width": Width(experts=(4,))}, "experts=4: no layer that is kept"),
        ({"width": Width(hidden_size=tuple(range(1, 500)), ffn_size=tuple(range(1, 500)))}, "width: has 498,002 shapes"),
        ({"depth": Depth(layers=(9,))}, "depth.layers=9"),
        ({"depth": None, "width": None}, "depth, width: the recipe states neither"),
        ({"selection": Selection(by="throughput")}, "select.by='throughput': needs an objective"),
        ({"budget": Budget(tokens_per_s=1.0)}, "budget.tokens_per_s=1: needs an objective"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as refused:
        found(**changes)
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)


# --- the proxy of quality ---


def test_importance_kept_is_that_of_the_best_units_of_each_group() -> None:
    heads = [9.0, 1.0, 2.0, 3.0, 5.0, 6.0, 7.0, 8.0]
    hidden = [float(i) for i in range(32)]
    scores = {"mamba_heads": {0: heads}, "hidden_size": {0: hidden, 8: hidden}, "ffn_size": {1: [1.0] * 64, 3: [1.0] * 64}}
    quality = kept_importance(TEACHER, scores)

    def of(shape: Shape) -> float:
        return quality(shape, pruned_spec(TEACHER, shape))

    assert of(Shape()) == pytest.approx(1.0)
    assert of(Shape(mamba_heads=4)) == pytest.approx((4 + (9 + 3 + 8 + 7) / sum(heads)) / 5)
    assert of(Shape(hidden_size=16)) == pytest.approx((3 + 2 * sum(hidden[16:]) / sum(hidden)) / 5)
    assert of(Shape(ffn_size=16)) == pytest.approx((3 + 2 / 4) / 5)
    assert of(Shape(layers=(1, 2, 3, 4, 5, 6, 7))) == pytest.approx(3 / 5)
    weighted = kept_importance(TEACHER, scores, layer_weights={1: 3.0, 3: 1.0})
    last = Shape(layers=(0, 1, 2, 4, 5, 6, 7))
    assert weighted(last, pruned_spec(TEACHER, last)) == pytest.approx(3 / 4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=32, max_size=32), st.integers(1, 31))
def test_keeping_more_units_never_keeps_less_importance(scores: list[float], size: int) -> None:
    quality = kept_importance(TEACHER, {"hidden_size": {0: scores}})
    small, large = (quality(s, pruned_spec(TEACHER, s)) for s in (Shape(hidden_size=size), Shape(hidden_size=size + 1)))
    assert 0 <= small <= large <= 1 + 1e-12


def test_scores_that_cannot_be_are_refused() -> None:
    with pytest.raises(SpecError, match=r"scores.ffn_size\[1\]: must be numbers of 0 or more"):
        kept_importance(TEACHER, {"ffn_size": {1: [-1.0]}})
    with pytest.raises(SpecError, match="a multiple of 2"):
        kept_importance(TEACHER, {"mamba_heads": {0: [1.0, 2.0, 3.0]}})
    with pytest.raises(SpecError, match="have no weight"):
        kept_importance(TEACHER, {})


# --- the paper's search: facts of paper A, section 4.3 ---

PAPER = {(4480, 17920, 112), (4480, 15680, 128), (4800, 14400, 120)}


def three(overhead_gib: float) -> set[tuple[int | None, ...]]:
    recipe = load_recipe("12b-to-9b", [f"budget.overhead_bytes={round(overhead_gib * GIB)}", "select.predict=taken"])
    taken = search_recipe(recipe).candidates
    return {(c.shape.hidden_size, c.shape.ffn_size, c.shape.mamba_heads) for c in taken}


@pytest.mark.parametrize("overhead_gib", [0.49, 0.65, 0.83])
def test_the_27_grid_gives_exactly_the_papers_candidates(overhead_gib: float) -> None:
    assert three(overhead_gib) == PAPER


@pytest.mark.parametrize("overhead_gib", [0.47, 0.84])
def test_with_less_or_more_overhead_it_gives_others(overhead_gib: float) -> None:
    assert three(overhead_gib) != PAPER


def test_the_papers_choice_and_the_order_of_predictions_beside_the_measured_one() -> None:
    result = search_recipe(load_recipe("12b-to-9b"))
    assert (result.considered, result.fitting) == (27, 9)
    chosen = next(c for c in result.candidates if c.shape.mamba_heads == 128)
    assert chosen.spec.parameters == 8_888_227_328
    assert chosen.spec.renamed("x") == load_spec("nvidia/NVIDIA-Nemotron-Nano-9B-v2").renamed("x")
    measured = {112: 161.02, 128: 156.42, 120: 155.86}  # Table 10, tok/s on an A10G at 8k/16k, batch 8
    predicted = {c.shape.mamba_heads: c.tokens_per_s for c in result.candidates}
    for heads, rate in measured.items():
        assert predicted[heads] == pytest.approx(rate, rel=0.025)
    assert result.candidates[0].shape.mamba_heads == max(measured, key=lambda heads: measured[heads]) == 112


def test_56_layers_with_4_of_attention_are_the_9bs() -> None:
    recipe = load_recipe("12b-to-9b")
    assert recipe.depth is not None
    teacher, student = load_spec(recipe.teacher), load_spec("nvidia/NVIDIA-Nemotron-Nano-9B-v2")
    deep = pruned_spec(teacher, Shape(layers=kept_layers(teacher, 56, recipe.depth)))
    assert [type(m) for m in deep.layers] == [type(m) for m in student.layers]
    for count in (54, 52):
        kept = kept_layers(teacher, count, recipe.depth)
        assert len(kept) == count
        assert sum(isinstance(teacher.layers[i], Attention) for i in kept) == 4
