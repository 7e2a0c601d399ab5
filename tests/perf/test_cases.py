"""A cases file answers row by row: a bad row says what is wrong with it, the others are estimated as if it were not there."""

from __future__ import annotations

from dataclasses import asdict
from importlib import resources
from pathlib import Path

import pytest
import yaml

from tandem.perf.backend import ServingFits
from tandem.perf.cases import COLUMNS, estimate_cases, read_cases
from tandem.perf.estimate import Instances, estimate, estimate_disaggregated
from tandem.spec.design import Parallelism
from tandem.spec.errors import SpecError, TraceError

LLAMA = "meta-llama/Meta-Llama-3.1-8B"
R1 = "deepseek-ai/DeepSeek-R1"
ROW = {"model": LLAMA, "hardware": "h100-sxm", "isl": "1024", "osl": "128", "batch": "4"}
SPLIT = {"model": R1, "hardware": "b200-sxm", "precision": "fp4", "mode": "disaggregated", "isl": "4096", "osl": "512",
         "prefill_workers": "2", "prefill_tp": "8", "prefill_ep": "8", "decode_workers": "3", "decode_dp": "8",
         "decode_ep": "8"}  # fmt: skip


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def answers(*rows: dict[str, str]) -> list[dict[str, object]]:
    return list(estimate_cases(list(rows)))


def test_a_row_is_priced_as_the_function_prices_it(tmp_path: Path) -> None:
    file = write(
        tmp_path / "c.csv", "id, model ,hardware,isl,osl,concurrency,tp,gpus\na," + LLAMA + ", h100-sxm ,1024,128,12,2,4\n"
    )
    (found,) = answers(*read_cases(file))
    parallelism = Parallelism(tp=2)
    alone = asdict(
        estimate(model=LLAMA, hardware="h100-sxm", isl=1024, osl=128, concurrency=12, parallelism=parallelism, gpus=4)
    )
    assert found.pop("id") == "a"
    assert found == {k: alone[k] for k in found}
    assert set(found) == {"ttft_s", "tpot_s", "tokens_per_s_per_gpu", "tokens_per_s_per_user", "evidence"}


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"isl": ""}, "isl=''"),
        ({"isl": "x"}, "isl='x'"),
        ({"isl": "12.5"}, "isl='12.5'"),
        ({"isl": "-4"}, "isl='-4'"),
        ({"isl": "1e12"}, "isl=1000000000000"),
        ({"concurrency": "1e17", "batch": ""}, "concurrency=100000000000000000"),
        ({"osl": "0"}, "osl='0'"),
        ({"tp": "0"}, "tp='0'"),
        ({"tp": "3"}, "tp=3"),
        ({"tp": "1e30"}, "tp=1"),
        ({"model": "nobody/nothing"}, "model='nobody/nothing'"),
        ({"model": ""}, "model=''"),
        ({"hardware": "abacus"}, "hardware='abacus'"),
        ({"precision": "fp3"}, "precision='fp3'"),
        ({"backend": "none"}, "backend='none'"),
        ({"mode": "sideways"}, "mode='sideways'"),
        ({"batch": ""}, "batch=None"),
        ({"concurrency": "4"}, "concurrency=4"),
        ({"tp": "2", "moe_tp": "3"}, "moe_tp=3"),
        ({"gpus": "3", "tp": "2"}, "gpus=3"),
        ({"mode": "disaggregated"}, "decode_batch=''"),
        ({"mode": "disaggregated", "decode_batch": "4", "prefill_tp": "3"}, "tp=3"),
    ],
)
def test_a_bad_row_answers_with_its_error_and_the_others_go_on(changed: dict[str, str], field: str) -> None:
    before, bad, after = answers(ROW, {**ROW, **changed, "id": "odd"}, ROW)
    assert set(bad) == {"id", "error"}
    assert bad["id"] == "odd"
    assert field in str(bad["error"])
    assert "\n" not in str(bad["error"])
    assert (before.pop("id"), after.pop("id")) == ("1", "3")
    assert before == after == {k: v for k, v in answers(ROW)[0].items() if k != "id"}


def test_rows_are_counted_as_they_are_answered() -> None:
    seen: list[int] = []
    found = estimate_cases([ROW, {**ROW, "isl": ""}, ROW], seen.append)
    assert seen == []
    next(found)
    assert seen == [1]
    assert len(list(found)) == 2
    assert seen == [1, 2, 3]


def test_expert_groups_may_be_told_by_their_slices() -> None:
    """moe_tp slices an expert, so ep = tp * dp / moe_tp, as measured tables state it."""
    base = {**ROW, "model": "Qwen/Qwen3-30B-A3B", "tp": "4"}
    by_slices, by_groups = answers({**base, "moe_tp": "2"}, {**base, "ep": "2"})
    by_slices.pop("id"), by_groups.pop("id")
    assert by_slices == by_groups
    assert by_groups != {k: v for k, v in answers(base)[0].items() if k != "id"}


