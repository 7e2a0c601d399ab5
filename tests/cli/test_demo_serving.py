from __future__ import annotations

import pytest

import tandem
from tandem.cli import demo_serving
from tandem.cli.demonstrating import _served_lines
from tandem.spec.errors import Infeasible


@pytest.mark.slow
def test_without_real_weights_random_ones_are_served_and_the_demo_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_serving, "MODEL", "weights-that-nobody-has")
    served = demo_serving.serve_and_ask()
    assert isinstance(served, demo_serving.Served)
    assert served.random
    assert "random weights" in _served_lines(served)[0]
    assert min(served.handoff_bytes, served.ttft_s, served.tpot_s) > 0
    assert isinstance(served.predicted_ttft_s, tandem.Estimate)
    assert isinstance(served.to_json()["predicted_tpot_s"]["value"], float)


def test_without_the_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    found = demo_serving.serve_and_ask()
    assert isinstance(found, Infeasible)
    assert "tandem-lm[demo]" in found.reason
