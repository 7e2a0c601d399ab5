"""A user's own measurements: three formats, one kind of row, and every refusal names file, row, field and value."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tandem.perf.measurements import LATENCIES, latency_s, read_measurements
from tandem.perf.silicon import MeasuredRow
from tandem.perf.validate import predict, refuse_wrong_units
from tandem.spec.design import Parallelism, Pool
from tandem.spec.errors import SpecError, TraceError

ROW = {
    "id": "a", "model": "qwen3-8b", "hardware": "h100-sxm", "backend": "vllm", "precision": "fp8", "isl": "1024", "osl": "512",
    "concurrency": "8", "tp": "2", "ttft_s": "0.15", "tpot_s": "0.0125",
}  # fmt: skip
SPLIT = {
    "id": "d", "model": "deepseek-r1", "hardware": "b200-sxm", "backend": "sglang", "precision": "fp4", "mode": "disaggregated",
    "isl": "8192", "osl": "1024", "concurrency": "96", "prefill_workers": "2", "prefill_tp": "4", "prefill_batch": "1",
    "decode_workers": "3", "decode_dp": "8", "decode_ep": "8", "decode_batch": "4", "ttft_ms": "1500", "tpot_ms": "20",
}  # fmt: skip
# The shape is that of a run of AIPerf 0.13.0 with --streaming --concurrency 4; the fields that are not read are left out.
EXPORT: dict[str, Any] = {
    "schema_version": "1.4", "aiperf_version": "0.13.0",
    "time_to_first_token": {"unit": "ms", "avg": 57.6258, "p50": 57.3494, "count": 24},
    "inter_token_latency": {"unit": "ms", "avg": 11.6641, "p50": 11.6601, "count": 24},
    "output_sequence_length": {"unit": "tokens", "avg": 95.7, "count": 24},
    "input_sequence_length": {"unit": "tokens", "avg": 64.2, "count": 24},
    "input_config": {
        "models": {"items": [{"name": "Qwen/Qwen3-8B"}]},
        "phases": [
            {"name": "warmup", "kind": "warmup", "type": "concurrency", "requests": 8, "concurrency": 2},
            {"name": "profiling", "kind": "profiling", "type": "concurrency", "requests": 24, "concurrency": 4},
        ],
    },
    "was_cancelled": False, "is_complete": True,
}  # fmt: skip
EXPORT_CSV = """Metric,avg,min,max,sum,p50,p99,std
Input Sequence Length (tokens),64.20,64.00,65.00,1540.80,64.00,65.00,0.10
Inter Token Latency (ms),11.66,11.58,11.76,279.84,11.66,11.75,0.04
Output Sequence Length (tokens),95.70,95.00,96.00,2296.80,96.00,96.00,0.10
Time to First Output Token (ms),99.00,52.06,69.03,1383.02,57.35,67.60,3.97
Time to First Token (ms),57.63,52.06,69.03,1383.02,57.35,67.60,3.97

