"""What the server adds to the engine's steps on this machine: coefficients fitted to closed loops that were measured over HTTP.

    TPOT = k * (steps of the engine alone) + step + sequence*g + prefill * (g - 1) / (OSL - 1) * p
    TTFT = host + prompt*p + burst*g*p + pause*TPOT                   (backend.py; g requests in flight, p prompt seconds)

Between pools g decode, of those in flight; TTFT has queue*W beside it, W what a round of all through the prefill worker takes
longer than a request, and no prefill disturbs decode (perf/pools.py). No coefficient is negative; errors are relative ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem.perf.backend import BackendFit
from tandem.perf.host import LEAST_SPREAD, ONE, ServedRow
from tandem.perf.phases import PerfModel
from tandem.perf.pools import DecodePool, PrefillPool, exposed_transfer_s, prompt_times, split_times
from tandem.spec.errors import SpecError
from tandem.spec.workload import Workload

_KERNELS = ("step_s", "sequence_s", "gemm", "quantised_gemm", "moe", "moe_compute", "attention", "other")
"""Coefficients of a decode step that k multiplies."""
Result = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ServedFit:
    """Coefficients, and the median errors of the fitted rows as shares."""

    fit: BackendFit
    ttft_ape: float
    tpot_ape: float


def predict_served(perf: PerfModel, rows: Sequence[ServedRow]) -> tuple[Result, Result]:
    """TTFT and TPOT in seconds of each row, by `perf`: one instance, or where it is split one prefill and one decode worker."""
    ttft, tpot = np.empty(len(rows)), np.empty(len(rows))
    numbered = sorted(enumerate(rows), key=lambda one: (one[1].isl, one[1].osl))
    for (isl, osl), group in groupby(numbered, key=lambda one: (one[1].isl, one[1].osl)):
        members = list(group)
        at = [number for number, _ in members]
        flight = np.array([float(row.concurrency) for _, row in members])
        workload = Workload.fixed(isl, osl)
        if perf.split:
            ones = np.ones_like(flight)
            split = split_times(perf, PrefillPool(ONE, ones, ones), DecodePool(ONE, flight, ones), workload, flight)
            ttft[at], tpot[at] = split.ttft_s, split.tpot_s
        else:
            served = perf.colocated(ONE, flight, workload, closed_loop=True)
            ttft[at], tpot[at] = served.ttft_s, served.tpot_s
    return ttft, tpot


def fit_served(perf: PerfModel, rows: Sequence[ServedRow]) -> ServedFit:
    """Coefficients out of measured loops, starting from those of the engine alone, which `perf.given_fit` holds.

    With the measured times in the place of predicted ones on the right of the formulas, both are linear in what is sought.
    Raises SpecError for fewer than four rows or one number of requests in flight.
    """
    base = perf.given_fit
    if base is None:
        raise SpecError("perf: has no coefficients of the engine alone to start from")
    if len(rows) < 4 or len({row.concurrency for row in rows}) < 2:
        raise SpecError(f"rows: {len(rows)} served loops; four or more at two numbers in flight tell the server's parts apart")
    k, step_s, sequence_s, *prefill = _solve([_tpot_terms(perf, row) for row in rows], [row.tpot_s for row in rows])
    host_s, prompt, burst, pause, *queue = _solve([_ttft_terms(perf, row) for row in rows], [row.ttft_s for row in rows])
    kernels: dict[str, Any] = {name: k * getattr(base, name) for name in _KERNELS}
    kernels["step_s"] += step_s
    kernels["sequence_s"] += sequence_s
    kernels |= {"prefill": prefill[0]} if prefill else {}
    kernels |= {"queue": queue[0]} if queue else {}
    fit = replace(
        base,
        **kernels,
        host_s=host_s,
        prompt=prompt,
        burst=burst,
        pause=pause,
        num_rows=base.num_rows + len(rows),
        sequences_max=float(max(row.concurrency for row in rows)),
        isl_max=float(max(row.isl + row.osl for row in rows)),
    )
    ttft, tpot = predict_served(replace(perf, given_fit=fit), rows)
    ratios = {"ttft": ttft / [row.ttft_s for row in rows], "tpot": tpot / [row.tpot_s for row in rows]}
    intervals: dict[str, Any] = {}
    for metric, ratio in ratios.items():
        low, high = np.percentile(1.0 / ratio, (10, 90))
        intervals[f"{metric}_p10"] = min(float(low), 1.0 - LEAST_SPREAD)
        intervals[f"{metric}_p90"] = max(float(high), 1.0 + LEAST_SPREAD)
    errors = {metric: float(np.median(np.abs(ratio - 1.0))) for metric, ratio in ratios.items()}
    return ServedFit(fit=replace(fit, **intervals), ttft_ape=errors["ttft"], tpot_ape=errors["tpot"])


def _solve(terms: Sequence[Sequence[float]], measured: Sequence[float]) -> list[float]:
    """Coefficients, none negative, with the least squares of relative errors."""
    from scipy.optimize import nnls

    found = nnls(np.array(terms) / np.array(measured)[:, None], np.ones(len(measured)))[0]
    return [float(value) for value in found]


def _tpot_terms(perf: PerfModel, row: ServedRow) -> list[float]:
    """What k, step, sequence and, in one worker, prefill are multiplied by."""
    workload, steps = Workload.fixed(row.isl, row.osl), row.osl - 1.0
    flight = float(row.concurrency)
    if perf.split:  # those that are decoding, by what was measured
        flight = max(1.0, flight * row.tpot_s * steps / (row.ttft_s + row.tpot_s * steps))
        return [float(perf.decode_tpot_s(ONE, np.array(flight), workload)), 1.0, np.ceil(flight)]
    prompt_s = float(perf.prefill_kernels_s(ONE, 1.0, row.isl, 1.0))
    alone = float(perf.decode_tpot_s(ONE, np.array(flight), workload))
    return [alone, 1.0, flight, (flight - 1.0) / steps * prompt_s]


def _ttft_terms(perf: PerfModel, row: ServedRow) -> list[float]:
    """What host, prompt, burst, pause and, between pools, queue are multiplied by."""
    workload, flight = Workload.fixed(row.isl, row.osl), float(row.concurrency)
    if not perf.split:
        prompt_s = float(perf.prefill_kernels_s(ONE, 1.0, row.isl, 1.0))
        return [1.0, prompt_s, flight * prompt_s, row.tpot_s]
    decoding_s = row.tpot_s * (row.osl - 1.0)
    times = prompt_times(perf, PrefillPool(ONE, 1.0, 1.0), workload, np.array(flight))
    prompt_s = float(times.prompt_s(np.array(row.ttft_s + decoding_s)))
    prompt_s += float(exposed_transfer_s(perf, ONE, workload, np.array(prompt_s)))
    queue_s = max(float(times.cycle_s) - prompt_s - decoding_s, 0.0)
    return [1.0, prompt_s, float(times.burst_s), row.tpot_s, queue_s]
