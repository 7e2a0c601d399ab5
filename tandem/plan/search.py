"""Price the whole design space once, then choose from it: `Searched` holds every priced point, `select` asks it.

Selection under another SLO or budget prices nothing again, so "what would change the answer" costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tandem.perf.host import MAX_BATCH
from tandem.perf.memory import DEFAULT_STEP_TOKENS, LARGEST_STEP_TOKENS, MemoryUse, total_weight_bytes
from tandem.perf.phases import PerfModel
from tandem.perf.pools import exposed_transfer_s
from tandem.plan.rates import TOLERANCE, Matches, fill_budget
from tandem.plan.space import (
    BATCHES,
    PIGGYBACK_CHUNKS,
    PREFILL_BATCHES,
    PREFILL_CHUNKS,
    Points,
    grid,
    parallelisms,
)
from tandem.spec.design import Mode
from tandem.spec.errors import NoPlanError
from tandem.spec.workload import Slo, Workload

BLOCK = 16384
"""Design points priced at once: small enough that a block's arrays stay in the second-level cache."""
PAPER_TTFT_CUTOFF_S = 10.0
"""Designs with a longer TTFT are left out unless the SLO says otherwise (paper B, section 3)."""

Array = NDArray[np.float64]
Price = Callable[[Points], tuple[Array | float, ...]]


