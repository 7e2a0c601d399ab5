"""Fit what serving backends add to the kernels, on the calibration side of the measured rows only.

For each (backend, GPU generation, model family) five non-negative coefficients explain measured TPOT:

    TPOT = step + sequence * b + launch * T0 + work * T1 + prefill * (b - 1) / (OSL - 1) * T_prefill

by iteratively reweighted non-negative least squares on the relative error, drawn softly towards the coefficients of all
generations of the backend, so that a small group does not run away (facts: serving-fit.md).
"""

from __future__ import annotations

import datetime as dt
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tandem.perf.backend import BackendFit
from tandem.perf.costs import Layout, StepLoad
from tandem.perf.phases import PerfModel
from tandem.perf.silicon import MeasuredRow
from tandem.spec.errors import TandemError
from tandem.spec.workload import Workload

Array = NDArray[np.float64]
TERMS = ("step_s", "sequence_s", "launch_scale", "work_scale", "prefill_scale")
PARENT_ROWS = 8.0
"""Weight, in rows, of the family's coefficients when one generation of it is fitted."""
FOLDS = 4
"""Parts in which settings are held out to measure what the coefficients leave unexplained."""
PHYSICS = np.array([0.0, 0.0, 0.5, 1.0, 1.0])
"""What kernels should show: half of their launch times, all of their work, all of the prefill; host terms are free."""
PHYSICS_SHARE = 0.1
"""Weight of that expectation, as a share of the family's rows."""


def group_rows(rows: Iterable[MeasuredRow]) -> dict[tuple[str, ...], list[MeasuredRow]]:
    """Rows that share a performance model and lengths, so that one vectorised call prices them all."""
    groups: dict[tuple[str, ...], list[MeasuredRow]] = defaultdict(list)
    for r in rows:
        groups[(r.model.name, r.hardware.name, r.backend, str(r.precision), str(r.isl), str(r.osl))].append(r)
    return groups


def layout_arrays(rows: list[MeasuredRow]) -> Layout:
    """Parallelism of many rows."""
    axes = [[p.tp, p.pp, p.ep, p.dp, p.cpp] for p in (r.parallelism for r in rows)]
    return Layout(*np.array(axes, dtype=np.float64).T)


def row_terms(rows: list[MeasuredRow]) -> Array:
    """The five terms of rows that `group_rows` put together, seconds for one unit of each coefficient; axes: row, term."""
    first = rows[0]
    perf = PerfModel(first.model, first.hardware, first.precision, first.backend)
    layout, workload = layout_arrays(rows), Workload.fixed(first.isl, first.osl)
    batch = np.array([float(r.concurrency) for r in rows])
    seqs = np.asarray(perf.decode_load(layout, batch, workload).decode_seqs)
    one = np.ones(len(rows))
    prompt = perf.pricer.kernels(layout, StepLoad(prefill_seqs=one, isl=float(first.isl)))
    step = perf.pricer.kernels(layout, perf.decode_load(layout, batch, workload))
    prefill = (prompt.launch_s + prompt.work_s) * (seqs - 1.0) / max(first.osl - 1.0, 1.0)
    return np.stack([one, seqs, step.launch_s * one, step.work_s * one, prefill], axis=1)


def fit_terms(terms: Array, measured: Array, prior: Array, prior_rows: Array) -> Array:
    """Non-negative coefficients that minimise the absolute relative error, drawn towards `prior`.

    Moving one term's mean share of TPOT away from its prior costs as much as missing `prior_rows` rows by that share;
    0 leaves a coefficient free.
    """
    from scipy.optimize import nnls

    relative = terms / measured[:, None]
    size = np.mean(relative, axis=0) * np.sqrt(prior_rows)
    weight = np.ones(len(measured))
    coefficients = np.zeros(terms.shape[1])
    for _ in range(60):
        root = np.sqrt(weight)
        a = np.vstack([relative * root[:, None], np.diag(size)])
        coefficients, _ = nnls(a, np.concatenate([root, size * prior]))
        off = np.abs(relative @ coefficients - 1.0)
        weight = 1.0 / np.maximum(off, 0.01)
        weight *= len(weight) / weight.sum()
    return coefficients


def fit_family(terms: Array, measured: Array) -> Array:
    """Coefficients of one backend and family over all generations, drawn towards what physics expects of kernels."""
    free = np.array([0.0, 0.0, 1.0, 1.0, 1.0])
    return fit_terms(terms, measured, PHYSICS, free * PHYSICS_SHARE * len(measured))


