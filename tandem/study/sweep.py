"""A design space at full load: one model, GPU, precision and traffic, priced once and asked many questions.

    swept = Sweep.of("nano-9b-v2", "h100-sxm", Workload.fixed(8192, 1024), precision="fp8", backend="vllm").price()
    shared = swept.shared()                  # best of in-flight batching and piggybacking, as a Curve
    split = swept.split(ttft_cutoff_s=2.0)   # rate-matched pools, with the context-to-generation GPU ratio at every point
    split.at(50.0)                           # tok/s/GPU where a user gets at least 50 tok/s; 0 beyond the curve
    split.ratio_at(50.0)                     # prefill GPUs for each decode GPU there
    area_gain(split, shared)                 # what splitting buys over the whole frontier
    swept.transfer(split)                    # bytes/s each GPU sends and receives at every point (s0 + k * isl a request)
    swept.fixed_ratio(0.5)                   # the frontier of a deployment that never moves its GPUs

Assumptions (paper B, sections 3 and 5, Appendix B): GPUs and requests are as many as needed, so pools balance exactly and
replicas do not matter; TTFT is a prompt's own time, without a queue; state leaves layer by layer while the prompt is
computed; a decode pool does nothing else. Prices come from tandem.perf through the planner's own design space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tandem.perf.phases import PerfModel
from tandem.plan.frontier import pareto_rows
from tandem.plan.rates import TOLERANCE
from tandem.plan.search import PAPER_TTFT_CUTOFF_S, Priced, Searched
from tandem.plan.space import Points
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.design import Parallelism, Precision
from tandem.spec.errors import SpecError
from tandem.spec.hardware import HardwareSpec
from tandem.spec.model import ModelSpec
from tandem.spec.workload import Workload

Array = NDArray[np.float64]
SHARED_MODES = ("colocated", "piggybacked")
MAX_INSTANCE_GPUS = 64
"""Largest instance: the largest power of two in a 72-GPU domain."""


@dataclass
class FullLoad(Searched):
    """The planner's priced space, except that a co-located TTFT is the prompt's own, without waiting for other prompts.

    `cached_up`: piggybacked MLA keeps its up-projected keys and values between the chunks of a prompt; the memory that this
    takes is not counted, so it is the most that keeping them could gain.
    """

    cached_up: bool = False

    def _colocated(self, p: Points) -> tuple[Array, ...]:
        _, tpot, rate = super()._colocated(p)
        one_each = p.layout.dp * p.layout.pp
        alone = self.perf.prefill(p.layout, np.asarray(one_each), self.workload, percentile=self.percentile)
        return alone.ttft_s + self.perf.backend_fit.pause * tpot, tpot, rate

    def _piggybacked(self, p: Points) -> tuple[Array, ...]:
        if not self.cached_up:
            return super()._piggybacked(p)
        served = self.perf.piggybacked(
            p.layout, p.batch, self.workload, p.chunk_tokens, percentile=self.percentile, cached_up=True
        )
        return served.ttft_s, served.tpot_s, np.where(served.feasible, served.requests_per_s, 0.0)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A frontier of one mode, by rising interactivity and falling throughput. Times in seconds, rates in tokens/s.

    `row` is each point's row in the priced table `mode_of`: the decode table on a split curve, whose `prefill_row` is the
    prefill instance that Algorithm 1 picks and whose `ratio` holds prefill GPUs for each decode GPU; shared ones have neither.
    """

    mode: str
    tokens_per_s_per_user: Array
    tokens_per_s_per_gpu: Array
    row: NDArray[np.int64]
    mode_of: tuple[str, ...]
    ratio: Array | None = None
    prefill_row: int | None = None

    def __len__(self) -> int:
        return len(self.row)

    @property
    def top(self) -> float:
        """The highest interactivity that it reaches, tok/s/user; 0 for an empty curve."""
        return float(self.tokens_per_s_per_user[-1]) if len(self) else 0.0

    def index(self, tokens_per_s_per_user: float) -> int | None:
        """The best point that gives each user at least this much; None beyond the curve."""
        at = int(np.searchsorted(self.tokens_per_s_per_user, tokens_per_s_per_user * (1 - 1e-12)))
        return at if at < len(self) else None

    def at(self, tokens_per_s_per_user: float) -> float:
        """Throughput in tok/s/GPU where each user gets at least this much; 0 beyond the curve."""
        i = self.index(tokens_per_s_per_user)
        return 0.0 if i is None else float(self.tokens_per_s_per_gpu[i])

    def ratio_at(self, tokens_per_s_per_user: float) -> float | None:
        """Prefill GPUs for each decode GPU there; None beyond the curve or on a shared one."""
        i = self.index(tokens_per_s_per_user)
        return None if i is None or self.ratio is None else float(self.ratio[i])

    def area(self, top: float) -> float:
        """Area under the step function up to an interactivity, tok/s/GPU x tok/s/user."""
        edges = np.minimum(np.concatenate([[0.0], self.tokens_per_s_per_user]), top)
        return float(np.sum(np.diff(edges) * self.tokens_per_s_per_gpu))


