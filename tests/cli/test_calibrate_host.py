"""`tandem calibrate host`, whole but small: steps, a server with one worker and one with two, and what is predicted with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tandem
from tandem.perf.host import known_host
from tandem.spec.local import usable_cores

pytest.importorskip("torch", reason="pip install tandem-lm[model]")
pytest.importorskip("scipy", reason="pip install tandem-lm[calibrate]")
pytest.importorskip("fastapi", reason="pip install tandem-lm[serve]")
pytest.importorskip("aiohttp", reason="pip install tandem-lm[bench]")
from tandem.cli import calibrating_host
from tandem.engine import host, host_rates

LOOPS = ((32, 8, 1, 2), (300, 8, 1, 2), (32, 8, 2, 2), (300, 6, 3, 2))


@pytest.mark.slow
@pytest.mark.skipif(usable_cores() < 2, reason="two workers need two cores")
def test_a_machine_is_measured_and_a_model_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TANDEM_DATA", str(tmp_path))
    monkeypatch.setattr(calibrating_host, "GRID", {False: LOOPS, True: LOOPS})
    monkeypatch.setattr(host, "_BATCHES", (1, 4))
    monkeypatch.setattr(host, "_CONTEXTS", (32, 900))
    monkeypatch.setattr(host_rates, "_SHARE_S", 0.02)
    monkeypatch.setattr(host_rates, "_PRODUCT_S", 0.001)
    calibrating_host.run(["nano-hybrid"], "float32", [1], json_out=True)
    found = json.loads(capsys.readouterr().out)
    (name,) = found["hardware"]
    assert name == "host-1"
    assert found["hardware"][name]["scale_out_bytes_per_s"] > 1e5
    assert len(found["hardware"][name]["products"]) == 12
    assert len(found["fits"]) == 1
    first = known_host(name)
    assert first is not None
    assert (len(first.fits[0].loops), len(first.fits[0].split_loops)) == (len(LOOPS), len(LOOPS))
    predicted = tandem.estimate(model="nano-hybrid", hardware=name, isl=64, osl=16, concurrency=2)
    assert predicted.evidence == "calibrated"

    monkeypatch.setattr(calibrating_host, "can_serve", lambda: False)
    calibrating_host.run(["nano-transformer"], "float32", [1], json_out=False)
    assert "now `--hardware host` means this machine" in " ".join(capsys.readouterr().out.split())
    both = known_host(name)
    assert both is not None
    assert [one.model for one in both.fits] == ["nano-hybrid", "nano-transformer"]
    assert both.hardware == first.hardware


def test_threads_and_formats_that_are_none_are_refused() -> None:
    with pytest.raises(tandem.TandemError, match="--dtype='float8': must be one of float32"):
        calibrating_host.run(None, "float8", None, json_out=False)
    with pytest.raises(tandem.TandemError, match="threads=0"):
        calibrating_host.run(None, "float32", [0], json_out=False)
