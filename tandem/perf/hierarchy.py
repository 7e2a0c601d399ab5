"""A hierarchical fit of positive sums: measured = sum over terms of exp(common + deviations of its groups) * term.

Maximum a posteriori in logarithms: residuals log(predicted / measured) count by a soft absolute value, deviations have
Gaussian priors, so that a group with few rows stays near its parents. Gauss-Newton; a few hundred unknowns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tandem.perf.op_tables import extra

Array = NDArray[np.float64]
STEP_LIMIT = 0.5
"""Largest change of a logarithm in one iteration."""


@dataclass(frozen=True)
class Level:
    """One level of groups: the group of each row (by name; "" for none, which never deviates), the prior standard deviation of
    a group's logarithms, and whether a group deviates term by term or by one factor over all terms."""

    groups: Sequence[str]
    prior_sd: float
    by_term: bool


@dataclass(frozen=True)
class Hierarchy:
    """Fitted logarithms: `common` by term, and by group its deviations (length 1 where one factor covers all terms)."""

    common: Array
    deviations: dict[str, Array]

    def predict(self, terms: Array, groups: Sequence[Sequence[str]]) -> Array:
        """Seconds of rows, given their terms and the groups of each row; an unknown group deviates by 0."""
        logs = np.array([self.common + sum(self.deviations.get(g, np.zeros(1)) for g in row) for row in groups])
        return np.asarray(np.sum(np.exp(logs) * terms, axis=1))


def fit_hierarchy(
    terms: Array,
    measured: Array,
    levels: Sequence[Level],
    *,
    common_sd: float,
    softness: float,
    stiffness: Array | None = None,
    iterations: int = 60,
) -> Hierarchy:
    """Fit rows of `terms` [rows, terms] to `measured` [rows], both in seconds and positive.

    `stiffness` [terms] divides the prior standard deviation of each term: above 1 for those that physics knows better.
    `softness` is the residual (a natural logarithm) beyond which errors count by their size instead of their square.
    """
    rows, num_terms = terms.shape
    starts: dict[str, int] = {}
    firm = np.ones(num_terms) if stiffness is None else stiffness
    priors = [firm / common_sd]
    size = num_terms
    columns = [np.tile(np.arange(num_terms), (rows, 1))]
    for level in levels:
        width = num_terms if level.by_term else 1
        for group in level.groups:
            if group not in starts:
                starts[group] = size
                held = 1e-6 if group == "" else level.prior_sd
                priors.append((firm if level.by_term else np.ones(1)) / held)
                size += width
        first = np.array([starts[group] for group in level.groups])[:, None]
        columns.append(first + (np.arange(num_terms) if level.by_term else np.zeros(num_terms, dtype=int)))
    where, precision = np.stack(columns, axis=1), np.concatenate(priors) ** 2
    logs = np.zeros(size)
    sparse = extra("scipy.sparse")
    ends = np.arange(rows + 1) * (where.shape[1] * num_terms)
    for _ in range(iterations):
        parts = np.exp(logs[where].sum(axis=1)) * terms
        predicted = parts.sum(axis=1)
        residual = np.log(predicted / measured)
        weight = 1.0 / (softness**2 + residual**2)
        share = parts / predicted[:, None]
        slopes = np.repeat(share[:, None], where.shape[1], axis=1).ravel()
        jacobian = sparse.csr_array((slopes, where.ravel(), ends), shape=(rows, size))
        curvature = (jacobian.T @ (sparse.diags_array(weight) @ jacobian)).toarray() + np.diag(precision)
        step = np.linalg.solve(curvature, jacobian.T @ (weight * residual) + precision * logs)
        logs = logs - np.clip(step, -STEP_LIMIT, STEP_LIMIT)
        if np.max(np.abs(step)) < 1e-3:
            break
    widths = {group: num_terms if level.by_term else 1 for level in levels for group in level.groups}
    return Hierarchy(logs[:num_terms], {g: logs[s : s + widths[g]] for g, s in starts.items() if g})