def test_decode_batch_counts_one_attention_group() -> None:
    """Measured rows state the batch of one of dp groups; an instance holds dp times as many, in either pool."""
    (found,) = answers({**SPLIT, "decode_batch": "16", "prefill_batch": "2"})
    prefill = Instances(parallelism=Parallelism(tp=8, ep=8), batch=2, replicas=2)
    decode = Instances(parallelism=Parallelism(dp=8, ep=8), batch=16 * 8, replicas=3)
    direct = asdict(
        estimate_disaggregated(
            model=R1, hardware="b200-sxm", precision="fp4", isl=4096, osl=512, prefill=prefill, decode=decode
        )
    )
    assert {k: v for k, v in found.items() if k != "id"} == {k: direct[k] for k in found if k != "id"}


def test_pools_without_a_batch_take_one_prompt_a_group_and_share_the_concurrency() -> None:
    (shared,) = answers({**SPLIT, "concurrency": "100"})
    (stated,) = answers({**SPLIT, "concurrency": "100", "prefill_batch": "1", "decode_batch": "5"})  # ceil(100/3)=34 <= 40
    assert shared == stated


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model,hardware,isl,osl,tpp\n", "column 'tpp' is unknown"),
        ("model,hardware,isl\n", "has no column osl"),
        ("", "has no column model"),
        ("model,hardware,isl,osl\n", "holds no cases"),
        ("model,hardware,isl,osl\na,b,1,2\na,b,1,2,3\n", "cells: their number"),
    ],
)
def test_columns_are_checked_before_anything_runs(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(TraceError, match=f"c.csv.*: {said}"):
        read_cases(write(tmp_path / "c.csv", text))


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such file"):
        read_cases(tmp_path / "missing.csv")
    with pytest.raises(TraceError, match="no such file"):
        read_cases(tmp_path)
    (tmp_path / "b.csv").write_bytes(b"model,hardware\xff\xfe\n")
    with pytest.raises(TraceError, match=r"b\.csv: not a readable CSV file"):
        read_cases(tmp_path / "b.csv")


def test_every_documented_column_is_read(tmp_path: Path) -> None:
    (row,) = read_cases(write(tmp_path / "c.csv", ",".join(COLUMNS) + "\n" + ",".join("1" for _ in COLUMNS) + "\n"))
    assert list(row) == COLUMNS


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400"])
def test_numbers_that_are_none_are_errors_of_their_row(text: str) -> None:
    bad, good = answers({**ROW, "isl": text}, ROW)
    assert f"isl='{text}'" in str(bad["error"])
    assert "error" not in good


@pytest.mark.parametrize("changed", [{"tp": "8"}, {"batch": "4"}, {"gpus": "16"}])
def test_a_column_that_the_mode_does_not_read_changes_nothing(changed: dict[str, str]) -> None:
    plain, found = answers({**SPLIT, "decode_batch": "4"}, {**SPLIT, "decode_batch": "4", **changed})
    assert {k: v for k, v in found.items() if k != "id"} == {k: v for k, v in plain.items() if k != "id"}


def test_a_cell_that_never_ends_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"c\.csv"):
        read_cases(write(tmp_path / "c.csv", "model,hardware,isl,osl\n" + "x" * 200_000 + "\n"))


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path: Path) -> None:
    """Spreadsheets export one."""
    file = write(tmp_path / "c.csv", "\ufeffmodel,hardware,isl,osl\nm,h,1,2\n")
    assert read_cases(file) == [{"model": "m", "hardware": "h", "isl": "1", "osl": "2"}]


def test_every_option_of_one_case_is_a_column(tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    path.write_text(
        "id,model,hardware,backend,isl,osl,concurrency,rate,draft_tokens,acceptance,tp\n"
        "flight,deepseek-r1,b200-sxm,trtllm,1024,1024,8,,,,8\n"
        "drafted,deepseek-r1,b200-sxm,trtllm,1024,1024,8,,3,0.7,8\n"
        "arrivals,deepseek-r1,b200-sxm,trtllm,1024,1024,,2.5,,,8\n"
        "wrong,deepseek-r1,b200-sxm,trtllm,1024,1024,,many,,,8\n"
    )
    flight, drafted, arrivals, wrong = estimate_cases(read_cases(path))
    assert drafted["tpot_s"]["value"] < 0.8 * flight["tpot_s"]["value"]
    assert arrivals["tokens_per_s_per_gpu"]["value"] == pytest.approx(2.5 * 1024 / 8)
    assert wrong["error"] == "rate='many': must be a number"


def test_own_fits_change_the_answer_and_bad_ones_are_named(tmp_path: Path) -> None:
    shipped = resources.files("tandem.perf") / "data" / "serving_fits.yaml"
    data = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    data["common"]["tpot"]["step_s"] += 1.0
    slower = tmp_path / "slower.yaml"
    slower.write_text(yaml.safe_dump(data))
    row = {"model": "qwen3-8b", "hardware": "h100-sxm", "isl": "1024", "osl": "128", "concurrency": "4"}
    own, plain = (next(estimate_cases([row], fits=f)) for f in (ServingFits.read(slower), None))
    assert own["tpot_s"]["value"] > plain["tpot_s"]["value"] + 1e-3
    with pytest.raises(SpecError, match=r"fits='.*none\.yaml': no such file; `tandem calibrate serving"):
        ServingFits.read(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(SpecError, match=r"fits='.*bad\.yaml': serving fits: not what"):
        ServingFits.read(tmp_path / "bad.yaml")
