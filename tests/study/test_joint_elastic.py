"""Elastic scaling on top of compression: the judge of J6 says both, and constant pools are sized to the traffic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tandem.study import joint_elastic
from tandem.study.elastic_cells import Cell as Served
from tandem.study.elastic_cells import ready, run_cell
from tandem.study.elastic_traffic import Traffic
from tandem.study.joint_elastic import (
    BASE,
    BOTH,
    CASES,
    COMPRESSED,
    ELASTIC,
    Arrivals,
    Case,
    Outcome,
    elastic_claim,
    outcomes,
    service_of,
)
from tandem.study.joint_space import LARGE, SMALL, Setting

FOUR = Setting(gpus=4)
STEADY = Arrivals(what="six minutes in one", trace="azure-conversation-2023", scale=6.0, duration_s=360.0)
GOOD = {BASE: (5.0, 0.95), ELASTIC: (4.0, 0.95), COMPRESSED: (4.0, 0.95), BOTH: (3.0, 0.95)}


def cases(**changes: tuple[float, float]) -> dict[str, Case]:
    """The four of them by name; hours and attainment."""
    names = {"base": BASE, "elastic": ELASTIC, "compressed": COMPRESSED, "both": BOTH}
    return {
        case: Case(gpus=hours, most_gpus=int(hours), sizes="1P1D", gpu_hours=hours, attainment=attainment)
        for case, (hours, attainment) in (GOOD | {names[name]: value for name, value in changes.items()}).items()
    }


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, True),
        ({"both": (3.0, 0.945)}, True),  # within the tolerance of the others' attainment
        ({"both": (3.0, 0.92)}, False),  # fewer hours, for fewer requests in time
        ({"both": (3.0, 0.5)}, False),  # saves because it misses the objective
        ({"both": (3.0, 0.89), "elastic": (4.0, 0.89), "compressed": (4.0, 0.89)}, False),  # as good as the others: all miss it
        ({"elastic": (5.0, 0.5), "both": (4.5, 0.5)}, False),  # elastic saves nothing, and misses the objective
        ({"compressed": (2.9, 0.95)}, False),  # compression alone does better
        ({"elastic": (2.9, 0.95)}, False),  # scaling alone does better
        ({"elastic": (6.0, 0.95)}, True),  # of no use to the 12B alone, and yet on top of compression
    ],
)
def test_the_judge_of_elastic_scaling_compares_hours_and_attainment(changes: Any, holds: bool) -> None:
    outcome = Outcome(requests=1, cases=cases(**changes), static_as_good={"12B": 5.0, "9B": None}, series={})
    found = elastic_claim({"falling": outcome})
    assert found.holds is holds
    assert "GPUs" in found.why
    assert "in time" in found.why
    steady = replace(outcome, cases=cases(compressed=(2.9, 0.95)))
    assert elastic_claim({"falling": outcome, "steady": steady}).holds is False  # on every traffic, or not


def test_elastic_scaling_is_not_judged_where_a_case_is_missing() -> None:
    some = {name: case for name, case in cases().items() if name != COMPRESSED}
    assert elastic_claim({"falling": Outcome(requests=1, cases=some, static_as_good={}, series={})}).holds is None
    assert elastic_claim({}).holds is None


def test_constant_pools_are_sized_to_the_load_and_not_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker fewer in either pool misses the objective."""
    monkeypatch.setattr(joint_elastic, "TRAFFIC", {"steady": STEADY})
    outcome = outcomes(FOUR)["steady"]
    found = outcome.cases
    assert tuple(found) == CASES
    trace = STEADY.load()
    service = service_of(SMALL, FOUR, trace)
    assert service is not None
    made = ready(Served(service=service, traffic=Traffic(name=STEADY.trace)), trace=trace)
    prefill, decode = (int(n) for n in found[COMPRESSED].sizes.removesuffix("D").split("P"))
    kept = run_cell(made, (prefill, decode))
    assert kept.attainment == found[COMPRESSED].attainment >= joint_elastic.WANTED
    assert found[COMPRESSED].gpus == pytest.approx(prefill + decode)
    for fewer in ((prefill - 1, decode), (prefill, decode - 1)):
        assert min(fewer) < 1 or run_cell(made, fewer).attainment < joint_elastic.WANTED


def test_a_worker_is_as_large_as_the_model_needs() -> None:
    trace = STEADY.load()
    one = service_of(LARGE, FOUR, trace)
    two = service_of(LARGE, Setting(hardware="rtx-4090"), trace)
    assert one is not None
    assert two is not None
    assert (one.parallelism.gpus, two.parallelism.gpus) == (1, 2)  # 24.6 GB of weights, on GPUs of 80 and of 24 GB
    assert one.start_up_s > two.start_up_s
