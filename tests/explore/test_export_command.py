"""`tandem explore --export`: the page holds answers of the very model and GPU that were named, be they files or not."""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from hosts import keep_a_host

import tandem
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.workload import Slo, Workload

LLAMA = "meta-llama--Meta-Llama-3.1-70B_config.json"


def export(page: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What the page carries that the command writes."""
    from tandem.cli.app import main

    monkeypatch.setattr(sys, "argv", ["tandem", "explore", "--export", str(page), "--json", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code in (0, None)
    told = json.loads(capfd.readouterr().out)
    inside = re.search(r'id="answers">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert inside is not None
    found: dict[str, Any] = json.loads(inside[1])
    assert told["answers"] == len(found["answers"])
    assert told["answered"] == sum("error" not in each for each in found["answers"].values()) > 0
    return found


def test_a_folder_and_a_gpus_file_are_what_is_priced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both have names of the catalogue's, which mean something else there."""
    folder, box = tmp_path / "qwen3-8b", tmp_path / "box.yaml"
    folder.mkdir()
    with resources.as_file(resources.files("tandem.spec") / "data" / "models" / LLAMA) as config:
        shutil.copy(config, folder / "config.json")
    gpu = load_hardware("b200-sxm").to_json() | {"name": "a10g", "title": "Our own box", "price_per_hour_usd": 3.0}
    box.write_text(yaml.safe_dump(gpu))
    words = ["-m", str(folder), "--hardware", str(box), "--gpus", "8", "--ttft", "3"]
    found = export(tmp_path / "page.html", words, monkeypatch, capfd)
    plan = tandem.find_plan(
        model=load_spec(folder), hardware=load_hardware(box), gpus=8, workload=Workload.fixed(2048, 512),
        slo=Slo(ttft_s=3, tpot_s=0.05),
    )  # fmt: skip
    answer = found["answers"]["2048/512/0.05"]
    assert answer["recommended"] == json.loads(json.dumps(plan.recommended.to_json()))
    assert answer["best"]["tokens_per_s"] == plan.best.tokens_per_s
    assert (answer["model"], answer["hardware"]) == ("qwen3-8b", "a10g")
    assert answer["price_per_hour_usd"] == 3.0 * plan.recommended.gpus
    (model,), (hardware,) = found["catalogue"]["models"], found["catalogue"]["hardware"]
    assert (model["name"], model["parameters"]) == ("qwen3-8b", load_spec("llama-3.1-70b").parameters)
    assert (hardware["name"], hardware["title"], hardware["backends"]) == ("a10g", "Our own box", ["vllm"])
    assert {name: found["query"][name] for name in ("model", "hardware", "backend", "gpus", "ttft_s")} == {
        "model": "qwen3-8b", "hardware": "a10g", "backend": "vllm", "gpus": 8, "ttft_s": 3.0,
    }  # fmt: skip


def test_this_machine_is_exported_with_its_own_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TANDEM_DATA", str(tmp_path))
    keep_a_host()
    words = ["-m", "nano-hybrid", "--hardware", "host", "--gpus", "1", "--ttft", "100"]
    found = export(tmp_path / "page.html", words, monkeypatch, capfd)
    assert found["query"]["backend"] == "tandem"
    assert found["catalogue"]["hardware"][0]["backends"] == ["tandem"]


def test_a_name_that_is_none_is_refused_before_any_is_priced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tandem.cli.app import main

    for words in (["-m", "no-such-model"], ["--hardware", "no-such-gpu"], ["--backend", "other"], ["--gpus", "0"]):
        monkeypatch.setattr(sys, "argv", ["tandem", "explore", "--export", str(tmp_path / "page.html"), *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        told = capfd.readouterr().err
        assert words[1] in told
        assert told.count("\n") == 1
    assert not (tmp_path / "page.html").exists()
