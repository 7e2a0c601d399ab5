"""Which simulated worker gets a request: the choices of `tandem.sched.route`, without a list of views where one is plain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

from tandem.sched.route import RoutingLimits, WorkerView, route_prompt
from tandem.sim.worker import SimWorker
from tandem.spec.errors import Infeasible


class Board:
    """Workers by what they can do, in order of their numbers."""

    def __init__(self, limits: RoutingLimits) -> None:
        self._limits = limits
        self.prefillers: list[SimWorker] = []
        self.decoders: list[SimWorker] = []
        self._one_kind = True
        self._colocated = False

    def set(self, workers: Sequence[SimWorker]) -> None:
        """The workers that accept requests, after one has come or gone or changed its role."""
        self.prefillers = [w for w in workers if w.accepting and w.role == "prefill"]
        self.decoders = [w for w in workers if w.accepting and w.role != "prefill"]
        self._one_kind = len({id(w.kind) for w in self.prefillers}) < 2
        self._colocated = any(w.role == "colocated" for w in self.decoders)

    def prompt(self, isl: int, cached: Mapping[str, int], now_s: float) -> SimWorker | None:
        """Where a prompt goes, by the rule of `route_prompt`; None where nobody accepts.

        Of prefill workers with nothing of the prompt cached, where nobody decodes, the one with the least queue costs least;
        so with no cached prefix, and a prompt too long to stay where it decodes, no costs need be compared.
        """
        if not self.decoders:
            return None
        local = self._limits.max_local_tokens
        if self.prefillers and self._one_kind and not cached and not self._colocated and local is not None and isl > local:
            best, least = self.prefillers[0], inf
            for worker in self.prefillers:
                if worker.queued_tokens < least:
                    best, least = worker, worker.queued_tokens
            return best
        workers = self.prefillers + self.decoders
        views = [_view(w, now_s) for w in workers]
        times = workers[0].times  # of the role asked first; kinds that differ are compared by one of them
        found = route_prompt(isl, cached, views, times, self._limits)
        return None if isinstance(found, Infeasible) else next(w for w in workers if w.id == found.worker_id)

    def decode(self, context_tokens: int, now_s: float) -> SimWorker | None:
        """Where a sequence decodes, by the rule of `route_decode`: the shortest step with it, among those with room first."""
        best: SimWorker | None = None
        least = (True, inf)
        for worker in self.decoders:
            batch = worker.running + worker.incoming
            tokens = worker.settled_tokens + context_tokens
            # Contexts only grow in a run of steps, so that this is the least that the step can cost.
            if least < (False, worker.times.decode_s(batch + 1, tokens)):
                continue
            full = not (batch < worker.max_batch and worker.free_tokens_at(now_s) > context_tokens)
            cost = (full, worker.times.decode_s(batch + 1, worker.context_at(now_s) + context_tokens))
            if cost < least:
                best, least = worker, cost
        return best


def _view(worker: SimWorker, now_s: float) -> WorkerView:
    return WorkerView(
        id=worker.id,
        role=worker.role,
        queued_tokens=worker.queued_tokens,
        running=worker.running + worker.incoming,
        context_tokens=worker.context_at(now_s),
        max_batch=worker.max_batch,
        free_tokens=worker.free_tokens_at(now_s),
    )
