"""Bad input: exit 2, nothing on stdout, one line on stderr that names the field, the value and what would do."""

from __future__ import annotations

import errno
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem.cli.app import main
from tandem.spec.files import write_whole

Refused = Callable[..., str]
PLAN = {"-m": "qwen3-8b", "--hardware": "h100", "--gpus": "2"}
FIXED = {**PLAN, "--isl": "512", "--osl": "64"}
CASE = {"-m": "qwen3-8b", "--hardware": "h100", "--isl": "512", "--osl": "64", "--batch": "4"}
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100,
    "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 128, "max_position_embeddings": 2048,
}  # fmt: skip


def words(name: str, options: dict[str, str], **changes: str | None) -> list[str]:
    """A command line; a keyword sets an option, None takes it away."""
    wanted = {**options, **{f"--{key}": value for key, value in changes.items()}}
    return [name, *(word for key, value in wanted.items() if value is not None for word in (key, value))]


def plan(**changes: str | None) -> list[str]:
    return words("plan", FIXED, **changes)


def case(**changes: str | None) -> list[str]:
    return words("estimate", CASE, **changes)


LINES: list[tuple[list[str], list[str]]] = [
    # names
    (["inspect", "nosuch"], ["model='nosuch'", "`tandem models`"]),
    (["inspect", "qwen3"], ["model='qwen3'", "did you mean", "Qwen3-8B"]),
    (["inspect", ""], ["model=''"]),
    (["inspect"], ["argument 'model'", "--help"]),
    (["frob"], ["'frob'", "--help"]),
    (["calibrate", "frob"], ["'frob'", "--help"]),
    (["calibrate", "ops", "--system", "h900"], ["'h900'", "h100-sxm"]),
    (["inspect", "qwen3-8b", "--frob", "1"], ["--frob", "--help"]),
    (["validate", "--frob"], ["--frob", "--help"]),
    ([*plan(), "extra"], ["extra", "--help"]),
    (plan(hardware="h900"), ["hardware='h900'", "did you mean", "`tandem hardware`"]),
    (case(hardware="h900"), ["hardware='h900'"]),
    (plan(backend="tgi"), ["backend='tgi'", "vllm, sglang, trtllm"]),
    (case(backend="tgi"), ["backend='tgi'", "vllm, sglang, trtllm"]),
    (plan(precision="q2"), ["precision='q2'", "fp8"]),
    (case(precision="bf16/bf16"), ["precision='bf16/bf16'", "weights/activations/kv"]),
    (case(precision="bf16/bf16/q2"), ["precision.kv='q2'", "fp8"]),
    (["inspect", "qwen3-8b", "--dtype", "fp3"], ["precision='fp3'", "bf16"]),
    (case(mode="both"), ["mode='both'", "colocated or piggybacked"]),
    (case(mode="disaggregated"), ["mode='disaggregated'", "colocated or piggybacked"]),
    # sizes
    (["inspect", "qwen3-8b", "--context", "0"], ["context=0", "from 1 to"]),
    (["inspect", "qwen3-8b", "--context", "-1"], ["context=-1", "from 1 to"]),
    (["inspect", "qwen3-8b", "--context", "9" * 23], ["context=999", "from 1 to"]),
    (["inspect", "qwen3-8b", "--context", "1.5"], ["--context", "'1.5'", "integer"]),
    (["inspect", "qwen3-8b", "--batch", "0"], ["batch=0", "from 1 to"]),
    (plan(gpus="0"), ["gpus=0", "from 1 to 16,384"]),
    (plan(gpus="-3"), ["gpus=-3", "from 1 to 16,384"]),
    (plan(gpus="99999999"), ["gpus=99999999", "16,384"]),
    (plan(gpus="1.5"), ["--gpus", "'1.5'", "integer"]),
    (plan(isl="0"), ["isl=0", "from 1 to"]),
    (plan(isl="99999999999"), ["isl=99999999999", "16,777,216"]),
    (plan(osl="-1"), ["osl=-1", "from 1 to"]),
    (plan(osl="1"), ["osl=1", "at least 2 output tokens"]),
    (plan(isl="half"), ["--isl", "'half'"]),
    (case(isl="-5"), ["isl=-5"]),
    (case(osl="0"), ["osl=0"]),
    (case(batch="0"), ["batch=0"]),
    (case(batch="9999999999999"), ["batch=9999999999999"]),
    (case(batch=None), ["concurrency=None, batch=None", "exactly one"]),
    (case(concurrency="4"), ["concurrency=4, batch=4", "exactly one"]),
    # parallelism
    (case(tp="3"), ["tp=3", "num_heads=32"]),
    (case(tp="0"), ["tp=0", "from 1 to"]),
    (case(tp="5000"), ["tp=5000"]),
    (case(pp="1000"), ["pp=1000", "layers"]),
    (case(pp="4", cpp="2"), ["cpp=2", "pp=1"]),
    (case(dp="2"), ["dp=2", "use more replicas"]),
    (case(tp="2", ep="2"), ["ep=2", "no experts"]),
    (case(ep="2"), ["ep=2", "tp*dp=1"]),
    (words("estimate", {**CASE, "-m": "llama-3.1-405b", "--hardware": "a10g"}), ["tp=1", "needs", "a10g offers"]),
    # bounds
    *[(plan(**{f: v}), [f"{f}_s={float(v)!r}", "above 0"]) for f in ("ttft", "tpot") for v in ("0", "-1", "nan", "inf")],
    (plan(tpot="fast"), ["--tpot", "'fast'"]),
    *[(plan(percentile=v), [f"percentile={float(v)!r}", "at most 100"]) for v in ("0", "101", "nan")],
    # what is needed, and what excludes what
    (plan(isl=None, osl=None), ["--isl/--osl or --trace", "give either"]),
    (plan(osl=None), ["--osl", "must be given"]),
    (plan(trace="azure-conversation-2023"), ["--isl/--osl or --trace"]),
    (plan(osl=None, trace="azure-conversation-2023"), ["--isl/--osl or --trace"]),
    (case(hardware=None), ["--hardware", "must be given"]),
    (["estimate"], ["--model", "must be given"]),
    (["plan", "-m", "qwen3-8b"], ["--hardware", "--help"]),
    # files
    (plan(report="missing/page.html"), ["--report='missing/page.html'", "folder 'missing' does not exist"]),
    (["calibrate", "ops", "--out", "missing/x.csv"], ["--out='missing/x.csv'", "folder 'missing' does not exist"]),
    (["calibrate", "serving", "--out", "missing/x.csv"], ["--out='missing/x.csv'", "folder 'missing' does not exist"]),
    (["estimate", "--cases", "c.csv", "-m", "qwen3-8b"], ["--model='qwen3-8b'", "each row of --cases"]),
    (["estimate", "--cases", "c.csv", "--isl", "1"], ["--isl=1", "each row of --cases"]),
    (["estimate", "--cases", "c.csv", "--tp", "1"], ["--tp=1", "each row of --cases"]),
    (["estimate", "--cases", "c.csv", "--json", "--draft-tokens", "0"], ["--draft-tokens=0", "each row of --cases"]),
    (case(acceptance="0.7"), ["--acceptance=0.7", "without --draft-tokens"]),
    (["validate", "--peer-python", "python3"], ["--peer-python='python3'", "without --against"]),
    (["estimate", "--cases", "missing.csv"], ["cases='missing.csv'", "no such file"]),
    (plan(isl=None, osl=None, trace="missing.csv"), ["trace='missing.csv'", "azure-conversation-2023"]),
    (plan(isl=None, osl=None, trace="."), ["trace='.'", "no such file"]),
]  # fmt: skip


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("line", "parts"), LINES, ids=[" ".join(line)[:100] for line, _ in LINES])
def test_a_bad_command_line_is_refused_in_one_line(refused: Refused, line: list[str], parts: list[str]) -> None:
    message = refused(*line, "--json") if line[0] not in ("frob",) and line != ["calibrate", "frob"] else refused(*line)
    for part in parts:
        assert part in message


