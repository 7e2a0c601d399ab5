from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.cli.planning import read_workload
from tandem.cli.simulated import Traffic
from tandem.sim.arrivals import Gamma, make_trace
from tandem.sim.traces import load_trace
from tandem.spec.errors import SpecError

NOTHING: dict[str, Any] = {
    "trace": None, "format": None, "scale": 1.0, "start_s": 0.0, "duration_s": None, "isl": None, "osl": None, "arrivals": None,
    "requests": None,
}  # fmt: skip


def traffic(**given: Any) -> Traffic:
    return Traffic(**{**NOTHING, **given})


def test_each_replication_of_clients_is_another_day_and_of_a_recording_the_same_arrivals() -> None:
    drawn = traffic(trace="servegen-deepseek-r1", duration_s=300.0, scale=0.5).draw(3, 3)
    assert (
        drawn[0].arrival_s.tolist()
        == load_trace("servegen-deepseek-r1", seed=3, duration_s=300.0, scale=0.5).arrival_s.tolist()
    )
    assert len({trace.arrival_s.tobytes() for trace in drawn}) == 3
    dealt = traffic(trace="mooncake-conversation", start_s=60.0, duration_s=300.0).draw(3, 3)
    assert len({trace.arrival_s.tobytes() for trace in dealt}) == 1
    assert len({trace.isl.tobytes() for trace in dealt}) == 3
    assert len({int(np.sum(trace.isl)) for trace in dealt}) == 1
    assert all(trace.prefix_hash is not None for trace in dealt)


def test_arrivals_for_a_time_or_for_a_number_of_requests() -> None:
    lengths: dict[str, Any] = {"isl": 30, "osl": 3, "arrivals": "gamma:20:cv=3"}
    for duration_s, requests, count in ((50.0, None, None), (None, 70, 70), (None, None, 1000)):
        (trace,) = traffic(**lengths, duration_s=duration_s, requests=requests).draw(5, 1)
        own = make_trace(Gamma(rate_rps=20.0, cv=3.0), (30, 3), count=count, duration_s=duration_s, seed=5)
        assert trace.arrival_s.tobytes() == own.arrival_s.tobytes()
    with pytest.raises(SpecError, match=r"--duration=3.0: cannot be had with --requests"):
        traffic(**lengths, duration_s=3.0, requests=4)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"trace": "azure-code-2023", "format": "xml"}, "--trace-format='xml': must be csv, azure"),
        ({"trace": "azure-code-2023", "start_s": -2.0}, "--start=-2.0: must be 0 or more seconds"),
        ({"trace": "azure-code-2023", "start_s": 1e9}, "--start=1e[+]09: no request"),
        ({"trace": "azure-code-2023", "duration_s": -1.0}, "--duration=-1.0: must be a number above 0"),
        ({"trace": "azure-code-2023", "scale": 0.0}, "--scale=0.0: must be a number above 0"),
        ({"isl": 1, "osl": 1, "arrivals": "gamma:3"}, "--arrivals='gamma:3': needs cv"),
        ({"isl": 1, "osl": 1, "arrivals": "poisson:3", "start_s": 4.0}, "--start=4.0: changes nothing without --trace"),
    ],
)
def test_what_cannot_be_names_its_option(given: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        traffic(**given).draw(0, 1)


def test_a_plan_takes_every_form(tmp_path: Path) -> None:
    workload = read_workload(None, None, "mooncake-conversation")
    assert workload.mean_isl == pytest.approx(12_035.06, abs=0.01)
    assert workload.requests_per_s == pytest.approx(12_030 / 3539.478, rel=1e-6)
    (tmp_path / "log.csv").write_text("request_id,arrival_s,input_tokens,output_tokens\na,0,20,2\nb,4,10,1\n")
    assert read_workload(None, None, str(tmp_path / "log.csv")).mean_isl == 15.0
