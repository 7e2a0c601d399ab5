"""Predictions against measured serving rows, by group: the answer to "how accurate is it?"."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tandem.perf.calibrate_serving import group_rows, layout_arrays, prefill_arrays, served_batch
from tandem.perf.phases import PerfModel, ServeTime
from tandem.perf.pools import DecodePool, SplitTime, split_times
from tandem.perf.silicon import MeasuredRow
from tandem.spec.workload import Workload


@dataclass(frozen=True, kw_only=True)
class ErrorSet:
    """Errors of one group: absolute percentage errors as fractions, ratio predicted / measured, share inside the interval."""

    name: str
    side: str
    metric: str
    n: int
    median_ape: float
    mean_ape: float
    ratio: float
    coverage: float


@dataclass(frozen=True)
class Predictions:
    """Measured rows with what was predicted for them, in the same order; seconds."""

    rows: list[MeasuredRow]
    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]
    low: dict[str, NDArray[np.float64]]
    high: dict[str, NDArray[np.float64]]
    """Ends of the 80 % interval of either metric, seconds."""


def predict(rows: Iterable[MeasuredRow], progress: Callable[[str], None] = lambda _: None) -> Predictions:
    """Predict TTFT and TPOT of every row as `tandem estimate` would."""
    ordered: list[MeasuredRow] = []
    columns: list[NDArray[np.float64]] = []
    for group in group_rows(rows).values():
        first = group[0]
        progress(f"{first.model.name} on {first.hardware.name}")
        perf = PerfModel(first.model, first.hardware, first.precision, first.backend, split=first.prefill is not None)
        layout, workload = layout_arrays(group), Workload.fixed(first.isl, first.osl)
        asked = np.array([float(r.concurrency) for r in group])
        served: ServeTime | SplitTime
        if first.prefill is not None:
            replicas = np.array([float(r.replicas) for r in group])
            limit = served_batch(perf, layout, asked / replicas, workload)
            served = split_times(perf, prefill_arrays(group), DecodePool(layout, limit, replicas), workload, asked)
        else:
            batch = served_batch(perf, layout, asked, workload)
            served = perf.colocated(layout, batch, workload, closed_loop=True, waiting=asked - batch)
        fit = perf.backend_fit
        ordered += group
        ends = (fit.ttft_p10, fit.ttft_p90), (fit.tpot_p10, fit.tpot_p90)
        times = served.ttft_s, served.tpot_s
        lows = [t * min(low, 1.0) for t, (low, _) in zip(times, ends, strict=True)]
        highs = [t * max(high, 1.0) for t, (_, high) in zip(times, ends, strict=True)]
        columns.append(np.stack([*times, *lows, *highs]))
    ttft, tpot, ttft_low, tpot_low, ttft_high, tpot_high = np.concatenate(columns, axis=1)
    low, high = {"ttft_s": ttft_low, "tpot_s": tpot_low}, {"ttft_s": ttft_high, "tpot_s": tpot_high}
    return Predictions(ordered, ttft, tpot, low, high)


def error_sets(p: Predictions) -> list[ErrorSet]:
    """Errors of TPOT and TTFT for all rows, by family, by GPU, by backend and by family and backend, each side apart."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, r in enumerate(p.rows):
        family = r.model.family
        if r.prefill is not None:
            for name in ("disaggregated", f"disaggregated {r.backend}", f"disaggregated {r.backend} {r.hardware.name}"):
                groups[(r.side, name)].append(i)
            continue
        for name in (
            "all",
            family,
            r.hardware.name,
            r.backend,
            f"{family} {r.backend}",
            f"{family} {r.backend} {r.hardware.name}",
        ):
            groups[(r.side, name)].append(i)
    order = {"validation": 0, "calibration": 1}
    sets = []
    for (side, name), members in sorted(groups.items(), key=lambda kv: (order[kv[0][0]], kv[0][1] != "all", kv[0][1])):
        sets += [_errors(p, np.array(members), name, side, metric) for metric in ("tpot_s", "ttft_s")]
    return sets


def _errors(p: Predictions, members: NDArray[np.int64], name: str, side: str, metric: str) -> ErrorSet:
    measured = np.array([getattr(p.rows[i], metric) for i in members])
    ratio = getattr(p, metric)[members] / measured
    ape = np.abs(ratio - 1.0)
    inside = (p.low[metric][members] <= measured) & (measured <= p.high[metric][members])
    return ErrorSet(
        name=name,
        side=side,
        metric=metric,
        n=len(members),
        median_ape=float(np.median(ape)),
        mean_ape=float(np.mean(ape)),
        ratio=float(np.median(ratio)),
        coverage=float(np.mean(inside)),
    )
