"""Which simulated worker gets a request: the choices of `tandem.sched.route`, without a list of views where one is plain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

from tandem.sched.route import RoutingLimits, WorkerView, route_prompt
from tandem.sim.worker import SimWorker
from tandem.spec.errors import Infeasible

FRESH = 64
"""Up to so many decode workers the router knows the contexts of their latest step; of more it knows them as they were when a
sequence last came to a worker or left it."""
NEARLY = 1.0 - 1e-12
"""Rounding alone makes nobody cheaper."""


class Board:
    """Workers by what they can do, in order of their numbers."""

    def __init__(self, limits: RoutingLimits) -> None:
        self._limits = limits
        self.prefillers: list[SimWorker] = []
        self.decoders: list[SimWorker] = []
        self._slope_s = 0.0
        self._colocated = False

    def set(self, workers: Sequence[SimWorker]) -> None:
        """The workers that accept requests, after one has come or gone or changed its role."""
        self.prefillers = [w for w in workers if w.accepting and w.role == "prefill"]
        self.decoders = [w for w in workers if w.accepting and w.role != "prefill"]
        self._slope_s = min((min(w.times.per_token_s[1:]) for w in self.decoders[:1]), default=0.0)
        for worker in self.decoders[1:]:
            if worker.kind is not self.decoders[0].kind:
                self._slope_s = 0.0  # the least that any of them could take
        self._colocated = any(w.role == "colocated" for w in self.decoders)

    def prompt(self, isl: int, cached: Mapping[str, int], now_s: float) -> SimWorker | None:
        """Where a prompt goes, by the rule of `route_prompt`; None where nobody accepts.

        Of prefill workers with nothing of the prompt cached, where nobody decodes, the one with the least queue costs least.
        """
        if not self.decoders:
            return None
        if not cached:
            return self._uncached(isl, now_s)
        workers = self.prefillers + self.decoders
        found = route_prompt(isl, cached, [_view(w, now_s) for w in workers], workers[0].times, self._limits)
        return None if isinstance(found, Infeasible) else next(w for w in workers if w.id == found.worker_id)

    def _uncached(self, isl: int, now_s: float) -> SimWorker:
        """The same where none has anything cached, by the terms of `prompt_cost` that vary; one kind's times for all."""
        limits, decoders = self._limits, self.decoders
        best, least = decoders[0], (True, inf, 0)
        times = best.times
        if self.prefillers:
            queues = [worker.queued_tokens for worker in self.prefillers]
            best, times = self.prefillers[queues.index(min(queues))], self.prefillers[0].times
            if limits.max_local_tokens is not None and isl > limits.max_local_tokens:
                if not self._colocated:
                    return best
                decoders = [w for w in decoders if w.role == "colocated"]
            least = (False, times.prefill_s(best.queued_tokens, 0) + times.transfer_s(isl), best.number)
        base_s, per_token_s, largest = times.base_s, times.per_token_s, len(times.base_s) - 1
        pause_s, step_tokens = limits.pause_weight * times.prefill_s(isl, 0), limits.step_tokens
        for worker in decoders:
            batch, queued = worker.running + worker.incoming, worker.queued_tokens
            cost_s = batch * pause_s
            if queued:
                cost_s += times.prefill_s(queued, 0)
            if batch:
                steps = -(-(queued + isl) // step_tokens)
                if batch <= largest and not least[0]:
                    # Contexts only grow in a run of steps, so that this is the least that it can cost.
                    tokens = worker.decoding_tokens + worker.incoming_tokens
                    if cost_s + steps * (base_s[batch] + per_token_s[batch] * tokens) > least[1]:
                        continue
                cost_s += steps * times.decode_s(batch, worker.context_at(now_s))
            cost = (batch >= worker.max_batch or not worker.has_room(isl, now_s), cost_s, worker.number)
            if cost < least:
                best, least = worker, cost
        return best

    def decode(self, context_tokens: int, now_s: float) -> SimWorker | None:
        """Where a sequence decodes, by the rule of `route_decode`: the shortest step with it, among those with room first."""
        if not self.decoders:
            return None
        own_s = self._slope_s * context_tokens
        floors = [worker.floor_s for worker in self.decoders]
        best = self.decoders[floors.index(min(floors))]
        least = self._decode_cost(best, context_tokens, now_s)
        if len(floors) > FRESH and not least[0]:
            return best
        # Contexts only grow in a run of steps, so that a floor is the least that a step can cost.
        bound = inf if least[0] else (least[1] - own_s) * NEARLY
        for worker, floor_s in zip(self.decoders, floors, strict=True):
            if floor_s < bound and worker is not best:
                cost = self._decode_cost(worker, context_tokens, now_s)
                if cost < least or (cost == least and worker.number < best.number):
                    best, least = worker, cost
                    bound = inf if least[0] else (least[1] - own_s) * NEARLY
        if least[0]:  # nobody has room, and those without a place in their batch have no floor
            return min(self.decoders, key=lambda w: (self._decode_cost(w, context_tokens, now_s), w.number))
        return best

    @staticmethod
    def _decode_cost(worker: SimWorker, context_tokens: int, now_s: float) -> tuple[bool, float]:
        batch = worker.running + worker.incoming
        tokens = worker.decoding_tokens + worker.incoming_tokens + worker.running * worker.steps_done(now_s)
        full = batch >= worker.max_batch or not worker.has_room(context_tokens, now_s)
        return full, worker.times.decode_s(batch + 1, tokens + context_tokens)


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
