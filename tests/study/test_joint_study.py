"""The joint study on a space that is small enough to be checked: every judge right, and able to say both."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.cli import studying
from tandem.cli.app import main
from tandem.perf.costs import Layout
from tandem.perf.memory import MemoryModel
from tandem.report.joint_html import joint_page, joint_tables
from tandem.report.text import console
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.design import Precision
from tandem.spec.errors import SpecError
from tandem.study import joint_claims, joint_elastic, joint_space, joint_split
from tandem.study.joint import study_joint
from tandem.study.joint_claims import rank_correlation
from tandem.study.joint_elastic import CASES, Arrivals
from tandem.study.joint_space import CHOSEN, SMALL, TRANSFORMER, WHOLE, Candidate, Key, Setting, candidates, cell_text, cells
from tandem.study.joint_transfer import AS_IS, Decision, MovedMemory, Transfers, transfer_claim, variants
from tandem.study.result import Claim, StudyResult

FEW, DEEP = (56, 4480, 15_680, 112), (62, 4480, 15_680, 128)
FOUR = Setting(gpus=4, load_rps=20.0)
STEADY = Arrivals(what="six minutes in one", trace="azure-conversation-2023", scale=6.0, duration_s=360.0)


@pytest.fixture(scope="module")
def small() -> StudyResult:
    """Two cells, the shapes of the study's widths that its claims name, a minute of traffic."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint_space, "TRAFFIC", ((4096, 512),))
        patch.setattr(joint_space, "TPOTS_S", (0.02, 0.05))
        patch.setattr(joint_split, "ANSWERS", (128, 2048))
        patch.setattr(joint_elastic, "TRAFFIC", {"steady": STEADY})
        return study_joint(FOUR)


def claim_of(small: StudyResult, id: str) -> Claim:
    return next(claim for claim in small.claims if claim.id == id)


def test_every_shape_has_a_deployment_in_every_cell(small: StudyResult) -> None:
    rows = small.findings["shapes"]
    assert len(rows) == 54  # 27 widths at two depths
    assert all(rate > 0 for row in rows for rate in row["per_gpu"].values())
    by = {(r["layers"], r["hidden_size"], r["ffn_size"], r["mamba_heads"]): r for r in rows}
    assert by[WHOLE]["parameters"] == load_spec("nvidia/NVIDIA-Nemotron-Nano-12B-v2").parameters
    assert by[CHOSEN]["parameters"] == load_spec("nvidia/NVIDIA-Nemotron-Nano-9B-v2").parameters
    assert by[CHOSEN]["total_bytes"] < by[WHOLE]["total_bytes"]
    assert all(by[CHOSEN]["per_gpu"][cell] > by[WHOLE]["per_gpu"][cell] for cell in by[WHOLE]["per_gpu"])
    assert [claim.id for claim in small.claims] == [f"J{i}" for i in range(1, 9)]
    json.dumps(small.to_json(), allow_nan=False)


def test_the_plane_has_bytes_a_proxy_of_quality_goodput_and_gpus(small: StudyResult) -> None:
    rows = small.findings["plane"]
    assert {row["model"] for row in rows} == {"12B", "9B", "Qwen3-8B", "Llama-3.1-8B"}
    shapes = {(r["layers"], r["hidden_size"], r["ffn_size"], r["mamba_heads"]): r for r in small.findings["shapes"]}
    for row in rows:
        # what is served needs no more than an instance of each pool beside the share of the budget that the load is
        assert row["gpus_for_load"] >= FOUR.load_rps * 512 / row["tokens_per_s_per_gpu"] - 1e-6
        assert row["goodput_rps"] <= FOUR.gpus * row["tokens_per_s_per_gpu"] / 512 * (1 + 1e-9)
    nine = next(row for row in rows if row["model"] == "9B")
    assert nine["goodput_rps"] == shapes[CHOSEN]["goodput_rps"][nine["cell"]]
    assert nine["gpus_for_load"] == shapes[CHOSEN]["gpus_for_load"][nine["cell"]]
    load = small.figures["load"]
    assert "proxy of quality" in load.title
    assert "no measure of accuracy" in load.note
    assert load.y_title == "GPUs"
    assert small.figures["plane"].y_title == "requests/s within the bounds"
    points = [text for panel in small.figures["plane"].panels for series in panel.series for text in series.text]
    assert len(points) == 54 + 2  # of the bound that is drawn: shapes, and the Transformers
    assert all(word in points[0] for word in ("B parameters", "GiB", "requests/s", "GPUs for 20 requests/s"))


