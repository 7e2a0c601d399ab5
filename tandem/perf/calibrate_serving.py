"""Fit what serving backends make of the kernels, on the calibration side of the measured rows only.

The formulas are those of backend.py; the fit is hierarchical (hierarchy.py), so that a backend's many rows carry its few, and
a model on a GPU that nobody measured still gets what its backend, GPU generation and family have shown (docs/adr/0007).
"""

from __future__ import annotations

import datetime as dt
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from tandem.perf.backend import (
    DOMAIN,
    PHYSICS,
    SHARED_LEVELS,
    TERMS,
    TPOT_TERMS,
    TTFT_TERMS,
    ServingFits,
    fingerprint,
    fit_family,
    group_keys,
)
from tandem.perf.costs import Layout
from tandem.perf.hierarchy import Hierarchy, Level, fit_hierarchy
from tandem.perf.phases import PerfModel
from tandem.perf.pools import PrefillPool, exposed_transfer_s, prompt_times
from tandem.perf.silicon import MeasuredRow
from tandem.spec.errors import TandemError
from tandem.spec.workload import Workload

Array = NDArray[np.float64]
PRIOR_SD = {"tpot": (0.2, 0.1, 0.2, 0.2, 0.1, 0.1), "ttft": (0.5, 0.3, 0.3, 0.3, 0.3, 0.2)}
"""Prior standard deviation of a group's logarithms, by level of `group_keys`: a backend may differ from another by a third,
one GPU generation or model of it by a fifth. TTFT is noisier (docs/accuracy.md)."""
COMMON_SD = {"tpot": 0.5, "ttft": 1.0}
SOFTNESS = {"tpot": 0.25, "ttft": 0.25}
FIRM = {
    "network": 2.5,
    "sequence_s": 2.0,
    "gemm": 6.0,
    "quantised_gemm": 1.5,
    "attention": 1.5,
    "moe": 1.5,
    "other": 1.5,
    "prefill": 1.5,
}
"""How much smaller the prior standard deviation of a term is: work was measured operator by operator, so it is held closer to
its curve than host time and collectives inside a graph; bf16 matrix multiplications are known best."""
FOLDS = 10
"""Parts in which settings are held out to measure what the coefficients leave unexplained."""
MIN_SPREAD_ROWS = 30
"""Fewest held-out rows for which a backend's family has an interval of its own."""


class RowTerms(NamedTuple):
    """What the coefficients weigh, in measured rows: `tpot` seconds [rows, TPOT_TERMS]; for TTFT the prompt's seconds, those of
    all prompts that start together, requests that wait per request served, and a prefill pool's seconds for all requests."""

    tpot: Array
    prompt_s: Array
    burst_s: Array
    waiting: Array
    cycle_s: Array
    sequences: Array
    """Of an attention group; a record of where rows stood, no term."""


def group_rows(rows: Iterable[MeasuredRow]) -> dict[tuple[str, ...], list[MeasuredRow]]:
    """Rows that share a performance model and lengths, so that one vectorised call prices them all."""
    groups: dict[tuple[str, ...], list[MeasuredRow]] = defaultdict(list)
    for r in rows:
        setting = (r.model.name, r.hardware.name, r.backend, r.precision, r.isl, r.osl, r.prefill is None, r.draft_tokens)
        groups[tuple(str(x) for x in setting)].append(r)
    return groups


def layout_arrays(rows: Sequence[MeasuredRow]) -> Layout:
    """Parallelism of many rows."""
    axes = [[p.tp, p.pp, p.ep, p.dp, p.cpp] for p in (r.parallelism for r in rows)]
    return Layout(*np.array(axes, dtype=np.float64).T)


def prefill_arrays(rows: Sequence[MeasuredRow]) -> PrefillPool:
    """Prefill pools of many disaggregated rows."""
    pools = [r.prefill for r in rows if r.prefill is not None]
    axes = [[p.tp, p.pp, p.ep, p.dp, p.cpp] for p in (pool.parallelism for pool in pools)]
    batch, replicas = np.array([[pool.batch, pool.replicas] for pool in pools], dtype=np.float64).T
    return PrefillPool(Layout(*np.array(axes, dtype=np.float64).T), batch, replicas)


def served_batch(perf: PerfModel, layout: Layout, concurrency: Array, workload: Workload) -> Array:
    """Requests that memory holds of those in flight; where not even one seems to fit, one is served (the row exists)."""
    use = perf.memory.use(layout, workload.final_context, min(2048.0, workload.mean_isl))
    return np.clip(use.max_batch(layout), 1.0, concurrency)


