"""The design space: every parallelism that divides the model, batch sizes per phase, chunk sizes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tandem.perf.costs import Layout
from tandem.perf.divide import refuse_parallelism
from tandem.spec.design import Parallelism
from tandem.spec.model import ModelSpec, MoE

BATCHES: NDArray[np.float64] = np.unique(np.concatenate([np.arange(1, 33), np.round(32 * 1.03 ** np.arange(1, 165))])).astype(
    np.float64
)
"""Sequences in flight in one attention group: every size to 32, then steps of 3 % to about 4,000: as fine as the balance."""
PREFILL_BATCHES: NDArray[np.float64] = np.array([1.0, 2.0, 4.0, 8.0])
PREFILL_CHUNKS: NDArray[np.float64] = np.array([2048.0, 4096.0, 8192.0, 16384.0, np.inf])
"""Token budgets of a prefill step; inf takes a whole prompt at once."""
PIGGYBACK_CHUNKS: NDArray[np.float64] = np.array([512.0, 1024.0, 2048.0, 4096.0, 8192.0])


LARGEST_INSTANCE = 4096
"""GPUs of one instance; what a larger budget has beyond it goes into replicas."""


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length()) if 2**i <= limit]


@lru_cache(maxsize=64)
def parallelisms(model: ModelSpec, budget: int, *, phase: str) -> tuple[Parallelism, ...]:
    """Every valid parallelism of at most `budget` GPUs, in powers of two; cpp in prefill, dp and ep with experts only."""
    budget = min(budget, LARGEST_INSTANCE)
    has_experts = any(isinstance(m, MoE) for m, _ in model.mixers)
    found = []
    for tp in _powers(budget):
        for dp in _powers(budget // tp) if has_experts else [1]:
            for ep in _powers(tp * dp) if has_experts else [1]:
                for stages in _powers(min(budget // (tp * dp), len(model.layers))):
                    kinds = [Parallelism(tp=tp, dp=dp, ep=ep, pp=stages)]
                    if phase == "prefill" and stages > 1:
                        kinds.append(Parallelism(tp=tp, dp=dp, ep=ep, cpp=stages))
                    found += [p for p in kinds if refuse_parallelism(model, p) is None]
    return tuple(found)


class Points(NamedTuple):
    """Design points of one phase as flat, equally long arrays."""

    layout: Layout
    batch: NDArray[np.float64]
    chunk_tokens: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.batch)

    def take(self, rows: NDArray[np.bool_] | NDArray[np.int64] | slice) -> Points:
        """The points of these rows."""
        return Points(Layout(*(np.asarray(a)[rows] for a in self.layout)), self.batch[rows], self.chunk_tokens[rows])

    def parallelism(self, row: int) -> Parallelism:
        """The parallelism of one row."""
        return Parallelism(**{axis: int(np.asarray(values)[row]) for axis, values in self.layout._asdict().items()})


def grid(layouts: Sequence[Parallelism], batches: NDArray[np.float64], chunks: NDArray[np.float64]) -> Points:
    """The product of layouts, sequences per attention group and stage, and chunk sizes."""
    axes = np.array([[p.tp, p.pp, p.ep, p.dp, p.cpp] for p in layouts], dtype=np.float64).reshape(-1, 5)
    rows, batch, chunk = np.meshgrid(np.arange(len(layouts)), batches, chunks, indexing="ij")
    layout = Layout(*(axes[rows.ravel(), i] for i in range(5)))
    return Points(layout, batch.ravel() * np.asarray(layout.dp) * np.asarray(layout.pp), chunk.ravel())
