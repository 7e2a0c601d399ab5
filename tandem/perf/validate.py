"""Predictions against measured serving rows: the answer to "how accurate is it?".

A quarter of the settings was never fitted, and either side is judged apart. held_out.py judges what no row at all was
fitted of, and what each evidence label is worth; peer.py asks another predictor about the same rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tandem.perf.backend import BackendFit
from tandem.perf.calibrate_serving import decode_slots, group_rows, layout_arrays, prefill_arrays, served_batch
from tandem.perf.costs import Layout
from tandem.perf.divide import refuse_parallelism
from tandem.perf.phases import Basis, PerfModel, ServeTime
from tandem.perf.pools import DecodePool, SplitTime, pools_basis, split_times
from tandem.perf.silicon import MeasuredRow
from tandem.spec.design import Parallelism
from tandem.spec.errors import Infeasible, TraceError
from tandem.spec.workload import Workload

METRICS = ("tpot_s", "ttft_s")
SIDES = ("validation", "calibration", "both")
UNIT_FACTOR = 100.0
"""Measured over predicted beyond which a latency is taken to be in another unit: of the shipped rows, TPOT is never 25 times
off, TTFT of single rows up to 430 times (requests that wait), but never of half of a file."""

Array = NDArray[np.float64]
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PeerErrors:
    """Errors of another predictor on the rows of a set that it answers, and Tandem's on those same rows."""

    answered: int
    share: float
    median_ape: float | None
    mean_ape: float | None
    ratio: float | None
    own_median_ape: float | None
    own_mean_ape: float | None


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
    peer: PeerErrors | None = None


@dataclass(frozen=True)
class Predictions:
    """Measured rows with what was predicted for them, in the same order; seconds."""

    rows: list[MeasuredRow]
    ttft_s: Array
    tpot_s: Array
    low: dict[str, Array]
    high: dict[str, Array]
    """Ends of the 80 % interval of either metric, seconds."""
    evidence: list[str] = field(default_factory=list)
    """The label that `tandem estimate` would give each row of the validation side; "refused" where it answers with an error."""

    def take(self, kept: NDArray[np.bool_]) -> Predictions:
        """Some of the rows."""
        index = np.flatnonzero(kept)
        low, high = ({m: ends[m][index] for m in METRICS} for ends in (self.low, self.high))
        labels = [self.evidence[i] for i in index] if self.evidence else []
        return Predictions([self.rows[i] for i in index], self.ttft_s[index], self.tpot_s[index], low, high, labels)

    @staticmethod
    def join(parts: Sequence[Predictions]) -> Predictions:
        """One after another."""
        low = {m: np.concatenate([p.low[m] for p in parts]) for m in METRICS}
        high = {m: np.concatenate([p.high[m] for p in parts]) for m in METRICS}
        rows, labels = [r for p in parts for r in p.rows], [e for p in parts for e in p.evidence]
        return Predictions(
            rows, np.concatenate([p.ttft_s for p in parts]), np.concatenate([p.tpot_s for p in parts]), low, high, labels
        )

    @property
    def validation(self) -> NDArray[np.bool_]:
        """Which rows are on the validation side."""
        return np.array([r.side == "validation" for r in self.rows], dtype=bool)

    @property
    def disaggregated(self) -> NDArray[np.bool_]:
        """Which rows have two pools."""
        return np.array([r.prefill is not None for r in self.rows], dtype=bool)


FitOf = Callable[[MeasuredRow], BackendFit]


