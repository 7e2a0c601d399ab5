"""A machine that was measured is planned for as it was measured: its engine, its formats, its workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import tandem
from tandem.perf.backend import BackendFit, fingerprint
from tandem.perf.closed_loop import STEP_TOKENS
from tandem.perf.efficiency import ROOFLINE
from tandem.perf.estimate import Instances, estimate_disaggregated, perf_model
from tandem.perf.host import ENGINE, MAX_BATCH, HostCalibration, HostFit, keep_host, kinds_of, known_host
from tandem.plan.planner import STEADY
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.design import Parallelism, Precision
from tandem.spec.errors import SpecError
from tandem.spec.hardware import HardwareSpec
from tandem.spec.workload import Workload

MODEL = load_spec("nvidia/NVIDIA-Nemotron-Nano-9B-v2")
OTHER = load_spec("Qwen/Qwen3-8B")
FP32 = Precision(weights="fp32", activations="bf16", kv="fp32")
INT8 = Precision(weights="int8", activations="bf16", kv="fp32")
FIT = BackendFit(step_s=1e-3, prompt=1.0, sequences_max=32, isl_max=1024, gpus_max=1.0)


def machine(name: str, workers: int) -> HardwareSpec:
    gpu = load_hardware("a10g")
    return replace(
        gpu, name=name, fits_from=ROOFLINE, peak_flops=dict.fromkeys(("bf16", "fp32", "int8"), 2e11), scale_up_gpus=workers,
        bandwidth_efficiency=1.0, sources={**gpu.sources, "bandwidth_efficiency": "made up"}, memory_bytes=2**37,
    )  # fmt: skip


def fitted(model: tandem.ModelSpec, precision: Precision) -> HostFit:
    return HostFit(
        model=model.name,
        arch=fingerprint(model),
        kinds=kinds_of(model),
        precision=precision,
        fit=FIT,
        decode_ape=0.0,
        prefill_ape=0.0,
    )


@pytest.fixture(autouse=True)
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANDEM_DATA", str(tmp_path))
    one = HostCalibration(hardware=machine("host", 1), threads=2, fits=(fitted(OTHER, FP32), fitted(MODEL, INT8)))
    return keep_host({"host": one, "host-1": replace(one, hardware=machine("host-1", 2), threads=1)})


def test_backend_and_format_are_those_that_were_measured() -> None:
    assert [perf_model(m, "host", None, None).precision for m in (OTHER, MODEL)] == [FP32, INT8]
    unmeasured = perf_model("meta-llama/Llama-3.1-8B", "host", None, None)
    assert (unmeasured.backend, unmeasured.precision) == (ENGINE, FP32)  # as the other Transformer
    assert perf_model("nvidia/NVIDIA-Nemotron-Nano-12B-v2", "host", None, None).precision == INT8  # as the other hybrid
    assert perf_model(MODEL, "host", "fp32/bf16/fp32", None).precision.weights == "fp32"
    assert perf_model(MODEL, "a10g", None, None).backend == "vllm"
    found = tandem.estimate(model=MODEL, hardware="host", isl=256, osl=64, concurrency=4)
    named = tandem.estimate(
        model=MODEL, hardware="host", isl=256, osl=64, concurrency=4, precision="int8/bf16/fp32", backend=ENGINE
    )
    assert found == named
    assert found.evidence == "calibrated"


def test_the_likest_model_lends_its_coefficients() -> None:
    """A model that was not measured is priced as one of its kind, whichever was measured last."""
    known = known_host("host")
    assert known is not None
    fits = [
        replace(one, precision=FP32, fit=replace(FIT, step_s=step_s))
        for one, step_s in zip(known.fits, (1.0, 2.0), strict=True)
    ]
    for order in (fits, fits[::-1]):
        both = replace(known, fits=tuple(order))
        for name, step_s in (("meta-llama/Llama-3.1-8B", 1.0), ("nvidia/NVIDIA-Nemotron-Nano-12B-v2", 2.0)):
            fit, evidence = both.find(load_spec(name), "fp32")
            assert (fit.step_s, evidence) == (step_s, "transferred")


def test_another_backend_and_more_workers_than_fit_are_refused() -> None:
    with pytest.raises(SpecError, match="backend='vllm': host was measured with Tandem's engine; must be tandem"):
        perf_model(MODEL, "host", None, "vllm")
    workload = Workload.fixed(256, 64)
    with pytest.raises(SpecError, match="gpus=64: host is one machine, where 1 worker fits; use 1"):
        tandem.find_plan(model=MODEL, hardware="host", gpus=64, workload=workload)
    with pytest.raises(SpecError, match="gpus=3: host-1 is one machine, where 2 workers fit; use 2"):
        tandem.estimate(model=MODEL, hardware="host-1", isl=256, osl=64, concurrency=4, gpus=3)
    pools = [Instances(parallelism=Parallelism(), batch=1, replicas=count) for count in (1, 2)]
    with pytest.raises(SpecError, match="gpus=3: host-1"):
        estimate_disaggregated(model=MODEL, hardware="host-1", isl=256, osl=64, prefill=pools[0], decode=pools[1])


def test_a_plan_is_of_batches_that_the_engine_takes_and_says_what_it_is_for() -> None:
    plan = tandem.find_plan(model=MODEL, hardware="host-1", gpus=2, workload=Workload.fixed(256, 64), slo=tandem.Slo(ttft_s=60))
    assert plan.recommended.backend == ENGINE
    assert all(pool.batch <= MAX_BATCH for option in plan.frontier for pool in option.deployment.pools)
    assert STEADY in plan.notes
    assert STEADY not in tandem.find_plan(model=MODEL, hardware="a10g", gpus=2, workload=Workload.fixed(256, 64)).notes


def test_the_engines_limits_are_the_engines() -> None:
    config = pytest.importorskip("tandem.engine.config", reason="pip install tandem-lm[model]").EngineConfig()
    assert (config.max_batch, config.step_tokens) == (MAX_BATCH, STEP_TOKENS)


def test_a_model_is_added_to_what_was_measured_with_the_same_peaks() -> None:
    known = known_host("host")
    assert known is not None
    anew = replace(known, fits=(replace(fitted(OTHER, FP32), decode_ape=0.5), fitted(OTHER, INT8)))
    both = anew.beside(known)
    assert [(one.model, one.precision.weights, one.decode_ape) for one in both.fits] == [
        (MODEL.name, "int8", 0.0),
        (OTHER.name, "fp32", 0.5),
        (OTHER.name, "int8", 0.0),
    ]
    assert anew.beside(None) == anew
    faster = replace(anew, hardware=replace(anew.hardware, memory_bytes_per_s=1e9))
    assert faster.beside(known) == faster


def test_whoever_can_do_without_is_not_stopped_by_a_broken_file(measured: Path) -> None:
    measured.write_text("nonsense")
    assert known_host("host") is None
