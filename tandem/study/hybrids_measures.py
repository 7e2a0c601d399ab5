"""The numbers of the study of hybrids for one setting: frontiers, ratios, what moves, and where decisions differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from tandem.perf.costs import Layout
from tandem.spec.design import Evidence, Precision
from tandem.spec.model import ModelSpec
from tandem.study.hybrids_cells import (
    BreakEven,
    Decisions,
    Flips,
    Key,
    all_decisions,
    break_even,
    flips_of,
    law_checks,
    models_of,
)
from tandem.study.hybrids_space import DECODE_HEAVY, PAIRS, PREFILL_HEAVY, TPOTS_S, HybridSpace, Pair, Setting, model_of
from tandem.study.sweep import Swept, area_gain

MIXES: Final = (PREFILL_HEAVY, DECODE_HEAVY)
PAPER_CUTOFF_S, TIGHT_CUTOFF_S = 10.0, 2.0
SCANS: Final = {"scan x0.5": Setting(scan=0.5), "scan x2": Setting(scan=2.0), "state bf16": Setting(state="bf16")}
"""What is varied about recurrent layers; their Transformers are not touched by it."""
OTHER_GPU = Setting(hardware="h200-sxm", precision="fp8")


class State(NamedTuple):
    """Bytes of a request's state after `isl` tokens: s0 + k * isl."""

    s0_bytes: int
    k_bytes: int

    def at(self, isl: float) -> float:
        """Bytes that a prefill instance hands over."""
        return self.s0_bytes + self.k_bytes * isl


class Crossing(NamedTuple):
    """Tokens from which on the hybrid moves less, as transfer and in a decode step (where its state is read and written)."""

    transfer_tokens: float
    decode_tokens: float


class Side(NamedTuple):
    """One model at one mix: area gain, prefill share of the GPUs at the relaxed end, ratios, bandwidth (bytes/s a GPU)."""

    gain: float
    ratio_relaxed: float
    ratio_tight: float
    top: float
    need_low: float
    need_high: float
    piggyback: float
    evidence: Evidence
    """What its decode steps' prediction rests on."""


class Ends(NamedTuple):
    """Ratios of two models at the ends of the interactivities that both split frontiers span: hybrid, Transformer."""

    low: float
    high: float
    hybrid: tuple[float, float]
    transformer: tuple[float, float]


class Law(NamedTuple):
    """How well the closed form reproduces the sweeps: share of equal decisions, in all cells and in those whose gain is not
    within the tolerance of balance of the threshold; median and median absolute relative error of the gain."""

    cells: int
    agree: float
    agree_clear: float
    bias: float
    error: float


@dataclass(frozen=True)
class HybridMeasures:
    """Everything that the claims ask, for one backend on one GPU."""

    space: HybridSpace
    sides: dict[tuple[str, tuple[int, int]], Side]
    ends: dict[str, Ends]
    crossings: dict[str, Crossing]
    states: dict[str, State]
    cells: dict[str, Decisions]
    tight: dict[str, Decisions]
    """The same under a TTFT of TIGHT_CUTOFF_S instead of PAPER_CUTOFF_S."""
    flips: dict[str, Flips]
    law: Law
    even: dict[str, dict[tuple[int, float], tuple[BreakEven, BreakEven]]]
    """Pair -> (ISL, TPOT bound) -> OSL up to which splitting is worth it: hybrid, Transformer."""
    advantage: dict[str, list[float]]
    """Hybrid over Transformer, each deployed at its best, for every cell that both serve."""


def state_of(model: ModelSpec, precision: Precision) -> State:
    """s0 and k of a model."""
    return State(model.state_bytes_per_sequence(state=precision.state), model.kv_bytes_per_token(kv=precision.kv))


def crossing_of(hybrid: State, transformer: State) -> Crossing:
    """Where s0 + k * n of the hybrid meets k * n of the Transformer; a decode step reads and writes s0."""
    slope = transformer.k_bytes - hybrid.k_bytes
    return Crossing(hybrid.s0_bytes / slope, 2.0 * hybrid.s0_bytes / slope)


def side_of(swept: Swept) -> Side:
    """One model's numbers at one mix."""
    split, shared = swept.split(), swept.shared()
    plain, chunked = swept.shared(modes=["colocated"]), swept.shared(modes=["piggybacked"])
    need = swept.transfer(split).need_bytes_per_s
    assert split.ratio is not None
    layout = Layout.of(swept.parallelism(split, 0))
    top = max(plain.top, chunked.top)
    return Side(
        gain=area_gain(split, shared) or 0.0,
        ratio_relaxed=float(split.ratio[0]),
        ratio_tight=float(split.ratio[-1]),
        top=split.top,
        need_low=float(need.min()),
        need_high=float(need.max()),
        piggyback=chunked.area(top) / plain.area(top),
        evidence=swept.perf.evidence(
            layout, swept.perf.decode_load(layout, float(swept.batch(split, 0)), swept.sweep.workload)
        ),
    )


def ends_of(hybrid: Swept, transformer: Swept) -> Ends:
    """Ratios where both frontiers have points."""
    ours, theirs = hybrid.split(), transformer.split()
    low = max(float(c.tokens_per_s_per_user[0]) for c in (ours, theirs))
    high = min(ours.top, theirs.top)
    pairs = [(c.ratio_at(low) or 0.0, c.ratio_at(high) or 0.0) for c in (ours, theirs)]
    return Ends(low, high, *pairs)


