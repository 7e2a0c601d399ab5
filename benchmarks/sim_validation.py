"""The simulator against four measured runs of vLLM 0.19: two to calibrate on, two to judge by.

    python benchmarks/sim_validation.py [--shipped]

Calibrates anew (10 s; needs SciPy), or takes the shipped factors, and prints them, and of each run how far simulated means are
from measured ones. Then the same with one assumption changed at a time: what the result rests on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from tandem.perf.backend import PHYSICS
from tandem.perf.efficiency import find_fit
from tandem.perf.estimate import perf_model
from tandem.sim.build import kind_of
from tandem.sim.calibrate import VLLM_0_19, AllReduce, ServingFactors, calibrate, errors, kind_of_run
from tandem.sim.config import Group, SimConfig, WorkerKind
from tandem.sim.measured import CALIBRATION, VALIDATION, MeasuredRun, load_run
from tandem.sim.simulate import run as simulate
from tandem.spec.catalog import load_hardware
from tandem.spec.design import Pool

PRO = load_hardware("rtx-pro-6000")
HEADER = f"{'':42}{'TTFT':>8}{'TPOT':>8}{'tokens/s':>9}{'rms TPOT':>9}{'preempted':>10}"


def show(run: MeasuredRun, kind: WorkerKind) -> None:
    result = simulate(SimConfig(groups=(Group(kind=kind, role="colocated", count=1),)), run.trace)
    found = errors(run, result)
    spread = float(np.sqrt(np.nanmean(np.log(result.requests.tpot_s / run.tpot_s) ** 2)))
    preempted = int(result.requests.preemptions.sum())
    print(f"{run.name:42}{found.ttft:+8.1%}{found.tpot:+8.1%}{found.throughput:+9.1%}{spread:9.1%}{preempted:10}")


def uncalibrated(run: MeasuredRun) -> WorkerKind:
    """The performance model as it ships, with the fit of vLLM on other GPUs."""
    pool = Pool(parallelism=run.parallelism, batch=run.max_batch, chunk_tokens=run.step_tokens)
    return kind_of(perf_model(run.model, run.hardware, "bf16", "vllm"), pool, context=1300.0, blocks=run.blocks)


def section(title: str, names: Iterable[str], kind: Callable[[MeasuredRun], WorkerKind]) -> None:
    print(f"\n{title}\n{HEADER}")
    for name in names:
        run = load_run(name)
        show(run, kind(run))


def main(shipped: bool) -> None:
    began = time.perf_counter()
    factors: ServingFactors = VLLM_0_19 if shipped else calibrate([load_run(name) for name in CALIBRATION])
    if not shipped:
        print(f"calibrated in {time.perf_counter() - began:.1f} s")
    host = factors.host
    print(f"host: {host.step_s * 1e3:.3f} ms a step, {host.sequence_s * 1e6:.1f} us a sequence,", end=" ")
    print(f"{host.chunk_step_s * 1e3:.2f} ms more for a step with prompt tokens")
    for name, gpu in factors.gpus.items():
        print(f"{name}: {gpu.compute:.3f} of its curves' arithmetic, {gpu.bandwidth:.3f} of their bandwidth")
    section("calibration: simulated over measured", CALIBRATION, lambda run: kind_of_run(run, factors))
    section("validation", VALIDATION, lambda run: kind_of_run(run, factors))
    section("uncalibrated, as tandem.perf ships", (*CALIBRATION, *VALIDATION), uncalibrated)
    fastest = find_fit(PRO, "allreduce", "bf16")[0].bandwidth_efficiency * PRO.scale_up_bytes_per_s
    nominal = replace(factors, all_reduce=AllReduce(each_s=0.0, bytes_per_s=fastest))
    section("all-reduce as the fastest engine's, not vLLM 0.19's", VALIDATION, lambda run: kind_of_run(run, nominal))
    uneven = replace(factors, imbalance=PHYSICS.imbalance)
    section("busiest experts as physics has them, not the fit of vLLM", VALIDATION, lambda run: kind_of_run(run, uneven))


if __name__ == "__main__":
    main("--shipped" in sys.argv[1:])
