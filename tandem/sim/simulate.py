"""`run`: a simulation as discrete events on requests. Arrivals come out of the trace, all else out of one heap.

At equal times what comes to a worker is handled before its boundary, so that a step begins with all that has come by then.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import Any

import numpy as np

from tandem.sched.fair import by_age
from tandem.sched.observation import Decision, ScalingPolicy
from tandem.sched.prefix import PrefixIndex
from tandem.sched.route import Role
from tandem.sim.audit import check, unfinished
from tandem.sim.board import Board
from tandem.sim.config import SimConfig, WorkerKind
from tandem.sim.decoding import UNBOUNDED, SimRequest
from tandem.sim.fleet import Fleet
from tandem.sim.links import Links
from tandem.sim.observe import Watch
from tandem.sim.queues import PrefixCache
from tandem.sim.result import ERROR, LENGTH, TIMES, Columns, RequestTable, SimResult
from tandem.sim.worker import SimWorker
from tandem.spec.errors import SpecError
from tandem.spec.workload import Slo, Trace

ARRIVES, CALL, BOUNDARY = 0, 1, 2
"""Kinds of events, in the order in which they are handled at equal times."""


NOTHING: list[int] = []
IDLE_WINDOWS = 100
"""A run in which so many windows pass with nothing to come has ended, its requests unfinished."""


class Simulation:
    """The state of a run; `run` makes one and runs it."""

    def __init__(self, config: SimConfig, trace: Trace, policy: ScalingPolicy | None, slo: Slo | None, checked: bool) -> None:
        self.config, self.trace, self._checked = config, trace, checked
        self.now_s = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, int, Any, Any]] = []
        self._serial = count()
        self._columns = Columns(len(trace))
        self._isl: list[int] = trace.isl.tolist()
        self._osl: list[int] = trace.osl.tolist()
        self._arrival_s: list[float] = trace.arrival_s.tolist()
        self._clients = None if trace.client is None else [str(client) for client in trace.client.tolist()]
        self._unrouted: deque[SimRequest] = deque()
        self._homeless: deque[tuple[SimRequest, SimWorker, float]] = deque()
        self._prefixes = None if trace.prefix_hash is None or not config.prefix_cache_tokens else PrefixIndex()
        self._links = Links(config.workers_per_link)
        self.board = Board(config.routing)
        self._open = len(trace)
        self._next_s, self._idle = 0.0, 0
        """Windows in which nothing happened and nothing was to come: a policy has left nobody to serve what waits."""
        self._simulated = 0
        self.live: dict[int, SimRequest] = {}
        self.fleet = Fleet(config, self)
        self.watch = Watch(config, self, self._columns, slo)
        self._policy = policy
        self._decisions: list[tuple[float, Decision]] = []

    # What the parts ask for.

    def later(self, at_s: float, what: Any, argument: Any = None) -> None:
        """Call `what(argument)` then."""
        heappush(self._heap, (at_s, CALL, next(self._serial), what, argument))

    def new_worker(self, number: int, kind: WorkerKind, role: Role) -> SimWorker:
        """A worker of this run."""
        fair = self._clients is not None
        tokens = self.config.prefix_cache_tokens
        cache = None if self._prefixes is None else PrefixCache(tokens, self.trace.prefix_block)
        return SimWorker(
            number, kind, role, self._columns, fair=fair, cache=cache, on_prefilled=self._prefilled, on_done=self._done
        )

    def changed(self, *, came_up: bool = False) -> None:
        """Workers came, went or changed their roles: those who waited for one are placed, and prompts that have not begun move:
        those of workers that take none any more, and all of them when a worker has come up."""
        self.board.set(self.fleet.workers)
        if self.board.decoders:
            self._move([w for w in self.fleet.workers if w.waiting and (came_up or not w.accepting)])
        for _ in range(len(self._unrouted)):
            self._place(self._unrouted.popleft())
        for _ in range(len(self._homeless)):
            request, source, end_s = self._homeless.popleft()
            if source.status == "gone":
                self._begin_again(request)
            else:
                self._hand_off(request, source, end_s)

    def _move(self, workers: list[SimWorker]) -> None:
        """Their prompts that have not begun are routed anew, in order of arrival."""
        waiting = [(request, worker) for worker in workers for request in worker.recall()]
        for request, worker in sorted(waiting, key=lambda pair: by_age(pair[0])):
            self._place(request, before=worker)
        for worker in workers:
            if worker.waiting:
                worker.disturb(self.now_s)
                self.schedule(worker)
            if worker.status == "draining" and worker.empty:
                self.later(self.now_s, self.fleet.drained, worker)

    def schedule(self, worker: SimWorker) -> None:
        """The loop learns when a worker's present run ends."""
        if worker.epoch != worker.pushed and worker.end_s != inf:
            worker.pushed = worker.epoch
            heappush(self._heap, (worker.end_s, BOUNDARY, next(self._serial), worker, worker.epoch))

    def died(self, worker: SimWorker) -> None:
        """Its requests begin again from their prompts and the tokens that they have."""
        if self._prefixes is not None:
            self._prefixes.forget(worker.id)
        for request in worker.take_all():
            self._begin_again(request)

    def _begin_again(self, request: SimRequest) -> None:
        self._columns.retries[request.row] += 1
        request.computed = 0
        self._place(request)

    @property
    def unplaced(self) -> list[SimRequest]:
        """Requests that no worker has."""
        return list(self._unrouted)

    @property
    def unplaced_states(self) -> int:
        """States that no worker takes."""
        return len(self._homeless)

    # Requests.

    def _arrive(self, row: int) -> None:
        isl, at_s = self._isl[row], self._arrival_s[row]
        client = "" if self._clients is None else self._clients[row]
        request = SimRequest(id=f"{row:09d}", isl=isl, max_tokens=UNBOUNDED, arrival_s=at_s, client=client)
        request.row, request.target = row, self._osl[row]
        request.prefix, request.hashes = 0, NOTHING if self._prefixes is None else self._hashes(row)
        self.watch.arrived(isl)
        if isl + request.target > self.fleet.longest:
            request.finish_reason = "error"
            self._columns.finish[row], self._columns.done_s[row] = ERROR, at_s
            self._open -= 1
            return
        self.live[row] = request
        self._place(request)

    def _place(self, request: SimRequest, before: SimWorker | None = None) -> None:
        """Route a prompt; `before` is the worker that it waited at, whom it does not leave for an equal."""
        cached: dict[str, int] = {}
        if request.hashes and self._prefixes is not None:
            cells = self._prefixes.matched(request.hashes)
            cached = {name: min(n * self.trace.prefix_block, request.isl - 1) for name, n in cells.items()}
            if before is not None and before.id in cached:  # its own note there is no prefix that anyone has prefilled
                cached[before.id] = request.prefix
        worker = self.board.prompt(request.to_prefill, cached, self.now_s)
        if before is not None:
            if worker is before:
                before.stays(request)
                return
            before.leaves(request)
        if worker is None:
            self._unrouted.append(request)
            return
        if self._prefixes is not None:
            request.prefix = cached.get(worker.id, 0)
            self._prefixes.note(worker.id, request.hashes)
        worker.submit(request, self.now_s)
        self.schedule(worker)

    def _hashes(self, row: int) -> list[int]:
        if self._prefixes is None or self.trace.prefix_hash is None or self.trace.prefix_end is None:
            return []
        begin = 0 if row == 0 else int(self.trace.prefix_end[row - 1])
        found: list[int] = self.trace.prefix_hash[begin : int(self.trace.prefix_end[row])].tolist()
        return found

    def _prefilled(self, source: SimWorker, request: SimRequest, now_s: float) -> None:
        self._columns.transfer_start_s[request.row] = now_s
        self._hand_off(request, source, now_s)

    def _hand_off(self, request: SimRequest, source: SimWorker, end_s: float) -> None:
        target = self.board.decode(request.context, self.now_s)
        if target is None:
            self._homeless.append((request, source, end_s))
            return
        target.expect(request)
        times = source.times
        start_s = self._columns.prefill_start_s[request.row]
        there_s = self._links.send(
            source.number,
            target.number,
            times.transfer_bytes(request.computed),
            times.link_bytes_per_s,
            start_s if end_s == self.now_s else self.now_s,
            self.now_s,
            times.last_layer,
        )
        heappush(self._heap, (there_s, ARRIVES, next(self._serial), request, target))

    def _state_arrives(self, request: SimRequest, target: SimWorker) -> None:
        if target.status == "gone":
            self._begin_again(request)
            return
        self._columns.transfer_end_s[request.row] = self.now_s
        target.accept(request, self.now_s)
        self.schedule(target)

    def _done(self, request: SimRequest, now_s: float) -> None:
        row = request.row
        self._columns.finish[row], self._columns.osl[row], self._columns.done_s[row] = LENGTH, request.osl, now_s
        if request.osl == 1:  # the last token is the first one: the client has it when the host has sent it
            self._columns.done_s[row] = self._columns.first_token_s[row]
        self._simulated += request.osl
        self._open -= 1
        del self.live[row]
        self.watch.finished(request, now_s)

    # The loop.

    def run(self) -> SimResult:
        """Handle events until all requests are done, or time is up."""
        heap, arrivals, total = self._heap, self._arrival_s, len(self._arrival_s)
        until_s = inf if self.config.until_s is None else self.config.until_s
        self.fleet.start()
        for death in self.config.deaths:
            self.later(death.at_s, self.fleet.kill, death.worker)
        self.later(self.config.window_s, self._observe)
        row, next_s, events = 0, arrivals[0], 0
        self._next_s = next_s
        serial, checked = self._serial, self._checked
        while self._open and self._idle < IDLE_WINDOWS:
            if next_s <= heap[0][0]:
                if next_s > until_s:
                    break
                self.now_s = next_s
                self._arrive(row)
                row += 1
                self._next_s = next_s = arrivals[row] if row < total else inf
                events += 1
                continue
            at_s, kind, _, what, argument = heappop(heap)
            if at_s > until_s:
                break
            if kind == BOUNDARY:
                if what.epoch != argument:
                    continue
                self.now_s = at_s
                what.wake()
                if what.end_s != inf:
                    what.pushed = what.epoch
                    heappush(heap, (what.end_s, BOUNDARY, next(serial), what, what.epoch))
                if what.status == "draining" and what.empty:
                    self.fleet.drained(what)
            elif kind == ARRIVES:
                self.now_s = at_s
                self._state_arrives(what, argument)
            else:
                self.now_s = at_s
                what(argument)
            events += 1
            if checked:
                for worker in self.fleet.workers:
                    check(worker)
        self.events = events
        if until_s != inf and self._open:
            self.now_s = until_s
        return self._result()

    def _observe(self, _: object) -> None:
        self._idle = 0 if self._heap or self._next_s < inf else self._idle + 1
        observation = self.watch.observe(self.now_s)
        if self._policy is not None:
            decision = self._policy.decide(observation)
            if decision.changed:
                self._decisions.append((self.now_s, decision))
                self.fleet.carry_out(decision)
        self.later(self.now_s + self.config.window_s, self._observe)

    def _result(self) -> SimResult:
        for worker in self.fleet.workers:
            for at, osl in unfinished(worker):
                self._columns.osl[at] = osl
        c, trace = self._columns, self.trace
        gpu_seconds, price_usd = self.fleet.cost(self.now_s)
        table = RequestTable(
            arrival_s=trace.arrival_s,
            isl=trace.isl,
            osl=np.frombuffer(c.osl, dtype=np.int64),
            cached=np.frombuffer(c.cached, dtype=np.int64),
            preemptions=np.frombuffer(c.preemptions, dtype=np.int32),
            retries=np.frombuffer(c.retries, dtype=np.int32),
            finish=np.frombuffer(c.finish, dtype=np.int8),
            **{name: np.frombuffer(getattr(c, name)) for name in TIMES},
        )
        partly = int(np.sum(table.osl[table.finish == 0]))
        return SimResult(
            requests=table,
            series=self.watch.series(self.now_s),
            decisions=self._decisions,
            gpu_seconds=gpu_seconds,
            price_usd=price_usd,
            duration_s=self.now_s,
            simulated_tokens=self._simulated + partly,
            events=self.events,
        )


def run(
    config: SimConfig,
    trace: Trace,
    *,
    policy: ScalingPolicy | None = None,
    slo: Slo | None = None,
    checked: bool = False,
) -> SimResult:
    """Serve `trace` with the workers of `config`; without a policy they stay as they are.

    Nothing is drawn at random: the same arguments, the same bytes. `checked` verifies after every event that no block is lost,
    which takes long. Raises SpecError for a trace that has no requests or is not in order of arrival.
    """
    if not len(trace):
        raise SpecError("trace: holds no requests")
    if np.any(np.diff(trace.arrival_s) < 0):
        raise SpecError("trace: arrivals must be in order; sort them by arrival_s")
    if int(trace.osl.min()) < 1 or int(trace.isl.min()) < 1:
        raise SpecError("trace: isl and osl must be at least 1")
    return Simulation(config, trace, policy, slo, checked).run()