def predict(rows: Iterable[MeasuredRow], progress: Progress = lambda _: None, fit_of: FitOf | None = None) -> Predictions:
    """Predict TTFT and TPOT of every row as `tandem estimate` would, by the shipped fits or by `fit_of` each row's setting."""
    ordered: list[MeasuredRow] = []
    columns: list[Array] = []
    evidence: list[str] = []
    for group in group_rows(rows).values():
        first = group[0]
        progress(f"{first.model.name} on {first.hardware.name}")
        given = fit_of(first) if fit_of else None
        split = first.prefill is not None
        perf = PerfModel(first.model, first.hardware, first.precision, first.backend, given, split, first.draft_tokens)
        layout, workload = layout_arrays(group), Workload.fixed(first.isl, first.osl)
        asked, replicas = (np.array([float(getattr(r, name)) for r in group]) for name in ("concurrency", "replicas"))
        served: ServeTime | SplitTime
        if split:
            limit = np.minimum(served_batch(perf, layout, asked / replicas, workload), decode_slots(group))
            served = split_times(perf, prefill_arrays(group), DecodePool(layout, limit, replicas), workload, asked)
            batch = served.batch
        else:
            share = np.ceil(asked / replicas)
            batch = served_batch(perf, layout, share, workload)
            served = perf.colocated(layout, batch, workload, closed_loop=True, waiting=share - batch)
        ordered += group
        labels = [] if fit_of else _labels(perf, group, batch, workload)
        for label, row in zip(labels, group, strict=False):
            evidence.append("refused" if label is None else label.evidence if row.side == "validation" else "")
        fits = [perf.fit_for(label.backend) if label else perf.backend_fit for label in labels or [None] * len(group)]
        times = {"ttft": served.ttft_s, "tpot": served.tpot_s}
        lows = [seconds * [min(getattr(f, f"{m}_p10"), 1.0) for f in fits] for m, seconds in times.items()]
        highs = [seconds * [max(getattr(f, f"{m}_p90"), 1.0) for f in fits] for m, seconds in times.items()]
        columns.append(np.stack([*times.values(), *lows, *highs]))
    ttft, tpot, ttft_low, tpot_low, ttft_high, tpot_high = np.concatenate(columns, axis=1)
    low, high = {"ttft_s": ttft_low, "tpot_s": tpot_low}, {"ttft_s": ttft_high, "tpot_s": tpot_high}
    return Predictions(ordered, ttft, tpot, low, high, evidence)


def _labels(perf: PerfModel, group: Sequence[MeasuredRow], batch: Array, workload: Workload) -> list[Basis | None]:
    """What each prediction rests on; None for rows that `tandem estimate` refuses."""
    prompts = Workload.fixed(group[0].isl, 1)
    labels: list[Basis | None] = []
    for row, b in zip(group, batch, strict=True):
        pools = [(row.parallelism, workload)] + ([(row.prefill.parallelism, prompts)] if row.prefill else [])
        if not all(_fits(perf, parallelism, served) for parallelism, served in pools):
            labels.append(None)
            continue
        layout = Layout.of(row.parallelism)
        if row.prefill is None:
            labels.append(perf.basis(layout, perf.decode_load(layout, b, workload)))
        else:
            labels.append(pools_basis(perf, prefill_arrays([row]), layout, b, workload))
    return labels


def _fits(perf: PerfModel, parallelism: Parallelism, workload: Workload) -> bool:
    """Whether the parallelism divides the model, and memory holds one sequence: what `tandem estimate` refuses otherwise."""
    if isinstance(refuse_parallelism(perf.model, parallelism), Infeasible):
        return False
    layout = Layout.of(parallelism)
    use = perf.memory.use(layout, workload.final_context, min(2048.0, workload.mean_isl))
    return bool(use.max_batch(layout) >= 1)


def refuse_wrong_units(p: Predictions) -> None:
    """TraceError where measured latencies are so far from the predicted ones that they must be in another unit."""
    for metric in METRICS:
        factor = measured(p, metric) / getattr(p, metric)
        typical = factor if metric == "tpot_s" else np.full(1, np.median(factor))
        wrong = np.flatnonzero((typical > UNIT_FACTOR) | (typical < 1.0 / UNIT_FACTOR))
        if len(wrong):
            row = p.rows[int(wrong[0])]
            at = f"{row.where}: " if row.where else ""
            raise TraceError(
                f"{at}row {row.row_id!r}: {metric}={getattr(row, metric):g} is {factor[wrong[0]]:,.3g} times what is predicted "
                f"({getattr(p, metric)[wrong[0]]:.3g} s); check its unit: {metric} is seconds, {metric[:-1]}ms milliseconds"
            )


def measured(p: Predictions, metric: str) -> Array:
    """Measured seconds of a metric, in the order of the rows."""
    return np.array([getattr(r, metric) for r in p.rows])