def decode_slots(rows: Sequence[MeasuredRow]) -> Array:
    """Largest batch of a decode instance that disaggregated rows state."""
    return np.array([np.inf if r.decode_batch is None else float(r.decode_batch) for r in rows])


def row_terms(rows: Sequence[MeasuredRow]) -> RowTerms:
    """The terms of rows that `group_rows` put together."""
    first = rows[0]
    split = first.prefill is not None
    perf = PerfModel(first.model, first.hardware, first.precision, first.backend, split=split, draft_tokens=first.draft_tokens)
    layout, workload = layout_arrays(rows), Workload.fixed(first.isl, first.osl)
    asked, one = np.array([float(r.concurrency) / r.replicas for r in rows]), np.ones(len(rows))
    batch = served_batch(perf, layout, asked, workload)
    if split:
        # Of the requests in flight those decode that are not in their first token: Little's law on the measured times.
        decoding = [r.tpot_s * (r.osl - 1) / (r.ttft_s + r.tpot_s * (r.osl - 1)) for r in rows]
        batch = np.clip(asked * decoding, 1.0, np.minimum(batch, decode_slots(rows)))
    load = perf.decode_load(layout, batch, workload)
    launch, work = perf.pricer.classes(layout, load)
    seqs = np.asarray(load.decode_seqs)
    if split:
        times = prompt_times(perf, prefill_arrays(rows), workload, np.array([float(r.concurrency) for r in rows]))
        tpot_s = np.array([r.tpot_s for r in rows])
        prompt_s = times.prompt_s(times.alone_s + tpot_s * max(first.osl - 1.0, 1.0)) * one
        prompt_s = prompt_s + exposed_transfer_s(perf, prefill_arrays(rows).layout, workload, prompt_s)
        burst_s, cycle_s = (np.asarray(x) * one for x in (times.burst_s, times.cycle_s))
        stall_s, waiting = 0.0 * one, 0.0 * one
    else:
        prompt_s = perf.prefill_kernels_s(layout, one, float(first.isl), one)
        burst_s, cycle_s = seqs * prompt_s, 0.0 * one
        stall_s, waiting = prompt_s * (seqs - 1.0) / max(first.osl - 1.0, 1.0), (asked - batch) / batch
    columns = {
        "step_s": one,
        "sequence_s": seqs,
        "launch": launch,
        **work,
        "prefill": stall_s,
        "imbalance": (work["moe"] + work["moe_compute"]) * (np.asarray(layout.ep) > 1),
    }
    columns = {name: seconds / (1.0 if name == "prefill" else perf.tokens_per_step) for name, seconds in columns.items()}
    tpot = np.stack([getattr(PHYSICS, name) * columns[name] * one for name in TPOT_TERMS], axis=1)
    return RowTerms(tpot, prompt_s, burst_s, waiting, cycle_s, seqs)


def ttft_terms(terms: RowTerms, tpot_s: Array, osl: Array) -> Array:
    """Seconds of TTFT's terms [rows, TTFT_TERMS], given the TPOT that the rows are predicted to have."""
    served_s = terms.prompt_s + tpot_s * (osl - 1.0)
    columns = {
        "host_s": np.ones_like(tpot_s),
        "prompt": terms.prompt_s,
        "burst": terms.burst_s,
        "queue": terms.waiting * served_s + np.maximum(terms.cycle_s - served_s, 0.0),
        "pause": tpot_s,
    }
    return np.stack([getattr(PHYSICS, name) * columns[name] for name in TTFT_TERMS], axis=1)


