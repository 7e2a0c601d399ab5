"""Figures 9 and 10 of paper B as a simulated service: which share of the workers should prefill, and what a fixed share loses.

DeepSeek-R1 on a fixed number of workers; for each split into pools and each target the largest Poisson rate at which 90 % of
the requests meet TTFT and TPOT is found by bisection. The paper prices a full load without a queue; here requests come one by
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tandem.sim.arrivals import poisson_trace
from tandem.sim.config import WorkerKind
from tandem.sim.simulate import run
from tandem.spec.workload import Slo, Workload
from tandem.study.elastic_cells import SERVICES, Cell, Ready, ready
from tandem.study.elastic_traffic import SYNTHETIC, TRAFFIC

Mix = tuple[int, int]
PAPER_MIX: Mix = (16_384, 2_048)
MIXES: tuple[Mix, ...] = ((16_384, 2_048), (4_096, 1_024), (2_048, 2_048))
TPOTS_S = (0.025, 0.03, 0.04, 0.06)
MIX_TPOT_S = 0.04
TTFT_S = 10.0
"""The paper leaves out all that takes longer."""
WORKERS = 12
WANTED = 0.9
HOLDS = 4.0
"""Times that a run lasts as long as one answer takes; the first quarter of its requests is not judged."""
STEPS = 5
"""Of a bisection."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """Requests/s that a split serves within its objective, at least `WANTED` of them."""

    mix: Mix
    tpot_s: float
    prefill: int
    decode: int
    rps: float


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """All splits at every target (of the paper's mix), and at every mix (at one target)."""

    workers: int
    by_tpot: tuple[Served, ...]
    by_mix: tuple[Served, ...]

    def best(self, rows: Sequence[Served], key: float | Mix) -> Served:
        """The split that serves most at this target or mix."""
        return max((s for s in rows if key in (s.tpot_s, s.mix)), key=lambda s: (s.rps, -s.prefill))

    def kept(self, rows: Sequence[Served], key: float | Mix, prefill: int) -> float:
        """What a split with so many prefill workers serves there, over the best."""
        best = self.best(rows, key)
        mine = next(s for s in rows if key in (s.tpot_s, s.mix) and s.prefill == prefill)
        return mine.rps / best.rps if best.rps else 0.0


def ceiling_rps(kind: WorkerKind, made: Ready, mix: Mix, tpot_s: float, sizes: tuple[int, int]) -> float:
    """No split serves more: prompts alone, and full batches within TPOT."""
    isl, osl = mix
    context = isl + osl / 2.0
    rates = replace(made.rates, tpot_s=tpot_s)
    batch = rates.decode_batch(context)
    return min(
        sizes[0] * kind.times.groups / max(kind.times.prefill_s(isl, 0), 1e-9),
        sizes[1] * batch / (osl * kind.times.decode_s(batch, batch * context)),
    )


def served(made: Ready, mix: Mix, tpot_s: float, sizes: tuple[int, int], holds: float = HOLDS, seed: int = 0) -> Served:
    """The largest rate of Poisson arrivals with these lengths that keeps the objective, in steady state."""
    slo = Slo(ttft_s=TTFT_S, tpot_s=tpot_s, percentile=100.0 * WANTED)
    config = made.config(sizes, 60.0)
    low, high = 0.0, ceiling_rps(made.kind, made, mix, tpot_s, sizes)
    for step in range(STEPS):
        rate = 0.9 * high if step == 0 else (low + high) / 2.0
        requests = max(200, round(rate * holds * (mix[1] * tpot_s + TTFT_S)))
        trace = poisson_trace(Workload.fixed(*mix), rate, requests, seed)
        kept = float(run(config, trace, slo=slo).requests.meets(slo)[requests // 4 :].mean())
        low, high = (rate, high) if kept >= WANTED else (low, rate)
    return Served(mix=mix, tpot_s=tpot_s, prefill=sizes[0], decode=sizes[1], rps=low)


def ratios(
    *,
    workers: int = WORKERS,
    tpots_s: Sequence[float] = TPOTS_S,
    mixes: Sequence[Mix] = MIXES,
    holds: float = HOLDS,
    service: str = "deepseek-r1",
    every: int = 1,
) -> Ratios:
    """Every split (or one in `every`) of the workers at every target and for every mix."""
    # Workers of either mix are tabulated around the paper's lengths.
    lengths = poisson_trace(Workload.fixed(*PAPER_MIX), 1.0, 100, 0)
    made = ready(Cell(service=SERVICES[service], traffic=TRAFFIC[SYNTHETIC]), trace=lengths)
    splits = [(p, workers - p) for p in range(1, workers, every)]
    by_tpot = [served(made, PAPER_MIX, tpot_s, sizes, holds) for tpot_s in tpots_s for sizes in splits]
    by_mix = [served(made, mix, MIX_TPOT_S, sizes, holds) for mix in mixes for sizes in splits]
    return Ratios(workers=workers, by_tpot=tuple(by_tpot), by_mix=tuple(by_mix))
