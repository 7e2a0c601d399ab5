"""Workers that come, drain, change their roles, die and go, and what they cost meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from tandem.sched.observation import Decision
from tandem.sched.route import Role
from tandem.sim.config import SimConfig, WorkerKind
from tandem.sim.worker import SimWorker
from tandem.spec.errors import SpecError


def _least_to_do(worker: SimWorker) -> tuple[bool, int, int, int]:
    return worker.status != "starting", worker.running + worker.incoming, worker.queued_tokens, worker.number


class Host(Protocol):
    """What the fleet asks of a simulation."""

    now_s: float

    def later(self, at_s: float, what: object, argument: object = None) -> None:
        """Call `what(argument)` then."""

    def new_worker(self, number: int, kind: WorkerKind, role: Role) -> SimWorker:
        """A worker of this run."""
        ...

    def changed(self, *, came_up: bool = False) -> None:
        """Workers came, went or changed their roles."""

    def died(self, worker: SimWorker) -> None:
        """Its requests have lost their state."""


class Fleet:
    """All workers. Targets are met by flips first, then by starts and drains; a worker changes its role only when drained."""

    def __init__(self, config: SimConfig, host: Host) -> None:
        self._config, self._host = config, host
        self.workers: list[SimWorker] = []
        self._next = 0
        self._since_s: dict[int, float] = {}
        self._gpu_seconds = self._price_usd = 0.0
        self._kinds: dict[Role, WorkerKind] = {}
        for group in config.groups:
            self._kinds.setdefault(group.role, group.kind)
        self._by_name = {kind.name: kind for kind in (*config.kinds, *(group.kind for group in config.groups))}
        self._rolling: dict[Role, int] | None = None
        """How many of the new kind each role is to have, while workers are replaced."""
        self.longest = min(
            (group.kind.blocks - 1) * group.kind.limits.block_size for group in config.groups if group.role != "prefill"
        )

    def start(self) -> None:
        """Those of the beginning are up."""
        for group in self._config.groups:
            for _ in range(group.count):
                self._add(group.kind, group.role).status = "up"
        self._host.changed()

    def count(self, role: Role) -> int:
        """Workers that have this role, or will have it: up, starting, or changing to it."""
        return sum(1 for w in self.workers if self._heads_for(w) == role)

    def _heads_for(self, worker: SimWorker) -> Role | None:
        if worker.status in ("draining", "flipping"):
            return worker.flip_to
        return worker.role

    def _add(self, kind: WorkerKind, role: Role) -> SimWorker:
        worker = self._host.new_worker(self._next, kind, role)
        self._next += 1
        self.workers.append(worker)
        self._since_s[worker.number] = self._host.now_s
        return worker

    def _begin(self, kind: WorkerKind, role: Role) -> None:
        worker = self._add(kind, role)
        worker.status = "starting"
        self._host.later(self._host.now_s + kind.start_up_s, self._up, worker)

    def _up(self, worker: SimWorker) -> None:
        if worker.status in ("starting", "flipping"):
            worker.status, worker.flip_to = "up", None
            self._roll()
            self._host.changed(came_up=True)

    def kill(self, number: int) -> None:
        """The worker dies, and another starts in its stead."""
        worker = next((w for w in self.workers if w.number == number), None)
        if worker is None:
            return
        role, status = worker.flip_to or worker.role, worker.status
        self._gone(worker)
        self._host.changed()
        self._host.died(worker)
        if status != "draining" or worker.flip_to is not None:
            self._begin(self._kinds[role] if self._rolling is not None else worker.kind, role)

    def _gone(self, worker: SimWorker) -> None:
        worker.status = "gone"
        self.workers.remove(worker)
        self._pay(worker, self._host.now_s)

    def _pay(self, worker: SimWorker, now_s: float) -> None:
        seconds = now_s - self._since_s.pop(worker.number)
        self._gpu_seconds += seconds * worker.kind.gpus
        self._price_usd += seconds / 3600.0 * worker.kind.price_per_hour_usd

    def cost(self, now_s: float) -> tuple[float, float]:
        """GPU seconds and price of all workers until now; the run is over."""
        for worker in self.workers:
            self._pay(worker, now_s)
        return self._gpu_seconds, self._price_usd

    # Scaling.

    def carry_out(self, decision: Decision) -> None:
        """Make the workers of each role as many as the decision says."""
        if decision.kind is not None:
            if decision.kind not in self._by_name:
                raise SpecError(f"kind={decision.kind!r}: must be {' or '.join(self._by_name)}, or be given in SimConfig.kinds")
            self._kinds = dict.fromkeys(decision.targets, self._by_name[decision.kind])
            self._rolling = dict(decision.targets)
            for worker in self.workers:
                if worker.status == "draining":
                    worker.flip_to = None
            self._roll()
        else:
            self.meet(decision.targets)
        self._host.changed()

    def _roll(self) -> None:
        """Replace workers one after another: a new one of each role starts, and when it is up, old ones drain, so many that the
        last of them goes with the last one to come."""
        if self._rolling is None:
            return
        left = any(w.status == "flipping" for w in self.workers)
        for role, target in self._rolling.items():
            there = [w for w in self.workers if w.role == role and w.status in ("up", "starting")]
            old = [w for w in there if w.kind is not self._kinds[role]]
            new = [w for w in there if w.kind is self._kinds[role]]
            if any(w.status == "starting" for w in new):
                left = True
                continue
            to_come = max(0, target - len(new))
            # Those up share out the old ones that may go: none before the first has come, all with the last.
            keep = len(old) * to_come // (to_come + 1) if new or not target else len(old)
            for worker in sorted(old, key=_least_to_do)[: len(old) - keep]:
                self._drain(worker, None)
            if to_come:
                left = True
                self._begin(self._kinds[role], role)
        if not left:
            targets, self._rolling = self._rolling, None
            self.meet(targets)

    def meet(self, targets: Mapping[Role, int]) -> None:
        """Towards these counts, from what is there and on its way."""
        wanted = {role: count - self.count(role) for role, count in targets.items()}
        for role in sorted(wanted):
            for worker in [w for w in self.workers if w.status == "draining" and w.role == role and w.flip_to is None]:
                if wanted[role] > 0:  # it was to go, and is needed after all
                    worker.status = "up"
                    wanted[role] -= 1
        for role in sorted(wanted):
            for other in sorted(wanted):
                while wanted[role] > 0 and wanted[other] < 0 and (spare := self._spare(other, flip=True)) is not None:
                    self._drain(spare, role)
                    wanted[role] -= 1
                    wanted[other] += 1
        for role in sorted(wanted):
            while wanted[role] < 0 and (spare := self._spare(role, flip=False)) is not None:
                self._drain(spare, None)
                wanted[role] += 1
            kind = self._kinds.get(role) or next(iter(self._kinds.values()))
            for _ in range(max(0, wanted[role])):
                self._begin(kind, role)

    def _spare(self, role: Role, *, flip: bool) -> SimWorker | None:
        """The worker of a role that is missed least: one that starts, else the one with the least to do; never the last that
        is up, unless another is on its way."""
        there = [w for w in self.workers if w.role == role and w.status in ("up", "starting")]
        if not there or (flip and all(w.status == "starting" for w in there)):
            return None
        able = [w for w in there if w.status == "up"] if flip else there
        if len(there) == 1 and flip:
            return None
        return min(able, key=_least_to_do)

    def _drain(self, worker: SimWorker, flip_to: Role | None) -> None:
        if worker.status == "starting":
            self._gone(worker)
            return
        worker.status, worker.flip_to = "draining", flip_to
        if worker.empty:
            self._host.later(self._host.now_s, self.drained, worker)

    def drained(self, worker: SimWorker) -> None:
        """Nothing is left there: it goes, or changes its role."""
        if worker.status != "draining" or not worker.empty:
            return
        if worker.flip_to is None:
            self._gone(worker)
            return
        worker.status = "flipping"
        self._host.later(self._host.now_s + worker.kind.flip_s, self._flip, worker)

    def _flip(self, worker: SimWorker) -> None:
        if worker.status == "flipping" and worker.flip_to is not None:
            worker.role = worker.flip_to
            self._up(worker)
