"""Asking another predictor: the question in its words, its answers in seconds, its absence in one line."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tandem.perf.peer import ask_peer, peer_case
from tandem.perf.phases import PerfModel
from tandem.perf.silicon import MeasuredRow
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.design import Parallelism, Pool, Precision
from tandem.spec.errors import SpecError, TandemError

API = """
def cli_estimate(model_path, **ask):
    print("noise that is no answer")
    if ask["isl"] == 13:
        raise ValueError("no data\\nfor this")
    from types import SimpleNamespace
    return SimpleNamespace(ttft=ask["isl"] * 1.0, tpot=ask["osl"] / 2 if model_path.startswith("Qwen/") else 7.0)
"""


def row(**changes: object) -> MeasuredRow:
    base = MeasuredRow(
        row_id="r", model=load_spec("qwen3-8b"), hardware=load_hardware("h100-sxm"), backend="vllm",
        precision=Precision.parse("bf16"), parallelism=Parallelism(tp=2), isl=1024, osl=512, concurrency=8,
        ttft_s=0.1, tpot_s=0.01, side="validation",
    )  # fmt: skip
    return replace(base, **changes)


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the peer's name and shape whose answers are known."""
    files = {
        "aiconfigurator/__init__.py": "", "aiconfigurator/cli/__init__.py": "", "aiconfigurator/cli/api.py": API,
        "aiconfigurator/sdk/__init__.py": "",
        "aiconfigurator/sdk/perf_database.py": "def get_database_view(): ...\ndef get_latest_database_version(): ...\n",
        "aiconfigurator_core/__init__.py": "", "aiconfigurator_core/model_configs/Qwen--Qwen3-8B_config.json": "{}",
        "aiconfigurator-0.0.9.dist-info/METADATA": "Metadata-Version: 2.1\nName: aiconfigurator\nVersion: 0.0.9\n",
    }  # fmt: skip
    for name, text in files.items():
        file = tmp_path / "site" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return tmp_path / "site"


def test_answers_come_in_seconds_and_silence_with_its_reason(peer: Path) -> None:
    seen: list[str] = []
    rows = [row(row_id="a"), row(row_id="b", isl=13), row(row_id="c", model=load_spec("nano-9b-v2")), row(row_id="d", osl=20)]
    found = ask_peer("aiconfigurator", rows, seen.append)
    assert (found.version, found.asked) == ("0.0.9", 4)
    assert found.times == {"a": (1.024, 0.256), "d": (1.024, 0.010)}
    assert found.reasons == {"ValueError: no data for this": 1, "brings no configuration of this model": 1}
    assert seen[-1] == "aiconfigurator 4/4"
    assert "aiconfigurator" not in sys.modules


def test_without_the_package_one_line_says_how_to_get_it(tmp_path: Path) -> None:
    if importlib.util.find_spec("aiconfigurator") is not None:
        pytest.skip("it is installed here")
    with pytest.raises(TandemError, match=r"^aiconfigurator is not installed for .*: pip install aiconfigurator==0\.12\.0"):
        ask_peer("aiconfigurator", [row()])
    with pytest.raises(SpecError, match=r"against='other': must be aiconfigurator"):
        ask_peer("other", [row()])
    with pytest.raises(SpecError, match=r"peer_python='.*nothing': cannot be run"):
        ask_peer("aiconfigurator", [row()], python=tmp_path / "nothing")


def test_a_peer_that_breaks_down_is_reported_and_not_counted_as_silent(peer: Path) -> None:
    (peer / "aiconfigurator" / "sdk" / "perf_database.py").write_text("")
    with pytest.raises(TandemError, match=r"aiconfigurator stopped with exit status 1: AttributeError"):
        ask_peer("aiconfigurator", [row()])


def test_a_colocated_question_in_the_peers_words() -> None:
    """Batches are those of one attention group of one instance; the published format is left to the peer."""
    case = peer_case(row(parallelism=Parallelism(tp=2, dp=4, ep=8), concurrency=96, replicas=2), ["x"])
    assert case == {
        "id": "r",
        "models": ["x"],
        "ask": {
            "system_name": "h100_sxm", "backend_name": "vllm", "isl": 1024, "osl": 512, "mode": "agg", "batch_size": 12,
            "tp_size": 2, "pp_size": 1, "attention_dp_size": 4, "moe_tp_size": 1, "moe_ep_size": 8,
        },
    }  # fmt: skip
    other = peer_case(row(precision=Precision.parse("fp4")), ["x"])["ask"]
    assert (other["gemm_quant_mode"], other["moe_quant_mode"]) == ("nvfp4", "nvfp4")


def test_a_row_that_drafted_is_asked_as_such_with_the_same_accepted_tokens() -> None:
    """The peer's `nextn_accepted` counts accepted drafts of a step: a + a^2 + a^3, one less than the tokens that it yields."""
    drafted = row(model=load_spec("deepseek-r1"), draft_tokens=3)
    ask = peer_case(drafted, ["x"])["ask"]
    own = PerfModel(drafted.model, drafted.hardware, drafted.precision, draft_tokens=3)
    assert ask["nextn"] == 3
    assert ask["nextn_accepted"] == pytest.approx(own.tokens_per_step - 1) == pytest.approx(0.7 + 0.49 + 0.343)
    assert not {"nextn", "nextn_accepted"} & set(peer_case(row(), ["x"])["ask"])


def test_a_disaggregated_question_in_the_peers_words() -> None:
    prefill = Pool(parallelism=Parallelism(tp=4), batch=2, replicas=3, role="prefill")
    split = row(prefill=prefill, parallelism=Parallelism(tp=2, dp=8, ep=4), replicas=2, concurrency=512, decode_batch=128)
    ask = peer_case(split, ["x"])["ask"]
    assert ask["mode"] == "disagg"
    assert {k: v for k, v in ask.items() if k.startswith("prefill_")} == {
        "prefill_batch_size": 2, "prefill_num_workers": 3, "prefill_tp_size": 4, "prefill_pp_size": 1,
        "prefill_attention_dp_size": 1, "prefill_moe_tp_size": 4, "prefill_moe_ep_size": 1,
    }  # fmt: skip
    assert {k: v for k, v in ask.items() if k.startswith("decode_")} == {
        "decode_batch_size": 16, "decode_num_workers": 2, "decode_tp_size": 2, "decode_pp_size": 1,
        "decode_attention_dp_size": 8, "decode_moe_tp_size": 4, "decode_moe_ep_size": 4,
    }  # fmt: skip
    assert peer_case(replace(split, decode_batch=None), ["x"])["ask"]["decode_batch_size"] == 512 // 2 // 8
