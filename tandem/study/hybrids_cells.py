"""Is splitting worth it? One answer for each model, traffic and TPOT bound, with the arithmetic behind it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from tandem.plan.rates import TOLERANCE
from tandem.plan.search import PAPER_TTFT_CUTOFF_S
from tandem.study.hybrids_space import TPOTS_S, HybridSpace, Pair
from tandem.study.sweep import Curve, Swept

WORTH = 1.05
"""Splitting is worth it from this gain on: below it, one pool is simpler."""
PROVEN = 1.33
"""Measured split deployments reach 75 to 100 % of such curves (vendor's blog on GB200), so only more than 1 / 0.75 is sure."""

Key = tuple[int, int, float]
"""ISL, OSL, TPOT bound in seconds."""


class Loads(NamedTuple):
    """GPU-seconds behind a decision, at the decode instance that the split frontier picks under the bound.

    A step of b sequences takes `fixed_s + each_s * b` seconds on `gpus` GPUs: weights and launches, then what each sequence
    adds. `own_prompt_s` and `shared_prompt_s` are GPU-seconds of a prompt in the prefill pool's layout and in the decode
    instance's own; `max_batch` is what memory holds in that instance.
    """

    fixed_s: float
    each_s: float
    gpus: float
    own_prompt_s: float
    shared_prompt_s: float
    max_batch: float

    def gain(self, tpot_s: float, osl: float) -> float | None:
        """What splitting this one instance's work would gain: the law of the page. None where the bound is below a step.

        Split: b = (T - w) / c. Shared: every token also carries its share q / (OSL - 1) of other requests' prompts, so
        b = (T - w) / (c + q / (OSL - 1)); neither beyond memory.
        """
        steps = osl - 1.0
        if tpot_s <= self.fixed_s:
            return None
        pause_s = self.shared_prompt_s / self.gpus / steps
        alone = min(self.max_batch, max((tpot_s - self.fixed_s) / self.each_s, 1.0))
        mixed = min(self.max_batch, max((tpot_s - self.fixed_s) / (self.each_s + pause_s), 1.0))
        split = (self.fixed_s / alone + self.each_s) * self.gpus + self.own_prompt_s / steps
        shared = (self.fixed_s / mixed + self.each_s + pause_s) * self.gpus
        return shared / split

    def prompt_share(self, osl: float) -> float:
        """Share of a request's marginal GPU-seconds that is prefill: 1 - x of the law."""
        decode = self.each_s * self.gpus * (osl - 1.0)
        return self.own_prompt_s / (self.own_prompt_s + decode)

    def stretch(self, tpot_s: float) -> float:
        """T / (T - w): how much longer a step is than what its sequences add to it."""
        return tpot_s / (tpot_s - self.fixed_s) if tpot_s > self.fixed_s else float("inf")


class Decision(NamedTuple):
    """Throughput (tok/s/GPU) of both kinds of deployment under a TPOT bound; 0 where none meets it."""

    split: float
    shared: float
    loads: Loads | None = None

    @property
    def reachable(self) -> bool:
        """Whether any deployment meets the bound."""
        return max(self.split, self.shared) > 0

    @property
    def gain(self) -> float | None:
        """Split over shared; None where the shared one cannot meet the bound."""
        return self.split / self.shared if self.shared > 0 else None

    def worth(self, threshold: float = WORTH) -> bool:
        """Whether to split: enough gain, or nothing else meets the bound."""
        return self.split > 0 and (self.shared <= 0 or self.split / self.shared >= threshold)


Decisions = dict[Key, Decision]


def loads_of(swept: Swept, split: Curve, i: int) -> Loads:
    """The loads at one point of a split frontier."""
    assert split.prefill_row is not None
    decode, prefill = swept.space.priced["decode"], swept.space.priced["prefill"]
    row = split.row[i : i + 1]
    points = decode.points.take(row)
    unit = float(np.asarray(points.layout.dp * points.layout.pp)[0])
    high = max(float(points.batch[0]), 2.0 * unit)
    low = max(np.floor(high / 2.0 / unit), 1.0) * unit
    ends = swept.perf.decode_tpot_s(points.layout, np.array([low, high]), swept.sweep.workload).tolist()
    each = max((ends[1] - ends[0]) / (high - low), 1e-12)
    gpus = float(decode.gpus[row[0]])
    # A group prefills one prompt at a time while its other stages and groups do the same.
    kernels = swept.perf.prefill_kernels_s(points.layout, 1.0, swept.sweep.workload.mean_isl, 1.0)
    alone = float(np.asarray(swept.perf.prompt_cost * kernels)[0]) / unit * gpus
    own = float(prefill.gpus[split.prefill_row] / prefill.requests_per_s[split.prefill_row])
    return Loads(max(ends[0] - each * low, 0.0), each, gpus, own, alone, float(decode.max_batch[row[0]]))


def decide(swept: Swept, tpot_s: float, split: Curve, shared: Curve, *, explain: bool) -> Decision:
    """Both kinds of deployment at a TPOT bound; `explain` adds the loads."""
    i = split.index(1.0 / tpot_s)
    loads = loads_of(swept, split, i) if explain and i is not None else None
    return Decision(split.at(1.0 / tpot_s), shared.at(1.0 / tpot_s), loads)


def decisions(
    space: HybridSpace, model: str, *, ttft_cutoffs_s: tuple[float, ...] = (PAPER_TTFT_CUTOFF_S,), explain: bool = False
) -> list[Decisions]:
    """All cells of a model, once for each TTFT cutoff; a cell is priced once. `explain` adds the loads under the first."""
    found: list[Decisions] = [{} for _ in ttft_cutoffs_s]
    for isl in space.isls:
        for osl in space.osls:
            swept = space.price(model, (isl, osl))
            for which, (cells, cutoff) in enumerate(zip(found, ttft_cutoffs_s, strict=True)):
                split, shared = swept.split(ttft_cutoff_s=cutoff), swept.shared(ttft_cutoff_s=cutoff)
                for tpot_s in TPOTS_S:
                    cells[isl, osl, tpot_s] = decide(swept, tpot_s, split, shared, explain=explain and which == 0)
    return found


def all_decisions(
    space: HybridSpace,
    models: Sequence[str],
    *,
    ttft_cutoffs_s: tuple[float, ...] = (PAPER_TTFT_CUTOFF_S,),
    explain: bool = False,
) -> list[dict[str, Decisions]]:
    """Cells of several models at once, on all cores: model -> cells for each TTFT cutoff. One sweep is too small for two."""

    def one(model: str) -> list[Decisions]:
        return decisions(space, model, ttft_cutoffs_s=ttft_cutoffs_s, explain=explain)

    space.progress(f"{len(models)} models, {space.setting.backend}, {space.setting.hardware}")
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        found = list(pool.map(one, models))
    return [{m: cells[i] for m, cells in zip(models, found, strict=True)} for i in range(len(ttft_cutoffs_s))]


class Flips(NamedTuple):
    """Cells of a pair by whose decision is to split; `unreachable` where one of the two models meets the bound in no way."""

    both: list[Key]
    hybrid: list[Key]
    transformer: list[Key]
    neither: list[Key]
    unreachable: list[Key]

    @property
    def compared(self) -> int:
        """Cells in which both models can serve."""
        return len(self.both) + len(self.hybrid) + len(self.transformer) + len(self.neither)


def flips_of(hybrid: Decisions, transformer: Decisions, threshold: float = WORTH) -> Flips:
    """Compare the decisions of two models, cell by cell."""
    flips = Flips([], [], [], [], [])
    for key, ours in hybrid.items():
        theirs = transformer[key]
        if not (ours.reachable and theirs.reachable):
            flips.unreachable.append(key)
            continue
        answer = ours.worth(threshold), theirs.worth(threshold)
        {(True, True): flips.both, (True, False): flips.hybrid, (False, True): flips.transformer}.get(
            answer, flips.neither
        ).append(key)
    return flips


class BreakEven(NamedTuple):
    """The OSL up to which splitting is worth it, interpolated between grid points; `bounded` says on which side the grid
    ends: `below` (never worth it), `above` (always), or `inside`."""

    osl: float
    bounded: str

    def __str__(self) -> str:
        return f"{'<' if self.bounded == 'below' else '>' if self.bounded == 'above' else ''}{self.osl:,.0f}"


def break_even(cells: Decisions, isl: int, tpot_s: float, threshold: float = WORTH) -> BreakEven:
    """Where the gain of a row of cells falls below the threshold for good, linear in the logarithm of OSL."""
    osls = sorted({osl for i, osl, t in cells if (i, t) == (isl, tpot_s)})
    worth = [osl for osl in osls if cells[isl, osl, tpot_s].worth(threshold)]
    if not worth:
        return BreakEven(float(osls[0]), "below")
    last = worth[-1]
    if last == osls[-1]:
        return BreakEven(float(last), "above")
    after = osls[osls.index(last) + 1]
    high, low = cells[isl, last, tpot_s].gain, cells[isl, after, tpot_s].gain
    if high is None or low is None:
        return BreakEven(float(last), "inside")
    share = (high - threshold) / (high - low)
    return BreakEven(float(last * (after / last) ** share), "inside")


class LawCheck(NamedTuple):
    """The law beside one cell: relative error of its gain, whether it decides alike, whether the cell is no tie."""

    error: float
    agrees: bool
    clear: bool


def law_checks(cells: Decisions) -> Iterator[LawCheck]:
    """Every cell in which both kinds of deployment meet the bound."""
    for (_, osl, tpot_s), cell in cells.items():
        if cell.gain is None or cell.loads is None or cell.split <= 0:
            continue
        gain = cell.loads.gain(tpot_s, float(osl))
        if gain is not None:
            clear = abs(cell.gain / WORTH - 1.0) > TOLERANCE
            yield LawCheck(gain / cell.gain - 1.0, (gain >= WORTH) == cell.worth(), clear)


def models_of(pair: Pair) -> tuple[str, ...]:
    """Every model of a pair."""
    return (pair.hybrid, pair.transformer, *pair.others)
