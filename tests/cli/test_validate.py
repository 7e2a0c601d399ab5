"""`tandem validate` and `calibrate serving` with a user's own rows: the contract of their JSON, the page, every refusal."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Refused = Callable[..., str]
CSV = """id,model,hardware,backend,precision,isl,osl,concurrency,tp,ttft_ms,tpot_ms
a,qwen3-32b,h100-sxm,vllm,fp8,1024,512,8,2,150,15
b,qwen3-32b,h100-sxm,vllm,fp8,1024,512,16,2,210,16
c,qwen3-32b,h100-sxm,vllm,fp8,1024,512,64,2,410,24
"""
SETS = {"name", "side", "n", "metric", "median_ape", "mean_ape", "ratio", "coverage", "peer", "predictor"}


@pytest.fixture
def rows(tmp_path: Path) -> str:
    file = tmp_path / "mine.csv"
    file.write_text(CSV)
    return str(file)


def found(done: Any) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return dict(json.loads(done.stdout))


def test_own_rows_are_judged_without_the_extra(command: Any, without_extras: str, rows: str, tmp_path: Path) -> None:
    """Neither measured rows nor kernels tables are needed for that, and nothing is left out."""
    page = tmp_path / "page.html"
    data = found(command("validate", "--rows", rows, "--json", "--report", str(page), PYTHONPATH=without_extras))
    assert data["source"] == "mine.csv"
    assert data["peer"] is None
    assert data["answered"] == {"colocated": {"usable": 3, "answered": 3, "share": 1.0}}
    assert all(set(s) == SETS for s in data["sets"])
    by_name = {s["name"]: s for s in data["sets"]}
    whole = by_name["validation tpot all"]
    assert (whole["n"], whole["metric"], whole["side"], whole["predictor"]) == (3, "tpot_s", "validation", "tandem")
    errors = [abs(r["tpot_s"]["value"] / r["tpot_s"]["measured"] - 1) for r in data["rows"]]
    assert whole["mean_ape"] == pytest.approx(sum(errors) / 3)
    assert whole["median_ape"] == pytest.approx(sorted(errors)[1])
    assert by_name["validation tpot label roofline"]["n"] == 3
    assert not any("leave-one" in name for name in by_name)
    html = page.read_text()
    assert "Predicted against measured" in html
    assert "http" not in html.split("</script>")[-1]
    assert data["rows"][0]["id"] == "a"


def test_the_table_shows_each_own_row(command: Any, rows: str) -> None:
    done = command("validate", "--rows", rows)
    assert done.returncode == 0
    assert "Row by row" in done.stdout
    assert "15.0 ms" in done.stdout
    assert "aiconfigurator" not in done.stdout


def test_options_describe_rows_that_say_less(command: Any, rows: str, tmp_path: Path) -> None:
    short = tmp_path / "short.csv"
    short.write_text("isl,osl,concurrency,ttft_s,tpot_s\n1024,512,8,0.15,0.015\n")
    given = ["--model", "qwen3-32b", "--hardware", "h100-sxm", "--precision", "fp8", "--tp", "2"]
    one = found(command("validate", "--rows", str(short), *given, "--json"))["rows"][0]
    other = found(command("validate", "--rows", rows, "--json"))["rows"][0]
    assert {**one, "id": ""} == {**other, "id": ""}


REFUSALS: list[tuple[str, list[str], list[str]]] = [
    ("id,a\n1,2\n", [], ["mine.csv", "has no column ttft_s or ttft_ms"]),
    (CSV.replace(",210,", ",-210,"), [], ["mine.csv row 2", "ttft_ms='-210'", "above 0"]),
    (CSV.replace("h100-sxm", "h900", 1), [], ["mine.csv row 1", "hardware='h900'"]),
    (CSV.replace("ttft_ms,tpot_ms", "ttft_s,tpot_s"), [], ["mine.csv row 1", "tpot_s='15'", "name the column tpot_ms"]),
    (CSV.replace(",15\n", ",15000\n"), [], ["mine.csv row 1", "tpot_ms='15000'"]),
    (CSV.replace(",15\n", ",1500\n"), [], ["row 'a'", "tpot_s=1.5", "times what is predicted", "unit"]),
    (CSV, ["--against", "nobody"], ["against='nobody'", "aiconfigurator"]),
    (CSV, ["--against", "aiconfigurator", "--peer-python", "/nowhere"], ["peer_python='/nowhere'"]),
    (CSV, ["--report", "no/such/page.html"], ["--report", "does not exist"]),
]


@pytest.mark.parametrize(("content", "words", "named"), REFUSALS)
def test_a_bad_file_or_option_is_refused_in_one_line(
    refused: Refused, tmp_path: Path, content: str, words: list[str], named: list[str]
) -> None:
    file = tmp_path / "mine.csv"
    file.write_text(content)
    line = refused("validate", "--rows", str(file), *words)
    assert all(word in line for word in named), line


@pytest.mark.parametrize("name", [("validate",), ("calibrate", "serving")])
def test_options_for_rows_need_rows(refused: Refused, name: tuple[str, ...]) -> None:
    assert "--tp='2': describes rows of a file; give --rows FILE" in refused(*name, "--tp", "2")
    assert "rows='gone.csv': no such file" in refused(*name, "--rows", "gone.csv")


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs a command in this process on a part of the measured rows, and gives its JSON."""
    pytest.importorskip("aiconfigurator_core")
    from tandem.cli.app import main
    from tandem.perf import silicon

    with silicon.sample_path().open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    kept = [r for r in lines if (r["backend"], r["mode"]) in (("vllm", "agg"), ("trtllm", "disagg"))]
    part = tmp_path / "part.csv"
    with part.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]))
        writer.writeheader()
        writer.writerows(r for i, r in enumerate(kept) if r["mode"] == "disagg" or i % 3 == 0)
    monkeypatch.setattr(silicon, "sample_path", lambda: part)

    def run(*words: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["tandem", *words, "--json"])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capfd.readouterr()
        assert stopped.value.code == 0, err
        return dict(json.loads(out))

    return run


