"""Calibration of this machine: known coefficients come back out of made-up steps, and predictions rest on them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tandem
from tandem.perf.backend import BackendFit
from tandem.perf.efficiency import ROOFLINE
from tandem.perf.host import ONE, HostCalibration, HostFit, StepRow, fit_steps, keep_host, load_host
from tandem.perf.phases import PerfModel
from tandem.perf.step import StepPricer
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.design import Precision
from tandem.spec.errors import SpecError
from tandem.spec.hardware import HardwareSpec

pytest.importorskip("scipy", reason="pip install tandem-lm[calibrate]")
MODEL = load_spec("nvidia/NVIDIA-Nemotron-Nano-9B-v2")
FP32 = Precision(weights="fp32", kv="fp32")
HOST = replace(
    load_hardware("a10g"), name="host", fits_from=ROOFLINE, memory_bytes_per_s=2e10, peak_flops={"bf16": 2e11, "fp32": 2e11},
    bandwidth_efficiency=1.0, sources={**load_hardware("a10g").sources, "bandwidth_efficiency": "made up"},
    memory_bytes=2**38,
)  # fmt: skip


def made_up(fit: BackendFit, hardware: HardwareSpec = HOST) -> list[StepRow]:
    """Steps that take exactly what coefficients say."""
    pricer = StepPricer(MODEL, hardware, FP32)

    def seconds(row: StepRow) -> float:
        work = {name: float(value) for name, value in pricer.classes(ONE, row.load)[1].items()}
        gemm = sum(work[name] for name in ("gemm", "quantised_gemm", "moe", "moe_compute"))
        if row.batch:
            fixed = fit.step_s + fit.sequence_s * row.batch
            return fixed + fit.gemm * gemm + fit.attention * work["attention"] + fit.other * work["other"]
        return fit.prompt * (math.ceil(row.isl / 256) * fit.prompt_s + gemm + work["attention"] + work["other"])

    rows = [StepRow(batch=b, context=c, isl=0, seconds=1.0) for b, c in product((1, 2, 4, 8, 16, 32), (64, 256, 1024))]
    rows += [StepRow(batch=0, context=0, isl=isl, seconds=1.0) for isl in (32, 128, 512)]
    return [replace(row, seconds=seconds(row)) for row in rows]


@settings(deadline=None)
@given(
    step=st.floats(0, 0.1), sequence=st.floats(0, 1e-2), gemm=st.floats(0.5, 4), attention=st.floats(0.5, 4),
    other=st.floats(0.5, 4), host=st.floats(0, 0.1), prompt=st.floats(0.5, 4),
)  # fmt: skip
def test_coefficients_of_steps_come_back(
    step: float, sequence: float, gemm: float, attention: float, other: float, host: float, prompt: float
) -> None:
    given_fit = BackendFit(
        step_s=step, sequence_s=sequence, gemm=gemm, attention=attention, other=other, prompt_s=host, prompt=prompt
    )
    found = fit_steps(MODEL, HOST, FP32, made_up(given_fit))
    assert found.decode_ape < 1e-6
    assert found.prefill_ape < 1e-6
    again = made_up(found.fit)
    for row, same in zip(made_up(given_fit), again, strict=True):
        assert same.seconds == pytest.approx(row.seconds, rel=1e-5)
    assert found.fit.prompt == pytest.approx(prompt, rel=1e-4)


def test_rows_that_tell_nothing_apart_are_refused() -> None:
    rows = made_up(BackendFit())
    with pytest.raises(SpecError, match="have 1 batches"):
        fit_steps(MODEL, HOST, FP32, [row for row in rows if row.batch in (0, 1)])
    with pytest.raises(SpecError, match="have 1 prompts"):
        fit_steps(MODEL, HOST, FP32, [row for row in rows if row.batch or row.isl == 32])


def calibration(**terms: float) -> HostCalibration:
    fit = fit_steps(MODEL, HOST, FP32, made_up(BackendFit(**terms)))
    return HostCalibration(hardware=HOST, threads=2, fits=(fit,))


def test_what_is_kept_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_DATA", str(tmp_path / "data"))
    with pytest.raises(SpecError, match="hardware='host': this machine was not measured so; run `tandem calibrate host`"):
        load_hardware("host")
    assert load_host("host") is None
    found = calibration()
    path = keep_host({"host": found})
    assert path == tmp_path / "data" / "host.json"
    assert load_host("host") == found
    assert load_hardware("HOST") == HOST
    with pytest.raises(SpecError, match=r"host\.json has host; run"):
        load_hardware("host-1")
    keep_host({"host-1": replace(found, hardware=replace(HOST, name="host-1"), threads=1)})
    assert load_host("host") == found
    assert load_hardware("host-1").name == "host-1"
    path.write_text(json.dumps({"host": {"hardware": HOST.to_json(), "threads": 2}}))
    with pytest.raises(SpecError, match="is no calibration of this version"):
        load_host("host")


def test_predictions_are_the_steps_that_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TPOT of a decode pool is the step at that batch and context; a model that was not measured borrows and says so."""
    monkeypatch.setenv("TANDEM_DATA", str(tmp_path))
    terms = {"step_s": 0.01, "sequence_s": 1e-3, "gemm": 1.5}
    keep_host({"host": calibration(**terms)})
    found = tandem.estimate(
        model=MODEL, hardware="host", isl=512, osl=128, concurrency=1, precision="fp32/bf16/fp32", backend="tandem"
    )
    assert found.evidence == "calibrated"
    perf = PerfModel(MODEL, load_hardware("host"), FP32, backend="tandem")
    at = StepRow(batch=8, context=256, isl=0, seconds=0.0)
    row = next(row for row in made_up(BackendFit(**terms)) if (row.batch, row.context) == (8, 256))
    kernels = perf.pricer.kernels(ONE, at.load, perf.backend_fit)
    step_s = perf.backend_fit.step_s + perf.backend_fit.sequence_s * 8 + kernels.work_s
    assert step_s == pytest.approx(row.seconds, rel=1e-5)
    other = tandem.estimate(
        model="meta-llama/Llama-3.1-8B", hardware="host", isl=512, osl=128, concurrency=1, precision="fp32/bf16/fp32",
        backend="tandem",
    )  # fmt: skip
    assert other.evidence == "transferred"
    assert other.tpot_s.low < other.tpot_s.value < other.tpot_s.high


def test_one_fit_a_model_and_format(tmp_path: Path) -> None:
    one = calibration().fits[0]
    half = replace(one, precision=Precision(weights="fp16"), fit=replace(one.fit, gemm=9.0))
    both = replace(calibration(), fits=(one, half))
    assert both.find(MODEL, "fp16") == (half.fit, "calibrated")
    assert both.find(MODEL, "fp32") == (one.fit, "calibrated")
    assert both.find(load_spec("meta-llama/Llama-3.1-8B"), "bf16")[1] == "transferred"
    assert replace(both, fits=()).find(MODEL, "fp32")[1] == "roofline"
    assert isinstance(one, HostFit)
