"""What state transfer `s0 + k * isl` changes: cells planned again with other bytes on the link, memory and kernels as they are.

Two things of a plan depend on those bytes. The last layer's share of them delays the first token (`exposed_transfer_s`); and no
pool hands over more requests than its links carry, which is nowhere near on a GPU's own links and is therefore left out by the
planner: here it is a bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tandem.perf.costs import Layout
from tandem.perf.memory import MemoryModel, ModelMemory
from tandem.perf.ops import Array
from tandem.perf.phases import PerfModel
from tandem.perf.pools import exposed_transfer_s
from tandem.plan.planner import WORTH_SPLITTING
from tandem.plan.search import Priced, Searched
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.design import Mode, Precision
from tandem.spec.model import ModelSpec
from tandem.spec.workload import Workload
from tandem.study.joint_claims import NOT_JUDGED, claim
from tandem.study.joint_space import TRANSFORMER, Cell, Setting, cell_text, cells, short
from tandem.study.result import Claim, Figure, Panel, Series

LINKS_BYTES_PER_S = (1.25e9, 2.5e9, 5e9, 12.5e9, 25e9)
"""Slower links than a GPU's own, from 10 Gbit/s on."""
AS_IS = "as it is"
SHOWN_TPOT_S = 0.02


class Moved(NamedTuple):
    """What a request moves: with its recurrent state or without, and whose cache a token adds."""

    state: bool
    cache: ModelSpec


def variants(spec: ModelSpec) -> dict[str, Moved]:
    """The model's own bytes, without s0, with the Transformer's k, and with both, which is what the Transformer moves."""
    other = load_spec(TRANSFORMER)
    name = short(TRANSFORMER)
    return {
        AS_IS: Moved(True, spec),
        "s0 = 0": Moved(False, spec),
        f"k of {name}": Moved(True, other),
        f"s0 = 0 and k of {name}": Moved(False, other),
    }


@dataclass(frozen=True)
class MovedMemory(MemoryModel):
    """A sequence's bytes as a link sees them."""

    moved: Moved

    def sequence_bytes(self, layout: Layout, context: Array) -> NDArray[np.float64]:
        """s0 + k * context on one GPU of a group, each part of whom it is said to be."""
        cache = ModelMemory(self.moved.cache, self.precision)
        grown = cache.sequence_bytes(layout, context) - cache.sequence_bytes(layout, 0.0)
        state = super().sequence_bytes(layout, 0.0) if self.moved.state else 0.0
        return np.asarray(state + grown)


@dataclass(frozen=True)
class MovedModel(PerfModel):
    """A performance model of which only the bytes of a sequence are other ones: for transfers, not for memory."""

    moved: Moved | None = None

    @cached_property
    def memory(self) -> MemoryModel:
        """Sizes what a link must carry."""
        assert self.moved is not None
        return MovedMemory(self.model, self.precision, self.hardware, self.moved)


class Decision(NamedTuple):
    """What is recommended where a request moves these bytes; `gain` is None where split or shared pools meet no bounds."""

    mode: Mode | None
    gain: float | None
    bytes_per_request: float
    exposed_s: float | None
    """Of the transfer, in the best split deployment: what the first token waits for."""


@dataclass
class Replanned:
    """A cell that is priced once, and decided for any bytes on the link."""

    spec: ModelSpec
    cell: Cell
    setting: Setting

    @cached_property
    def _searched(self) -> Searched:
        gpu = load_hardware(self.setting.hardware)
        perf = PerfModel(self.spec, gpu, Precision.parse(None, native=self.spec.native_precision))
        isl, osl, tpot_s = self.cell
        return Searched(perf, Workload.fixed(isl, osl), self.setting.gpus, self.setting.slo(tpot_s).percentile).price_all()

    @property
    def points_evaluated(self) -> int:
        """Design points priced."""
        return self._searched.points_evaluated

    def decide(self, moved: Moved, link_bytes_per_s: float | None = None) -> Decision:
        """The plan for these bytes; a link other than the GPU's own between pools."""
        searched, whole = self._searched, Layout(1.0, 1.0, 1.0, 1.0, 1.0)
        perf, workload, slo = searched.perf, searched.workload, self.setting.slo(self.cell[2])
        link = link_bytes_per_s or perf.hardware.scale_out_bytes_per_s
        gpu = replace(perf.hardware, scale_out_bytes_per_s=link)
        other = MovedModel(perf.model, gpu, perf.precision, perf.backend, moved=moved)
        prefill, decode = searched.priced["prefill"], searched.priced["decode"]
        points = prefill.points
        done = searched.pools_perf.prefill(
            points.layout, points.batch, workload, points.chunk_tokens, percentile=searched.percentile
        )
        exposed = exposed_transfer_s(other, points.layout, workload, done.ttft_s)
        priced = {
            "prefill": replace(_linked(prefill, other, workload), ttft_s=np.asarray(done.ttft_s + exposed)),
            "decode": _linked(decode, other, workload),
        }
        choices = replace(searched, priced={**searched.priced, **priced}).select(slo, self.setting.gpus)
        split = choices.get("disaggregated")
        shared = {mode: choice.requests_per_s for mode, choice in choices.items() if mode != "disaggregated"}
        best = max(shared, key=lambda m: shared[m], default=None)
        gain = split.requests_per_s / shared[best] if split is not None and best is not None else None
        mode: Mode | None = best
        if split is not None and (gain is None or gain > WORTH_SPLITTING):
            mode = "disaggregated"
        return Decision(
            mode=mode,
            gain=gain,
            bytes_per_request=float(other.memory.sequence_bytes(whole, workload.mean_isl)),
            exposed_s=None if split is None or split.prefill_row is None else float(exposed[split.prefill_row]),
        )