def area_gain(split: Curve, shared: Curve) -> float | None:
    """Area under one frontier over that under the other, up to the higher of their ends; None where the second is empty."""
    top = max(split.top, shared.top)
    below = shared.area(top)
    return split.area(top) / below if below > 0 else None


def largest_gain(split: Curve, shared: Curve, share: float = 0.9) -> tuple[float, float]:
    """(the largest ratio of the two heights, its interactivity) over the first `share` of the range that both reach."""
    limit = share * min(split.top, shared.top)
    xs = [float(x) for x in np.concatenate([split.tokens_per_s_per_user, shared.tokens_per_s_per_user]) if x <= limit]
    gains = [(split.at(x) / shared.at(x), x) for x in xs if shared.at(x) > 0]
    return max(gains, default=(0.0, 0.0))


class Transfer(NamedTuple):
    """Bytes/s that a GPU sends out of the prefill pool and receives in the decode pool, at every point of a split curve."""

    egress_bytes_per_s: Array
    ingress_bytes_per_s: Array

    @property
    def need_bytes_per_s(self) -> Array:
        """What its link must carry: the larger of the two (paper B, Figure 12)."""
        return np.maximum(self.egress_bytes_per_s, self.ingress_bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is swept: every parallelism of up to `max_instance_gpus` GPUs, every batch and chunk of tandem.plan.space."""

    model: ModelSpec
    hardware: HardwareSpec
    precision: Precision
    backend: str
    workload: Workload
    max_instance_gpus: int = MAX_INSTANCE_GPUS
    percentile: float = 50.0
    cached_up: bool = False
    """See FullLoad."""

    @classmethod
    def of(
        cls,
        model: str | ModelSpec,
        hardware: str | HardwareSpec,
        workload: Workload,
        *,
        precision: str | None = None,
        backend: str = "tandem",
        domain_gpus: int | None = None,
        max_instance_gpus: int = MAX_INSTANCE_GPUS,
        cached_up: bool = False,
    ) -> Sweep:
        """A sweep by names; precision None is the published weights' format. SpecError where a name or value is wrong.

        `domain_gpus` replaces the size of the GPU's scale-up domain, to compare links and nothing else.
        """
        spec = load_spec(model) if isinstance(model, str) else model
        gpu = load_hardware(hardware) if isinstance(hardware, str) else hardware
        if domain_gpus is not None:
            gpu = replace(gpu, scale_up_gpus=domain_gpus)
        if workload.mean_osl < 2:
            raise SpecError(
                f"osl={workload.mean_osl:g}: a sweep needs at least 2 output tokens, or there is no decode to price"
            )
        return cls(
            model=spec,
            hardware=gpu,
            precision=Precision.parse(precision, native=spec.native_precision),
            backend=backend,
            workload=workload,
            max_instance_gpus=max_instance_gpus,
            cached_up=cached_up,
        )

    def price(self) -> Swept:
        """Price every point: co-located, piggybacked, prefill and decode."""
        perf = PerfModel(self.model, self.hardware, self.precision, self.backend)
        space = FullLoad(perf, self.workload, self.max_instance_gpus, self.percentile, cached_up=self.cached_up)
        space.price_all()
        return Swept(sweep=self, space=space)


@dataclass(frozen=True)
class Swept:
    """A priced sweep; every question is answered from its tables, nothing is priced again."""

    sweep: Sweep
    space: FullLoad

    @property
    def points_evaluated(self) -> int:
        """Design points priced or refused for memory."""
        return self.space.points_evaluated

    @property
    def perf(self) -> PerfModel:
        """The performance model that priced it."""
        return self.space.perf

    @cached_property
    def _osl(self) -> float:
        return self.sweep.workload.mean_osl

    def _priced(self, mode: str) -> tuple[Priced, Array]:
        """A mode's table and its tok/s/GPU."""
        priced = self.space.priced[mode]
        return priced, priced.requests_per_s / priced.gpus * self._osl

    def shared(
        self,
        *,
        ttft_cutoff_s: float = PAPER_TTFT_CUTOFF_S,
        modes: Sequence[str] = SHARED_MODES,
        only: Mapping[str, NDArray[np.int64]] | None = None,
    ) -> Curve:
        """The frontier of deployments that prefill and decode on the same GPUs: the best over `modes`.

        `only` keeps only these rows of a mode's table, for instance those of one chunk size.
        """
        xs, ys, rows, names = [], [], [], []
        for mode in modes:
            priced, per_gpu = self._priced(mode)
            ok = np.flatnonzero(priced.ttft_s <= ttft_cutoff_s)
            if only is not None and mode in only:
                ok = np.intersect1d(ok, only[mode])
            xs.append(1.0 / priced.tpot_s[ok])
            ys.append(per_gpu[ok])
            rows.append(ok)
            names.append(np.full(len(ok), SHARED_MODES.index(mode)))
        x, y, row, name = (np.concatenate(a) for a in (xs, ys, rows, names))
        keep = pareto_rows(x, y)[::-1]
        modes_of = tuple(SHARED_MODES[i] for i in name[keep])
        kind = modes[0] if len(modes) == 1 else "shared"
        return Curve(mode=kind, tokens_per_s_per_user=x[keep], tokens_per_s_per_gpu=y[keep], row=row[keep], mode_of=modes_of)

    def best_prefill(self, ttft_cutoff_s: float = PAPER_TTFT_CUTOFF_S) -> int | None:
        """Row of the prefill instance with the most requests/s a GPU within the cutoff (Algorithm 1), the fastest on a tie."""
        priced, per_gpu = self._priced("prefill")
        ok = np.flatnonzero(priced.ttft_s <= ttft_cutoff_s)
        if not len(ok):
            return None
        close = ok[per_gpu[ok] >= np.max(per_gpu[ok]) * 0.999]
        return int(close[np.argmin(priced.ttft_s[close])])

    def split(self, *, ttft_cutoff_s: float = PAPER_TTFT_CUTOFF_S) -> Curve:
        """The frontier of rate-matched pools: the best prefill instance with every decode instance, in exact balance.

        With r requests/s a GPU, ratio = r_decode / r_prefill and throughput = OSL / (1 / r_prefill + 1 / r_decode).
        """
        return self._pools(None, ttft_cutoff_s)

    def fixed_ratio(self, ratio: float, *, ttft_cutoff_s: float = PAPER_TTFT_CUTOFF_S) -> Curve:
        """The frontier with a fixed number of prefill GPUs for each decode GPU: the slower pool sets the rate (Figure 10)."""
        if not ratio > 0:
            raise SpecError(f"ratio={ratio!r}: must be above 0")
        return self._pools(ratio, ttft_cutoff_s)

    def _pools(self, ratio: float | None, cutoff: float) -> Curve:
        row = self.best_prefill(cutoff)
        decode, per_gpu = self._priced("decode")
        if row is None or not len(decode.points):
            none = np.zeros(0)
            return Curve(
                mode="disaggregated", tokens_per_s_per_user=none, tokens_per_s_per_gpu=none,
                row=np.zeros(0, dtype=np.int64), mode_of=(), ratio=none,
            )  # fmt: skip
        prompts = float(self._priced("prefill")[1][row])
        share = per_gpu / prompts if ratio is None else np.full_like(per_gpu, ratio)
        height = np.minimum(share * prompts, per_gpu) / (1.0 + share)
        keep = pareto_rows(1.0 / decode.tpot_s, height)[::-1]
        return Curve(
            mode="disaggregated",
            tokens_per_s_per_user=1.0 / decode.tpot_s[keep],
            tokens_per_s_per_gpu=height[keep],
            row=keep,
            mode_of=("decode",) * len(keep),
            ratio=share[keep],
            prefill_row=row,
        )

    def parallelism(self, curve: Curve, i: int) -> Parallelism:
        """The parallelism of a curve's point: of its decode instance on a split curve."""
        return self.space.priced[curve.mode_of[i]].points.parallelism(int(curve.row[i]))

    def batch(self, curve: Curve, i: int) -> int:
        """Requests in flight in that instance."""
        return int(self.space.priced[curve.mode_of[i]].points.batch[curve.row[i]])

    def instances(self, curve: Curve, i: int) -> tuple[int, int]:
        """Prefill and decode instances of a split curve's point in the smallest whole numbers within 3 % of balance."""
        if curve.ratio is None or curve.prefill_row is None:
            raise SpecError(f"mode={curve.mode!r}: only pools of their own have two kinds of instance")
        gpus = self.space.priced["decode"].gpus[curve.row[i]] / self.space.priced["prefill"].gpus[curve.prefill_row]
        return whole_numbers(float(curve.ratio[i] * gpus))

    def transfer(self, curve: Curve) -> Transfer:
        """Bandwidth that moving each prompt's state takes, over GPUs that hold a unique part of it (paper B, Equations 1, 2).

        The state of a prompt is s0 + k * isl bytes with both K and V counted; where tp exceeds the KV heads, copies are
        not counted as unique, so the GPUs that share a head each need the whole of it.
        """
        if curve.prefill_row is None:
            raise SpecError(f"mode={curve.mode!r}: only pools of their own move state between them")
        rows = np.full(len(curve), curve.prefill_row)
        sides = [(self.space.priced["prefill"], rows), (self.space.priced["decode"], curve.row)]
        need = []
        for priced, taken in sides:
            layout = priced.points.take(taken).layout
            each = self.perf.memory.sequence_bytes(layout, self.sweep.workload.mean_isl)
            need.append(np.asarray(each * priced.requests_per_s[taken] / layout.dp))
        return Transfer(*need)


def whole_numbers(ratio: float, tolerance: float = TOLERANCE) -> tuple[int, int]:
    """The fraction with the smallest terms within `tolerance` of a ratio (Algorithm 2's integer solver): (above, below)."""
    if not (ratio > 0 and np.isfinite(ratio)):
        raise SpecError(f"ratio={ratio!r}: must be a finite number above 0")
    low, high = ratio / (1 + tolerance), ratio * (1 + tolerance)
    # Walk down the Stern-Brocot tree: the first fraction inside the interval has the smallest terms.
    left, right = (0, 1), (1, 0)
    while True:
        middle = left[0] + right[0], left[1] + right[1]
        if middle[0] < low * middle[1]:
            left = middle
        elif middle[0] > high * middle[1]:
            right = middle
        else:
            return middle
