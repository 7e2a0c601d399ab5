"""What a server adds on this machine: known coefficients come back out of made-up loops, in one worker and between two."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tandem.perf.backend import BackendFit, fingerprint
from tandem.perf.efficiency import ROOFLINE
from tandem.perf.estimate import Instances, estimate, estimate_disaggregated
from tandem.perf.host import HostCalibration, HostFit, ServedRow, keep_host
from tandem.perf.host_served import fit_served, predict_served
from tandem.perf.phases import PerfModel
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.design import Parallelism, Precision
from tandem.spec.errors import SpecError

pytest.importorskip("scipy", reason="pip install tandem-lm[calibrate]")
MODEL = load_spec("nvidia/NVIDIA-Nemotron-Nano-9B-v2")
FP32 = Precision(weights="fp32", kv="fp32")
HOST = replace(
    load_hardware("a10g"), name="host", fits_from=ROOFLINE, memory_bytes_per_s=2e11, peak_flops={"bf16": 2e13, "fp32": 2e13},
    bandwidth_efficiency=1.0, sources={**load_hardware("a10g").sources, "bandwidth_efficiency": "made up"},
    memory_bytes=2**38, scale_up_gpus=2,
)  # fmt: skip
ENGINE = BackendFit(
    step_s=1e-3,
    sequence_s=1e-4,
    launch=0.0,
    host_s=1e-3,
    prompt=1.2,
    prompt_s=8e-3,
    sequences_max=32.0,
    isl_max=900.0,
    gpus_max=1.0,
)
POINTS = tuple(product((64, 256, 640), (32, 96), (1, 4, 12)))


def perf(fit: BackendFit = ENGINE, *, split: bool = False) -> PerfModel:
    return PerfModel(MODEL, HOST, FP32, backend="tandem", given_fit=fit, split=split)


def made_up(model: PerfModel) -> list[ServedRow]:
    """Loops that take exactly what a model says."""
    rows = [ServedRow(isl=isl, osl=osl, concurrency=c, ttft_s=1.0, tpot_s=1.0, per_place=2) for isl, osl, c in POINTS]
    times = zip(rows, *predict_served(model, rows), strict=True)
    return [replace(row, ttft_s=float(ttft), tpot_s=float(tpot)) for row, ttft, tpot in times]


def told(k: float, step_s: float, sequence_s: float, prompt: float, **terms: float) -> BackendFit:
    """A server that multiplies the engine's steps by k, adds to each, and has these terms of its own."""
    kernels = dict.fromkeys(("gemm", "quantised_gemm", "moe", "moe_compute", "attention", "other"), k)
    more = {"step_s": k * ENGINE.step_s + step_s, "sequence_s": k * ENGINE.sequence_s + sequence_s}
    return replace(ENGINE, **kernels, **more, prompt=prompt, prefill=prompt, **terms)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("step_s", "sequence_s", "k", "prompt", "prompt_s", "host_s"),
    [(2e-3, 2e-4, 1.1, 1.5, 1e-2, 1e-2), (0.0, 5e-4, 1.4, 1.6, 1.2e-2, 0.0)],
)
def test_served_loops_are_met(
    split: bool, step_s: float, sequence_s: float, k: float, prompt: float, prompt_s: float, host_s: float
) -> None:
    rows = made_up(perf(told(k, step_s, sequence_s, prompt, prompt_s=prompt_s, host_s=host_s), split=split))
    found = fit_served(perf(split=split), rows)
    assert found.ttft_ape < 0.07  # a loop changes by whole steps, so the last percents have no slope to follow
    assert found.tpot_ape < 0.07
    ttft, _ = predict_served(perf(found.fit, split=split), rows)
    assert np.median(np.abs(ttft / [row.ttft_s for row in rows] - 1)) == pytest.approx(found.ttft_ape)
    assert found.fit.tpot_p10 <= 0.9 <= 1.1 <= found.fit.tpot_p90


def test_predictions_are_those_of_the_public_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fitted is what `estimate` says, in one worker and in pools; pools that were not measured are `transferred`."""
    monkeypatch.setenv("TANDEM_DATA", str(tmp_path))
    pools = replace(ENGINE, host_s=0.02, prompt_s=0.01)
    one = HostFit(
        model=MODEL.name, arch=fingerprint(MODEL), precision=FP32, fit=ENGINE, decode_ape=0.0, prefill_ape=0.0, split=pools,
        ttft_ape=0.1, tpot_ape=0.1,
    )  # fmt: skip
    calibration = HostCalibration(hardware=HOST, threads=1, fits=(one,))
    keep_host({"host": calibration})
    row = ServedRow(isl=256, osl=128, concurrency=4, ttft_s=1.0, tpot_s=1.0)
    common = {
        "model": MODEL,
        "hardware": "host",
        "isl": 256,
        "osl": 128,
        "concurrency": 4,
        "precision": FP32,
        "backend": "tandem",
    }
    together = estimate(**common)
    assert (together.ttft_s.value, together.tpot_s.value) == pytest.approx([float(t[0]) for t in predict_served(perf(), [row])])
    prefill, decode = (Instances(parallelism=Parallelism(), batch=batch) for batch in (1, 4))
    apart = estimate_disaggregated(**common, prefill=prefill, decode=decode)
    expected = [float(t[0]) for t in predict_served(perf(pools, split=True), [row])]
    assert (apart.ttft_s.value, apart.tpot_s.value) == pytest.approx(expected)
    assert apart.evidence == together.evidence == "calibrated"
    keep_host({"host": replace(calibration, fits=(replace(one, split=None),))})
    assert estimate_disaggregated(**common, prefill=prefill, decode=decode).evidence == "transferred"


def test_loops_that_tell_nothing_apart_are_refused() -> None:
    rows = made_up(perf())
    with pytest.raises(SpecError, match="3 served loops; four or more at two numbers in flight"):
        fit_served(perf(), rows[:3])
    with pytest.raises(SpecError, match="6 served loops"):
        fit_served(perf(), [row for row in rows if row.concurrency == 4])
    with pytest.raises(SpecError, match="has no coefficients of the engine alone"):
        fit_served(replace(perf(), given_fit=None), rows)
