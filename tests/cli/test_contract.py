"""The command-line contract: one JSON object on stdout, exit 0, the promised keys; text for people without --json."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

COLUMNS = ["id", "model", "hardware", "backend", "precision", "mode", "isl", "osl", "concurrency", "tp"]
POOLS = ["prefill_workers", "prefill_tp", "decode_workers", "decode_tp", "decode_batch"]
CASES = f"""{",".join(COLUMNS + POOLS)}
a,llama-3.1-8b,h100-sxm,vllm,bf16,,1024,256,16,1,,,,,
b,llama-3.1-70b,h200-sxm,trtllm,fp8,disaggregated,4096,512,64,,2,2,1,4,64
c,llama-3.1-70b,a10g,vllm,bf16,,1024,256,16,1,,,,,
d,qwen3-8b,h100-sxm,sglang,,piggybacked,1024,256,8,2,,,,,
,qwen3-8b,h100-sxm,,,,1024,256,8,3,,,,,
"""
PLAN = ["plan", "-m", "nano-9b-v2", "--hardware", "h100-sxm", "--gpus", "8"]
FIXED = [*PLAN, "--isl", "4096", "--osl", "512", "--ttft", "2", "--tpot", "0.02"]
TRACE = [*PLAN, "--trace", "azure-conversation-2023", "--ttft", "2", "--tpot", "0.03", "--percentile", "90"]
ESTIMATE = ["estimate", "-m", "qwen3-8b", "--hardware", "h100-sxm", "--isl", "1024", "--osl", "128"]
PLAN_KEYS = ["colocated", "disaggregated", "recommended", "gain", "frontier", "points_evaluated", "seconds"]
ESTIMATE_KEYS = ["ttft_s", "tpot_s", "tokens_per_s_per_gpu", "tokens_per_s_per_user", "max_batch", "memory", "evidence"]
INSPECT_KEYS = [
    "parameters",
    "active_parameters",
    "weight_bytes",
    "kv_bytes_per_token",
    "state_bytes_per_sequence",
    "total_bytes",
]
SIMULATE = ["simulate", "-m", "qwen3-8b", "--hardware", "h100-sxm", "--gpus", "4", "--trace", "azure-conversation-2023"]
SIMULATED = [*SIMULATE, "--duration", "30", "--ttft", "2", "--tpot", "0.03", "--policy", "elastic", "--max-gpus", "6"]
SIMULATE_KEYS = [
    "ttft_s",
    "tpot_s",
    "goodput",
    "attainment",
    "gpu_hours",
    "price_usd",
    "simulated_tokens",
    "seconds",
    "decisions",
]
COMMANDS: list[tuple[list[str], list[str]]] = [
    (["models"], ["items"]),
    (["hardware"], ["items"]),
    (["inspect", "nano-9b-v2", "--context", "131072", "--batch", "1", "--dtype", "bf16"], [*INSPECT_KEYS, "layers"]),
    ([*ESTIMATE, "--batch", "8"], ESTIMATE_KEYS),
    ([*ESTIMATE, "--concurrency", "64", "--tp", "2", "--precision", "fp8", "--backend", "sglang"], ESTIMATE_KEYS),
    ([*ESTIMATE, "--batch", "8", "--mode", "piggybacked", "--backend", "tandem"], ESTIMATE_KEYS),
    (["estimate", "--cases", "cases.csv"], ["rows"]),
    (FIXED, PLAN_KEYS),
    (TRACE, PLAN_KEYS),
    (SIMULATED, SIMULATE_KEYS),
    (["demo", "--out", "tour/page"], ["fits", "ratios", "plans", "report"]),
]
IDS = [
    "models",
    "hardware",
    "inspect",
    "estimate",
    "estimate fp8",
    "estimate mixed",
    "cases",
    "plan",
    "plan trace",
    "simulate",
    "demo",
]


@pytest.fixture(autouse=True)
def cases_file(tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text(CASES)


def one_object(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("\n") == 1

    def never(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    data = json.loads(done.stdout, parse_constant=never)
    assert isinstance(data, dict)
    return data


def estimates(data: Any) -> Iterator[dict[str, Any]]:
    """Every object that has a value with an interval, at any depth."""
    if isinstance(data, dict):
        if {"value", "low", "high"} <= set(data):
            yield data
        for inner in data.values():
            yield from estimates(inner)
    elif isinstance(data, list):
        for inner in data:
            yield from estimates(inner)


@pytest.mark.parametrize(("words", "keys"), COMMANDS, ids=IDS)
def test_with_json_a_command_prints_one_object_with_the_promised_keys(command: Any, words: list[str], keys: list[str]) -> None:
    data = one_object(command(*words, "--json"))
    assert set(keys) <= set(data)
    found = list(estimates(data))
    assert found or words[0] in ("models", "hardware", "inspect", "simulate")
    for e in found:
        assert 0 < e["low"] <= e["value"] <= e["high"] < math.inf
        assert e["evidence"] in ("calibrated", "transferred", "roofline")


@pytest.mark.parametrize("words", [words for words, _ in COMMANDS], ids=IDS)
def test_without_json_a_command_prints_text_that_fits_a_terminal(command: Any, words: list[str]) -> None:
    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr + done.stdout
    assert not done.stdout.lstrip().startswith("{")
    lines = [line for line in done.stdout.splitlines() if not line.startswith("report:")]
    assert max(len(line.rstrip()) for line in lines) <= 120


def test_the_catalogues_list_every_model_and_gpu_with_bytes_in_si(command: Any) -> None:
    models = one_object(command("models", "--json"))["items"]
    gpus = one_object(command("hardware", "--json"))["items"]
    assert {"a10g", "h100-sxm", "h200-sxm", "b200-sxm", "b300-sxm", "gb200", "gb300"} <= {g["name"] for g in gpus}
    assert all(g["memory_bytes"] > 2**34 for g in gpus)
    nano = next(m for m in models if m["name"] == "nvidia/NVIDIA-Nemotron-Nano-9B-v2")
    assert (nano["parameters"], nano["kv_bytes_per_token"]) == (8_888_227_328, 16_384)


def test_inspect_adds_up(command: Any) -> None:
    data = one_object(command("inspect", "nano-9b-v2", "--context", "1000", "--batch", "3", "--json"))
    assert data["total_bytes"] == data["weight_bytes"] + data["kv_bytes"] + data["state_bytes"]
    assert data["kv_bytes"] == 3 * 1000 * data["kv_bytes_per_token"]
    assert data["state_bytes"] == 3 * data["state_bytes_per_sequence"]


def test_every_row_of_a_cases_file_is_answered_in_order_with_predictions_or_an_error(command: Any) -> None:
    rows = one_object(command("estimate", "--cases", "cases.csv", "--json"))["rows"]
    assert [row["id"] for row in rows] == ["a", "b", "c", "d", "5"]
    for row in rows:
        if row["id"] in ("c", "5"):
            assert set(row) == {"id", "error"}
        else:
            assert set(row) == {"id", "ttft_s", "tpot_s", "tokens_per_s_per_gpu", "tokens_per_s_per_user", "evidence"}
    assert "needs" in rows[2]["error"]
    assert rows[4]["error"] == "tp=3: does not divide num_heads=32"


def test_names_are_case_blind_and_hyphens_are_underscores(command: Any) -> None:
    one = one_object(command(*ESTIMATE, "--batch", "8", "--json"))
    words = ["estimate", "-m", "QWEN/Qwen3-8B", "--hardware", "H100_SXM", "--isl", "1024", "--osl", "128", "--batch", "8"]
    assert one_object(command(*words, "--json")) == one


def test_the_recommended_object_is_a_deployment_file(command: Any) -> None:
    from tandem.spec.design import Deployment

    data = one_object(command(*TRACE, "--json"))
    deployment = Deployment.from_json(data["recommended"])
    assert deployment.gpus == data["recommended"]["gpus"] <= data["gpus"] == 8
    assert data["slo"] == {"ttft_s": 2.0, "tpot_s": 0.03, "percentile": 90.0}


def test_the_same_question_gives_the_same_answer_but_for_the_seconds(command: Any) -> None:
    one, two = (one_object(command(*FIXED, "--json")) for _ in range(2))
    assert one.pop("seconds") > 0
    assert two.pop("seconds") > 0
    assert one == two


def test_a_report_is_one_self_contained_page_and_leaves_nothing_else(command: Any, tmp_path: Path) -> None:
    done = command(*FIXED, "--report", "plan.html", "--json")
    one_object(done)
    page = (tmp_path / "plan.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert "src='http" not in page
    assert 'src="http' not in page
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cases.csv", "plan.html"]


def test_the_demo_writes_its_report_where_it_says(command: Any, tmp_path: Path) -> None:
    data = one_object(command("demo", "--out", "tour/page", "--json"))
    assert Path(data["report"]).is_file()
    assert tmp_path in Path(data["report"]).parents
    assert [f["fits"] for f in data["fits"]] == [False, True, False]


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["plan", "--help"], ["calibrate"], ["--version"]])
def test_help_and_version_exit_0(command: Any, words: list[str]) -> None:
    done = command(*words)
    assert done.returncode == 0
    assert done.stdout.strip()
    assert done.stderr == ""


NEEDS_EXTRA = [
    ["validate"],
    ["calibrate", "serving"],
    ["calibrate", "ops"],
    ["calibrate", "ops", "--json"],
]


@pytest.mark.parametrize("words", NEEDS_EXTRA)
def test_without_the_extra_calibration_names_it_in_one_line(command: Any, without_extras: str, words: list[str]) -> None:
    done = command(*words, PYTHONPATH=without_extras)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "tandem-lm[calibrate]" in done.stderr


def test_without_the_extra_the_planner_works(command: Any, without_extras: str) -> None:
    one_object(command(*FIXED, "--json", PYTHONPATH=without_extras))
