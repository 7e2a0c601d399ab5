"""`Member`: one worker among the pools' workers, its role, and how busy it is, with what was sent to it since it last told."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass

from tandem.sched.route import Role, WorkerView
from tandem.serve.hosts import WorkerHandle
from tandem.serve.messages import Accept, Capacity, Command, Submit, WorkerStats
from tandem.serve.records import Record


@dataclass(frozen=True, slots=True)
class _Sent:
    number: int
    queued_tokens: int
    running: int
    context_tokens: int


class Member:
    """A worker, over all of its lives."""

    def __init__(self, handle: WorkerHandle, role: Role) -> None:
        self.handle = handle
        self.role: Role = role
        self.draining = False
        self.scaling = False
        """Whether it drains because a controller wants so: the server stays ready meanwhile."""
        self.hopeless = False
        """It died too many times in a row: requests do not wait for it."""
        self.lives = 0
        """How many times it has come up."""
        self.capacity: Capacity | None = None
        self.stats: WorkerStats | None = None
        self.records: dict[str, Record] = {}
        self._sent: deque[_Sent] = deque()
        self._count = 0
        self._offset_s = math.inf
        self._view: WorkerView | None = None
        self.watcher: Callable[[Member], None] | None = None
        """Is told when what `view` says may have changed."""

    @property
    def id(self) -> str:
        """Its name."""
        return self.handle.id

    @property
    def up(self) -> bool:
        """Whether it can be talked to."""
        return self.capacity is not None and self.handle.alive

    @property
    def accepting(self) -> bool:
        """Whether new work may go there."""
        return self.up and not self.draining

    def began(self, capacity: Capacity) -> None:
        """A new life: it holds nothing."""
        self.lives += 1
        self.capacity = capacity
        self._reset()

    def ended(self) -> None:
        """It is not there any more."""
        self.capacity = None
        self._reset()

    def send(self, command: Command) -> None:
        """Hand it a command, and count what that adds to its load."""
        match command:
            case Submit(request):
                tokens = len(request.prompt_ids) + len(request.output_ids)
                self._add(tokens, 0, 0)
            case Accept(handoff):
                tokens = len(handoff.request.prompt_ids) + len(handoff.request.output_ids)
                self._add(0, 1, tokens)
        self.handle.send(command)

    def told(self, stats: WorkerStats) -> None:
        """It has said how busy it is."""
        self.stats = stats
        while self._sent and self._sent[0].number <= stats.handled:
            self._sent.popleft()
        self.changed()

    def heard_at(self, there_s: float, here_s: float) -> None:
        """A batch of events has come. The least difference of the clocks that was ever seen has the least of the way in it."""
        self._offset_s = min(self._offset_s, here_s - there_s)

    def local_s(self, there_s: float) -> float:
        """Its clock in terms of ours; late by no more than the quickest message took."""
        return there_s + self._offset_s

    def changed(self) -> None:
        """Role, draining or its load has changed."""
        self._view = None
        if self.watcher is not None:
            self.watcher(self)

    @property
    def view(self) -> WorkerView:
        """As the router sees it."""
        if self._view is None or self._view.accepting != self.accepting:
            self._view = self._seen()
        return self._view

    def _add(self, queued_tokens: int, running: int, context_tokens: int) -> None:
        self._count += 1
        self._sent.append(_Sent(self._count, queued_tokens, running, context_tokens))
        self.changed()

    def _reset(self) -> None:
        self.stats = None
        self._sent.clear()
        self._count = 0
        self._offset_s = math.inf
        self.changed()

    def _seen(self) -> WorkerView:
        capacity, stats = self.capacity, self.stats
        if capacity is None:
            return WorkerView(id=self.id, role=self.role, accepting=False)
        queued = sum(sent.queued_tokens for sent in self._sent)
        running = sum(sent.running for sent in self._sent)
        context = sum(sent.context_tokens for sent in self._sent)
        free = capacity.tokens - context
        if stats is not None:
            queued += stats.engine.queued_tokens + stats.deferred_tokens
            running += stats.engine.running + stats.arriving
            free = stats.free_tokens - context
            context += stats.engine.context_tokens + stats.arriving_tokens
        return WorkerView(
            id=self.id,
            role=self.role,
            accepting=self.accepting,
            queued_tokens=queued,
            running=running,
            context_tokens=context,
            max_batch=capacity.max_batch,
            free_tokens=max(0, free - queued),
        )


class Roster(Mapping[str, Member]):
    """All members by name, and how the router sees them: only who has changed is looked at again."""

    def __init__(self, members: Iterable[Member] = ()) -> None:
        self._members: dict[str, Member] = {}
        self._views: dict[str, WorkerView] = {}
        self._listed: list[WorkerView] = []
        self._stale: set[Member] = set()
        for member in members:
            self.add(member)

    def __getitem__(self, worker_id: str) -> Member:
        return self._members[worker_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def values(self) -> ValuesView[Member]:
        """The members, in the order in which they came."""
        return self._members.values()

    def add(self, member: Member) -> None:
        """One more."""
        self._members[member.id] = member
        self._views[member.id] = member.view
        self._stale.add(member)
        member.watcher = self._stale.add

    def remove(self, worker_id: str) -> Member:
        """One less; KeyError for one that is not here."""
        member = self._members.pop(worker_id)
        member.watcher = None
        self._stale.discard(member)
        del self._views[worker_id]
        self._listed = list(self._views.values())
        return member

    @property
    def views(self) -> Sequence[WorkerView]:
        """Of all, in the order in which they came. A worker that died a moment ago may still seem to accept."""
        if self._stale:
            for member in self._stale:
                self._views[member.id] = member.view
            self._stale.clear()
            self._listed = list(self._views.values())
        return self._listed