@dataclass(frozen=True)
class Table:
    """Measured rows with all that fitting and judging them needs, in one order."""

    rows: list[MeasuredRow]
    terms: RowTerms
    keys: list[tuple[str, ...]]

    @classmethod
    def of(cls, rows: Iterable[MeasuredRow], progress: Callable[[str], None] = lambda _: None) -> Table:
        """Price the terms of rows, setting by setting."""
        members: list[MeasuredRow] = []
        parts = []
        for group in group_rows(rows).values():
            progress(f"{group[0].model.name} on {group[0].hardware.name}")
            members += group
            parts.append(row_terms(group))
        keys = [group_keys(r.backend, r.hardware, r.model, r.precision.weights, r.prefill is not None) for r in members]
        return cls(members, RowTerms(*(np.concatenate(column) for column in zip(*parts, strict=True))), list(keys))

    def domain(self, i: int) -> tuple[float, ...]:
        """Where a row stood, in the order of backend.DOMAIN."""
        row = self.rows[i]
        pools = [row.parallelism] + ([row.prefill.parallelism] if row.prefill else [])
        stages = max(p.pp * p.cpp for p in pools)
        return float(self.terms.sequences[i]), row.isl, max(p.gpus for p in pools), stages, row.draft_tokens

    def measured(self, metric: str) -> Array:
        """Measured seconds of a metric."""
        return np.array([getattr(r, f"{metric}_s") for r in self.rows])

    def take(self, kept: NDArray[np.bool_]) -> Table:
        """Some of the rows."""
        index = np.flatnonzero(kept)
        picked = RowTerms(*(column[index] for column in self.terms))
        return Table([self.rows[i] for i in index], picked, [self.keys[i] for i in index])

    def metric_terms(self, metric: str, tpot_s: Array) -> Array:
        """Terms of a metric; TTFT's need the predicted TPOT."""
        osl = np.array([float(r.osl) for r in self.rows])
        return self.terms.tpot if metric == "tpot" else ttft_terms(self.terms, tpot_s, osl)

    def fit(self) -> dict[str, Hierarchy]:
        """Both metrics' coefficients on these rows; TTFT stands on the TPOT that they predict."""
        found: dict[str, Hierarchy] = {}
        tpot_s = self.measured("tpot")
        for metric in TERMS:
            levels = [
                Level([key[i] for key in self.keys], sd, by_term=i < SHARED_LEVELS) for i, sd in enumerate(PRIOR_SD[metric])
            ]
            found[metric] = fit_hierarchy(
                self.metric_terms(metric, tpot_s),
                self.measured(metric),
                levels,
                common_sd=COMMON_SD[metric],
                softness=SOFTNESS[metric],
                stiffness=np.array([FIRM.get(term, 1.0) for term in TERMS[metric]]),
            )
            tpot_s = found["tpot"].predict(self.terms.tpot, self.keys)
        return found

    def predict(self, fits: dict[str, Hierarchy]) -> dict[str, Array]:
        """Predicted seconds of both metrics."""
        tpot_s = fits["tpot"].predict(self.terms.tpot, self.keys)
        return {m: fits[m].predict(self.metric_terms(m, tpot_s), self.keys) for m in TERMS}

    def held_out(self, parts: Sequence[str], fit_on: NDArray[np.bool_] | None = None) -> dict[str, Array]:
        """Predictions of every row by coefficients fitted without its part; `fit_on` restricts what is ever fitted."""
        labels = np.array(parts)
        allowed = np.ones(len(labels), dtype=bool) if fit_on is None else fit_on
        found = {metric: np.full(len(labels), np.nan) for metric in TERMS}
        for part in np.unique(labels):
            out = labels == part
            train = allowed & ~out
            if not train.any():
                continue
            predicted = self.take(out).predict(self.take(train).fit())
            for metric in TERMS:
                found[metric][out] = predicted[metric]
        return found


def fold_of(row: MeasuredRow) -> str:
    """The part of a row for cross-validation: rows of one setting (model, GPU, format, lengths) stay together."""
    key = f"{fingerprint(row.model)}|{row.hardware.name}|{row.precision.weights}|{row.isl}|{row.osl}"
    return str(zlib.crc32(key.encode()) % FOLDS)


def calibrate_serving(rows: Iterable[MeasuredRow], progress: Callable[[str], None] = lambda _: None) -> ServingFits:
    """Serving fits from rows of the calibration side; rows of the validation side are refused, not dropped in silence.

    The percentiles are those of rows held out of the fit: by setting for `calibrated` predictions, by whole model and
    by whole GPU for `transferred` ones, so that an interval tells what to expect of what nobody measured.
    """
    kept = list(rows)
    if any(r.side != "calibration" for r in kept):
        raise TandemError("calibration rows: validation rows among them; the split keeps them for judging")
    if not kept:
        raise TandemError("calibration rows: none left to fit")
    table = Table.of(kept, progress)
    progress("fitting")
    fits = table.fit()
    models = {fingerprint(r.model): r.model.name for r in reversed(kept)}
    return ServingFits(
        common=common_terms(fits), groups=group_entries(table, fits), spread=_spread(table, progress), models=models
    )


def _rounded(values: Array) -> list[float]:
    return [round(float(v), 4) for v in values]