def test_page_and_terminal_show_the_plane_and_the_four_cases(small: StudyResult, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(json.dumps(small.to_json()))
    page = joint_page("t", "l", data)
    assert page.count("class='chart'") == len(data["figures"]) == 6
    assert all(f"id='{c['id']}'" in page for c in data["claims"])
    console().print(joint_tables(data))
    text = capsys.readouterr().out
    for shown in (page, text):
        assert all(case in shown for case in (*CASES, "quality", "GPU hours", "4096/512 at 20 ms"))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 120


def test_the_break_even_is_where_both_move_as_much(small: StudyResult) -> None:
    values = claim_of(small, "J5").values
    heads, tokens = values["state_bytes"], values["break_even_tokens"]
    assert heads["128 heads"] - heads["112 heads"] == pytest.approx(tokens * 8192)  # two layers of 8 heads, keys and values


def candidate(
    key: Key, parameters: int, rate: float, gain: float | None, size: int = 100, fixed: float = 1.0, mode: str | None = None
) -> Any:
    """One whose numbers are given; only what judges read."""
    split = gain is not None and gain > 1.05
    return SimpleNamespace(
        key=key, fixed_batch=fixed,
        spec=SimpleNamespace(
            name=str(key), parameters=parameters, kv_bytes_per_token=lambda: 16_384, kv_bytes=lambda isl: 16_384 * isl,
            state_bytes_per_sequence=lambda: 100_000_000,
        ),
        total_bytes=size, per_gpu=lambda cell: rate, gain=lambda cell: gain, plans=dict.fromkeys(cells()), state_bytes=1e8,
        attention_layers=4, mode=lambda cell: mode or ("disaggregated" if split else "piggybacked"),
    )  # fmt: skip


def shapes(**changes: Callable[[], Any]) -> dict[Key, Any]:
    made = {
        WHOLE: candidate(WHOLE, 1000, 10.0, 1.0, size=140),
        CHOSEN: candidate(CHOSEN, 800, 14.0, 1.0, fixed=3.0),
        FEW: candidate(FEW, 790, 13.8, 1.0, fixed=2.0),
        DEEP: candidate(DEEP, 810, 13.9, 1.0, fixed=1.0),
    }
    return made | {CHOSEN if name == "chosen" else FEW: make() for name, make in changes.items()}


def test_judges_of_service_say_both() -> None:
    assert joint_claims.service_claim(shapes()).holds is True
    assert joint_claims.service_claim(shapes(chosen=lambda: candidate(CHOSEN, 800, 11.0, 1.0))).holds is False
    assert joint_claims.bytes_claim(shapes()).holds is True
    assert joint_claims.bytes_claim(shapes(few=lambda: candidate(FEW, 790, 5.0, 1.0))).holds is False
    assert joint_claims.winner_claim(shapes()).holds is True
    assert joint_claims.winner_claim(shapes(few=lambda: candidate(FEW, 790, 20.0, 1.0, fixed=2.0))).holds is False


def test_judges_say_nothing_where_nothing_is_served() -> None:
    none: dict[Key, Any] = {}
    for key, one in shapes().items():
        none[key] = SimpleNamespace(**{**vars(one), "per_gpu": lambda cell: None, "mode": lambda cell: None})
    for judge in (
        joint_claims.service_claim,
        joint_claims.bytes_claim,
        joint_claims.winner_claim,
        joint_split.compression_claim,
    ):
        assert judge(none).holds is None


def test_the_judge_of_compression_says_both() -> None:
    assert joint_split.compression_claim(shapes()).holds is True
    flipped = joint_split.compression_claim(shapes(chosen=lambda: candidate(CHOSEN, 800, 14.0, 1.3)))
    assert flipped.holds is False
    assert len(flipped.values["flips"]) == len(cells())


def test_a_model_that_only_split_pools_serve_is_split() -> None:
    """There is no gain to compare, and yet a decision."""
    alone = candidate(CHOSEN, 800, 14.0, None, mode="disaggregated")
    assert joint_split.compression_claim(shapes(chosen=lambda: alone)).holds is False


@pytest.mark.parametrize(
    ("ours", "theirs", "holds", "ties"),
    [(1.2, 1.2, True, 0), (1.0, 0.9, True, 0), (1.2, 0.9, False, 0), (1.06, 1.04, False, 9), (1.2, 1.04, False, 0)],
)
def test_the_judge_of_a_transformer_says_where_the_decision_differs_and_what_is_a_tie(
    ours: float, theirs: float, holds: bool, ties: int
) -> None:
    peers = {"T": candidate((1, 1, 0, 0), 790, 9.0, theirs)}
    found = joint_split.transformer_claim(candidate(CHOSEN, 800, 14.0, ours), peers, {})
    assert found.holds is holds
    assert len(found.values["flips"]) == (0 if holds else len(cells()))
    assert len(found.values["ties"]) == ties
    if not holds:
        assert f"9B {ours:.2f}" in found.ours
        assert f"T {theirs:.2f}" in found.ours


def test_the_transformer_stands_in_the_same_cells(small: StudyResult) -> None:
    values = claim_of(small, "J7").values
    assert all(set(gains) == {"9B", "Qwen3-8B", "Llama-3.1-8B"} for gains in values["gains"].values())
    assert set(values["worth_splitting"]) == {"12B", "9B", "Qwen3-8B", "Llama-3.1-8B"}
    assert small.findings["transformers"]["Qwen3-8B"]["parameters"] == load_spec(TRANSFORMER).parameters


def test_a_variant_moves_the_bytes_that_it_says_and_holds_its_own() -> None:
    spec, other, whole = load_spec(SMALL), load_spec(TRANSFORMER), Layout(1.0, 1.0, 1.0, 1.0, 1.0)
    held = MemoryModel(spec, Precision(), load_hardware("h100-sxm"))
    s0, tokens = float(held.sequence_bytes(whole, 0.0)), 8192
    bytes_of = {
        name: float(MovedMemory(spec, Precision(), held.hardware, moved).sequence_bytes(whole, float(tokens)))
        for name, moved in variants(spec).items()
    }
    own, theirs = tokens * spec.kv_bytes_per_token(), tokens * other.kv_bytes_per_token()
    assert list(bytes_of.values()) == [s0 + own, own, s0 + theirs, theirs]
    assert bytes_of[AS_IS] == float(held.sequence_bytes(whole, float(tokens)))


def test_cells_are_planned_again_for_other_bytes_on_the_link(small: StudyResult) -> None:
    """As it is, a cell is decided as the planner decides it; more bytes, or a slower link, never gain more."""
    row = next(r for r in small.findings["shapes"] if (r["layers"], r["hidden_size"], r["ffn_size"]) == CHOSEN[:3]
               and r["mamba_heads"] == CHOSEN[3])  # fmt: skip
    for cell, by_variant in small.findings["transfers"].items():
        assert by_variant[AS_IS]["own"]["mode"] == row["mode"][cell]
        assert by_variant[AS_IS]["own"]["gain"] == pytest.approx(row["gain"][cell])
        for by_link in by_variant.values():
            gains = [d["gain"] or 0.0 for d in by_link.values()]
            assert list(by_link) == sorted(by_link, key=lambda link: float("inf") if link == "own" else float(link))
            assert all(a <= b * 1.03 for a, b in pairwise(gains))  # but for the balance of pools
        slowest = {name: next(iter(by_link.values()))["gain"] for name, by_link in by_variant.items()}
        assert slowest["k of Qwen3-8B"] < slowest[AS_IS] <= slowest["s0 = 0"]


def decided(mode: Any, gain: float) -> Decision:
    return Decision(mode, gain, 1e8, 1e-3)


def test_the_judge_of_transfers_says_both() -> None:
    split, shared = decided("disaggregated", 1.2), decided("piggybacked", 0.9)

    def found(other: Decision, slow: Decision) -> Transfers:
        return Transfers(
            5e10, {cell: {AS_IS: {1e9: slow, None: split}, "s0 = 0": {1e9: slow, None: other}} for cell in cells()}
        )

    kept = transfer_claim(found(split, shared))
    assert kept.holds is False
    assert kept.values["furthest_gain"] == 0.0
    assert kept.values["slower"]["1e+09"][AS_IS] == [cell_text(cell) for cell in cells()]
    changed = transfer_claim(found(shared, shared))
    assert changed.holds is True
    assert changed.values["furthest_gain"] == pytest.approx(0.25)
    assert len(changed.values["changed"]["s0 = 0"]) == len(cells())


def test_rank_correlation() -> None:
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0, 3.0], [30.0, 20.0, 10.0]) == pytest.approx(-1.0)
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(0.8)