def _linked(priced: Priced, perf: PerfModel, workload: Workload) -> Priced:
    """A pool's instances, none of which hands over or takes more requests than its links carry."""
    layout = priced.points.layout
    each = perf.memory.sequence_bytes(layout, workload.mean_isl)
    most = perf.hardware.scale_out_bytes_per_s * np.asarray(layout.dp) / np.maximum(each, 1e-9)
    return replace(priced, requests_per_s=np.minimum(priced.requests_per_s, most))


@dataclass(frozen=True)
class Transfers:
    """Decisions by cell, variant and link; None as a link is the GPU's own."""

    own_bytes_per_s: float
    by_cell: Mapping[Cell, Mapping[str, Mapping[float | None, Decision]]]
    points_evaluated: int = 0

    def at(self, cell: Cell, variant: str, link_bytes_per_s: float | None = None) -> Decision:
        """One of them."""
        return self.by_cell[cell][variant][link_bytes_per_s]

    @property
    def links(self) -> tuple[float | None, ...]:
        """From the slowest to the GPU's own."""
        return tuple(next(iter(next(iter(self.by_cell.values())).values())))

    def changed(self, variant: str, link_bytes_per_s: float | None = None) -> list[Cell]:
        """Cells in which this is deployed otherwise than what the model moves over the GPU's own links."""
        return [
            cell for cell in self.by_cell if _splits(self.at(cell, variant, link_bytes_per_s)) != _splits(self.at(cell, AS_IS))
        ]

    def furthest(self, variant: str) -> float:
        """The largest change of a gain on the GPU's own links, as a share."""
        pairs = [(self.at(cell, variant).gain, self.at(cell, AS_IS).gain) for cell in self.by_cell]
        return max((abs(a / b - 1) for a, b in pairs if a and b), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Decisions by names; `own` is the GPU's own link."""
        return {
            cell_text(cell): {
                variant: {"own" if link is None else f"{link:g}": d._asdict() for link, d in by_link.items()}
                for variant, by_link in by_variant.items()
            }
            for cell, by_variant in self.by_cell.items()
        }


def _splits(decision: Decision) -> bool:
    return decision.mode == "disaggregated"


def transfers(spec: ModelSpec, setting: Setting, links: Sequence[float] = LINKS_BYTES_PER_S) -> Transfers:
    """Every cell again, with every variant over every link that is slower than the GPU's own."""
    own = load_hardware(setting.hardware).scale_out_bytes_per_s
    slower: list[float | None] = [link for link in sorted(links) if link < own]
    by_cell, points = {}, 0
    for cell in cells():
        again = Replanned(spec, cell, setting)
        by_cell[cell] = {
            name: {link: again.decide(moved, link) for link in (*slower, None)} for name, moved in variants(spec).items()
        }
        points += again.points_evaluated
    return Transfers(own, by_cell, points)


def transfer_claim(found: Transfers) -> Claim:
    """J8: the same cells, deployed for other bytes on the link."""
    others = [name for name in next(iter(found.by_cell.values())) if name != AS_IS]
    served = [cell for cell in found.by_cell if found.at(cell, AS_IS).mode is not None]
    changed = {name: found.changed(name) for name in others}
    own = f"{found.own_bytes_per_s / 1e9:g} GB/s a GPU"
    furthest = max(found.furthest(name) for name in others)
    slower = [
        f"{link / 1e9:g} GB/s: " + ", ".join(f"{name} {len(found.changed(name, link))}" for name in (AS_IS, *others))
        for link in reversed(found.links)
        if link is not None and any(found.changed(name, link) for name in (AS_IS, *others))
    ]
    example = served[0] if served else None
    moved = "" if example is None else f"{cell_text(example)} moves " + ", ".join(
        f"{d.bytes_per_request / 1e6:,.0f} MB ({name}; {(d.exposed_s or 0.0) * 1e3:.2f} ms of it not hidden)"
        for name in (AS_IS, *others) for d in (found.at(example, name),)
    )  # fmt: skip
    ours = "; ".join(f"{name}: {len(cells_)} of {len(served)} cells" for name, cells_ in changed.items())
    return claim(
        "J8", "what a request moves (s0 + k * isl) changes where the 9B is split",
        f"over its own links ({own}) another recommendation with {ours}; gains move by at most {furthest:.1%}",
        any(changed.values()) if served else None,
        (f"a request of {moved}, of a bound of seconds" if moved else NOT_JUDGED)
        + (f". Over slower links so many cells are decided otherwise: {'; '.join(slower)}" if slower else ""),
        changed={name: [cell_text(c) for c in where] for name, where in changed.items()}, furthest_gain=furthest,
        slower={f"{link:g}": {name: [cell_text(c) for c in found.changed(name, link)] for name in (AS_IS, *others)}
                for link in found.links if link is not None},
    )  # fmt: skip


def transfer_figure(found: Transfers) -> Figure:
    """Gain against the link's rate, for the prompts of each traffic at one bound."""
    panels = []
    for cell in cells():
        if cell[2] != SHOWN_TPOT_S:
            continue
        series = []
        for variant in found.by_cell[cell]:
            there = [
                (link or found.own_bytes_per_s, gain)
                for link in found.links
                if (gain := found.at(cell, variant, link).gain) is not None
            ]
            series.append(Series(name=variant, x=[link / 1e9 for link, _ in there], y=[gain for _, gain in there]))
        panels.append(Panel(title=cell_text(cell), series=tuple(series)))
    return Figure(
        title="What the moved state changes: the 9B with other bytes on the link",
        note=f"Gain of splitting over sharing; {WORTH_SPLITTING} is worth it. The rightmost points are the GPU's own links.",
        x_title="GB/s of a GPU's link",
        y_title="gain",
        panels=tuple(panels),
        x_log=True,
    )
