"""The plainest simulator: every worker takes one step after another, and the whole policy is asked at every step and choice."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from itertools import count

from tandem.sched.batch import Chunk, Room, StepPlan, plan_step
from tandem.sched.fair import FairShare
from tandem.sched.request import Request
from tandem.sched.route import Role, WorkerView, route_decode, route_prompt
from tandem.sim.config import SimConfig, WorkerKind
from tandem.sim.links import Links
from tandem.spec.errors import Infeasible
from tandem.spec.workload import Trace


@dataclass(eq=False)
class Plain:
    """One worker."""

    number: int
    kind: WorkerKind
    role: Role
    running: list[Request] = field(default_factory=list)
    waiting: list[Request] = field(default_factory=list)
    arrived: list[Request] = field(default_factory=list)
    coming: list[Request] = field(default_factory=list)
    share: FairShare = field(default_factory=FairShare)
    plan: StepPlan = field(default_factory=StepPlan)
    busy: bool = False

    def held(self, tokens: int) -> int:
        return -(-tokens // self.kind.limits.block_size)

    def free_blocks(self) -> int:
        """Those that nobody holds, counted from scratch; a step under way holds what its chunks will."""
        chunks = {id(c.request): c.tokens for c in self.plan.prefill}
        begun = [r for r in self.waiting if r.computed or id(r) in chunks]
        return (
            self.kind.blocks
            - sum(self.held(r.computed) for r in self.running)
            - sum(self.held(r.computed + chunks.get(id(r), 0)) for r in begun)
        )

    def view(self) -> WorkerView:
        chunks = {id(c.request) for c in self.plan.prefill}
        new = [r for r in self.waiting if not r.computed and id(r) not in chunks]
        states = self.arrived + self.coming
        pending = sum(r.to_prefill for r in new) + sum(r.context for r in states)
        return WorkerView(
            id=f"w{self.number:06d}",
            role=self.role,
            queued_tokens=sum(r.to_prefill for r in self.waiting),
            running=len(self.running) + len(states),
            context_tokens=sum(r.context for r in self.running + states),
            max_batch=self.kind.limits.max_batch,
            free_tokens=max(0, self.free_blocks() * self.kind.limits.block_size - pending),
        )


def simulate(config: SimConfig, trace: Trace) -> list[Request]:
    """All requests of a trace, served; workers stay as they are."""
    fleet = [Plain(0, group.kind, group.role) for group in config.groups for _ in range(group.count)]
    for number, worker in enumerate(fleet):
        worker.number = number
    times, links, serial = fleet[0].kind.times, Links(config.workers_per_link), count()
    heap: list[tuple[float, int, int, str, object, object]] = []
    clients = [""] * len(trace) if trace.client is None else [str(c) for c in trace.client]
    target: dict[str, int] = {}
    everyone: list[Request] = []

    def push(at_s: float, order: int, what: str, a: object, b: object = None) -> None:
        heapq.heappush(heap, (at_s, order, next(serial), what, a, b))

    for row in range(len(trace)):
        request = Request(
            id=f"{row:09d}",
            isl=int(trace.isl[row]),
            max_tokens=1 << 40,
            arrival_s=float(trace.arrival_s[row]),
            client=clients[row],
        )
        target[request.id] = int(trace.osl[row])
        everyone.append(request)
        push(request.arrival_s, 0, "arrival", request)

    def begin(worker: Plain, now_s: float) -> None:
        """Plan and begin a step, if there is anything to do."""
        limits = worker.kind.limits
        begun = [r for r in worker.waiting if r.computed]
        plan = plan_step(
            running=worker.running,
            waiting=worker.waiting,
            arrived=worker.arrived,
            limits=limits,
            room=Room(blocks=worker.free_blocks(), slots=limits.max_batch - len(worker.running) - len(begun)),
            served=worker.share.served,
        )
        for request in plan.preempt:
            if request in worker.running:
                worker.running.remove(request)
                worker.waiting.append(request)
            request.computed = 0
            request.preemptions += 1
        for request in plan.admit:
            worker.arrived.remove(request)
            worker.running.append(request)
            request.decode_start_s = now_s
        worker.plan = plan
        worker.busy = bool(plan.decode or plan.prefill)
        if not worker.busy:
            return
        context = sum(r.context for r in worker.running)
        for chunk in plan.prefill:
            if chunk.request.prefill_start_s is None:
                chunk.request.prefill_start_s = now_s
        if plan.prefill:
            seconds = times_of(worker).chunks_s(len(worker.running), context, list(plan.prefill))
        else:
            seconds = times_of(worker).decode_s(len(worker.running), context)
        push(now_s + seconds, 2, "step", worker)

    def times_of(worker: Plain):  # type: ignore[no-untyped-def]
        return worker.kind.times

    def finish(worker: Plain, request: Request, now_s: float) -> None:
        request.finish_reason = "length"
        request.done_s = request.first_token_s if request.osl == 1 else now_s
        worker.share.leave(request.client)

    def first_token(worker: Plain, request: Request, now_s: float) -> None:
        request.osl = 1
        request.prefill_end_s = now_s
        request.first_token_s = now_s + times.first_token_s
        worker.share.charge(request.client, 1)
        if target[request.id] == 1:
            finish(worker, request, now_s)
        elif worker.role == "prefill":
            worker.share.leave(request.client)
            request.transfer_start_s = now_s
            found = route_decode(request.context, [w.view() for w in fleet], times)
            assert not isinstance(found, Infeasible)
            to = next(w for w in fleet if w.view().id == found.worker_id)
            to.coming.append(request)
            assert request.prefill_start_s is not None
            there_s = links.send(
                worker.number,
                to.number,
                times.transfer_bytes(request.computed),
                times.link_bytes_per_s,
                request.prefill_start_s,
                now_s,
                times.last_layer,
            )
            push(there_s, 1, "state", request, to)
        else:
            request.decode_start_s = now_s
            worker.running.append(request)

    def end(worker: Plain, now_s: float) -> None:
        """A step is over: tokens for those who decoded, progress for those who prefilled."""
        chunks: tuple[Chunk, ...] = worker.plan.prefill
        worker.plan, worker.busy = StepPlan(), False
        for request in list(worker.running):
            request.osl += 1
            request.computed += 1
            worker.share.charge(request.client, 1)
            if request.osl == target[request.id]:
                worker.running.remove(request)
                finish(worker, request, now_s)
        for chunk in chunks:
            request = chunk.request
            request.computed += chunk.tokens
            worker.share.charge(request.client, chunk.tokens)
            if not request.to_prefill:
                worker.waiting.remove(request)
                if request.osl:
                    worker.running.append(request)
                else:
                    first_token(worker, request, now_s)

    while heap:
        now_s, _, _, what, a, b = heapq.heappop(heap)
        if what == "arrival":
            assert isinstance(a, Request)
            found = route_prompt(a.isl, {}, [w.view() for w in fleet], times, config.routing)
            assert not isinstance(found, Infeasible)
            worker = next(w for w in fleet if w.view().id == found.worker_id)
            worker.share.arrive(a.client)
            worker.waiting.append(a)
        elif what == "state":
            assert isinstance(a, Request)
            assert isinstance(b, Plain)
            worker = b
            worker.coming.remove(a)
            worker.share.arrive(a.client)
            worker.arrived.append(a)
            a.transfer_end_s = now_s
        else:
            assert isinstance(a, Plain)
            worker = a
            end(worker, now_s)
        if not worker.busy:
            begin(worker, now_s)
    return everyone
