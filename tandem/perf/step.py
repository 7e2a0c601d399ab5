"""Seconds of one engine step: the operations of `costs`, timed by the fitted curves of `efficiency`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tandem.perf.backend import KERNELS_ONLY, BackendFit
from tandem.perf.costs import Item, LayerCosts, Layout, StepLoad
from tandem.perf.efficiency import OpTimer, bind
from tandem.perf.ops import NETWORK, Array
from tandem.spec.design import Evidence, Precision
from tandem.spec.hardware import HardwareSpec
from tandem.spec.model import ModelSpec

EVIDENCE_ORDER: tuple[Evidence, ...] = ("calibrated", "transferred", "roofline")


WORK_CLASSES = ("gemm", "quantised_gemm", "attention", "moe", "moe_compute", "network", "other")
"""Kinds of work that a backend's fit scales apart; each is a field of BackendFit. `moe` is what experts move, `moe_compute`
their arithmetic: backends read weights alike, but their expert kernels compute at rates that differ by factors."""


def work_class(item: Item) -> str:
    """Which of WORK_CLASSES an operation belongs to. Matrix multiplications in bf16 follow their curve within 10 %, those in
    fewer bits within 15 to 25 % only, so that a backend may deviate from the latter more."""
    if item.op in NETWORK:
        return "network"
    if item.op.startswith(("attention", "mla")):
        return "attention"
    if item.op == "gemm":
        return "gemm" if item.dtype == "bf16" else "quantised_gemm"
    return "moe" if item.op == "moe" else "other"


def weakest(evidence: list[Evidence]) -> Evidence:
    """The weakest of several kinds of evidence."""
    return max(evidence, key=EVIDENCE_ORDER.index)


class KernelTime(NamedTuple):
    """Seconds of a step's kernels: `launch_s`, their fixed times as measured one by one, and `work_s`, all beyond them.

    Serving backends replay captured graphs, where much of the fixed time overlaps; so the two are kept apart and each
    backend's fit says how much of either it shows.
    """

    launch_s: Array
    work_s: Array


WORTH_JOINING = 0.75
"""Runs of alike points are priced once where they are at most this share of the points: more are no gain."""


def _runs(layout: Layout, load: StepLoad) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """First rows and lengths of the runs of neighbours alike in layout and load; None where joining them is no gain."""
    if any(np.ndim(reach) for reach in (load.decode_window_context or {}).values()):
        return None
    varying = [part for part in (*layout, *load) if isinstance(part, np.ndarray) and part.ndim]
    if not varying or any(part.shape != varying[0].shape or part.ndim > 1 for part in varying):
        return None
    new = np.zeros(len(varying[0]), dtype=bool)
    new[:1] = True
    for part in varying:
        new[1:] |= part[1:] != part[:-1]
    first = np.flatnonzero(new)
    if len(first) > WORTH_JOINING * len(new):
        return None
    return first, np.diff(first, append=len(new))


def _at(parts: Iterable[Any], rows: NDArray[np.int64]) -> list[Any]:
    """Each part at these rows; what is the same for all points stays."""
    return [part[rows] if isinstance(part, np.ndarray) and part.ndim else part for part in parts]


@dataclass(frozen=True)
class StepPricer:
    """Times engine steps of one model at one precision on one kind of GPU."""

    model: ModelSpec
    hardware: HardwareSpec
    precision: Precision

    @cached_property
    def _costs(self) -> LayerCosts:
        return LayerCosts(self.model, self.precision)

    @cached_property
    def _timers(self) -> dict[tuple[str, str], OpTimer]:
        return {}

    def _timer(self, item: Item) -> OpTimer:
        key = (item.op, item.dtype)
        if key not in self._timers:
            self._timers[key] = bind(self.hardware, item.op, item.dtype)
        return self._timers[key]

    def _item_work_s(self, item: Item) -> Array:
        link = None
        if item.op in NETWORK and item.gpus is not None:
            fits = np.asarray(item.gpus) <= self.hardware.scale_up_gpus
            link = np.where(fits, self.hardware.scale_up_bytes_per_s, self.hardware.scale_out_bytes_per_s)
        return self._timer(item).work_s(item.work, link) * item.count

    def _work_by_class(self, item: Item) -> list[tuple[str, Array]]:
        """Seconds of an operation beyond its fixed time, by WORK_CLASSES."""
        whole = self._item_work_s(item)
        if item.op != "moe":
            return [(work_class(item), whole)]
        # The curves of experts add the two (sharpness 1), so the parts are exact.
        compute = np.asarray(item.work.flops) / self._timer(item).flops_per_s * item.count
        return [("moe", whole - compute), ("moe_compute", compute)]

    def kernels(self, layout: Layout, load: StepLoad, shown: BackendFit = KERNELS_ONLY) -> KernelTime:
        """Kernel and network time of one pass through all layers, for every design point, as a backend shows its classes.

        Neighbours that are alike in all that this depends on are priced once: the same numbers to the bit.
        """
        runs = _runs(layout, load)
        if runs is None:
            return self._kernels(layout, load, shown)
        first, lengths = runs
        found = self._kernels(Layout(*_at(layout, first)), StepLoad(*_at(load, first)), shown)
        return KernelTime(*(np.repeat(np.broadcast_to(seconds, first.shape), lengths) for seconds in found))

    def _kernels(self, layout: Layout, load: StepLoad, shown: BackendFit) -> KernelTime:
        launch: Array = np.zeros(())
        work: Array = np.zeros(())
        scales: dict[str, Array] = {kind: getattr(shown, kind) for kind in WORK_CLASSES}
        if shown.imbalance:
            busiest = shown.imbalance * (np.asarray(layout.ep) > 1)
            scales |= {kind: scales[kind] + busiest for kind in ("moe", "moe_compute")}
        for item in self._costs.step_items(layout, load):
            launch = launch + self._timer(item).fit.t0_s * item.count
            for kind, seconds in self._work_by_class(item):
                work = work + seconds * scales[kind]
        return KernelTime(launch, work)

    def classes(self, layout: Layout, load: StepLoad) -> tuple[Array, dict[str, Array]]:
        """Launch seconds of a step, and its work seconds by `work_class`: what calibration weighs one by one."""
        launch: Array = np.zeros(())
        work: dict[str, Array] = {kind: np.zeros(()) for kind in WORK_CLASSES}
        for item in self._costs.step_items(layout, load):
            launch = launch + self._timer(item).fit.t0_s * item.count
            for kind, seconds in self._work_by_class(item):
                work[kind] = work[kind] + seconds
        return launch, work

    def breakdown(self, layout: Layout, load: StepLoad) -> dict[str, dict[str, float]]:
        """For one design point: seconds by operation class, cut into fixed, compute and memory (or network) shares."""
        classes: dict[str, dict[str, float]] = {}
        for item in self._costs.step_items(layout, load):
            timer, count = self._timer(item), float(np.sum(item.count))
            fixed = timer.fit.t0_s * count
            seconds = fixed + float(np.sum(self._item_work_s(item)))
            if seconds == 0:
                continue
            compute = float(np.sum(item.work.flops)) / timer.flops_per_s * count
            moved = float(np.sum(item.work.moved_bytes)) / timer.bytes_per_s * count
            if item.op in NETWORK:
                compute, moved = 0.0, seconds - fixed
            scale = (seconds - fixed) / (compute + moved) if compute + moved > 0 else 0.0
            row = classes.setdefault(item.op, {"seconds": 0.0, "fixed": 0.0, "compute": 0.0, "moved": 0.0})
            for key, value in (("seconds", seconds), ("fixed", fixed), ("compute", compute * scale), ("moved", moved * scale)):
                row[key] += value
        return classes

    def evidence(self, layout: Layout, load: StepLoad) -> list[Evidence]:
        """Of each design point the weakest evidence among the operations that take at least a tenth of its step."""
        seconds: dict[tuple[str, str], Array] = {}
        for item in self._costs.step_items(layout, load):
            key = (item.op, item.dtype)
            launch = self._timer(item).fit.t0_s * item.count
            seconds[key] = seconds.get(key, 0.0) + launch + self._item_work_s(item)
        total = np.atleast_1d(np.sum(np.broadcast_arrays(*seconds.values()), axis=0))
        ranks = np.zeros(total.shape, dtype=int)
        for (op, dtype), part in seconds.items():
            ranks = np.maximum(ranks, np.where(part >= 0.1 * total, EVIDENCE_ORDER.index(self._timers[op, dtype].evidence), 0))
        return [EVIDENCE_ORDER[rank] for rank in ranks]
