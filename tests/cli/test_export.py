"""`tandem plan --export DIR`: what is written, what is printed, and which folders are refused before anything is planned."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Refused = Callable[..., str]
PLAN = ["plan", "-m", "qwen3-8b", "--hardware", "h100", "--gpus", "2", "--isl", "512", "--osl", "64"]


def test_an_export_is_written_beside_the_plan(command: Any, tmp_path: Path) -> None:
    done = command(*PLAN, "--export", "out")
    assert done.returncode == 0, done.stderr
    assert "export: " in done.stdout
    names = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {"README.md", "nodes.env", "vllm/run-node.sh", "sglang/run-node.sh", "dynamo/graph.yaml"} <= names
    assert {"llm-d/model-servers.yaml", "llm-d/router-values.yaml", "ray/serve.yaml", "benchmark/run.sh"} <= names


def test_with_json_one_object_is_printed_and_the_export_is_its_deployment(command: Any, tmp_path: Path) -> None:
    done = command(*PLAN, "--export", "out", "--json")
    assert done.stdout.count("\n") == 1
    printed = json.loads(done.stdout)
    exported = json.loads((tmp_path / "out/plan.json").read_text())
    predicted = exported.pop("predicted")
    assert exported == printed["recommended"]
    assert predicted["gpus"] == printed["recommended"]["gpus"]


def test_an_impossible_plan_writes_no_folder(command: Any, tmp_path: Path) -> None:
    done = command(*PLAN, "--tpot", "0.0000001", "--export", "out")
    assert done.returncode == 2
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_earlier_export_are_refused(refused: Refused, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "notes.txt").write_text("mine")
    assert "holds 'notes.txt', which no export wrote; name a folder that is new or empty" in refused(
        *PLAN, "--export", str(own)
    )
    assert (own / "notes.txt").read_text() == "mine"
    forged = tmp_path / "forged"
    forged.mkdir()
    (forged / "tandem-export.json").write_text('{"files": 3}')
    assert "'tandem-export.json'" in refused(*PLAN, "--export", str(forged))
    file = tmp_path / "file"
    file.write_text("")
    assert "is not a folder" in refused(*PLAN, "--export", str(file))
    link = tmp_path / "link"
    link.symlink_to(own)
    assert "is not a folder" in refused(*PLAN, "--export", str(link))
    assert "does not exist; create it first" in refused(*PLAN, "--export", str(tmp_path / "no" / "where"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "forged", "link", "own"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(refused: Refused, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    assert "cannot be written" in refused(*PLAN, "--export", str(closed / "out"))
