"""Which worker a request goes to, of those that are there: what the router knows of them, and what they have cached."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from tandem.sched.prefix import PrefixIndex
from tandem.sched.route import Route, StepTimes, WorkerView, route_decode, route_prompt
from tandem.sched.times import MeasuredTimes
from tandem.serve.members import Member, Roster
from tandem.serve.messages import WorkerStats
from tandem.serve.pool_limits import PoolLimits
from tandem.serve.records import Record
from tandem.spec.errors import Infeasible

log = logging.getLogger("tandem.serve")

_PREFIXES = 100_000
"""Pairs of prefix and worker that the router remembers: some 50 MB."""


class Router:
    """Chooses workers. It changes nothing but what it remembers of their caches and of how long their steps take."""

    def __init__(self, members: Roster, *, times: StepTimes, limits: PoolLimits) -> None:
        self._members, self._times, self._limits = members, times, limits
        self._prefixes = PrefixIndex(max_entries=_PREFIXES)

    def prompt(self, record: Record) -> tuple[Route, Member, int] | None:
        """Where a prompt goes, and how many tokens of it are cached there; None while nobody has room for it."""
        cached = {name: cells * self._limits.prefix_tokens for name, cells in self._prefixes.matched(record.hashes).items()}
        if (
            record.waited_at is not None and record.waited_at in cached
        ):  # its own note there is no prefix that anyone has prefilled
            cached[record.waited_at] = record.waited_with

        def choose(views: Sequence[WorkerView]) -> Route | Infeasible:
            return route_prompt(record.context, cached, views, self._times, self._limits.routing)

        found = self._routed(choose)
        if found is None or found[1].view.queued_tokens >= self._limits.queued_tokens:
            return None
        route, member = found
        return route, member, min(cached.get(member.id, 0), record.context)

    def state(self, record: Record) -> tuple[Route, Member] | None:
        """Where a sequence goes on whose state is there; None while nobody has room for it."""
        found = self._routed(lambda views: route_decode(record.context, views, self._times))
        if found is None:
            return None
        view = found[1].view
        room = view.running < view.max_batch + self._limits.ahead and view.free_tokens > record.context
        return found if room or not view.running else None

    def sent(self, record: Record, member: Member, route: Route) -> None:
        """A request goes where it was routed to."""
        if record.handoff is None:
            self._prefixes.note(member.id, record.hashes)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("request %s: %s", record.key, route.reason)

    def forget(self, member: Member) -> None:
        """What a worker had cached is gone."""
        self._prefixes.forget(member.id)

    def learn(self, stats: WorkerStats) -> None:
        """How long a step took, for times that are measured."""
        engine = stats.engine
        if isinstance(self._times, MeasuredTimes):
            if engine.last_step_rows and not engine.last_step_tokens:
                self._times.observe_decode(engine.last_step_rows, engine.context_tokens, engine.last_step_s)
            elif engine.last_step_tokens and not engine.last_step_rows:
                self._times.observe_prefill(engine.last_step_tokens, engine.last_step_s)

    def _routed(self, choose: Callable[[Sequence[WorkerView]], Route | Infeasible]) -> tuple[Route, Member] | None:
        """A route to a worker that is there; None where there is none."""
        while True:
            route = choose(self._members.views)
            if isinstance(route, Infeasible):
                return None
            member = self._members[route.worker_id]
            if member.accepting:
                return route, member
            member.changed()  # it has died, and nobody has said so yet
