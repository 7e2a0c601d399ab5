"""benchmarks/headline.py: what is judged of measured ratios, and what is said of a prediction. Nothing is measured here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def headline() -> Iterator[Any]:
    """The script as a module; its neighbours' names are its own again afterwards."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("headline")
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def found(low: float, value: float, high: float, prediction: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "names": ("h", "t"), "ratio": {"value": value, "low": low, "high": high}, "ratio_alone": {"value": 1.0},
        "batch": {"h": 3, "t": 1}, "cap_bytes": 20_000_000, "isl": 350, "osl": 699, "predicted": prediction,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("measured", "printed", "faster", "as_much"),
    [
        ((2.20, 2.52, 2.90), 6.3, True, False),  # docs/study-paper-a.md, first row
        ((1.04, 1.17, 1.32), 3.3, True, False),  # and second: sure to be faster, and by far less than printed
        ((5.0, 6.0, 6.5), 6.3, True, True),
        ((0.9, 1.1, 1.3), 3.3, False, False),
        ((0.9, 2.0, 4.0), 3.3, False, True),  # so wide that it says neither
    ],
)
def test_faster_at_all_and_by_as_much_are_judged_apart(
    headline: Any, measured: tuple[float, float, float], printed: float, faster: bool, as_much: bool
) -> None:
    at_all, by_as_much = headline.against_paper(2, "1k + 8k", printed, found(*measured))
    assert (at_all.id, at_all.holds) == ("H2", faster)
    assert (by_as_much.id, by_as_much.printed, by_as_much.holds) == ("H2b", f"{printed}x", as_much)
    assert at_all.printed == "faster"  # so that no factor stands beside a verdict that is not of it
    assert at_all.ours == by_as_much.ours


def test_a_prediction_outside_the_interval_and_borrowed_coefficients_are_said(headline: Any) -> None:
    ratio = found(1.81, 1.90, 1.99)["ratio"]
    assert headline.told(None, ratio) == "not calibrated"
    assert headline.told({"value": 1.85, "borrowed": []}, ratio) == "1.85x"
    told = headline.told({"value": 1.63, "borrowed": ["nano-compress"]}, ratio)
    assert told == "1.63x with another model's coefficients for nano-compress, outside the interval"


def test_whose_coefficients_are_borrowed_is_found_by_what_was_calibrated(
    headline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a host on which `tandem calibrate host` measured nano-hybrid and nano-transformer."""
    load_spec, find_weights, fingerprint = headline.load_spec, headline.find_weights, "tandem.perf.backend"
    known = {importlib.import_module(fingerprint).fingerprint(load_spec(name)) for name in ("nano-hybrid", "nano-transformer")}

    def find(spec: Any, weights: str) -> tuple[None, str]:
        assert weights == "fp32"
        return None, "calibrated" if importlib.import_module(fingerprint).fingerprint(spec) in known else "transferred"

    rate = SimpleNamespace(tokens_per_s_per_gpu=SimpleNamespace(value=2.0))
    monkeypatch.setattr(headline, "estimate", lambda **_: rate)
    monkeypatch.setattr(headline, "load_host", lambda name: SimpleNamespace(find=find))
    at = headline.Setting("8k + 16k", 20_000_000, 350, 699)
    names = ("nano-compress", "nano-align-hybrid")
    assert all(find_weights(name) for name in names)
    assert headline.predicted(names, at, dict.fromkeys(names, 1)) == {"value": 1.0, "borrowed": ["nano-compress"]}
    names = ("nano-align-hybrid", "nano-align-transformer")
    assert headline.predicted(names, at, dict.fromkeys(names, 1)) == {"value": 1.0, "borrowed": []}