def test_candidates_are_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint_space, "plan_of", lambda spec, cell, setting: None)
    monkeypatch.setattr(joint_space, "_refuse_hopeless", lambda teacher, setting: None)
    found = candidates(Setting())
    assert {WHOLE, CHOSEN, FEW, DEEP} <= found.keys()
    assert all(isinstance(one, Candidate) and one.per_gpu(cells()[0]) is None for one in found.values())
    assert {one.attention_layers for key, one in found.items() if key[0] == 56} == {4}
    assert found[CHOSEN].spec.layers == load_spec(SMALL).layers  # which J6 serves


@pytest.mark.parametrize(
    ("given", "named"),
    [({"gpus": 0}, "gpus=0"), ({"gpus": 20_000}, "gpus=20000"), ({"hardware": "nope"}, "hardware='nope'"),
     ({"ttft_s": 0.0}, "ttft_s=0.0"), ({"load_rps": -1.0}, "load_rps=-1.0")],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_by_name(given: Any, named: str) -> None:
    with pytest.raises(SpecError) as wrong:
        Setting(**given)
    assert named in str(wrong.value)
    assert "\n" not in str(wrong.value)


def test_gpus_that_serve_nothing_are_refused_before_shapes_are_priced(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a shape was priced")

    monkeypatch.setattr(joint_space, "pruned_spec", never)
    with pytest.raises(SpecError, match=r"gpus=1, hardware='l4', ttft_s=4: serve neither"):
        study_joint(Setting(gpus=1, hardware="l4"))


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [("--gpus", "0", "gpus=0"), ("--hardware", "nope", "hardware='nope'"), ("--ttft", "-1", "ttft_s=-1.0"),
     ("--load", "0", "load_rps=0.0")],
)  # fmt: skip
def test_the_command_takes_budget_hardware_bound_and_load(
    option: str, value: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tandem", "study", "joint", option, value])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert named in err
    assert err.count("\n") == 1


def test_without_options_the_setting_is_the_documented_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(studying, "run_joint", lambda *given: asked.append(given))
    for words in ([], ["--gpus", "8", "--hardware", "h200-sxm", "--ttft", "2", "--load", "5"]):
        monkeypatch.setattr("sys.argv", ["tandem", "study", "joint", *words])
        with pytest.raises(SystemExit):
            main()
    assert [given[0] for given in asked] == [
        Setting(gpus=16, hardware="h100-sxm", ttft_s=4.0, load_rps=50.0),
        Setting(gpus=8, hardware="h200-sxm", ttft_s=2.0, load_rps=5.0),
    ]