Metric,Value
Request Count,24.00
"""


def table(path: Path, *rows: dict[str, str]) -> Path:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(columns), *(",".join(row.get(name, "") for name in columns) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(path: Path, **given: str) -> list[MeasuredRow]:
    return read_measurements([path], given, "validation")


def test_a_colocated_row_is_read_in_seconds(tmp_path: Path) -> None:
    (found,) = read(table(tmp_path / "m.csv", {**ROW, "gpus": "4"}))
    assert (found.row_id, found.model.name, found.hardware.name, found.backend) == ("a", "Qwen/Qwen3-8B", "h100-sxm", "vllm")
    assert (found.ttft_s, found.tpot_s, found.isl, found.osl, found.concurrency) == (0.15, 0.0125, 1024, 512, 8)
    assert (found.parallelism, found.replicas, found.side, found.prefill) == (Parallelism(tp=2), 2, "validation", None)
    assert found.precision.weights == "fp8"


def test_a_batch_is_that_of_each_instance(tmp_path: Path) -> None:
    (found,) = read(table(tmp_path / "m.csv", {**ROW, "concurrency": "", "batch": "8", "gpus": "4"}))
    assert (found.concurrency, found.replicas) == (16, 2)


def test_a_disaggregated_row_has_both_pools(tmp_path: Path) -> None:
    (found,) = read(table(tmp_path / "m.csv", SPLIT))
    assert (found.ttft_s, found.tpot_s) == pytest.approx((1.5, 0.020))
    assert found.prefill == Pool(parallelism=Parallelism(tp=4), batch=1, replicas=2, role="prefill")
    assert (found.parallelism, found.replicas, found.decode_batch) == (Parallelism(dp=8, ep=8), 3, 32)
    assert found.concurrency == 96


def test_drafted_tokens_are_read_and_the_fitted_acceptance_may_be_stated(tmp_path: Path) -> None:
    (split,) = read(table(tmp_path / "m.csv", {**SPLIT, "draft_tokens": "2"}))
    assert split.draft_tokens == 2
    whole = {**ROW, "model": "deepseek-r1", "hardware": "b200-sxm", "precision": "fp4", "tp": "8"}
    first, second = read(
        table(tmp_path / "n.csv", {**whole, "draft_tokens": "3", "acceptance": "0.70"}, {**whole, "id": "b", "acceptance": ""})
    )
    assert (first.draft_tokens, second.draft_tokens) == (3, 0)


def test_a_row_knows_where_it_stood(tmp_path: Path) -> None:
    first, second = read(table(tmp_path / "m.csv", ROW, {**ROW, "id": "b"}))
    assert (first.where, second.where) == ("m.csv row 1", "m.csv row 2")


def test_a_latency_in_another_unit_is_refused_with_its_file_and_row(tmp_path: Path) -> None:
    """4.5 s a token is plausible of some deployment, not of this one."""
    rows = read(table(tmp_path / "m.csv", ROW, {**ROW, "id": "b", "tpot_s": "4.5"}))
    with pytest.raises(TraceError, match=r"m.csv row 2: row 'b': tpot_s=4.5 is .* times what is predicted .*check its unit"):
        refuse_wrong_units(predict(rows))


def test_a_line_with_more_cells_than_columns_is_refused(tmp_path: Path) -> None:
    file = table(tmp_path / "m.csv", ROW, {**ROW, "tpot_s": "0.0125,7"})
    with pytest.raises(TraceError, match=r"m.csv row 2 \(line 3\): cells: their number is not that of the 11 columns"):
        read(file)


def test_options_fill_what_the_file_leaves_empty_and_nothing_else(tmp_path: Path) -> None:
    own = {**ROW, "tp": "", "id": "b"}
    without = [{k: v for k, v in r.items() if k != "hardware"} for r in (ROW, own)]
    first, second = read(table(tmp_path / "m.csv", *without), hardware="h200-sxm", tp="4")
    assert {first.hardware.name, second.hardware.name} == {"h200-sxm"}
    assert (first.parallelism.tp, second.parallelism.tp) == (2, 4)


@pytest.mark.parametrize("older", [False, True])
def test_an_aiperf_summary_is_one_row(tmp_path: Path, older: bool) -> None:
    """Older exports keep the load in `loadgen` and the model's name at the endpoint."""
    flat = {"loadgen": {"concurrency": 4}, "endpoint": {"model_names": ["Qwen/Qwen3-8B"]}}
    file = tmp_path / "profile_export_aiperf.json"
    file.write_text(json.dumps({**EXPORT, "input_config": flat} if older else EXPORT, indent=2))
    (found,) = read(file, hardware="h100-sxm", tp="2")
    assert (found.ttft_s, found.tpot_s) == pytest.approx((0.0576258, 0.0116641))
    assert (found.isl, found.osl, found.concurrency, found.model.name) == (64, 96, 4, "Qwen/Qwen3-8B")
    assert found.parallelism == Parallelism(tp=2)
    assert read(file, hardware="h100-sxm", model="qwen3-32b", concurrency="5")[0].concurrency == 5