NOBODY: list[tuple[list[str], list[str]]] = [
    (plan(tpot="1e-9"), ["tpot_s=1e-09", "no deployment", "is faster than", "relax it"]),
    (plan(ttft="1e-9"), ["ttft_s=1e-09", "no deployment", "is faster than"]),
    (
        words("plan", {**FIXED, "-m": "llama-3.1-405b", "--hardware": "a10g"}),
        ["gpus=2", "on 2 x a10g does not fit", "use more"],
    ),
]


@pytest.mark.parametrize(("line", "parts"), NOBODY, ids=["tpot", "ttft", "does not fit"])
def test_an_objective_nobody_can_meet_is_refused_in_one_line(refused: Refused, line: list[str], parts: list[str]) -> None:
    message = refused(*line)
    for part in parts:
        assert part in message


def test_a_refusal_while_planning_has_no_empty_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tandem", *plan(backend="tgi")])
    with pytest.raises(SystemExit):
        main()
    assert capfd.readouterr().err.startswith("error: ")


HEAD = "arrival_s,isl,osl\n"
TRACES: list[tuple[str | bytes, list[str]]] = [
    (HEAD + "0,abc,5\n", ["line 2", "isl='abc'", "must be a number"]),
    (HEAD + "0,5.5,5\n", ["line 2", "isl='5.5'"]),
    (HEAD + "0,5,5\n1,-5,5\n", ["line 3", "isl=-5", "at least 1"]),
    (HEAD + "0,5,0\n", ["line 2", "osl=0", "at least 1"]),
    (HEAD + "-1,5,5\n", ["line 2", "arrival_s=-1", "at least 0"]),
    (HEAD + "nan,5,5\n", ["line 2", "arrival_s=nan"]),
    (HEAD + "inf,5,5\n", ["line 2", "arrival_s=inf"]),
    (HEAD + "0,999999999999,5\n", ["line 2", "isl=999999999999"]),
    (HEAD + "0,5\n", ["line 2", "osl=None"]),
    (HEAD + "5,5,5\n1,5,5\n", ["line 3", "arrival_s=1.0", "row above (5.0)"]),
    (HEAD + "0,5,5\n\0,1,1\n", ["line 3", "arrival_s="]),
    (HEAD, ["holds no requests"]),
    ("", ["has no column", "needs arrival_s, isl, osl"]),
    ("arrival_s,isl\n0,5\n", ["no column osl"]),
    ((HEAD + "0,5,5\n").encode("utf-16"), ["not a readable CSV file"]),
    (bytes(range(256)), ["not a readable CSV file"]),
]


