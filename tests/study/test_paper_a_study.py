"""The study of paper A: every claim judged, every judge able to say no, verdicts of re-runs taken over."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tandem.spec.catalog import load_spec
from tandem.spec.errors import SpecError
from tandem.study import paper_a_claims as claims
from tandem.study.paper_a import study_paper_a
from tandem.study.result import Claim


@pytest.fixture(scope="module")
def found() -> dict[str, Claim]:
    return {claim.id: claim for claim in claims.claims()}


def test_what_is_printed_is_met(found: dict[str, Claim]) -> None:
    assert list(found) == [f"A{i}" for i in range(1, 11)]
    assert {name: claim.holds for name, claim in found.items()} == dict.fromkeys(found, True)


def test_the_numbers_behind_the_verdicts(found: dict[str, Claim]) -> None:
    """Tolerances: exact where the paper's number is a count, the paper's last digit or 10 to 15 % where it is a rate."""
    assert found["A1"].values["parameters"] == {claims.NANO_12B: 12_310_001_152, claims.NANO_9B: 8_888_227_328}
    assert found["A2"].values["bytes_per_token"] == {"9B": 16_384, "Qwen3-8B": 147_456}
    assert sorted(found["A3"].values["dropped"]) == [7, 8, 23, 24, 48, 52]
    assert found["A4"].values["bytes"][claims.NANO_9B] == pytest.approx(18.69 * 2**30, rel=1e-3)
    overheads = found["A5"].values["overhead_gib"]
    assert 0.45 < overheads[0] < 0.5
    assert 0.8 < overheads[-1] < 0.85
    assert overheads == [round(overheads[0] + 0.01 * i, 2) for i in range(len(overheads))]
    assert found["A7"].values["ratio"] == pytest.approx(6.3, rel=0.1)
    assert found["A7"].values["batches"] == [8, 1]
    assert found["A8"].values["ratio"] == pytest.approx(3.3, rel=0.15)
    assert found["A9"].values["at_one"] < 1.5 < found["A9"].values["by_batch"]


@pytest.mark.parametrize(
    ("name", "value", "refuted"),
    [
        ("BUDGET_BYTES", 2**34, {"A4"}),
        ("CONTEXT", 2**19, {"A4"}),
        ("NEAR", 1e-4, {"A6", "A7", "A8", "A10"}),
        ("load_spec", lambda name: load_spec(name if name != claims.NANO_9B else claims.NANO_12B), {"A1", "A3", "A4", "A10"}),
        ("load_spec", lambda name: load_spec(name if name != claims.QWEN else claims.NANO_12B), {"A2"}),
        ("rate_at", lambda model, *at: 100.0 if model == claims.QWEN else 900.0, {"A7", "A8", "A9", "A10"}),
        ("TABLE_10", {161.02: (4480, 17_920, 112), 156.42: (4480, 15_680, 128), 300.0: (4800, 14_400, 120)}, {"A6"}),
        ("TABLE_10", {161.02: (4480, 17_920, 112), 156.42: (4480, 15_680, 128), 155.86: (4800, 14_400, 128)}, {"A5", "A6"}),
        ("H100_ROWS", {claims.NANO_9B: (1000.0, 16.6)}, {"A10"}),
        ("H100_ROWS", {claims.NANO_9B: (794.0, 17.6)}, {"A10"}),
    ],
)
def test_judges_can_say_no(
    found: dict[str, Claim], monkeypatch: pytest.MonkeyPatch, name: str, value: Any, refuted: set[str]
) -> None:
    monkeypatch.setattr(claims, name, value)
    now = {claim.id: claim.holds for claim in claims.claims()}
    assert {each for each, holds in now.items() if not holds} == refuted


def test_reruns_stand_beside_under_their_own_names(tmp_path: Path, found: dict[str, Claim]) -> None:
    claim = replace(found["A1"], id="C1", holds=None, ours="unknown", ours_by={"runs": "unknown"})
    file = tmp_path / "claims.json"
    file.write_text(json.dumps({"study": "compression", "claims": [json.loads(json.dumps(vars_of(claim)))]}))
    study = study_paper_a([file])
    assert [c.id for c in study.claims][-1] == "compression C1"
    assert study.claims[-1].holds is None
    assert study.claims[-1].ours_by == {"Tandem": "unknown"}
    assert study.findings["reruns"] == {str(file): 1}
    json.dumps(study.to_json(), allow_nan=False)


def vars_of(claim: Claim) -> dict[str, Any]:
    return {name: getattr(claim, name) for name in claim.__dataclass_fields__}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is no claims.json"),
        ('{"study": "paper-b", "claims": []}', "is a study of 'paper-b'; must be one of pretraining, alignment, compression"),
        ('{"study": "alignment", "claims": [{"id": "A1"}]}', "is no claims.json"),
        ('{"claims": []}', "is no claims.json"),
    ],
)
def test_a_file_that_is_no_study_of_runs_is_refused(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "claims.json"
    file.write_text(text)
    with pytest.raises(SpecError, match=told) as caught:
        study_paper_a([file])
    assert "\n" not in str(caught.value)
    with pytest.raises(SpecError, match=r"is no claims\.json"):
        study_paper_a([tmp_path / "none.json"])