def test_an_aiperf_csv_needs_the_model_and_the_concurrency(tmp_path: Path) -> None:
    file = tmp_path / "profile_export_aiperf.csv"
    file.write_text(EXPORT_CSV)
    (found,) = read(file, hardware="h100-sxm", model="qwen3-8b", concurrency="4")
    assert (found.ttft_s, found.tpot_s, found.isl, found.osl) == pytest.approx((0.05763, 0.01166, 64, 96))
    with pytest.raises(TraceError, match=r"profile_export_aiperf.csv: model='': must be given, in the file or as --model"):
        read(file, hardware="h100-sxm", concurrency="4")
    with pytest.raises(TraceError, match=r"concurrency='': give either"):
        read(file, hardware="h100-sxm", model="qwen3-8b")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_complete": False, "incomplete_reason": "timeout"}, "did not finish .timeout."),
        ({"was_cancelled": True}, "did not finish .cancelled."),
        ({"time_to_first_token": None}, "has no time_to_first_token; AIPerf writes it with --streaming"),
        ({"inter_token_latency": {"unit": "parsec", "avg": 1}}, "inter_token_latency unit='parsec': must be one of ns, us, ms"),
        ({"inter_token_latency": {"unit": "ms", "avg": "fast"}}, "inter_token_latency avg='fast': must be a number"),
        ({"inter_token_latency": {"unit": "ms", "avg": -1.0}}, "inter_token_latency avg=-1.0: must be a number above 0"),
        ({"inter_token_latency": {"unit": "ms", "avg": math.nan}}, "inter_token_latency avg=nan: must be a number above 0"),
        ({"inter_token_latency": {"unit": ["ms"], "avg": 10}}, "inter_token_latency unit=.*: must be one of"),
        ({"time_to_first_token": {"unit": "ms", "avg": 10**400}}, "time_to_first_token avg='1000.*': must be a number"),
        ({"input_sequence_length": {"avg": math.nan}}, "input_sequence_length avg=nan: must be a number above 0"),
        ({"input_sequence_length": {"avg": -64}}, "input_sequence_length avg=-64: must be a number above 0"),
        ({"output_sequence_length": {"avg": math.inf}}, "output_sequence_length avg=inf: must be a number above 0"),
        ({"input_config": ["odd"]}, "model='': must be given"),
        ({"input_config": {"phases": "odd", "models": {"items": 3}, "endpoint": "x", "loadgen": 7}}, "model='': must be given"),
        ({"input_config": {"phases": [{"type": "poisson", "rate": 3}]}}, "type='poisson': not measured at a fixed concurrency"),
    ],
)
def test_an_unusable_aiperf_export_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    file = tmp_path / "e.json"
    file.write_text(json.dumps({**EXPORT, **changes}))
    with pytest.raises(TraceError, match=f"e.json: .*{words}"):
        read(file, hardware="h100-sxm")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ttft_s": "-0.1"}, "ttft_s='-0.1': must be a number above 0"),
        ({"tpot_s": "0"}, "tpot_s='0': must be a number above 0"),
        ({"tpot_s": "nan"}, "tpot_s='nan': must be a number above 0"),
        ({"tpot_s": "fast"}, "tpot_s='fast': must be a number above 0"),
        ({"tpot_s": "12.5"}, "tpot_s='12.5': that is 12.5 s, .* name the column tpot_ms"),
        ({"ttft_s": "15000"}, "ttft_s='15000': that is 15000 s, .* name the column ttft_ms"),
        ({"tpot_s": "", "tpot_ms": "0.0125"}, "tpot_ms='0.0125': that is 1.25e-05 s, .* name the column tpot_s"),
        ({"tpot_ms": "12.5"}, "tpot_s='0.0125': give exactly one of tpot_s and tpot_ms"),
        ({"tpot_s": ""}, "tpot_s='': give exactly one"),
        ({"model": "nosuch"}, "model='nosuch'"),
        ({"model": ""}, "model='': must be given, in the file or as --model"),
        ({"hardware": "h900"}, "hardware='h900'"),
        ({"backend": "tgi"}, "backend='tgi'"),
        ({"precision": "q2"}, "precision='q2'"),
        ({"isl": "half"}, "isl='half': must be a whole number"),
        ({"isl": ""}, "isl='': must be given"),
        ({"osl": "1"}, "osl=1: must be at least 2"),
        ({"tp": "0"}, "tp='0': must be a whole number"),
        ({"tp": "3"}, "tp=3"),
        ({"gpus": "3"}, "gpus=3: must be a multiple of the 2 GPUs"),
        ({"concurrency": ""}, "concurrency='': give either concurrency or batch"),
        ({"batch": "4"}, "concurrency='8': give either concurrency or batch"),
        ({"mode": "piggybacked"}, "mode='piggybacked': must be colocated or disaggregated"),
        ({"id": "first"}, "id='first': row 1 has it already"),
        ({"isl": "99999999999"}, "isl=99999999999: must be a whole number from 1 to"),
        ({"isl": "900000000"}, "isl=900000000: must be"),
        ({"concurrency": "1e17"}, "concurrency=100000000000000000: must be a whole number from 1 to 1,000,000,000"),
        ({"model": "deepseek-r1"}, "tp=2: deepseek-ai/DeepSeek-R1 with one sequence of 1,536 tokens needs"),
        ({"rate": "2"}, "rate='2': measured rows are at a fixed number in flight"),
        ({"acceptance": "0.9"}, "acceptance='0.9': leave it empty"),
        ({"acceptance": "high"}, "acceptance='high': leave it empty"),
        ({"draft_tokens": "3"}, "draft_tokens=3: Qwen/Qwen3-8B was published without multi-token prediction"),
        ({"draft_tokens": "some"}, "draft_tokens='some': must be a whole number of at least 0"),
    ],
)
def test_a_bad_cell_is_refused_with_file_row_field_and_value(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    file = table(tmp_path / "m.csv", {**dict.fromkeys(changes, ""), **ROW, "id": "first"}, {**ROW, **changes})
    with pytest.raises(TraceError, match=f"m.csv row 2: .*{words}"):
        read(file)


@pytest.mark.parametrize("column", ["ttft_s", "tpot_s", "model", "hardware", "isl", "osl"])
def test_a_missing_column_is_refused(tmp_path: Path, column: str) -> None:
    file = table(tmp_path / "m.csv", {k: v for k, v in ROW.items() if k != column})
    with pytest.raises(TraceError, match=f"m.csv: has no column {column}"):
        read(file)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"rows='.*gone.csv': no such file"):
        read(tmp_path / "gone.csv")
    with pytest.raises(TraceError, match=r"m.csv: column 'colour' is unknown"):
        read(table(tmp_path / "m.csv", {**ROW, "colour": "red"}))
    (tmp_path / "empty.csv").write_text(",".join(ROW) + "\n")
    with pytest.raises(TraceError, match=r"empty.csv: holds no cases"):
        read(tmp_path / "empty.csv")
    (tmp_path / "half.json").write_text('{"time_to_first_token": ')
    with pytest.raises(TraceError, match=r"half.json: not a readable JSON file"):
        read(tmp_path / "half.json")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00id")
    with pytest.raises(TraceError, match=r"bytes.csv: not a readable"):
        read(tmp_path / "bytes.csv")


def test_files_are_put_together_and_their_ids_stay_apart(tmp_path: Path) -> None:
    one, two = table(tmp_path / "one.csv", ROW), table(tmp_path / "two.csv", {**ROW, "id": "b"})
    assert [r.row_id for r in read_measurements([one, two], {}, "calibration")] == ["a", "b"]
    with pytest.raises(TraceError, match=r"three.csv row 1: id='a' is in two files \(one.csv row 1\)"):
        read_measurements([one, table(tmp_path / "three.csv", ROW)], {}, "calibration")
    with pytest.raises(TraceError, match=r"one.csv row 1: id='a' is in two files"):
        read_measurements([one, one], {}, "calibration")


@pytest.mark.parametrize("name", LATENCIES)
def test_a_latency_survives_its_unit(name: str) -> None:
    metric, _, unit = name.partition("_")
    text = "0.25" if unit == "s" else "250"
    assert latency_s({name: text}, metric) == pytest.approx(0.25)
    with pytest.raises(SpecError, match=f"{metric}_s='': give exactly one"):
        latency_s({}, metric)
