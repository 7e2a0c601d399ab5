from __future__ import annotations

import gzip
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from evaluated import save_base, subject_of

from tandem.evaluation.harness import FOLDER, OWN_TASKS, harness, task_index
from tandem.evaluation.run import evaluate_models
from tandem.evaluation.score import score
from tandem.evaluation.settings import EvaluationSettings
from tandem.spec.errors import SpecError
from tandem.spec.recipes import recipes_folder

pytest.importorskip("lm_eval", reason="pip install tandem-lm[eval]")
GSM8K = runpy.run_path(str(FOLDER / "gsm8k.py"))


def test_every_problem_has_four_different_choices_one_of_them_right() -> None:
    with gzip.open(recipes_folder() / "data" / "gsm8k_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        entries = [json.loads(line) for line in lines]
    places = [0, 0, 0, 0]
    for entry in entries:
        made = GSM8K["problem"](entry)
        assert len(set(made["choices"])) == 4
        assert made["choices"][made["right"]] == made["answer"] == entry["answer"].split("#### ")[1].replace(",", "")
        assert GSM8K["problem"](entry) == made
        places[made["right"]] += 1
    assert min(places) > len(entries) / 5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("harness"), context=1024)


@pytest.fixture(scope="module")
def asked(base: Path) -> tuple[Any, dict[str, Any]]:
    return harness(subject_of(base, suites=("lm-eval",), problems=3), task_index(OWN_TASKS))


@pytest.mark.slow
def test_our_tasks_bring_their_questions_and_agree_with_lm_eval(asked: tuple[Any, dict[str, Any]]) -> None:
    records, results = asked
    ((key, answers),) = records.items()
    assert key == ("lm-eval", "as text")
    for task, measure in zip(OWN_TASKS, ("exact_match,last-number", "acc"), strict=True):
        own = [answer for answer in answers if answer.task == task]
        assert len(own) == 3
        assert score(own)["accuracy"] == pytest.approx(results[task][measure])
    assert all("Question: " in answer.question for answer in answers)
    json.dumps(results, allow_nan=False)


@pytest.mark.slow
def test_a_choice_is_the_likeliest_by_the_model_itself(base: Path, asked: tuple[Any, dict[str, Any]]) -> None:
    import torch

    subject = subject_of(base, problems=1)
    answer = next(a for a in asked[0]["lm-eval", "as text"] if a.task == "gsm8k_choice")
    with gzip.open(recipes_folder() / "data" / "gsm8k_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        made = GSM8K["problem"](json.loads(next(lines)))
    sums = []
    for choice in made["choices"]:
        start = subject.tokenizer.encode(answer.question)
        ids = torch.tensor([start + subject.tokenizer.encode(f" {choice}")])
        logs = subject.decoder(ids).log_softmax(-1)[0, len(start) - 1 : -1]
        sums.append(logs.gather(-1, ids[0, len(start) :, None]).sum().item())
    assert answer.text == made["choices"][sums.index(max(sums))]
    assert answer.expected == made["answer"]
    assert answer.right == (answer.text == answer.expected)


@pytest.mark.slow
def test_a_task_that_nobody_knows_is_refused_with_those_that_come_with_tandem(base: Path) -> None:
    settings = EvaluationSettings(suites=("lm-eval",), tasks=("no_such_task_at_all",))
    with pytest.raises(SpecError, match=r"tasks='no_such_task_at_all': neither .* come with Tandem"):
        evaluate_models([str(base)], settings)
