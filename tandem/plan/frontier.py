"""The throughput-interactivity frontier: what tok/s/GPU costs in tok/s/user, for every mode."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tandem.plan.rates import TOLERANCE
from tandem.plan.search import PAPER_TTFT_CUTOFF_S, Choice, Searched
from tandem.spec.design import Mode
from tandem.spec.workload import Slo

MAX_POINTS = 40
"""Points kept of each mode's frontier; the ends and the bends survive thinning."""


def pareto_rows(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.int64]:
    """Rows that no other row beats on both x and y, by falling x; of equal rows the first is kept."""
    falling = np.argsort(-x)
    rows = np.sort(falling[y[falling] >= np.maximum.accumulate(y[falling])])  # few, and all of the frontier among them
    order = rows[np.lexsort((-y[rows], -x[rows]))]
    best = np.maximum.accumulate(y[order])
    first = np.concatenate([[True], best[1:] > best[:-1]]) if len(order) else np.zeros(0, dtype=bool)
    return np.asarray(order[first], dtype=np.int64)


def _thin(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    if len(rows) <= MAX_POINTS:
        return rows
    return rows[np.unique(np.round(np.linspace(0, len(rows) - 1, MAX_POINTS)).astype(np.int64))]


def frontier_choices(searched: Searched, mode: Mode, slo: Slo) -> list[Choice]:
    """The frontier of one mode as deployments, under the TTFT bound only: TPOT is the axis one reads.

    Throughput is per GPU in use, so the height of a point does not depend on GPUs that the budget leaves over.
    """
    if mode == "disaggregated":
        return _disaggregated(searched, slo)
    priced = searched.priced[mode]
    ok = np.flatnonzero(priced.ttft_s <= (slo.ttft_s or PAPER_TTFT_CUTOFF_S))
    per_gpu = priced.requests_per_s[ok] / priced.gpus[ok]
    choices = []
    for row in ok[_thin(pareto_rows(1.0 / priced.tpot_s[ok], per_gpu))] if len(ok) else []:
        replicas = int(searched.budget // priced.gpus[row])
        rate, gpus = replicas * float(priced.requests_per_s[row]), int(replicas * priced.gpus[row])
        choices.append(Choice(mode, int(row), replicas, None, 0, rate, gpus, 0.0))
    return choices


def _disaggregated(searched: Searched, slo: Slo) -> list[Choice]:
    rows, decode = searched.prefill_candidates(slo, searched.budget), searched.priced["decode"]
    if not len(rows) or not len(decode.points):
        return []
    # Only decode points on their own (TPOT, rate per GPU) frontier of each instance size can end up on the joint one.
    kept = np.concatenate(
        [
            same[pareto_rows(1.0 / decode.tpot_s[same], decode.requests_per_s[same])]
            for size in np.unique(decode.gpus)
            for same in [np.flatnonzero(decode.gpus == size)]
        ]
    )
    chosen = decode.take(kept)
    m = searched.match(rows, chosen, searched.budget, TOLERANCE)
    if not np.any(m.num_prefill):  # a budget so small that nothing balances
        m = searched.match(rows, chosen, searched.budget, None)
    prefill_gpus = searched.priced["prefill"].gpus[rows]
    gpus = m.num_prefill * prefill_gpus[:, None] + m.num_decode * chosen.gpus[None, :]
    per_gpu = np.where(gpus > 0, m.requests_per_s / np.maximum(gpus, 1), 0.0)
    best = np.argmax(per_gpu, axis=0)
    height = per_gpu[best, np.arange(len(kept))]
    found = np.flatnonzero(height > 0)
    choices = []
    for i in found[_thin(pareto_rows(1.0 / chosen.tpot_s[found], height[found]))] if len(found) else []:
        p = int(best[i])
        choices.append(
            Choice(
                "disaggregated",
                int(kept[i]),
                int(m.num_decode[p, i]),
                int(rows[p]),
                int(m.num_prefill[p, i]),
                float(m.requests_per_s[p, i]),
                int(gpus[p, i]),
                float(m.imbalance[p, i]),
            )
        )
    return choices