@dataclass(frozen=True)
class Priced:
    """Feasible points of one mode: seconds, and requests/s and GPUs of one instance. Prefill has no TPOT, decode no TTFT."""

    points: Points
    ttft_s: Array
    tpot_s: Array
    requests_per_s: Array
    max_batch: Array
    gpus: Array

    @cached_property
    def _by_size(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows by size and falling rate, and where each size begins among them."""
        order = np.lexsort((-self.requests_per_s, self.gpus))
        return order, np.flatnonzero(np.diff(self.gpus[order], prepend=-1.0) > 0)

    def fastest(self, ok: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Rows of the fastest instance of each GPU count among the allowed ones."""
        order, begins = self._by_size
        if not len(order):
            return order
        rank = np.where(ok[order], np.arange(len(order)), len(order))
        first = np.minimum.reduceat(rank, begins)
        return np.asarray(order[first[first < len(order)]], dtype=np.int64)

    def take(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> Priced:
        """These rows only."""
        columns = self.ttft_s, self.tpot_s, self.requests_per_s, self.max_batch, self.gpus
        return Priced(self.points.take(rows), *(column[rows] for column in columns))


class Choice(NamedTuple):
    """One deployment by its rows in the priced tables; replicas or pool sizes, and the requests/s of the whole."""

    mode: Mode
    row: int
    replicas: int
    prefill_row: int | None
    num_prefill: int
    requests_per_s: float
    gpus: int
    imbalance: float


def price_blocks(price: Price, points: Points) -> tuple[Array, ...]:
    """Price points block by block and join the results. On one core: a block's arrays are so small that threads lose more to
    the interpreter's lock than they gain, measured on two cores."""
    starts = range(0, max(len(points), 1), BLOCK)
    blocks = [points.take(slice(start, start + BLOCK)) for start in starts]
    results = [price(block) for block in blocks]
    return tuple(np.concatenate([np.broadcast_to(r[i], b.batch.shape) for r, b in zip(results, blocks, strict=True)])
                 for i in range(len(results[0])))  # fmt: skip


@dataclass
class Searched:
    """The priced design space of one question."""

    perf: PerfModel
    workload: Workload
    budget: int
    percentile: float
    batch_stride: int = 1
    """Of the batch sizes every n-th is priced: more than 1 is a first look, coarser than the balance of pools."""
    priced: dict[str, Priced] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    points_evaluated: int = 0

    def price_all(self, progress: Callable[[str], None] = lambda _: None) -> Searched:
        """Price co-located, piggybacked, prefill and decode points."""
        model = self.perf.model
        layouts = parallelisms(model, self.budget, phase="decode")
        batches = BATCHES[:: self.batch_stride]
        if self.perf.on_host:
            batches = batches[batches <= MAX_BATCH]
        progress("co-located")
        self._add("colocated", grid(layouts, batches, np.array([np.inf])), self._colocated)
        progress("piggybacked")
        self._add("piggybacked", grid(layouts, batches[::2], PIGGYBACK_CHUNKS), self._piggybacked)
        progress("decode")
        self._add("decode", grid(layouts, batches, np.array([np.inf])), self._decode)
        progress("prefill")
        chunked = grid(parallelisms(model, self.budget, phase="prefill"), PREFILL_BATCHES, PREFILL_CHUNKS)
        self._add("prefill", chunked, self._prefill)
        return self

    def _add(self, mode: str, points: Points, price: Price) -> None:
        self.points_evaluated += len(points)
        max_batch = price_blocks(lambda p: (self.memory_use(mode, p).max_batch(p.layout),), points)[0]
        fits = points.batch <= max_batch
        self._refuse(f"{mode}: does not fit in memory", int(np.sum(~fits)))
        points, max_batch = points.take(fits), max_batch[fits]
        if mode == "piggybacked":
            in_time = self.perf.keeps_up(points.layout, points.batch, self.workload, points.chunk_tokens)[1]
            self._refuse(f"{mode}: prompts arrive faster than the chunks take them in", int(np.sum(~in_time)))
            points, max_batch = points.take(in_time), max_batch[in_time]
        ttft, tpot, rate = price_blocks(price, points) if len(points) else (np.zeros(0),) * 3
        self.priced[mode] = Priced(points, ttft, tpot, rate, max_batch, np.asarray(points.layout.gpus))

    def _refuse(self, reason: str, count: int) -> None:
        if count:
            self.refused[reason] = self.refused.get(reason, 0) + count

    def memory_use(self, mode: str, p: Points) -> MemoryUse:
        """Bytes on the fullest GPU of every point of a mode, with room for the activations of its largest step."""
        prefill = mode == "prefill"
        prompts = np.ceil(p.batch / (p.layout.dp * p.layout.pp))
        tokens = {
            "prefill": np.minimum(p.chunk_tokens, np.minimum(prompts * self.workload.mean_isl, LARGEST_STEP_TOKENS)),
            "decode": prompts,
            "colocated": np.full_like(p.batch, min(self.workload.mean_isl, DEFAULT_STEP_TOKENS)),
            "piggybacked": p.chunk_tokens,
        }[mode]
        context = max(self.workload.isl) if prefill else self.workload.final_context
        return self.perf.memory.use(p.layout, context, tokens)

    def _colocated(self, p: Points) -> tuple[Array, ...]:
        served = self.perf.colocated(p.layout, p.batch, self.workload, percentile=self.percentile)
        return served.ttft_s, served.tpot_s, served.requests_per_s

    def _piggybacked(self, p: Points) -> tuple[Array, ...]:
        served = self.perf.piggybacked(p.layout, p.batch, self.workload, p.chunk_tokens, percentile=self.percentile)
        return served.ttft_s, served.tpot_s, served.requests_per_s

    @cached_property
    def pools_perf(self) -> PerfModel:
        """The performance model of prefill and decode in pools of their own, which backends were measured in as well."""
        return replace(self.perf, split=True)

    def _decode(self, p: Points) -> tuple[Array, ...]:
        tpot = self.pools_perf.decode_tpot_s(p.layout, p.batch, self.workload)
        return np.zeros_like(tpot), tpot, p.batch / (tpot * (self.workload.mean_osl - 1.0))

    def _prefill(self, p: Points) -> tuple[Array, ...]:
        done = self.pools_perf.prefill(p.layout, p.batch, self.workload, p.chunk_tokens, percentile=self.percentile)
        exposed = exposed_transfer_s(self.perf, p.layout, self.workload, done.ttft_s)
        return done.ttft_s + exposed, np.zeros_like(done.ttft_s), done.requests_per_s

    # --- choosing ---

    def shared(self, mode: Mode, slo: Slo, budget: int) -> Choice | None:
        """The co-located or piggybacked deployment with the most requests/s in the budget, fewest GPUs on a tie."""
        priced = self.priced[mode]
        rows = np.sort(priced.fastest(self._meets(priced, slo)))
        replicas = budget // priced.gpus[rows]
        rate, gpus = replicas * priced.requests_per_s[rows], replicas * priced.gpus[rows]
        best = _best(rate, gpus)
        if best is None:
            return None
        return Choice(mode, int(rows[best]), int(replicas[best]), None, 0, float(rate[best]), int(gpus[best]), 0.0)

    def _meets(self, priced: Priced, slo: Slo) -> NDArray[np.bool_]:
        ttft_ok = priced.ttft_s <= (slo.ttft_s or PAPER_TTFT_CUTOFF_S)
        return ttft_ok & (priced.tpot_s <= (slo.tpot_s or np.inf))

    def prefill_candidates(self, slo: Slo, budget: int) -> NDArray[np.int64]:
        """Rows of the best prefill instance of each GPU count: the highest rate under the TTFT bound (Algorithm 1)."""
        priced = self.priced["prefill"]
        return priced.fastest((priced.ttft_s <= (slo.ttft_s or PAPER_TTFT_CUTOFF_S)) & (priced.gpus < budget))

    def match(self, prefill_rows: NDArray[np.int64], decode: Priced, budget: int, tolerance: float | None) -> Matches:
        """Best pools for every (prefill candidate, decode point); axes: prefill, decode. Points of one size go together: the
        larger an instance, the fewer numbers of them there are to try."""
        prefill = self.priced["prefill"].take(prefill_rows)
        columns = [np.flatnonzero(decode.gpus == size) for size in np.unique(decode.gpus)]
        found = [
            fill_budget(
                prefill.requests_per_s[:, None],
                decode.requests_per_s[None, same],
                prefill.gpus[:, None],
                decode.gpus[None, same],
                budget=budget,
                tolerance=tolerance,
            )
            for same in columns
        ]
        back = np.argsort(np.concatenate(columns))
        return Matches(*(np.concatenate(parts, axis=1)[:, back] for parts in zip(*found, strict=True)))

    def disaggregated(self, slo: Slo, budget: int) -> Choice | None:
        """The pair of pools with the most requests/s in the budget, balanced within TOLERANCE where that is possible.

        Of each instance size only the fastest prefill and decode instances under the SLO can give the highest rate;
        which of them, and how many, is tried in full. Then the faster pool is slowed down to the other one's rate by a
        smaller batch, which costs no throughput and improves its latency. A pair that stays out of balance is taken only
        where no balanced one comes within TOLERANCE of its rate.
        """
        prefill, decode = self.priced["prefill"], self.priced["decode"]
        p_rows = self.prefill_candidates(slo, budget)
        d_rows = decode.fastest((decode.tpot_s <= (slo.tpot_s or np.inf)) & (decode.gpus < budget))
        if not len(p_rows) or not len(d_rows):
            return None
        m = self.match(p_rows, decode.take(d_rows), budget, tolerance=None)
        gpus = m.num_prefill * prefill.gpus[p_rows][:, None] + m.num_decode * decode.gpus[d_rows][None, :]
        top = float(np.max(m.requests_per_s))
        near = [(p, d) for p, d in zip(*np.nonzero(m.requests_per_s >= (1 - TOLERANCE) * top), strict=True) if top > 0]
        found = [
            self._balanced(
                Choice(
                    "disaggregated",
                    int(d_rows[d]),
                    int(m.num_decode[p, d]),
                    int(p_rows[p]),
                    int(m.num_prefill[p, d]),
                    float(m.requests_per_s[p, d]),
                    int(gpus[p, d]),
                    float(m.imbalance[p, d]),
                ),
                slo,
            )
            for p, d in near
        ]
        return min(found, key=lambda c: (c.imbalance > TOLERANCE, -round(c.requests_per_s / top, 3), c.gpus), default=None)

    def _balanced(self, choice: Choice, slo: Slo) -> Choice:
        """The same pools with the faster one's batch lowered until it is at most TOLERANCE faster, if its sizes allow."""
        prefill, decode = self.priced["prefill"], self.priced["decode"]
        assert choice.prefill_row is not None
        p_row, d_row, rate = choice.prefill_row, choice.row, choice.requests_per_s
        if choice.num_prefill * prefill.requests_per_s[p_row] > rate:
            in_time = prefill.ttft_s <= (slo.ttft_s or PAPER_TTFT_CUTOFF_S)
            p_row = _slowed(prefill, p_row, in_time, rate / choice.num_prefill, prefill.ttft_s)
        if choice.replicas * decode.requests_per_s[d_row] > rate:
            in_time = decode.tpot_s <= (slo.tpot_s or np.inf)
            d_row = _slowed(decode, d_row, in_time, rate / choice.replicas, decode.tpot_s)
        rates = choice.num_prefill * prefill.requests_per_s[p_row], choice.replicas * decode.requests_per_s[d_row]
        return choice._replace(
            prefill_row=p_row, row=d_row, requests_per_s=float(min(rates)), imbalance=float(max(rates) / min(rates) - 1.0)
        )

    def select(self, slo: Slo, budget: int) -> dict[Mode, Choice]:
        """The best deployment of each mode that can meet the SLO within the budget."""
        found = {
            "colocated": self.shared("colocated", slo, budget),
            "piggybacked": self.shared("piggybacked", slo, budget),
            "disaggregated": self.disaggregated(slo, budget),
        }
        return {mode: choice for mode, choice in found.items() if choice is not None}  # type: ignore[misc]

    def explain_nothing(self, slo: Slo) -> NoPlanError:
        """Why no deployment meets the SLO: what is missing, with the best value that the space offers."""
        perf, n = self.perf, self.budget
        where = f"{perf.model.name} on {n} x {perf.hardware.name}"
        served = [p for m, p in self.priced.items() if m in ("colocated", "piggybacked") and len(p.points)]
        if not served:
            weights = total_weight_bytes(perf.model, perf.precision)
            each = perf.model.kv_bytes(round(self.workload.final_context), kv=perf.precision.kv)
            each += perf.model.state_bytes_per_sequence(state=perf.precision.state)
            return NoPlanError(
                f"gpus={n}: {where} does not fit: {weights:,} B of weights and {each:,} B for one sequence of "
                f"{self.workload.final_context:,.0f} tokens; use more GPUs, fewer bits, shorter sequences or a smaller model"
            )
        ttft_bound, tpot_bound = slo.ttft_s or PAPER_TTFT_CUTOFF_S, slo.tpot_s or np.inf
        assumed = "" if slo.ttft_s else f" (no --ttft given: {PAPER_TTFT_CUTOFF_S:g} s is assumed)"
        prompts = [*served, *(q for q in [self.priced["prefill"]] if len(q.points))]
        tokens = [*served, *(q for q in [self.priced["decode"]] if len(q.points))]
        ttft = min(float(np.min(p.ttft_s)) for p in prompts)
        tpot = min(float(np.min(p.tpot_s)) for p in tokens)
        if ttft > ttft_bound:
            return NoPlanError(
                f"ttft_s={ttft_bound:g}{assumed}: no deployment of {where} is faster than {ttft:.4g} s; relax it"
            )
        if tpot > tpot_bound:
            return NoPlanError(f"tpot_s={tpot_bound:g}: no deployment of {where} is faster than {tpot:.4g} s; relax it")
        return NoPlanError(
            f"ttft_s={ttft_bound:g}{assumed}, tpot_s={tpot_bound:g}: either can be met by {where}, but not both at once; "
            "relax one or add GPUs"
        )


def _best(rate: Array, gpus: Array) -> int | None:
    """Row of the highest rate, fewest GPUs among those within a thousandth of it; None when no rate is above 0."""
    if rate.size == 0 or (top := float(np.max(rate))) <= 0:
        return None
    close = np.flatnonzero(rate >= top * 0.999)
    return int(close[np.lexsort((-rate[close], gpus[close]))[0]])


def _slowed(priced: Priced, row: int, ok: NDArray[np.bool_], needed: float, latency_s: Array) -> int:
    """Among instances of equal size and at least the needed rate: the lowest latency close to it, else the nearest rate."""
    rates = priced.requests_per_s
    rows = np.flatnonzero(ok & (priced.gpus == priced.gpus[row]) & (rates >= needed * (1 - 1e-9)))
    close = rows[rates[rows] <= needed * (1 + TOLERANCE)]
    if len(close):
        return int(close[np.argmin(latency_s[close])])
    return int(rows[np.argmin(rates[rows])]) if len(rows) else row
