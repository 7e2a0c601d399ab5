"""A machine that was measured, made up: two loops of a served model, and coefficients."""

from __future__ import annotations

from dataclasses import replace

from tandem.perf.backend import BackendFit, fingerprint
from tandem.perf.efficiency import ROOFLINE
from tandem.perf.host import HostCalibration, HostFit, ServedRow, keep_host
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.design import Precision
from tandem.spec.model import ModelSpec


def keep_a_host(name: str = "host", model: str = "Qwen/Qwen3-8B") -> ModelSpec:
    """Keep a calibration of one worker where TANDEM_DATA says; the model that it is of."""
    loops = tuple(ServedRow(isl=isl, osl=64, concurrency=4, ttft_s=0.1, tpot_s=0.01) for isl in (64, 256))
    spec = load_spec(model)
    fit = HostFit(
        model=spec.name, arch=fingerprint(spec), precision=Precision(weights="fp32", kv="fp32"), fit=BackendFit(launch=0.0),
        decode_ape=0.0, prefill_ape=0.0, loops=loops, split=BackendFit(launch=0.0), split_loops=loops[:1],
    )  # fmt: skip
    peaks = {"bf16": 1e13, "fp32": 1e13}
    machine = replace(
        load_hardware("a10g"), name=name, fits_from=ROOFLINE, peak_flops=peaks, memory_bytes=2**38, scale_up_gpus=1
    )
    keep_host({name: HostCalibration(hardware=machine, threads=2, fits=(fit,))})
    return spec