@dataclass(frozen=True)
class _Table:
    """Rows of one backend and family: their terms, measured TPOT, generation and fold."""

    rows: list[MeasuredRow]
    terms: Array
    tpot_s: Array
    generation: NDArray[np.str_]
    fold: NDArray[np.int64]

    def coefficients(self, keep: NDArray[np.bool_]) -> dict[str, Array]:
        """Coefficients of every generation, fitted on the kept rows."""
        family = fit_family(self.terms[keep], self.tpot_s[keep])
        pull = np.full(len(TERMS), PARENT_ROWS)
        found = {}
        for generation in np.unique(self.generation):
            cell = keep & (self.generation == generation)
            found[str(generation)] = fit_terms(self.terms[cell], self.tpot_s[cell], family, pull) if cell.any() else family
        return found

    def held_out_ratios(self) -> Array:
        """Measured / predicted TPOT of every row by coefficients that have not seen its setting."""
        ratios = np.empty(len(self.tpot_s))
        for fold in range(FOLDS):
            out = self.fold == fold
            if out.any() and not out.all():
                found = self.coefficients(~out)
                predicted = np.array([t @ found[g] for t, g in zip(self.terms[out], self.generation[out], strict=True)])
                ratios[out] = self.tpot_s[out] / predicted
            elif out.all():
                found = self.coefficients(out)
                ratios = self.tpot_s / np.array([t @ found[g] for t, g in zip(self.terms, self.generation, strict=True)])
        return ratios


def _tables(rows: Iterable[MeasuredRow], progress: Callable[[str], None]) -> dict[tuple[str, str], _Table]:
    gathered: dict[tuple[str, str], list[tuple[list[MeasuredRow], Array, int]]] = defaultdict(list)
    for key, group in group_rows(rows).items():
        progress(f"{group[0].model.name} on {group[0].hardware.name}")
        fold = zlib.crc32("|".join(key).encode()) % FOLDS
        gathered[(group[0].backend, group[0].model.family)].append((group, row_terms(group), fold))
    tables = {}
    for kind, parts in gathered.items():
        members = [r for group, _, _ in parts for r in group]
        tables[kind] = _Table(
            rows=members,
            terms=np.concatenate([terms for _, terms, _ in parts]),
            tpot_s=np.array([r.tpot_s for r in members]),
            generation=np.array([r.hardware.generation for r in members]),
            fold=np.repeat([fold for _, _, fold in parts], [len(group) for group, _, _ in parts]),
        )
    return tables


def calibrate_serving(rows: Iterable[MeasuredRow], progress: Callable[[str], None] = lambda _: None) -> list[BackendFit]:
    """Backend fits from rows of the calibration side; rows of the validation side are refused, not dropped in silence.

    The percentiles are those of rows whose setting was held out of the fit, so that an interval tells what to expect of
    a setting nobody measured.
    """
    kept = list(rows)
    if any(r.side != "calibration" for r in kept):
        raise TandemError("calibration rows: validation rows among them; the split keeps them for judging")
    if not kept:
        raise TandemError("calibration rows: none left to fit")
    fits = []
    for (backend, family), table in sorted(_tables(kept, progress).items(), key=lambda kv: kv[0]):
        ratios = table.held_out_ratios()
        for generation, found in table.coefficients(np.ones(len(ratios), dtype=bool)).items():
            cell = table.generation == generation
            fit = BackendFit(
                backend=backend,
                generation=generation,
                family=family,
                num_rows=int(cell.sum()),
                **dict(zip(TERMS, found.tolist(), strict=True)),
                sequences_max=float(table.terms[cell, 1].max()),
                isl_max=float(max(r.isl for r, c in zip(table.rows, cell, strict=True) if c)),
                tpot_p10=float(np.quantile(ratios[cell], 0.1)),
                tpot_p90=float(np.quantile(ratios[cell], 0.9)),
                ttft_p10=1.0,
                ttft_p90=1.0,
            )
            low, high = _ttft_spread([r for r, c in zip(table.rows, cell, strict=True) if c], fit)
            fits.append(replace(fit, ttft_p10=low, ttft_p90=high))
    return fits


def _ttft_spread(rows: list[MeasuredRow], fit: BackendFit) -> tuple[float, float]:
    """10th and 90th percentile of measured / predicted TTFT under a fit."""
    ratios = []
    for group in group_rows(rows).values():
        first = group[0]
        perf = PerfModel(first.model, first.hardware, first.precision, first.backend, given_fit=fit)
        batch = np.array([float(r.concurrency) for r in group])
        served = perf.colocated(layout_arrays(group), batch, Workload.fixed(first.isl, first.osl), closed_loop=True)
        ratios.append(np.array([r.ttft_s for r in group]) / served.ttft_s)
    low, high = np.quantile(np.concatenate(ratios), [0.1, 0.9])
    return float(low), float(high)


def format_backends(fits: list[BackendFit], source: str) -> str:
    """The CSV text that `backend.parse_backends` reads, with where it comes from in # lines."""
    names = [f.name for f in fields(BackendFit)]
    lines = [
        "# What serving backends add to the kernels, fitted by `tandem calibrate serving`",
        f"# source: {source}, calibration side only; {sum(f.num_rows for f in fits)} rows; {dt.date.today()}",
        "# TPOT = step + sequence*b + launch*T0 + work*T1 + prefill*(b-1)/(OSL-1)*T_prefill",
        "# tpot_p10, tpot_p90: measured / predicted, each setting held out of the fit that predicts it; ttft: in sample",
        ",".join(names),
    ]
    for fit in fits:
        values = (getattr(fit, name) for name in names)
        lines.append(",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in values))
    return "\n".join(lines) + "\n"


def package_source(path: Path) -> str:
    """How the file of rows is called in provenance lines."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"aiconfigurator-core {version('aiconfigurator-core')} {path.name}"
    except PackageNotFoundError:
        return path.name
