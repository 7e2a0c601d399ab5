from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluated import save_base, save_chat

from tandem.evaluation.run import evaluate_models, examples
from tandem.evaluation.score import Answered
from tandem.evaluation.settings import EvaluationSettings
from tandem.report.evaluation_html import evaluation_page
from tandem.report.evaluation_text import BETTER, best_in, evaluation_text, part_rows, row_keys, score_rows
from tandem.report.text import console
from tandem.spec.errors import SpecError

TIMES = ("seconds",)
FEW = EvaluationSettings(suites=("reasoning",), tasks=("recall", "gcd"), problems=3, budgets=(0, 4), max_tokens=8)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("evaluated")
    base = save_base(folder / "base")
    return [str(base), str(save_chat(folder / "chat", base)), str(save_base(folder / "other", kind="transformer", seed=3))]


@pytest.fixture(scope="module")
def found(models: list[str]) -> dict[str, Any]:
    return evaluate_models(models, FEW)


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: timeless(item) for name, item in value.items() if name not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def test_the_same_seed_gives_the_same_result(models: list[str], found: dict[str, Any]) -> None:
    assert timeless(evaluate_models(models, FEW)) == timeless(found)
    assert json.loads(json.dumps(found, allow_nan=False))["models"]


def test_draws_follow_the_seed(models: list[str]) -> None:
    def texts(seed: int) -> list[str]:
        kept: list[str] = []
        settings = EvaluationSettings(
            suites=("reasoning",), tasks=("gcd",), problems=2, samples=2, temperature=1.0, seed=seed, max_tokens=8
        )
        evaluate_models(models[:1], settings, keep=lambda *event: kept.append(event[-1].text))
        return kept

    first = texts(0)
    assert first == texts(0)
    assert first != texts(1)
    assert len(set(first)) == 4


def test_every_model_has_its_modes_tasks_and_budgets(found: dict[str, Any]) -> None:
    by_name = {model["name"]: model["metrics"] for model in found["models"]}
    assert list(by_name) == ["base", "chat", "other"]
    assert list(by_name["base"]["reasoning"]) == ["thinking on"]
    assert list(by_name["chat"]["reasoning"]) == ["thinking on", "thinking off"]
    for metrics in by_name.values():
        assert list(metrics["reasoning"]["thinking on"]) == ["all", "recall", "gcd"]
        assert [point["budget"] for point in metrics["budgets"]] == [0, 4]
        assert metrics["budgets"][0]["forced"] == 1.0
        assert metrics["budgets"][0]["one_closing_mark"] == 1.0
        assert 0 <= metrics["budgets"][0]["one_closing_mark_unaided"] <= 1
        assert list(metrics["budgets"][0]["tasks"]) == ["recall", "gcd"]


def test_every_two_models_are_compared_where_both_were_asked(found: dict[str, Any]) -> None:
    asked = {(c["suite"], c["mode"], c["task"], c["a"], c["b"]) for c in found["comparisons"]}
    assert ("reasoning", "thinking on", "all", "base", "chat") in asked
    assert ("budgets", "4", "all", "base", "other") in asked
    assert not {mode for _, mode, *_ in asked} & {"thinking off"}


def test_every_answer_is_kept(models: list[str]) -> None:
    kept: list[tuple[str, str, str, Answered]] = []
    evaluate_models(models[:1], FEW, keep=lambda *event: kept.append(event))
    assert len(kept) == 3 * 2 * 3
    assert {(name, suite, mode) for name, suite, mode, _ in kept} == {
        ("base", "reasoning", "thinking on"),
        ("base", "budgets", "0"),
        ("base", "budgets", "4"),
    }