def common_terms(fits: dict[str, Hierarchy]) -> dict[str, dict[str, float]]:
    """What all backends share, by metric and term."""
    return {m: dict(zip(TERMS[m], _rounded(fits[m].common), strict=True)) for m in TERMS}


def group_entries(table: Table, fits: dict[str, Hierarchy]) -> dict[str, dict[str, Any]]:
    """Each group's rows, deviations and, where ServingFits.find asks for it, domain."""
    groups: dict[str, dict[str, Any]] = {}
    for level in range(len(table.keys[0])):
        names = np.array([key[level] for key in table.keys])
        for name in np.unique(names[names != ""]):
            inside = names == name
            entry: dict[str, Any] = {"num_rows": int(inside.sum())}
            for metric, terms in TERMS.items():
                values = _rounded(fits[metric].deviations[str(name)])
                entry[metric] = dict(zip(terms, values, strict=True)) if level < SHARED_LEVELS else values[0]
            if level in (0, len(table.keys[0]) - 1):
                stood = np.array([table.domain(int(i)) for i in np.flatnonzero(inside)]).max(axis=0)
                entry |= dict(zip(DOMAIN, (float(x) for x in stood), strict=True))
            groups[str(name)] = entry
    return groups


def _spread(table: Table, progress: Callable[[str], None]) -> dict[str, dict[str, tuple[float, float]]]:
    """10th and 90th percentile of measured / predicted of held-out rows, by metric and `evidence backend [family]`."""
    cuts = {
        "calibrated": [[fold_of(r) for r in table.rows]],
        "near": [[key[-1] for key in table.keys]],
        "transferred": [[fingerprint(r.model) for r in table.rows], [r.hardware.name for r in table.rows]],
    }
    ratios: dict[str, dict[str, list[Array]]] = {m: defaultdict(list) for m in TERMS}
    for evidence, ways in cuts.items():
        for parts in ways:
            progress(f"holding out rows: {evidence}")
            found = table.held_out(parts)
            for metric, predicted in found.items():
                ratio = table.measured(metric) / predicted
                for i in np.flatnonzero(np.isfinite(ratio)):
                    row = table.rows[i]
                    ratios[metric][f"{evidence} {row.backend}"].append(ratio[i])
                    kind = fit_family(row.model) if row.prefill is None else "pools"
                    ratios[metric][f"{evidence} {row.backend} {kind}"].append(ratio[i])
    spread: dict[str, dict[str, tuple[float, float]]] = {m: {} for m in TERMS}
    for metric, groups in ratios.items():
        for name, values in sorted(groups.items()):
            if name.count(" ") > 1 and len(values) < MIN_SPREAD_ROWS:
                continue
            low, high = np.quantile(np.array(values), [0.1, 0.9])
            spread[metric][name] = (round(float(low), 4), round(float(high), 4))
    for metric in ratios:
        for name in [n for n in spread[metric] if n.startswith("transferred ")]:  # never surer of what nobody measured
            own = name.replace("transferred", "calibrated", 1)
            if own in spread[metric]:
                (low, high), (low_own, high_own) = spread[metric][name], spread[metric][own]
                spread[metric][name] = min(low, low_own), max(high, high_own)
    for intervals in spread.values():  # too few rows to hold anything out: a factor of two, as for KERNELS_ONLY
        for backend in {key[0] for key in table.keys}:
            for evidence in cuts:
                intervals.setdefault(f"{evidence} {backend}", (0.5, 2.0))
    return spread


def format_fits(fits: ServingFits, source: str) -> str:
    """The YAML text that `backend.parse_fits` reads, with where it comes from."""
    rows = sum(g["num_rows"] for name, g in fits.groups.items() if " " not in name)
    data = {
        "provenance": {
            "source": source,
            "side": "calibration (docs/accuracy.md: crc32 of the setting, three quarters)",
            "num_rows": rows,
            "fitted": str(dt.date.today()),
            "by": "tandem calibrate serving",
            "values": "natural logarithms over the defaults of tandem.perf.backend.BackendFit",
            "spread": "measured / predicted, 10th and 90th percentile, of rows held out of the fit",
        },
        "models": dict(sorted(fits.models.items())),
        "common": fits.common,
        "spread": {m: {k: list(v) for k, v in groups.items()} for m, groups in fits.spread.items()},
        "groups": dict(fits.groups),
    }
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=160)


def package_source(path: Path) -> str:
    """How the file of rows is called in provenance lines."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"aiconfigurator-core {version('aiconfigurator-core')} {path.name}"
    except PackageNotFoundError:
        return path.name
