"""Recipes: what is known is read, what is not is refused by its path."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tandem.spec.errors import SpecError
from tandem.train.build import model_spec
from tandem.train.recipe_files import load_recipe, recipe_from_json, recipe_json, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_read_and_survives_json(name: str) -> None:
    recipe, folder = load_recipe(name)
    assert recipe.name == name
    assert recipe.about
    assert recipe_from_json(recipe_json(recipe)) == recipe
    assert (folder / f"{name}.yaml").is_file()
    assert model_spec(recipe).parameters > 0


def test_hybrid_and_transformer_are_of_one_size_and_learn_the_same() -> None:
    hybrid, transformer = (load_recipe(name)[0] for name in ("nano-hybrid", "nano-transformer"))
    assert model_spec(transformer).parameters == pytest.approx(model_spec(hybrid).parameters, rel=0.005)
    for part in ("data", "batch", "optimiser", "precision", "seed"):
        assert getattr(hybrid, part) == getattr(transformer, part)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("batch.tokes=1", "batch.tokes: no such field; did you mean tokens?"),
        ("bach.tokens=1", "bach: no such field; did you mean batch?"),
        ("batch.tokens=0", "batch.tokens=0: must be a whole number"),
        ("batch.tokens=many", "batch.tokens='many': must be a whole number"),
        ("batch.tokens=1.5", "batch.tokens=1.5: must be a whole number"),
        ("batch", "'batch': changes are written field.path=value"),
        ("seed=true", "seed=True: must be a whole number"),
        ("precision.linears=fp4", "precision.linears='fp4': must be one of fp32, bf16"),
        ("data.phases.9.until=1", "data.phases.9.until: data.phases has entries 0 to 2"),
        ("data.phases.0.until=0.95", "data.phases: until=[0.95, 0.9, 1.0]: must rise"),
        ("data.phases.0.weights={nothing: 1}", "data.phases[0].weights=['nothing']: no such source"),
        ("data.sources.more={kind: film}", "data.sources.more.kind='film': must be one of jsonl"),
        ("data.sources.more={path: x}", "data.sources.more.kind: is missing"),
        ("data.sources.plays.text=x", "data.sources.plays.text='x': changes nothing for a source of kind text"),
        ("data.sources.plays.prompt=x", "data.sources.plays.prompt='x': changes nothing for a source of kind text"),
        ("checkpoint.every=0", "checkpoint.every=0: must be a whole number"),
        ("guard.spike=.nan", "guard.spike=nan: must be a finite number"),
        ("optimiser.weight_decay=-1", "optimiser.weight_decay=-1.0: must be a number from 0 to 1"),
        ("data.cut=[nothing]", "data.cut='nothing': no such source"),
        ("optimiser.decay=1.2", "optimiser.decay=1.2: must be a number"),
        ("optimiser.min_lr=1", "optimiser.min_lr=1"),
        ("name.first=x", "name.first: name is 'nano-hybrid' and has no fields"),
    ],
)
def test_a_change_that_means_nothing_is_refused_by_its_path(change: str, message: str) -> None:
    with pytest.raises(SpecError) as refused:
        load_recipe("nano-hybrid", ["name=nano-hybrid", change])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@given(tokens=st.integers(1, 10**13), sequences=st.integers(1, 4096), rate=st.floats(1e-5, 1.0))
def test_changes_reach_the_fields_they_name(tokens: int, sequences: int, rate: float) -> None:
    changes = [f"batch.tokens={tokens}", f"batch.sequences={sequences}", f"optimiser.lr={rate!r}", "optimiser.min_lr=0"]
    recipe, _ = load_recipe("nano-hybrid", changes)
    assert (recipe.batch.tokens, recipe.batch.sequences, recipe.optimiser.lr) == (tokens, sequences, rate)
    assert (recipe.batch.steps - 1) * recipe.batch.tokens_per_step < tokens <= recipe.batch.steps * recipe.batch.tokens_per_step


def test_a_recipe_of_ones_own_extends_one_beside_it(tmp_path: Path) -> None:
    base = yaml.safe_load((load_recipe("nano-hybrid")[1] / "nano-hybrid.yaml").read_text())
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "mine.yaml").write_text("extends: base\nbatch: {tokens: 7}\nmodel: {replace: true, name: qwen3-8b}\n")
    recipe, folder = load_recipe(tmp_path / "mine.yaml")
    assert (recipe.name, recipe.batch.tokens, recipe.batch.sequences, folder) == ("mine", 7, 8, tmp_path)
    assert recipe.model.pattern is None
    assert model_spec(recipe).parameters == 8_190_735_360
    (tmp_path / "shipped.yaml").write_text("extends: nano-hybrid\nbatch: {tokens: 7}\n")
    assert load_recipe(tmp_path / "shipped.yaml")[0].batch.tokens == 7
    (tmp_path / "nano-hybrid.yaml").write_text("extends: nano-hybrid\nseed: 9\n")  # its own name is that of the shipped one
    assert load_recipe(tmp_path / "nano-hybrid.yaml")[0].seed == 9
    (tmp_path / "wrong.yaml").write_text("extends: nothing\n")
    with pytest.raises(SpecError, match=r"extends='nothing': no recipe beside it or among 12b-base, "):
        load_recipe(tmp_path / "wrong.yaml")
    with pytest.raises(SpecError, match=r"recipe='nano-hybird': no such recipe and no such file; did you mean nano-hybrid"):
        load_recipe("nano-hybird")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.pattern=MXM", "model.pattern='MXM': must be of M"),
        ("model.pattern=null", "model.pattern=None: give a pattern"),
        ("model.state_dim=null", "model.state_dim=None: the pattern 'M-M-M*-M-M*-' needs it"),
        ("model.name=qwen3-8b", "model.pattern='M-M-M*-M-M*-': leave it out"),
    ],
)
def test_a_model_that_is_not_said_is_refused(change: str, message: str) -> None:
    with pytest.raises(SpecError) as refused:
        model_spec(load_recipe("nano-hybrid", [change])[0])
    assert message in str(refused.value)