@pytest.mark.parametrize(
    ("pick", "settings", "message"),
    [
        ([0], {"suites": ("tools",)}, "suite='tools': base has no chat template"),
        ([1, 0], {"suites": ("instructions",)}, "suite='instructions': base has no chat template"),
        ([0], {"suites": ("reasoning",), "thinking": "off"}, "thinking='off': base cannot be asked so"),
        ([0, 0], {}, "names one twice"),
        ([], {}, "models: none given"),
        ([0], {"suites": ("needles",), "lengths": (4000,)}, "lengths=4000: base has room for 488 tokens"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_loaded(
    models: list[str], pick: list[int], settings: dict[str, Any], message: str
) -> None:
    loaded: list[str] = []
    with pytest.raises(SpecError) as refused:
        evaluate_models(
            [models[i] for i in pick], EvaluationSettings(**settings), listen=lambda event: loaded.append(event["kind"])
        )
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert loaded == []


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "mute")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SpecError, match=r"holds no tokenizer.json"):
        evaluate_models([str(folder)], FEW)


def test_models_of_the_same_folder_name_keep_their_paths(models: list[str], tmp_path: Path) -> None:
    twin = save_base(tmp_path / "base", seed=5)
    both = evaluate_models([models[0], str(twin)], EvaluationSettings(suites=("reasoning",), tasks=("gcd",), problems=1))
    assert [model["name"] for model in both["models"]] == [models[0], str(twin)]


# --- what people read ---


def test_examples_are_some_right_and_some_wrong_of_each_suite() -> None:
    def answer(i: int, task: str) -> Answered:
        return Answered(problem=f"{task}{i}", task=task, question="q", expected="e", text="t", worth=float(i % 2))

    answers = [answer(i, task) for task in "abcde" for i in range(4)]
    shown = examples({("reasoning", "thinking on"): answers, ("budgets", "8"): answers})
    assert [s["right"] for s in shown] == [True] * 3 + [False] * 3
    assert len({(s["task"], s["right"]) for s in shown}) == 6
    assert {s["suite"] for s in shown} == {"reasoning"}


def printed(data: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    console().print(evaluation_text(data))
    return capsys.readouterr().out


def test_the_terminal_shows_every_score(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(found, capsys)
    for word in ("recall", "gcd", "thinking off", "By thinking budget", "How they were written"):
        assert word in text
    assert len(score_rows(found)) == len(row_keys(found)) == 6
    assert all(len(row) == 6 for row in score_rows(found))


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", "</details></pre><img src=x onerror=alert(1)>", "&lt;b&gt;"])
def test_what_models_wrote_and_are_called_is_escaped(found: dict[str, Any], evil: str) -> None:
    data = json.loads(json.dumps(found))
    for sample in data["models"][0]["samples"]:
        sample.update(text=evil, question=evil, expected=evil)
    data["models"][0].update(name=evil, notes=[evil], checkpoint=evil)
    page = evaluation_page(data)
    body = page.partition("<body>")[2]
    assert evil not in body.replace("\\u003c", "<") or evil == "&lt;b&gt;"
    assert body.count("<script>alert") == body.count("<img") == 0


def test_the_page_needs_nothing_from_outside(found: dict[str, Any]) -> None:
    body = evaluation_page(found).partition("<body>")[2]
    assert "src=" not in body
    assert "href=" not in body
    assert "<h2>Accuracy against thinking budget</h2>" in body
    assert body.count("<details class='answer'>") == sum(len(model["samples"]) for model in found["models"])


def verdicts(*better: str | None) -> dict[str, Any]:
    names = ["a", "b", "c"]
    score = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "parts": {}, "answer_tokens": None}
    metrics = {"reasoning": {"thinking on": {"all": score, "gcd": score, "recall": score}}}
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    about = {"suite": "reasoning", "mode": "thinking on", "task": "gcd"}
    return {
        "models": [{"name": name, "metrics": metrics, "notes": []} for name in names],
        "comparisons": [{**about, "a": a, "b": b, "better": w} for (a, b), w in zip(pairs, better, strict=True)],
        "seconds": 1.0,
    }


def test_a_star_stands_beside_a_model_that_is_better_than_every_other() -> None:
    key = ("reasoning", "thinking on", "gcd")
    assert best_in(verdicts("a", "a", None), key) == "a"
    assert best_in(verdicts("b", None, "b"), key) == "b"
    assert best_in(verdicts("a", None, "b"), key) is None
    assert best_in(verdicts(None, None, None), key) is None
    rows = score_rows(verdicts("a", "a", None))
    assert [cell.endswith(BETTER) for cell in rows[1][3:]] == [True, False, False]
    assert not any(cell.endswith(BETTER) for cell in rows[0] + rows[2])


def test_parts_of_answers_have_a_row_each() -> None:
    data = verdicts(None, None, None)
    data["models"] = data["models"][:2]
    score = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "parts": {"format": 0.75, "substance": None}, "answer_tokens": 3.0}
    data["models"][0]["metrics"] = {"tools": {"thinking on": {"all": score}}}
    assert part_rows(data) == [
        ["tools", "thinking on", "format", "75.0%", "-"],
        ["tools", "thinking on", "substance", "-", "-"],
    ]
