"""What the server adds to the engine's steps on this machine: coefficients fitted to closed loops that were measured over HTTP.

Loops are played step by step (closed_loop.py), by one worker or by one that prefills and one that decodes, with

    step   = k * (step of the engine alone) + step + sequence*g
    prompt = prompt * (kernels + fixed*passes), and host from a client to the engine and back

and between pools steps that are a share longer while a prompt is read, as both use one memory.
No coefficient is negative; errors are relative ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem.perf.backend import BackendFit
from tandem.perf.closed_loop import Loop, engine_loop, pools_loop
from tandem.perf.host import LEAST_SPREAD, ServedRow
from tandem.perf.phases import PerfModel
from tandem.spec.errors import SpecError

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
    return _play(perf.split, rows, [Loop.of(perf, row.isl, row.osl, row.concurrency) for row in rows])


def _play(split: bool, rows: Sequence[ServedRow], loops: Sequence[Loop]) -> tuple[Result, Result]:
    play = pools_loop if split else engine_loop
    times = [play(loop, per_place=row.per_place) for row, loop in zip(rows, loops, strict=True)]
    return np.array([one.ttft_s for one in times]), np.array([one.tpot_s for one in times])


def fit_served(perf: PerfModel, rows: Sequence[ServedRow]) -> ServedFit:
    """Coefficients out of measured loops, starting from those of the engine alone, which `perf.given_fit` holds.

    Raises SpecError for fewer than four rows or one number of requests in flight.
    """
    base = perf.given_fit
    if base is None:
        raise SpecError("perf: has no coefficients of the engine alone to start from")
    if len(rows) < 4 or len({row.concurrency for row in rows}) < 2:
        raise SpecError(f"rows: {len(rows)} served loops; four or more at two numbers in flight tell the server's parts apart")
    fit = replace(
        _fit_loops(perf, base, rows),
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


def _fit_loops(perf: PerfModel, base: BackendFit, rows: Sequence[ServedRow]) -> BackendFit:
    from scipy.optimize import least_squares

    loops = [Loop.of(perf, row.isl, row.osl, row.concurrency) for row in rows]

    def built(found: Result) -> BackendFit:
        k, step_s, sequence_s, prompt, fixed_s, host_s, *beside = (float(value) for value in found)
        kernels = {name: k * getattr(base, name) for name in _KERNELS}
        kernels["step_s"] += step_s
        kernels["sequence_s"] += sequence_s
        return replace(
            base, **kernels, prompt=prompt, prefill=prompt, prompt_s=fixed_s / prompt, host_s=host_s, beside=sum(beside)
        )

    def changed(loop: Loop, found: Result) -> Loop:
        """What `built` does to its times: nothing is priced again."""
        k, step_s, sequence_s, prompt, fixed_s, host_s, *beside = (float(value) for value in found)
        steps = [k * alone + step_s + sequence_s * number for number, alone in enumerate(loop.step_s)]
        token_s = loop.token_s * prompt / base.prompt
        return replace(loop, step_s=(0.0, *steps[1:]), token_s=token_s, pass_s=fixed_s, host_s=host_s, beside=sum(beside))

    def errors(found: Result) -> Result:
        times = _play(perf.split, rows, [changed(loop, found) for loop in loops])
        return np.asarray(np.log(np.concatenate(times) / measured))

    measured = np.array([row.ttft_s for row in rows] + [row.tpot_s for row in rows])
    fixed_s = base.prompt * base.prompt_s
    count = 7 if perf.split else 6  # one worker reads and decodes in turns: nothing is beside it
    scale = np.array([1.0, 1e-3, 1e-4, base.prompt, 1e-2, 1e-2, 0.3])[:count]
    least = np.array([0.5, 0.0, 0.0, 0.2 * base.prompt, 0.0, 0.0, 0.0])[:count]
    found = []
    for prompt in (1.0, 1.6):  # a loop changes by whole steps, so there is more than one valley
        start = np.array([1.0, 2e-4, 2e-5, prompt * base.prompt, prompt * fixed_s + 1e-3, base.host_s + 2e-3, 0.1])[:count]
        found.append(
            least_squares(
                errors,
                start,
                bounds=(least, np.inf),
                x_scale=scale,
                diff_step=np.full(count, 0.02),
                loss="soft_l1",
                f_scale=0.1,
                max_nfev=40,
            )
        )
    return built(min(found, key=lambda one: float(one.cost)).x)