def advantage_of(hybrid: Decisions, transformer: Decisions) -> list[float]:
    """Best hybrid deployment over best Transformer deployment, cell by cell."""
    found = []
    for key, ours in hybrid.items():
        theirs = transformer[key]
        if ours.reachable and theirs.reachable:
            found.append(max(ours.split, ours.shared) / max(theirs.split, theirs.shared))
    return found


def law_of(cells: Mapping[str, Decisions]) -> Law:
    """The closed form against every cell of every model."""
    found = [e for c in cells.values() for e in law_checks(c)]
    errors = np.array([e.error for e in found])
    agree, clear = ([e.agrees for e in found if every or e.clear] for every in (True, False))
    return Law(
        len(found), float(np.mean(agree)), float(np.mean(clear)), float(np.median(errors)), float(np.median(np.abs(errors)))
    )


def measure(space: HybridSpace, *, others: bool = True) -> HybridMeasures:
    """Price everything for one setting; `others` False leaves out the further Transformers that only check the decisions."""
    models = [model for pair in PAIRS.values() for model in (models_of(pair) if others else pair[:2])]
    sides: dict[tuple[str, tuple[int, int]], Side] = {}
    for model in models:
        space.progress(f"{model}, {space.setting.backend}")
        sides |= {(model, mix): side_of(space.get(model, mix)) for mix in MIXES}
    cutoffs = (PAPER_CUTOFF_S, TIGHT_CUTOFF_S)
    cells, tight = all_decisions(space, models, ttft_cutoffs_s=cutoffs, explain=True)
    precision = Precision.parse(space.setting.precision)
    states = {m: state_of(model_of(m), precision) for m in cells}
    crossings = {name: crossing_of(states[p.hybrid], states[p.transformer]) for name, p in PAIRS.items()}
    compared = {name: (cells[p.hybrid], cells[p.transformer]) for name, p in PAIRS.items()}
    return HybridMeasures(
        space=space,
        sides=sides,
        ends={
            n: ends_of(space.get(p.hybrid, PREFILL_HEAVY), space.get(p.transformer, PREFILL_HEAVY)) for n, p in PAIRS.items()
        },
        crossings=crossings,
        states=states,
        cells=cells,
        tight=tight,
        flips={n: flips_of(*c) for n, c in compared.items()},
        law=law_of(cells),
        even={
            n: {(i, t): (break_even(h, i, t), break_even(f, i, t)) for i in space.isls for t in TPOTS_S}
            for n, (h, f) in compared.items()
        },
        advantage={n: advantage_of(*c) for n, c in compared.items()},
    )


@dataclass(frozen=True)
class Variants:
    """Decisions under other assumptions: name -> model -> cells. A model that a variant does not touch is missing there."""

    cells: dict[str, dict[str, Decisions]]
    other_gpu: dict[str, Decisions]
    sides: dict[str, dict[str, Side]]
    """Name -> hybrid -> its numbers at PREFILL_HEAVY, for what is varied about recurrent layers."""
    points_priced: int = 0
    points_considered: int = 0

    def flips(self, name: str, pair: Pair, base: HybridMeasures) -> Flips:
        """Flips of a pair under one variant, over the cells that it priced."""
        found = self.cells[name]
        hybrid = found.get(pair.hybrid, base.cells[pair.hybrid])
        transformer = found.get(pair.transformer, base.cells[pair.transformer])
        return flips_of({k: v for k, v in hybrid.items() if k in transformer}, transformer)


def variants_of(base: HybridMeasures, engine: HybridMeasures | None) -> Variants:
    """Price what the recurrent kernels' stand-ins, the state's format, TTFT and the GPU could change."""
    space, cells = base.space, {f"TTFT {TIGHT_CUTOFF_S:g} s": base.tight}
    spaces, sides = [], {}
    for name, setting in SCANS.items():
        varied = HybridSpace(setting, space.isls, space.osls, space.max_instance_gpus, space.progress)
        (cells[name],) = all_decisions(varied, [p.hybrid for p in PAIRS.values()])
        sides[name] = {p.hybrid: side_of(varied.get(p.hybrid, PREFILL_HEAVY)) for p in PAIRS.values()}
        spaces.append(varied)
    if engine is not None:
        cells[engine.space.setting.backend] = engine.cells
    other = HybridSpace(OTHER_GPU, space.isls[1::2], space.osls[::2], space.max_instance_gpus, space.progress)
    models = [m for p in PAIRS.values() for m in (p.hybrid, p.transformer)]
    (found,) = all_decisions(other, models)
    spaces.append(other)
    return Variants(cells, found, sides, sum(s.points_priced for s in spaces), sum(s.points_considered for s in spaces))


def firm_flips(pair: Pair, base: HybridMeasures, variants: Variants) -> dict[str, list[Key]]:
    """Cells in which one of the two models alone is worth splitting under every variant: `hybrid` or `transformer`."""
    own = flips_of(base.cells[pair.hybrid], base.cells[pair.transformer])
    firm = {"hybrid": set(own.hybrid), "transformer": set(own.transformer)}
    for name in variants.cells:
        other = variants.flips(name, pair, base)
        firm["hybrid"] &= set(other.hybrid)
        firm["transformer"] &= set(other.transformer)
    return {side: sorted(keys) for side, keys in firm.items()}
