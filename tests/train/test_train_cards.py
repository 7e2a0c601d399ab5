"""Cards: what a hub reads parses and says what the run says; what people read has every number and notice."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.spec.errors import SpecError
from tandem.train.build import model_spec
from tandem.train.cards import CURVE_POINTS, data_card, model_card
from tandem.train.data.document import BadRow
from tandem.train.data.prepared import DataReport, SourceReport
from tandem.train.recipe import Recipe
from tandem.train.recipe_files import load_recipe

STEPS = 120
PHASES = (
    "[{until: 0.6, weights: {addresses: 0.4, plays: 0.2, reasoning: 1.4}}, {until: 0.9, weights: {addresses: 5, plays: 95}}, "
    "{until: 1.0, weights: {plays: 1}}]"
)
ABOUT = {"date": "2026-11-29", "version": "0.8.0"}


def source(name: str, kind: str, licence: str, notice: str = "", **more: Any) -> SourceReport:
    numbers = {
        "read": 1000, "bad_rows": 0, "documents": 900, "held_out_documents": 18, "chars": 250_000, "tokens": 80_000,
        "prompt_tokens": 20_000, "held_out_tokens": 1_600,
    }  # fmt: skip
    return SourceReport(name=name, kind=kind, licence=licence, notice=notice, **{**numbers, **more})


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("nano-hybrid", ["seed=7", "precision.linears=fp8-block", f"data.phases={PHASES}"])[0]


@pytest.fixture(scope="module")
def report() -> DataReport:
    return DataReport(
        fingerprint="0123abcd",
        vocab_size=2048,
        sources=(
            source("addresses", "text", "public domain", "works of the US government", quality={"low": 3, "high": 897}),
            source("plays", "text", "public domain"),
            source(
                "word-problems", "jsonl", "MIT", "Copyright (c) 2021 OpenAI",
                dropped={"short": 2, "evaluation-set:gsm8k_test.jsonl.gz": 5, "quality": 0}, bad_rows=1,
                first_bad_rows=(BadRow(file="rows.jsonl", line=12, why="no column | answer"),),
            ),
            source("reasoning", "procedural", "Apache-2.0"),
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def journal() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        tokens = step * 4096
        lines.append(
            {"kind": "step", "step": step, "loss": 8.0 - step / 20, "lr": 2e-3, "tokens": tokens, "learned_tokens": tokens // 2}
        )
    lines.insert(60, {"kind": "held_out", "step": 60, "loss": {"plays": 3.5}})
    lines.append({"kind": "held_out", "step": STEPS, "loss": {"plays": 2.25, "reasoning": 0.75}})
    return lines


METRICS: dict[str, Any] = {
    "loss": 2.0,
    "steps_s": 1800.0,
    "accuracy": {"chain_sum": {"accuracy": 0.725, "low": 0.66, "high": 0.78, "count": 200}},
    "samples": {"What is 1 + 1?\n<think>\n": "1 + 1 = 2\n</think>\n2"},
}


def front_of(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n\n", card, re.S)
    assert found
    front = yaml.safe_load(found[1])
    assert isinstance(front, dict)
    return front


def written(recipe: Recipe, report: DataReport, journal: list[dict[str, Any]], **more: Any) -> str:
    return model_card(recipe, model_spec(recipe), METRICS, journal, report, **(ABOUT | more))


def test_a_hub_reads_the_model_card(recipe: Recipe, report: DataReport, journal: list[dict[str, Any]]) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(written(recipe, report, journal, base="someone/base", datasets=["openai/gsm8k"]))
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model == "someone/base"
    assert card.data.datasets == ["openai/gsm8k"]
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("chain_sum", "accuracy", 0.725)
    again = hub.ModelCard(str(card))  # what the hub's own library makes of it parses, too
    assert again.data.to_dict() == card.data.to_dict()


def test_a_hub_reads_the_data_card(recipe: Recipe, report: DataReport) -> None:
    hub = pytest.importorskip("huggingface_hub")
    data = hub.DatasetCard(data_card(recipe, report, **ABOUT)).data
    assert data.license == ["apache-2.0", "mit", "other"]
    assert data.size_categories == ["1K<n<10K"]
    assert "synthetic" in data.tags


def test_the_model_card_says_what_the_run_says(recipe: Recipe, report: DataReport, journal: list[dict[str, Any]]) -> None:
    card = written(recipe, report, journal, command="tandem train nano-hybrid seed=7")
    spec = model_spec(recipe)
    for said in (
        f"{spec.parameters:,} parameters", f"`{recipe.model.pattern}`", "tandem train nano-hybrid seed=7",
        "| seed | 7 |", "2026-11-29",
        f"{STEPS * 4096:,}, {STEPS * 2048:,} of them learned", "| plays | 2.2500 |", "| reasoning | 0.7500 |",
        "| chain_sum | 72.5% | 66.0% to 78.0% | 200 |", "word-problems: MIT. Copyright (c) 2021 OpenAI", "E4M3",
        "the first 4 and the last 4 in bf16", "    What is 1 + 1?", "30 minutes",
        "| addresses | public domain | 900 | 80,000 | 20% | 5% | 0% |",
    ):  # fmt: skip
        assert said in card, said
    assert "| plays | 3.5000 |" not in card  # the evaluation on the way
    assert {"mamba2", "hybrid", "fp8-training"} <= set(front_of(card)["tags"])


def test_no_answers_no_index_and_no_invention(recipe: Recipe, report: DataReport, journal: list[dict[str, Any]]) -> None:
    steps = [line for line in journal if line["kind"] == "step"]
    card = model_card(recipe, model_spec(recipe), {}, steps, report, **ABOUT)
    assert not {"model-index", "datasets", "base_model"} & set(front_of(card))
    assert "None was asked for." in card
    assert "Samples" not in card
    with pytest.raises(SpecError, match="holds no step"):
        model_card(recipe, model_spec(recipe), {}, [], report, **ABOUT)


def test_needles_are_a_column_a_length(recipe: Recipe, report: DataReport, journal: list[dict[str, Any]]) -> None:
    shares = {"2048": {"accuracy": 0.4, "count": 40}, "512": {"accuracy": 0.9, "count": 40}}
    needles = {"single": shares, "chain": {"512": {"accuracy": 0.25, "count": 40}}}
    card = model_card(recipe, model_spec(recipe), METRICS | {"needles": needles}, journal, report, **ABOUT)
    assert "| kind | 512 | 2,048 |" in card
    assert "| single | 90% | 40% |" in card
    assert "| chain | 25% | - |" in card


@pytest.mark.parametrize(("base", "named"), [("nano-hybrid", True), ("a/b", True), ("/x/model", False), ("out/a/model", False)])
def test_a_path_is_no_base_model(
    recipe: Recipe, report: DataReport, journal: list[dict[str, Any]], base: str, named: bool
) -> None:
    card = written(recipe, report, journal, base=base)
    assert (base in card) == named
    assert ("base_model" in front_of(card)) == named
    assert "It goes on from" in card


@given(count=st.integers(1, 400))
@settings(deadline=None)
def test_the_curve_has_every_step_once(count: int) -> None:
    recipe, report = load_recipe("nano-transformer")[0], DataReport(fingerprint="0", vocab_size=300, sources=())
    steps = [
        {"kind": "step", "step": i + 1, "loss": float(i), "lr": 1e-3, "tokens": i + 1, "learned_tokens": 1}
        for i in range(count)
    ]
    card = model_card(recipe, model_spec(recipe), {}, steps, report, **ABOUT)
    table = card.split("### Loss")[1].split("##")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")][2:]
    ends = [int(row[0].replace(",", "")) for row in rows]
    assert len(rows) == min(CURVE_POINTS, count)
    assert ends[-1] == count
    assert ends == sorted(set(ends))
    sizes = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    total = sum(size * float(row[2]) for size, row in zip(sizes, rows, strict=True))
    assert total == pytest.approx(count * (count - 1) / 2, abs=1e-3 * count)


def test_the_data_card_names_what_was_left_out(recipe: Recipe, report: DataReport) -> None:
    card = data_card(recipe, report, notices="## Licence of GSM8K\n\nMIT License", **ABOUT)
    for said in (
        "3,600 documents of 4 sources, 320,000 tokens", "| word-problems | evaluation-set:gsm8k_test.jsonl.gz | 5 |",
        "rows.jsonl line 12: no column \\| answer", "| addresses | 3 | 897 |", "## Licence of GSM8K", "0123abcd",
        "data/gsm8k_test.jsonl.gz", "| reasoning | procedural | Apache-2.0 | 1,000 |",
    ):  # fmt: skip
        assert said in card, said
    assert "| quality | 0 |" not in card
    front_of(card)


@given(text=st.text(max_size=60))
@settings(deadline=None)
def test_no_name_breaks_a_table_or_the_yaml(text: str) -> None:
    recipe = load_recipe("nano-hybrid")[0]
    report = DataReport(fingerprint="0", vocab_size=300, sources=(source(text, "text", text, text),))
    card = data_card(replace(recipe, name=text), report, **ABOUT)
    front = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert front["pretty_name"] == f"Data of {text}"
    columns = {
        len(re.findall(r"(?<!\\)\|", line)) for line in card.split("## What was dropped")[0].splitlines() if line[:1] == "|"
    }
    assert columns == {11}


def test_same_data_same_bytes(recipe: Recipe, report: DataReport, journal: list[dict[str, Any]]) -> None:
    assert written(recipe, report, journal) == written(recipe, report, journal)