@pytest.mark.slow
def test_own_rows_move_the_fit_of_their_setting(few: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Three rows 40 % slower than the fit expects: the written fits know the setting, and it became slower."""
    from tandem.perf.backend import parse_fits
    from tandem.spec.catalog import load_hardware, load_spec

    asked = ("vllm", load_hardware("h200-sxm"), load_spec("nano-9b-v2"), "bf16")
    out = tmp_path / "fits.yaml"
    few("calibrate", "serving", "--out", str(out))
    before, was = parse_fits(out.read_text()).find(*asked)
    shipped = few("validate", "--rows", str(_own(tmp_path, (10.0, 15.0, 20.0))))["rows"]
    slow = _own(tmp_path, tuple(1.4e3 * r["tpot_s"]["value"] for r in shipped))
    data = few("calibrate", "serving", "--rows", str(slow), "--out", str(out))
    name = "nvidia/NVIDIA-Nemotron-Nano-9B-v2"
    assert [(f["model"], f["hardware"], f["num_rows"]) for f in data["fits"]] == [(name, "h200-sxm", 3)]
    assert "3 rows of mine.csv" in yaml.safe_load(out.read_text())["provenance"]["source"]
    after, now = parse_fits(out.read_text()).find(*asked)
    assert (was, now) == ("transferred", "calibrated")
    assert 1.05 < after.gemm / before.gemm < 1.5


def _own(folder: Path, tpot: tuple[float, ...]) -> Path:
    """Rows of a setting that nobody measured, with these TPOT in milliseconds."""
    file = folder / "mine.csv"
    rows = [f"r{c},nano-9b-v2,h200-sxm,1024,1024,{c},0.1,{t}" for c, t in zip((4, 16, 32), tpot, strict=True)]
    file.write_text("\n".join(["id,model,hardware,isl,osl,concurrency,ttft_s,tpot_ms", *rows]) + "\n")
    return file


@pytest.mark.slow
def test_measured_rows_are_judged_in_every_way(few: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """The sets that the contract names, over the sides and modes, with numbers in their order."""
    page = tmp_path / "page.html"
    data = few("validate", "--report", str(page))
    by_name = {s["name"]: s for s in data["sets"]}
    for metric in ("tpot", "ttft"):
        for name in ("all", "disaggregated", "leave-one-gpu-out", "leave-one-model-out", "leave-one-gpu-out disaggregated"):
            assert by_name[f"validation {metric} {name}"]["n"] >= 20
        for label in ("calibrated", "transferred", "roofline"):
            assert by_name[f"validation {metric} label {label}"]["n"] > 20
        assert by_name[f"both {metric} leave-one-gpu-out"]["n"] == by_name[f"both {metric} leave-one-model-out"]["n"]
        calibrated, transferred = (
            by_name[f"validation {metric} label {x}"]["median_ape"] for x in ("calibrated", "transferred")
        )
        assert calibrated < transferred
    assert all(set(s) == SETS for s in data["sets"])
    assert data["answered"]["disaggregated"]["share"] >= 0.95
    assert "rows" not in data
    html = page.read_text()
    assert "without h100-sxm" in html
    assert "leave-one" not in html.split("</script>")[-1]