def groups_of(r: MeasuredRow) -> tuple[str, ...]:
    """The sets that a row counts in, by mode, family, GPU and backend."""
    if r.prefill is not None:
        return "disaggregated", f"disaggregated {r.backend}", f"disaggregated {r.backend} {r.hardware.name}"
    family, gpu = r.model.family, r.hardware.name
    return "all", family, gpu, r.backend, f"{family} {r.backend}", f"{family} {r.backend} {gpu}"


def error_sets(p: Predictions, peer: dict[str, tuple[float, float]] | None = None) -> list[ErrorSet]:
    """Errors of TPOT and TTFT for all rows, by family, by GPU, by backend and by family and backend, each side apart.

    `peer` are another predictor's TTFT and TPOT in seconds by row id, of the rows that it answers.
    """
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, r in enumerate(p.rows):
        for name in groups_of(r):
            groups[(r.side, name)].append(i)
    sets = []
    for (side, name), members in sorted(groups.items(), key=lambda kv: (SIDES.index(kv[0][0]), kv[0][1] != "all", kv[0][1])):
        sets += [errors_of(p, np.array(members), name, side, metric, peer) for metric in METRICS]
    return sets


def errors_of(
    p: Predictions,
    members: NDArray[np.int64],
    name: str,
    side: str,
    metric: str,
    peer: dict[str, tuple[float, float]] | None = None,
) -> ErrorSet:
    """Errors of one metric on some rows, by index."""
    truth = measured(p, metric)[members]
    ratio = getattr(p, metric)[members] / truth
    ape = np.abs(ratio - 1.0)
    inside = (p.low[metric][members] <= truth) & (truth <= p.high[metric][members])
    return ErrorSet(
        name=name,
        side=side,
        metric=metric,
        n=len(members),
        median_ape=float(np.median(ape)),
        mean_ape=float(np.mean(ape)),
        ratio=float(np.median(ratio)),
        coverage=float(np.mean(inside)),
        peer=_peer_errors([p.rows[i] for i in members], metric, ape, peer)
        if peer is not None and side == "validation"
        else None,
    )


def _peer_errors(rows: Sequence[MeasuredRow], metric: str, own: Array, peer: dict[str, tuple[float, float]]) -> PeerErrors:
    which = ("ttft_s", "tpot_s").index(metric)
    known = np.array([r.row_id in peer for r in rows], dtype=bool)
    count = int(known.sum())
    if not count:
        nothing = dict.fromkeys(("median_ape", "mean_ape", "ratio", "own_median_ape", "own_mean_ape"))
        return PeerErrors(answered=0, share=0.0, **nothing)
    ratio = np.array([peer[r.row_id][which] / getattr(r, metric) for r in rows if r.row_id in peer])
    ape = np.abs(ratio - 1.0)
    return PeerErrors(
        answered=count,
        share=count / len(rows),
        median_ape=float(np.median(ape)),
        mean_ape=float(np.mean(ape)),
        ratio=float(np.median(ratio)),
        own_median_ape=float(np.median(own[known])),
        own_mean_ape=float(np.mean(own[known])),
    )


def answered(p: Predictions, peer: dict[str, tuple[float, float]] | None = None) -> dict[str, dict[str, float]]:
    """By mode, how many usable rows there are and how many `tandem estimate` answers; of the peer, on the validation side."""
    shares: dict[str, dict[str, float]] = {}
    finite = np.isfinite(p.ttft_s) & np.isfinite(p.tpot_s) & (np.array(p.evidence) != "refused")
    for mode, inside in (("colocated", ~p.disaggregated), ("disaggregated", p.disaggregated)):
        usable, count = int(inside.sum()), int((inside & finite).sum())
        if not usable:
            continue
        shares[mode] = {"usable": usable, "answered": count, "share": count / usable}
        if peer is not None:
            asked = [p.rows[i].row_id for i in np.flatnonzero(inside & p.validation)]
            count = sum(name in peer for name in asked)
            shares[mode] |= {"peer_asked": len(asked), "peer_answered": count, "peer_share": count / max(len(asked), 1)}
    return shares
