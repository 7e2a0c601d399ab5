from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

DEPLOYMENT = {
    "model": "nvidia/NVIDIA-Nemotron-Nano-9B-v2",
    "hardware": "h100-sxm",
    "prefill": {"parallelism": {"tp": 1}, "batch": 1, "replicas": 2, "role": "prefill"},
    "decode": {"parallelism": {"tp": 1}, "batch": 32, "replicas": 1, "role": "decode"},
}
TRAFFIC = ["--isl", "512", "--osl", "32", "--arrivals", "poisson:8", "--requests", "60", "--ttft", "1"]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "d.json"
    path.write_text(json.dumps(DEPLOYMENT))
    return str(path)


def outcome(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    from tandem.cli.app import main

    monkeypatch.setattr(sys, "argv", ["tandem", "simulate", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capfd.readouterr()
    return int(stopped.value.code or 0), out, err


def test_one_object_with_the_promised_keys_the_same_each_time(capfd: Any, monkeypatch: Any, file: str, tmp_path: Path) -> None:
    files = ["--requests-out", str(tmp_path / "r.csv"), "--report", str(tmp_path / "r.html")]
    rows = []
    for _ in range(2):
        code, out, err = outcome(capfd, monkeypatch, "--deployment", file, *TRAFFIC, *files, "--compare", file, "--json")
        assert (code, err) == (0, "")
        rows.append(json.loads(out))
        rows[-1].pop("seconds")
        assert rows[-1].pop("compare")[0]["difference"]["ttft_s"]["mean"] == 0.0
    assert rows[0] == rows[1]
    assert rows[0]["requests"]["completed"] == 60
    assert {"ttft_s", "tpot_s", "goodput", "gpu_hours", "price_usd", "simulated_tokens", "decisions"} <= set(rows[0])
    assert rows[0]["simulated_tokens"] == 60 * 32
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 61
    assert "Requests in the system" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--isl: must be given"),
        ([*TRAFFIC, "--gpus", "2"], "--deployment or --gpus"),
        (["--trace", "azure-conversation-2023", "--osl", "3"], "--osl=3"),
        ([*TRAFFIC, "--duration", "3"], "--duration=3.0"),
        ([*TRAFFIC, "--hardware", "a100-sxm"], "--hardware="),
        ([*TRAFFIC, "--max-gpus", "8"], "--max-gpus=8"),
        ([*TRAFFIC, "--policy", "wild"], "--policy='wild'"),
        ([*TRAFFIC, "--replications", "0"], "replications=0"),
        ([*TRAFFIC, "--requests-out", "x.txt"], "must end in .csv or .parquet"),
        ([*TRAFFIC, "--compare", "absent.json"], "cannot be read"),
    ],
)
def test_what_cannot_be_is_one_line(capfd: Any, monkeypatch: Any, file: str, words: list[str], says: str) -> None:
    code, out, err = outcome(capfd, monkeypatch, "--deployment", file, *words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert says in err
