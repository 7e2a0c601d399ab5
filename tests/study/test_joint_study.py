"""The joint study on a space that is small enough to be checked: every judge right, and able to say both."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.spec.catalog import load_spec
from tandem.study import joint, joint_space
from tandem.study.joint import rank_correlation, study_joint
from tandem.study.joint_space import CHOSEN, WHOLE, Candidate, Key, candidates, cells
from tandem.study.result import StudyResult

FEW, DEEP = (56, 4480, 15_680, 112), (62, 4480, 15_680, 128)


@pytest.fixture(scope="module")
def small() -> StudyResult:
    """Two cells, the shapes of the study's widths that its claims name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint_space, "TRAFFIC", ((4096, 512),))
        patch.setattr(joint_space, "TPOTS_S", (0.02, 0.05))
        patch.setattr(joint_space, "GPUS", 4)
        patch.setattr(joint, "SECONDS", 30.0)
        return study_joint()


def test_every_shape_has_a_deployment_in_every_cell(small: StudyResult) -> None:
    rows = small.findings["shapes"]
    assert len(rows) == 54  # 27 widths at two depths
    assert all(rate > 0 for row in rows for rate in row["per_gpu"].values())
    by = {(r["layers"], r["hidden_size"], r["ffn_size"], r["mamba_heads"]): r for r in rows}
    assert by[WHOLE]["parameters"] == load_spec("nvidia/NVIDIA-Nemotron-Nano-12B-v2").parameters
    assert by[CHOSEN]["parameters"] == load_spec("nvidia/NVIDIA-Nemotron-Nano-9B-v2").parameters
    assert by[CHOSEN]["total_bytes"] < by[WHOLE]["total_bytes"]
    assert all(by[CHOSEN]["per_gpu"][cell] > by[WHOLE]["per_gpu"][cell] for cell in by[WHOLE]["per_gpu"])
    json.dumps(small.to_json(), allow_nan=False)


def test_the_break_even_is_where_both_move_as_much(small: StudyResult) -> None:
    claim = next(claim for claim in small.claims if claim.id == "J5")
    heads, tokens = claim.values["state_bytes"], claim.values["break_even_tokens"]
    assert heads["128 heads"] - heads["112 heads"] == pytest.approx(tokens * 8192)  # two layers of 8 heads, keys and values


def candidate(key: Key, parameters: int, rate: float, gain: float, size: int = 100, fixed: float = 1.0) -> Any:
    """One whose numbers are given; only what judges read."""
    return SimpleNamespace(
        key=key, fixed_batch=fixed,
        spec=SimpleNamespace(name=str(key), parameters=parameters, kv_bytes_per_token=lambda: 16_384),
        total_bytes=size, per_gpu=lambda cell: rate, gain=lambda cell: gain, plans=dict.fromkeys(cells(), 1), state_bytes=1e8,
        attention_layers=4,
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
    assert joint._smaller_serves_more(shapes()).holds is True
    assert joint._smaller_serves_more(shapes(chosen=lambda: candidate(CHOSEN, 800, 11.0, 1.0))).holds is False
    assert joint._bytes(shapes()).holds is True
    assert joint._bytes(shapes(few=lambda: candidate(FEW, 790, 5.0, 1.0))).holds is False
    assert joint._same_winner(shapes()).holds is True
    assert joint._same_winner(shapes(few=lambda: candidate(FEW, 790, 20.0, 1.0, fixed=2.0))).holds is False


def test_judges_of_splitting_say_both() -> None:
    assert joint._flips(shapes()).holds is True
    flipped = joint._flips(shapes(chosen=lambda: candidate(CHOSEN, 800, 14.0, 1.3)))
    assert flipped.holds is False
    assert len(flipped.values["flips"]) == len(cells())


@pytest.mark.parametrize(
    ("hours", "holds"),
    [((4.0, 3.0, 3.0, 2.0), True), ((4.0, 3.0, 4.0, 3.5), False), ((4.0, None, 3.0, 2.0), None)],
)
def test_the_judge_of_elastic_scaling_says_all(hours: tuple[float | None, ...], holds: bool | None) -> None:
    names = ("12B, static", "12B, elastic", "9B, static", "9B, elastic")
    runs = {name: {"gpu_hours": h, "attainment": 1.0} for name, h in zip(names, hours, strict=True) if h is not None}
    assert joint._elastic(runs).holds is holds


def test_rank_correlation() -> None:
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0, 3.0], [30.0, 20.0, 10.0]) == pytest.approx(-1.0)
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(0.8)


def test_candidates_are_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint_space, "plan_of", lambda spec, cell: None)
    found = candidates()
    assert {WHOLE, CHOSEN, FEW, DEEP} <= found.keys()
    assert all(isinstance(one, Candidate) and one.per_gpu(cells()[0]) is None for one in found.values())
    assert {one.attention_layers for key, one in found.items() if key[0] == 56} == {4}