@pytest.mark.parametrize(("content", "parts"), TRACES, ids=[repr(content)[:50] for content, _ in TRACES])
def test_a_bad_trace_is_refused_with_its_row_and_reason(refused: Refused, content: str | bytes, parts: list[str]) -> None:
    Path("t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(*plan(isl=None, osl=None, trace="t.csv"))
    for part in ("t.csv", *parts):
        assert part in message


@pytest.mark.parametrize("content", [b"not gzip", gzip.compress((HEAD + "0,5,5\n" * 99).encode())[:40]], ids=["fake", "cut"])
def test_a_broken_archive_is_refused(refused: Refused, content: bytes) -> None:
    Path("t.csv.gz").write_bytes(content)
    assert "t.csv.gz: not a readable CSV file" in refused(*plan(isl=None, osl=None, trace="t.csv.gz"))


HUGE = "x" * 140_000
CASES: list[tuple[str | bytes, list[str]]] = [
    ("model,hardware,isl,osl,batchsize\nqwen3-8b,h100,1,2,3\n", ["'batchsize'", "columns are id, model"]),
    ("model,isl,osl\nqwen3-8b,1,2\n", ["no column hardware"]),
    ("", ["no column model"]),
    (bytes(range(128, 256)), ["not a readable CSV file"]),
]


@pytest.mark.parametrize(("content", "parts"), CASES, ids=["unknown column", "missing column", "empty", "binary"])
def test_a_bad_cases_file_is_refused_before_anything_runs(refused: Refused, content: str | bytes, parts: list[str]) -> None:
    Path("c.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused("estimate", "--cases", "c.csv")
    for part in ("c.csv", *parts):
        assert part in message


@pytest.mark.parametrize("kind", ["cases", "trace"])
def test_an_oversized_field_is_refused(refused: Refused, kind: str) -> None:
    Path("f.csv").write_text(f"model,hardware,isl,osl\n{HUGE},h100,1,1\n" if kind == "cases" else f"{HEAD}0,{HUGE},5\n")
    line = ["estimate", "--cases", "f.csv"] if kind == "cases" else plan(isl=None, osl=None, trace="f.csv")
    assert "f.csv" in refused(*line)


def test_a_cases_file_without_rows_is_refused(refused: Refused) -> None:
    Path("c.csv").write_text("model,hardware,isl,osl,batch\n")
    assert "c.csv" in refused("estimate", "--cases", "c.csv")


CONFIGS: list[tuple[str, list[str]]] = [
    ('{"model_type": ', ["not JSON"]),
    ("[1, 2]", ["JSON object"]),
    ('{"model_type": "weird"}', ["model_type='weird'", "supported are"]),
    (json.dumps({**LLAMA, "hidden_size": "big"}), ["hidden_size='big'"]),
    (json.dumps({**LLAMA, "hidden_size": -64}), ["hidden_size=-64"]),
    (json.dumps({k: v for k, v in LLAMA.items() if k != "num_hidden_layers"}), ["num_hidden_layers", "missing"]),
]


@pytest.mark.parametrize(("content", "parts"), CONFIGS, ids=[" ".join(parts) for _, parts in CONFIGS])
def test_a_broken_model_configuration_is_refused(refused: Refused, content: str, parts: list[str]) -> None:
    Path("config.json").write_text(content)
    for line in (["inspect", "config.json"], ["inspect", "."]):
        message = refused(*line)
        for part in parts:
            assert part in message


def test_a_broken_hardware_file_is_refused(refused: Refused) -> None:
    Path("gpu.yaml").write_text("memory_bytes: [")
    assert "gpu.yaml: not YAML" in refused(*case(hardware="gpu.yaml"))


class FullDisk:
    """A text file whose disk is full after a few characters."""

    def __init__(self, handle: int, *_: object, **__: object) -> None:
        self.raw = open(handle, "w", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()

    def write(self, text: str) -> int:
        self.raw.write(text[:10])
        self.raw.flush()
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("before", [None, "what was there"])
def test_a_report_that_cannot_be_finished_leaves_what_was_there(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: str | None
) -> None:
    target = tmp_path / "page.html"
    if before:
        target.write_text(before)
    monkeypatch.setattr(os, "fdopen", FullDisk)
    assert "No space left" in refused(*plan(report="page.html"))
    assert [p.name for p in tmp_path.iterdir()] == (["page.html"] if before else [])
    assert before is None or target.read_text() == before


def test_a_refused_plan_touches_no_report(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("old")
    refused(*plan(report="page.html", backend="tgi"))
    assert (tmp_path / "page.html").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_is_replaced_whole_even_when_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    target.write_text("old")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(target, "new")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]
    assert target.read_text() == "old"
    write_whole(target, "new")
    assert target.read_text() == "new"
