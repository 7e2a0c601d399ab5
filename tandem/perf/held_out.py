"""Errors on a GPU or a model of which no row was fitted, and what each evidence label is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tandem.perf.backend import KERNELS_ONLY, ServingFits, fingerprint, load_serving_fits
from tandem.perf.calibrate_serving import Table, common_terms, group_entries
from tandem.perf.silicon import MeasuredRow
from tandem.perf.validate import METRICS, ErrorSet, FitOf, Predictions, Progress, errors_of, predict


@dataclass(frozen=True)
class HeldOut:
    """Rows predicted by coefficients that never saw their GPU, or their model; `parts` names what was left out of each."""

    what: str
    predictions: Predictions
    parts: list[str]

    def sets(self) -> list[ErrorSet]:
        """Errors of the co-located rows, of the disaggregated ones, and of each part left out; validation rows, then all."""
        p, name = self.predictions, f"leave-one-{self.what}-out"
        split, labels = p.disaggregated, np.array(self.parts)
        cuts = {name: ~split, f"{name} disaggregated": split}
        cuts |= {f"{name} {part}": (labels == part) & ~split for part in sorted(set(self.parts))}
        cuts |= {f"{name} {part} disaggregated": (labels == part) & split for part in sorted(set(self.parts))}
        sets = []
        for side, kept in (("validation", p.validation), ("both", np.ones(len(p.rows), dtype=bool))):
            for cut, inside in cuts.items():
                members = np.flatnonzero(kept & inside)
                if len(members):
                    sets += [errors_of(p, members, cut, side, metric) for metric in METRICS]
        return sets


def leave_one_out(rows: Sequence[MeasuredRow], progress: Progress = lambda _: None) -> list[HeldOut]:
    """Every row predicted without the GPU, then without the model, that it is of.

    The serving coefficients are refitted on the calibration rows of all others; kernel timings of a GPU stay known, as they
    are for every GPU that Tandem calls calibrated. Models of one arithmetic (R1 and V3) are left out together.
    """
    table = Table.of([r for r in rows if r.side == "calibration"], progress)
    names: dict[str, str] = {}
    for name, key in sorted({(r.model.name.rpartition("/")[2], fingerprint(r.model)) for r in rows}, key=lambda it: len(it[0])):
        names.setdefault(key, name)
    ways: tuple[tuple[str, Callable[[MeasuredRow], str]], ...] = (
        ("gpu", lambda r: r.hardware.name),
        ("model", lambda r: names[fingerprint(r.model)]),
    )
    found = []
    for what, part_of in ways:
        predicted: list[Predictions] = []
        for part in sorted({part_of(r) for r in rows}):
            progress(f"without {part}")
            others = np.array([part_of(r) != part for r in table.rows], dtype=bool)
            if not others.any():
                continue
            fits = refit(table.take(others))
            predicted.append(predict([r for r in rows if part_of(r) == part], fit_of=fit_finder(fits)))
        joined = Predictions.join(predicted)
        found.append(HeldOut(what, joined, [part_of(r) for r in joined.rows]))
    return found


def refit(table: Table) -> ServingFits:
    """Serving fits of the rows of a table with the intervals of the shipped ones."""
    fits = table.fit()
    return ServingFits(common=common_terms(fits), groups=group_entries(table, fits), spread=load_serving_fits().spread)


def fit_finder(fits: ServingFits) -> FitOf:
    """How `predict` asks serving fits for the coefficients of a row."""
    return lambda r: fits.find(r.backend, r.hardware, r.model, r.precision.weights, r.prefill is not None)[0]


def label_sets(p: Predictions, held_out: Sequence[HeldOut], progress: Progress = lambda _: None) -> list[ErrorSet]:
    """What each evidence label is worth on validation rows of both modes.

    `calibrated`: the rows that carry it. `transferred`: all of them, predicted once without their GPU and once without their
    model, beside those that carry the label as shipped. `roofline`: all of them, by kernels back to back.
    """
    judged = p.take(p.validation)
    labels = np.array(judged.evidence)
    sets = {f"label {label}": judged.take(labels == label) for label in ("calibrated", "transferred", "roofline")}
    if held_out:
        sets["label transferred, as shipped"] = sets["label transferred"]
        sets["label transferred"] = Predictions.join([h.predictions.take(h.predictions.validation) for h in held_out])
    progress("kernels back to back")
    sets["label roofline"] = predict(judged.rows, fit_of=lambda _: KERNELS_ONLY)
    return [
        errors_of(q, np.arange(len(q.rows)), name, "validation", metric)
        for name, q in sets.items()
        if q.rows
        for metric in METRICS
    ]
