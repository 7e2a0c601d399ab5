"""Windows of a simulation: what a scaling policy is shown, and one point of the time series each."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tandem.sched.observation import Lengths, Observation, PoolCount
from tandem.sched.route import ROLES
from tandem.sim.config import SimConfig
from tandem.sim.decoding import SimRequest
from tandem.sim.fleet import Fleet
from tandem.sim.result import Columns
from tandem.sim.worker import SimWorker
from tandem.spec.workload import Slo

SERIES = (
    "at_s",
    "waiting",
    "decoding",
    "prefill_workers",
    "decode_workers",
    "colocated_workers",
    "starting",
    "gpus",
    "arrived",
    "finished",
    "ttft_s",
    "tpot_s",
)


class Host(Protocol):
    """What is watched."""

    @property
    def fleet(self) -> Fleet:
        """All workers."""
        ...

    @property
    def unplaced(self) -> list[SimRequest]:
        """Requests that no worker has."""
        ...

    @property
    def unplaced_states(self) -> int:
        """States that no worker takes."""
        ...


class Watch:
    """Counts what happens in a window; `observe` ends one and begins the next."""

    def __init__(self, config: SimConfig, host: Host, columns: Columns, slo: Slo | None) -> None:
        self._config, self._host, self._columns, self._slo = config, host, columns, slo
        self._isl: list[int] = []
        self._osl: list[int] = []
        self._tpot_s: list[float] = []
        self._met = 0
        self._busy_s: dict[int, float] = {}
        self._began_s = 0.0
        self._ended_tokens = self._tokens = 0
        """Output tokens of those that ended, and of all as the last window ended."""
        self._rows: list[tuple[float, ...]] = []

    def arrived(self, isl: int) -> None:
        """A request came."""
        self._isl.append(isl)

    def finished(self, request: SimRequest, now_s: float) -> None:
        """A request has its whole answer."""
        first_s = self._columns.first_token_s[request.row]
        ttft_s, osl = first_s - request.arrival_s, request.osl
        tpot_s = (now_s - first_s) / (osl - 1) if osl > 1 else None
        self._osl.append(osl)
        self._ended_tokens += osl
        if tpot_s is not None:
            self._tpot_s.append(tpot_s)
        if self._slo is not None:
            late = self._slo.ttft_s is not None and ttft_s > self._slo.ttft_s
            slow = self._slo.tpot_s is not None and tpot_s is not None and tpot_s > self._slo.tpot_s
            self._met += not (late or slow)

    def observe(self, now_s: float) -> Observation:
        """What the window that ends now has shown."""
        workers = self._host.fleet.workers
        waiting = [*self._host.unplaced, *(r for w in workers for r in w.waiting)]
        decoded = [r.target - (last - w.steps_at(now_s)) for w in workers for last, _, r in w.finishes]
        tokens = self._ended_tokens + sum(decoded) + sum(r.osl for w in workers for r in (*w.arrived, *w.resumed))
        firsts, self._columns.ttfts_s = self._columns.ttfts_s, []
        seconds = max(now_s - self._began_s, 1e-9)
        ended = len(self._osl)
        found = Observation(
            at_s=now_s,
            window_s=seconds,
            pools=self._pools(workers, seconds),
            arrived=len(self._isl),
            isl=Lengths.of(self._isl),
            osl=Lengths.of(self._osl),
            waiting=len(waiting),
            waiting_tokens=sum(w.queued_tokens for w in workers) + sum(r.to_prefill for r in self._host.unplaced),
            oldest_wait_s=max((now_s - r.arrival_s for r in waiting), default=0.0),
            waiting_decode=self._host.unplaced_states + sum(len(w.arrived) for w in workers),
            decoding=sum(w.running for w in workers),
            decoding_tokens=sum(w.context_at(now_s) - w.incoming_tokens for w in workers),
            decoded=Lengths.of(decoded),
            generated=max(0, tokens - self._tokens),
            first_tokens=len(firsts),
            ttft_s=float(np.percentile(firsts, 90)) if firsts else None,
            tpot_s=float(np.mean(self._tpot_s)) if self._tpot_s else None,
            attainment=self._met / ended if ended and self._slo is not None else None,
        )
        self._note(found, ended)
        self._isl, self._osl, self._tpot_s, self._met = [], [], [], 0
        self._began_s, self._tokens = now_s, tokens
        return found

    def _pools(self, workers: list[SimWorker], seconds: float) -> tuple[PoolCount, ...]:
        pools = []
        for role in ROLES:
            of_role = [w for w in workers if (w.flip_to if w.status == "flipping" else w.role) == role]
            for kind in {w.kind.name: w.kind for w in of_role}.values():
                there = [w for w in of_role if w.kind is kind]
                busy_s = sum(w.busy_s - self._busy_s.get(w.number, 0.0) for w in there)
                pools.append(
                    PoolCount(
                        role=role,
                        kind=kind.name,
                        up=sum(w.status == "up" for w in there),
                        starting=sum(w.status in ("starting", "flipping") for w in there),
                        draining=sum(w.status == "draining" for w in there),
                        gpus_per_worker=kind.gpus,
                        running=sum(w.running + w.incoming for w in there),
                        queued_tokens=sum(w.queued_tokens for w in there),
                        busy=min(busy_s / (seconds * len(there)), 1.0),
                    )
                )
        self._busy_s = {w.number: w.busy_s for w in workers}
        return tuple(pools)

    def _note(self, seen: Observation, ended: int) -> None:
        up = {role: sum(p.up for p in seen.pools if p.role == role) for role in ROLES}
        gpus = sum((p.up + p.starting + p.draining) * p.gpus_per_worker for p in seen.pools)
        nan = float("nan")
        self._rows.append(
            (
                seen.at_s,
                seen.waiting,
                seen.decoding,
                up["prefill"],
                up["decode"],
                up["colocated"],
                sum(p.starting for p in seen.pools),
                gpus,
                seen.arrived or 0,
                ended,
                nan if seen.ttft_s is None else seen.ttft_s,
                nan if seen.tpot_s is None else seen.tpot_s,
            )
        )

    def series(self, now_s: float) -> dict[str, NDArray[np.float64]]:
        """All windows as columns, the last one cut off where the run ended."""
        if now_s > self._began_s:
            self.observe(now_s)
        table = np.array(self._rows, dtype=np.float64).reshape(-1, len(SERIES))
        return {name: table[:, i] for i, name in enumerate(SERIES)}
