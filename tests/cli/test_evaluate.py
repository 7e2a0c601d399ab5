"""`tandem evaluate`: one JSON object, a page, every answer in a file, and one line for bad input."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluated import save_base, save_chat

from tandem.cli.app import main

FEW = ["--suite", "reasoning", "--tasks", "recall,gcd", "--problems", "2", "--max-tokens", "6"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("cli")
    base = save_base(folder / "base")
    return [str(base), str(save_chat(folder / "chat", base))]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["tandem", "evaluate", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0


def test_one_model_has_the_fields_of_the_contract(
    models: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, models[0], *FEW, "--budgets", "4,0", "--json")
    out, err = capfd.readouterr()
    data = json.loads(out)
    assert data["checkpoint"] == models[0]
    assert data["metrics"]["reasoning"]["thinking on"]["recall"]["count"] == 2
    assert [point["budget"] for point in data["metrics"]["budgets"]] == [0, 4]
    assert "models" not in data
    assert "base: reasoning, thinking on:" in err


def test_several_models_page_and_answers(
    models: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page, answers = tmp_path / "page.html", tmp_path / "answers.jsonl"
    run(monkeypatch, *models, *FEW, "--report", str(page), "--answers", str(answers))
    assert "thinking off" in capfd.readouterr().out
    assert "Evaluation of base, chat" in page.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == (1 + 2) * 2 * 2
    assert {line["model"] for line in lines} == {"base", "chat"}
    assert all(line["right"] is (line["worth"] >= 1) for line in lines)


def test_several_models_are_a_list(
    models: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, *models, *FEW, "--json")
    data = json.loads(capfd.readouterr().out)
    assert [model["checkpoint"] for model in data["models"]] == models
    assert all(model["metrics"] for model in data["models"])
    assert data["comparisons"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--suite", "frob"], ["suite='frob'", "needles"]),
        (["--tasks", "frob"], ["tasks='frob'", "chain_sum"]),
        (["--budgets", "0,few"], ["budgets='0,few'", "0,8,16"]),
        (["--budgets", "-1"], ["budgets=-1"]),
        (["--problems", "0"], ["problems=0"]),
        (["--thinking", "no"], ["thinking='no'", "on, off, both"]),
        (["--suite", "tools"], ["suite='tools'", "no chat template"]),
        (["--thinking", "off"], ["thinking='off'", "thinking=on"]),
        (["--samples", "2"], ["samples=2", "temperature"]),
        (["--threads", "0"], ["threads=0"]),
        (["--report", "no/such/folder/x.html"], ["report=", "create it first"]),
        (["--dtype", "float7"], ["dtype='float7'", "bfloat16"]),
        (["--device", "abacus"], ["abacus"]),
    ],
)
def test_bad_input_is_refused_in_one_line(
    refused: Callable[..., str], models: list[str], words: list[str], parts: list[str]
) -> None:
    message = refused("evaluate", models[0], *words)
    for part in parts:
        assert part in message


def test_a_model_that_is_not_there_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "nosuch" in refused("evaluate", "nosuch")
    (tmp_path / "empty").mkdir()
    assert "empty" in refused("evaluate", str(tmp_path / "empty"))


def test_without_models_there_is_one_line(refused: Callable[..., str]) -> None:
    assert "--help" in refused("evaluate")


def test_without_lm_eval_one_line_says_what_to_install(
    command: Callable[..., subprocess.CompletedProcess[str]], models: list[str], tmp_path: Path
) -> None:
    shim = tmp_path / "shim"
    shim.mkdir()
    (shim / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'lm_eval':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    done = command("evaluate", models[0], "--suite", "lm-eval", PYTHONPATH=str(shim))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "pip install 'tandem-lm[eval]'" in done.stderr
