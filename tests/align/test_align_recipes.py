"""Recipes of alignment: what they say, and what is refused."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="pip install tandem-lm[train]")
from tandem.align.recipe import StagePart
from tandem.align.recipe_files import load_recipe, recipe_names
from tandem.spec.errors import SpecError

MERGE = "stages.merge.merge"


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_read_and_ends_in_a_model(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.about
    assert list(recipe.stages) == ["sft-1", "sft-2", "sft-3", "ifeval-grpo", "dpo", "reward-model", "rlhf", "merge"]
    assert (recipe.plan_only is None) == name.startswith("nano-")


def test_hybrid_and_transformer_differ_in_the_base_alone() -> None:
    hybrid, transformer = load_recipe("nano-align-hybrid"), load_recipe("nano-align-transformer")
    assert (hybrid.stages, hybrid.tasks, hybrid.evaluate) == (transformer.stages, transformer.tasks, transformer.evaluate)
    assert (hybrid.base, transformer.base) == ("nano-hybrid", "nano-transformer")


def test_the_paper_s_stages_are_as_it_prints_them() -> None:
    """facts: tenth without thoughts, stage 2 not concatenated, a twentieth cut off, 16,000 prompts, alphas 0.1 to 0.9."""
    for name in ("12b-align", "nano-align-hybrid"):
        stages = load_recipe(name).stages
        one, two, three = (stages[f"sft-{i}"].sft for i in (1, 2, 3))
        assert one is not None
        assert two is not None
        assert three is not None
        assert [part.data.no_think for part in (one, two, three)] == [0.1] * 3
        assert [part.train.concatenate for part in (one, two, three)] == [True, False, True]
        assert [part.data.truncated for part in (one, two)] == [0, 0]
        mix = three.data
        assert mix.truncated * mix.reasoning / (mix.reasoning + mix.instructions + mix.tools) == pytest.approx(0.05, abs=0.015)
        assert stages["merge"].merge is not None
        assert stages["merge"].merge.alphas == tuple(i / 10 for i in range(1, 10))
    grpo = load_recipe("12b-align").stages["ifeval-grpo"].grpo
    assert grpo is not None
    assert grpo.asks.instructions == 16_000 == grpo.train.steps * (grpo.train.rows // grpo.train.generations)


def test_a_stage_goes_on_from_the_last_model_before_it() -> None:
    recipe = load_recipe("nano-align-hybrid", ["stages.rlhf.after=ifeval-grpo"])
    assert {name: recipe.before(name) for name in recipe.stages} == {
        "sft-1": None, "sft-2": "sft-1", "sft-3": "sft-2", "ifeval-grpo": "sft-3", "dpo": "ifeval-grpo",
        "reward-model": "dpo", "rlhf": "ifeval-grpo", "merge": "dpo",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("stages.sft-1.sft.data.reasonin=3", r"stages\.sft-1\.sft\.data\.reasonin: no such field; did you mean reasoning"),
        ("stages.sft-1.sft.data.no_think=1.5", r"stages\.sft-1\.sft\.data\.no_think=1\.5: must be a share"),
        ("stages.sft-1.sft.data={reasoning: 0}", r"stages\.sft-1\.sft\.data\.reasoning=0: the stage learns from nothing"),
        ("stages.ifeval-grpo.grpo.asks={tools: 0}", r"stages\.ifeval-grpo\.grpo\.asks\.reasoning=0: nothing is asked"),
        ("stages.sft-1.sft.train.lr=-1", r"stages\.sft-1\.sft\.train\.lr=-1"),
        ("stages.dpo.after=merge", r"stages\.dpo\.after='merge': must be a model's stage before it; there are sft-1"),
        ("stages.dpo.after=reward-model", r"stages\.dpo\.after='reward-model': must be a model's stage"),
        (
            "stages.rlhf.grpo.reward_model=dpo",
            r"stages\.rlhf\.grpo\.reward_model='dpo': must be a reward_model stage before it",
        ),
        (f"{MERGE}.second=nothing", r"stages\.merge\.merge\.second='nothing': must be a model's stage before it"),
        (f"{MERGE}.alphas=[0.5, 2]", r"alphas=2"),
        (f"{MERGE}.alphas=[]", r"alphas=\[\]: must hold one"),
        (
            "stages.dpo.sft={data: {tools: 1}, train: {steps: 1}}",
            r"stages\.dpo\.stage: states \['sft', 'dpo'\], must be one of",
        ),
        ("tasks=[]", r"tasks=\[\]: name one"),
        ("tasks=[chain_sun]", r"tasks='chain_sun': not known; chain_sum"),
        (f"{MERGE}.second=dpo", r"second='dpo': is the first as well"),
        ("stages.model={sft: {data: {tools: 1}, train: {steps: 1}}}", r"stages: 'model' must be a name .* none of base, final"),
        ("stages={}", r"stages=\{\}: name one"),
        ("seed=-1", r"seed=-1"),
        ("evaluate.budgets=[-1]", r"evaluate\.budgets=-1"),
        ("evaluate.budgets=[8, 8]", r"evaluate\.budgets=\[8, 8\]: names one twice"),
        ("stages.dpo.dpo.pairs.samples=1", r"samples=1: must be"),
    ],
)
def test_what_cannot_be_is_named_with_its_place(change: str, says: str) -> None:
    with pytest.raises(SpecError, match=says) as refused:
        load_recipe("nano-align-hybrid", [change])
    assert "\n" not in str(refused.value)


def test_names_of_stages_are_names_of_folders() -> None:
    with pytest.raises(SpecError, match=r"'\.\./x' must be a name that a folder may have"):
        load_recipe("nano-align-hybrid", ["stages={'../x': {sft: {data: {tools: 1}, train: {steps: 1}}}}"])
    with pytest.raises(SpecError, match="must be one of"):
        StagePart()
