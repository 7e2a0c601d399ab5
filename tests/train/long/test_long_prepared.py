"""Long documents through the whole of data preparation: none is cut, and what is learned are their questions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tandem.model.tokenizer import load_tokenizer
from tandem.spec.recipes import recipes_folder
from tandem.train.data.prepare import TOKENIZER_FOLDER, prepare
from tandem.train.data.stream import TokenStream
from tandem.train.long import QUESTIONS
from tandem.train.recipe import BatchPart, DataPart, ModelPart, PhasePart, Recipe, SourcePart, TokenizerPart
from tandem.train.recipe_files import load_recipe


def test_documents_fit_their_sequences_and_questions_are_learned(tmp_path: Path) -> None:
    recipe = Recipe(
        name="long-only",
        model=ModelPart(pattern="M*-"),
        data=DataPart(
            tokenizer=TokenizerPart(vocab_size=2048, sample_bytes=200_000),
            sources={
                "questions": SourcePart(kind="long-documents", path="data/*.txt.gz", documents=30, length=2048),
            },
            phases=(PhasePart(until=1.0, weights={"questions": 1.0}),),
        ),
        batch=BatchPart(sequence_length=2048, sequences=4, tokens=2048 * 4 * 5),
    )
    report = prepare(recipe, tmp_path / "data", recipe_folder=recipes_folder())
    source = report.sources[0]
    assert (source.documents, source.dropped, source.bad_rows) == (30, {}, 0)
    assert 0.7 * 2048 < source.tokens / (source.documents - source.held_out_documents) <= 2048
    tokenizer = load_tokenizer(tmp_path / "data" / TOKENIZER_FOLDER)
    batch = TokenStream(tmp_path / "data", recipe.data, recipe.batch, seed=0).batch()
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        learned = labels != -100
        text, tail = tokenizer.decode(ids[: int(np.argmax(learned)) + 1].tolist()), tokenizer.decode(labels[learned].tolist())
        assert text.endswith(f"\n\n{QUESTIONS}\n")
        assert tail.startswith(("Recall", "Count", "Go on"))
        assert 5 < tail.count("\n") < 60


def test_the_recipe_goes_on_with_the_third_phase_of_its_base() -> None:
    recipe, base = load_recipe("nano-long")[0], load_recipe("nano-hybrid")[0]
    (phase,) = recipe.data.phases
    last = base.data.phases[-1].weights
    assert phase.weights["long-questions"] == pytest.approx(0.2)
    assert {name: weight / 0.8 for name, weight in phase.weights.items() if name in last} == pytest.approx(last)
    assert recipe.batch.sequence_length == 4 * base.batch.sequence_length == recipe.data.sources["long-questions"].length
    assert (recipe.optimiser.schedule, recipe.optimiser.warmup, recipe.optimiser.decay) == ("constant", 0.0, 0.0)
