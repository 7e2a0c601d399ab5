"""Recipes of compression: what they say, and what is refused."""

from __future__ import annotations

import pytest

from tandem.compress.recipe import plan_json, search_recipe
from tandem.compress.recipe_files import load_recipe, recipe_names
from tandem.compress.space import kept_layers
from tandem.spec.catalog import load_spec
from tandem.spec.errors import SpecError
from tandem.spec.model import Attention


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_read_and_finds_shapes_within_its_budget(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.name, bool(recipe.about)) == (name, True)
    assert (recipe.plan_only is None) == (not name.startswith("12b"))
    found = search_recipe(recipe)
    assert len(found.candidates) == 3
    assert all(c.total_bytes <= found.limits["total_bytes"] < found.teacher.total_bytes for c in found.candidates)
    assert all(c.tokens_per_s for c in found.candidates)
    stages = list(recipe.stages.values())
    assert stages[0].cut == "depth"
    assert stages[-1].distil is not None


def test_the_three_named_recipes_are_there() -> None:
    assert {"12b-to-9b", "nano-compress", "smollm-compress"} <= set(recipe_names())


def test_the_papers_recipe_is_as_its_facts_say() -> None:
    """facts of paper A, sections 3, 4.1 to 4.3."""
    recipe = load_recipe("12b-to-9b")
    assert recipe.budget.total_bytes == pytest.approx((22.06 * 0.95 - 1.3) * 2**30, rel=2e-4)
    assert (recipe.budget.context, recipe.budget.batch, recipe.budget.precision) == (131_072, 1, "bf16")
    assert recipe.depth is not None
    assert set(recipe.depth.layers) == {52, 54, 56}
    assert recipe.width is not None
    assert recipe.width.count == 27
    assert (recipe.calibration.samples, recipe.calibration.length) == (1024, 8192)
    distilled = [stage.distil for stage in recipe.stages.values() if stage.distil is not None]
    assert [(d.tokens / 1e9, d.length) for d in distilled] == [(60, 8192), (50, 8192), (25, 49_152), (1, 262_144)]
    assert [d.rows * d.length for d in distilled] == [6_291_456] * 4
    assert {d.post_share for d in distilled} == {0.7}
    assert recipe.ranking is not None
    assert recipe.ranking.tokens == 19_000_000_000


def test_smollm_stays_a_transformer_of_whole_blocks() -> None:
    recipe = load_recipe("smollm-compress")
    teacher = load_spec(recipe.teacher)
    assert recipe.depth is not None
    for count in recipe.depth.layers:
        kept = kept_layers(teacher, count, recipe.depth)
        kinds = [isinstance(teacher.layers[i], Attention) for i in kept]
        assert kinds == [True, False] * (count // 2)


def test_a_plan_tells_what_it_does_not_know() -> None:
    plans = {name: plan_json(r := load_recipe(name), search_recipe(r)) for name in ("nano-compress", "12b-to-9b")}
    assert any("no importance is known yet" in note for note in plans["nano-compress"]["notes"])
    assert not any("no importance" in note for note in plans["12b-to-9b"]["notes"])
    assert any("planned, not run" in note for note in plans["12b-to-9b"]["notes"])
    assert plans["12b-to-9b"]["tokens"] == 136_000_000_000


def test_an_order_of_layers_takes_the_place_of_the_recipes() -> None:
    recipe = load_recipe("nano-compress", ["depth.layers=[11]"])
    found = search_recipe(recipe, order=(3, 0))
    assert {c.shape.layers for c in found.candidates} == {(0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11)}


DISTIL = "stages.distil-2.distil"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("width.neurons=[4]", "width.neurons: no such field"),
        ("width.hidden_size=[0]", "width.hidden_size=0"),
        ("width.hidden_size=[8, 8]", "width.hidden_size=[8, 8]: names a size twice"),
        ("width.ffn_multiple=[2]", "width.ffn_multiple: states the sizes that width.ffn_size does"),
        ("depth.layers=[]", "depth.layers=[]: must name one"),
        ("depth.order=[1, 1]", "depth.order=[1, 1]: names a layer twice"),
        ("depth.block=0", "depth.block=0"),
        ("budget.total_bytes=5", "budget.share=0.7: states the limit that budget.total_bytes does"),
        ("budget.share=1.5", "budget.share=1.5"),
        ("budget.share=null", "budget: states no limit"),
        ("budget.precision=q2", "precision='q2'"),
        ("select.take=0", "select.take=0"),
        ("select.by=luck", "select.by='luck': must be one of"),
        ("select={by: throughput, predict: taken}", "select.predict='taken': must be all"),
        ("objective.kind=cluster", "objective.kind='cluster': objective.cluster must be stated"),
        ("objective.kind=luck", "objective.kind='luck': must be one of"),
        ("depth=null", "stages.depth.cut='depth': the recipe has no depth to cut"),
        ("stages.width={cut: depth}", "stages.width.cut='depth': depth cuts it already"),
        ("stages.width={}", "stages.width.stage: must state one of cut"),
        ("teacher=''", "teacher='': name a model"),
        ("calibration.samples=0", "calibration.samples=0"),
        (f"{DISTIL}.final_lr=1.0", f"{DISTIL}.final_lr=1.0"),
        (f"{DISTIL}.tokens=10", f"{DISTIL}.tokens=10: must be one step at least"),
        (f"{DISTIL}.post_share=1.5", f"{DISTIL}.post_share=1.5"),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(change: str, said: str) -> None:
    with pytest.raises(SpecError) as refused:
        load_recipe("nano-compress", [change])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_recipe_needs_something_to_cut_and_an_objective_for_a_throughput() -> None:
    with pytest.raises(SpecError, match="depth, width: neither is stated"):
        load_recipe("nano-compress", ["depth=null", "width=null", "stages={}"])
    for change in ("budget.tokens_per_s=5", "select.by=throughput"):
        with pytest.raises(SpecError, match="needs an objective that predicts it"):
            load_recipe("nano-compress", ["objective=null", change])
