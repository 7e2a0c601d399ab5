"""A file in the format of silicon_sample.csv: what cannot be is refused with file, row, field and value."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tandem.perf.measurements import read_measurements
from tandem.perf.silicon import is_silicon_format, read_rows
from tandem.spec.errors import TraceError

LINE = {
    "id": "r_c8", "silicon_data_source": "here", "backend": "vllm", "model_path": "Qwen/Qwen3-8B", "system": "h100_sxm",
    "precision": "fp8", "mode": "agg", "isl": "1024", "osl": "512", "batch_size": "8", "tp_size": "2", "pp_size": "1",
    "attention_dp_size": "1", "moe_tp_size": "1", "moe_ep_size": "1", "silicon_ttft_ms": "150.5", "silicon_tpot_ms": "7.25",
}  # fmt: skip


def write(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"silicon_ttft_ms": "-3"}, "silicon_ttft_ms='-3': must be a number of milliseconds above 0"),
        ({"silicon_tpot_ms": "0"}, "silicon_tpot_ms='0': must be a number of milliseconds above 0"),
        ({"silicon_tpot_ms": "inf"}, "silicon_tpot_ms='inf'"),
        ({"silicon_tpot_ms": ""}, "silicon_tpot_ms=''"),
        ({"silicon_ttft_ms": "slow"}, "silicon_ttft_ms='slow'"),
        ({"isl": "0"}, "isl='0': must be a whole number of at least 1"),
        ({"isl": "many"}, "isl='many'"),
        ({"osl": "1"}, "osl='1': must be a whole number of at least 2"),
        ({"tp_size": "2.5"}, "tp_size='2.5': must be a whole number"),
        ({"tp_size": "-2"}, "tp_size='-2'"),
        ({"batch_size": "eight"}, "batch_size='eight'"),
        ({"model_path": "Qwen/Qwen9-8B"}, "model='Qwen/Qwen9-8B'"),
        ({"system": "h900"}, "hardware='h900'"),
        ({"precision": "q2"}, "precision='q2'"),
        ({"backend": "tgi"}, "backend='tgi': must be one of"),
        ({"mode": "both"}, "mode='both': must be agg or disagg"),
        ({"id": "first_c8"}, "id='first_c8': row 1 has it already"),
    ],
)
def test_a_bad_cell_is_refused_with_its_row(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    file = write(tmp_path / "s.csv", {**LINE, "id": "first_c8"}, {**LINE, **changes})
    with pytest.raises(TraceError, match=rf"s.csv row 2 \(line 3\): {words}"):
        list(read_rows(file))


def test_a_short_line_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "s.csv", LINE)
    file.write_text(file.read_text() + "r2_c8,here,vllm\n")
    with pytest.raises(TraceError, match=r"s.csv row 2 .*: cells: their number is not that of the columns"):
        list(read_rows(file))


def test_a_zero_where_a_converter_wrote_none_makes_a_row_unusable_but_not_wrong(tmp_path: Path) -> None:
    rows = [{**LINE, "id": f"r{i}_c8", name: "0"} for i, name in enumerate(("tp_size", "attention_dp_size", "batch_size"))]
    assert list(read_rows(write(tmp_path / "s.csv", *rows))) == []


def test_a_disaggregated_row_keeps_both_pools(tmp_path: Path) -> None:
    pools = {
        f"{role}_{name}": value
        for role, values in {"prefill": ("1", "2", "4", "1", "4", "1"), "decode": ("16", "3", "2", "2", "1", "4")}.items()
        for name, value in zip(
            ("batch_size", "num_workers", "tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size"), values, strict=True
        )
    }
    one = {"prefill_pp_size": "1", "decode_pp_size": "1"}
    model = {"model_path": "deepseek-ai/DeepSeek-R1", "system": "b200_sxm", "precision": "fp4", "mode": "disagg"}
    line = {**LINE, **model, **pools, **one, "id": "d_c64"}
    (found,) = read_rows(write(tmp_path / "s.csv", line))
    assert found.prefill is not None
    assert (found.prefill.batch, found.prefill.replicas, found.prefill.parallelism.tp) == (1, 2, 4)
    assert (found.replicas, found.parallelism.tp, found.parallelism.dp, found.parallelism.ep) == (3, 2, 2, 4)
    assert (found.decode_batch, found.concurrency) == (32, 64)
    unstated = {k: v for k, v in line.items() if k != "decode_num_workers"}
    assert list(read_rows(write(tmp_path / "t.csv", unstated))) == []
    with pytest.raises(TraceError, match=r"u.csv row 1 .*: decode_tp_size='two'"):
        list(read_rows(write(tmp_path / "u.csv", {**line, "decode_tp_size": "two"})))


def test_such_a_file_serves_as_a_users_rows_and_keeps_its_split(tmp_path: Path) -> None:
    file = write(tmp_path / "s.csv", LINE)
    assert is_silicon_format(LINE)
    assert read_measurements([file], {}, "calibration") == list(read_rows(file))


DRAFTED = {
    **LINE, "id": "r1_c4", "backend": "trtllm", "model_path": "deepseek-ai/DeepSeek-R1", "system": "b200_sxm",
    "batch_size": "4", "tp_size": "8", "moe_tp_size": "8", "backend_version": "1.2.0rc6.post3",
    "silicon_data_source": "silicon_concurrency=4; measured=2026-02-05T19:55:05Z",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "drafted"),
    [
        ({}, 3),
        ({"tp_size": "1", "attention_dp_size": "8", "batch_size": "1", "moe_tp_size": "1", "moe_ep_size": "8",
          "silicon_data_source": "silicon_concurrency=8; measured=2026-02-05T19:55:05Z"}, 1),
        ({"backend_version": "1.2.0rc6.post2"}, 0),
        ({"backend_version": "1.1.0rc2.post2"}, 3),
        ({"backend_version": "1.1.0rc2.post2",
          "silicon_data_source": "silicon_concurrency=4; measured=2025-12-15T00:00:00Z"}, 0),
        ({"silicon_data_source": "silicon_concurrency=4"}, 0),
        ({"model_path": "deepseek-ai/DeepSeek-V3"}, 0),
        ({"backend": "sglang"}, 0),
        ({"silicon_tpot_ms": "50"}, 3),
    ],
)  # fmt: skip
def test_what_was_drafted_is_known_by_backend_model_image_and_day_alone(
    tmp_path: Path, changes: dict[str, str], drafted: int
) -> None:
    (row,) = read_rows(write(tmp_path / "s.csv", {**DRAFTED, **changes}))
    assert row.draft_tokens == drafted
