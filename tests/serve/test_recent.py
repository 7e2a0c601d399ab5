"""What ended lately, and over which time it is counted."""

from __future__ import annotations

import pytest

from tandem.sched.request import Request
from tandem.serve import recent
from tandem.serve.recent import Recent


def ended(osl: int) -> Request:
    return Request(id="a", isl=8, max_tokens=osl, arrival_s=0.0, osl=osl, first_token_s=0.5, done_s=0.5 + 0.01 * (osl - 1))


def test_tokens_are_counted_over_the_time_that_the_server_runs_up_to_a_minute() -> None:
    now = [100.0]
    watched = Recent(lambda: now[0])
    now[0] = 110.0
    watched.on_finish(ended(50))
    found = watched.to_json()
    assert (found["window_s"], found["requests"], found["tokens_per_s"]) == (10.0, 1, 5.0)
    assert found["ttft_s"] == {"p50": 0.5, "p90": 0.5}
    assert found["tpot_s"]["p50"] == pytest.approx(0.01)
    now[0] = 165.0  # the request is still within the minute
    assert (watched.to_json()["window_s"], watched.to_json()["tokens_per_s"]) == (60.0, 50 / 60)
    now[0] = 171.0
    assert watched.to_json() == {"window_s": 60.0, "requests": 0, "tokens_per_s": 0.0, "ttft_s": None, "tpot_s": None}


def test_where_more_ends_than_is_remembered_the_time_is_that_of_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "_KEPT", 4)
    now = [0.0]
    watched = Recent(lambda: now[0])
    for second in range(20):
        now[0] = float(second)
        watched.on_finish(ended(10))
    found = watched.to_json()
    assert (found["window_s"], found["requests"]) == (3.0, 4)
