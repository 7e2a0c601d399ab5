"""What pools do with requests, as one state machine without tasks: events come in, commands and outputs go out.

A request waits (queue) -> is at a worker (`Record.member`) -> perhaps waits with its state (`Record.handoff`) for a worker to
decode it -> is there -> finishes. When its worker dies it waits again, from its prompt and the tokens that were received.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import replace

from tandem.engine.handoff import Handoff
from tandem.engine.types import EngineRequest, TokenOutput
from tandem.sched.fair import FairShare
from tandem.sched.prefix import prefix_hashes
from tandem.sched.request import FinishReason, Request
from tandem.sched.route import StepTimes
from tandem.serve.members import Member, Roster
from tandem.serve.messages import (
    Accept,
    Batch,
    Cancel,
    Finished,
    HandedOff,
    Outputs,
    Recall,
    Refused,
    Release,
    Returned,
    Submit,
    Taken,
    WorkerStats,
)
from tandem.serve.pool_limits import PoolLimits, PoolObserver
from tandem.serve.prompts import PromptQueue
from tandem.serve.records import Held, Record, forget_times, merge_times
from tandem.serve.routing import Router
from tandem.spec.errors import SpecError

SUSPECT_TRIES = 2
"""A request whose worker has died so often may be why: until its next token it is the only such one at any worker."""


class Traffic:
    """All requests and where they are. `changed` is called whenever some worker may have less to do."""

    def __init__(
        self,
        members: Roster,
        *,
        times: StepTimes,
        limits: PoolLimits,
        clock: Callable[[], float],
        observer: PoolObserver | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._members, self._limits, self._clock = members, limits, clock
        self._router = Router(members, times=times, limits=limits)
        self._observer, self._changed = observer, changed
        self._share = FairShare()
        self._queue = PromptQueue(self._share)
        self._records: dict[str, Record] = {}
        self._tries: dict[str, Record] = {}
        self._ready: deque[Record] = deque()
        self._leaving: set[str] = set()  # prefilled somewhere, to be handed off from there
        self._held: dict[str, Held] = {}
        self._suspect: Record | None = None
        self.retries = 0

    @property
    def in_flight(self) -> int:
        """Requests that have not finished."""
        return len(self._records)

    @property
    def waiting(self) -> int:
        """Of these, those that no worker has."""
        return len(self._queue)

    @property
    def records(self) -> Collection[Record]:
        """Requests that have not finished."""
        return self._records.values()

    @property
    def held_states(self) -> int:
        """States between two workers."""
        return len(self._held)

    def states_of(self, member: Member) -> int:
        """States that `member` keeps for others."""
        return sum(h.remote and h.source is member and h.life == member.lives for h in self._held.values())

    # What clients do.

    def admit(self, request: EngineRequest) -> Record:
        """Take on a request. Raises SpecError for an id that is served already, for a prompt that is none, and where too many
        wait."""
        if request.id in self._records:
            raise SpecError(f"request id={request.id!r}: is being served already")
        if len(self._queue) >= self._limits.max_waiting:
            raise SpecError(f"{len(self._queue):,} requests wait already; ask again later")
        if not request.prompt_ids:
            raise SpecError("prompt: has no tokens; give some text")
        try:
            hashes = prefix_hashes(request.prompt_ids, self._limits.prefix_tokens)
        except (OverflowError, TypeError):
            raise SpecError("prompt: holds what is no token id; give whole numbers below the vocabulary's size") from None
        life = Request(
            id=request.id,
            isl=len(request.prompt_ids),
            max_tokens=request.sampling.max_tokens,
            arrival_s=self._clock(),
            client=request.client,
            osl=len(request.output_ids),
        )
        record = Record(request, life, list(request.output_ids), hashes)
        self._records[request.id] = record
        self._share.arrive(life.client)
        self._wait(record)
        self.dispatch()
        return record

    def leave(self, record: Record) -> None:
        """The client does not listen any more: free all that its request holds."""
        if record.finished:
            return
        key, member = record.key, record.member
        self._drop(record)
        if member is not None:
            member.send(Cancel(key))
        self._close(record, "cancelled")
        self.dispatch()

    def fail(self, record: Record, why: str) -> None:
        """End a request with an error that its client sees."""
        key, member = record.key, record.member
        self._drop(record)
        if member is not None:
            member.send(Cancel(key))
        self._end(record, TokenOutput(record.request.id, len(record.tokens), (), "", finish_reason="error", error=why))

    def fail_waiting(self, why: str) -> None:
        """End all requests that no worker has."""
        for record in [r for r in self._records.values() if r.member is None]:
            self.fail(record, why)

    def fail_all(self, why: str) -> None:
        """End every request."""
        for record in list(self._records.values()):
            self.fail(record, why)

    # What workers do.

    def on_events(self, member: Member, batch: Batch) -> None:
        """What a worker has done in a step."""
        now = self._clock()
        member.heard_at(batch.now_s, now)
        for event in batch.events:
            match event:
                case Outputs(outputs):
                    for output in outputs:
                        self._receive(member, output, now)
                case Finished(life):
                    record = self._of(member, life.id)
                    if record is not None:
                        merge_times(record, life, member.local_s, now)
                case HandedOff(handoff):
                    self._handed_off(member, handoff, now)
                case Returned(key):
                    self._returned(member, key)
                case Taken(key):
                    self._taken(member, key, now)
                case Refused(key, reason):
                    self._let_go(key)
                    record = self._of(member, key)
                    if record is not None:
                        self._retry(record, reason)
                case WorkerStats():
                    self._told(member, event)
        self.dispatch()

    def on_death(self, member: Member, reason: str) -> None:
        """A worker is gone, with all that it had."""
        self._router.forget(member)
        for key in [key for key, held in self._held.items() if held.receiver is member]:
            self._let_go(key)
        lost = list(member.records.values())
        for record in [r for r in self._ready if self._lost_with(r, member)]:
            self._ready.remove(record)
            lost.append(record)
        for record in lost:
            self._retry(record, f"worker {member.id}: {reason}")
        self.dispatch()

    # Where requests go.

    def dispatch(self) -> None:
        """Send on whatever can go on: states that wait for a decode worker first, then prompts in fair order."""
        while self._ready and self._send_state(self._ready[0]):
            self._ready.popleft()
        while len(self._queue):
            record = self._queue.head(skip_after=None if self._suspect is None else SUSPECT_TRIES)
            if record is None or not self._send_prompt(record):
                break
        self._changed()

    def _send_prompt(self, record: Record) -> bool:
        found = self._router.prompt(record)
        if found is None:
            return False
        route, member, cached = found
        if route.hand_off and len(self._leaving) + len(self._held) >= self._limits.states(len(self._members)):
            return False
        self._router.sent(record, member, route)
        self._queue.remove(record)
        record.charged, record.waited_at = record.context - cached, None
        self._share.charge(record.life.client, record.charged)
        if record.attempt >= SUSPECT_TRIES:
            self._suspect = record
        self._give(record, member)
        if route.hand_off:
            self._leaving.add(record.key)
        member.send(Submit(record.to_send(), route.hand_off, max(0.0, self._clock() - record.life.arrival_s)))
        return True

    def _send_state(self, record: Record) -> bool:
        found = self._router.state(record)
        if found is None:
            return False
        route, member = found
        self._router.sent(record, member, route)
        handoff, record.handoff = record.handoff, None
        assert handoff is not None
        self._held[record.key].receiver = member
        self._give(record, member)
        member.send(Accept(handoff))
        return True

    def recall(self, member: Member) -> None:
        """Ask a worker for the prompts back that it has not begun: they are routed anew as they come, and lose nothing."""
        for key, record in member.records.items():
            if record.life.first_token_s is None:
                member.send(Recall(key))

    def spread(self, new: Member) -> None:
        """A worker takes work from now on: prompts that wait at others of its role, and have not begun, may be sooner there."""
        for member in self._members.values():
            if member is not new and member.role == new.role and member.accepting and member.view.queued_tokens:
                self.recall(member)
        self.dispatch()

    def _returned(self, member: Member, key: str) -> None:
        record = self._of(member, key)
        if record is None:
            return
        self._drop(record)
        record.waited_at, record.waited_with = member.id, record.context - record.charged
        self._share.charge(record.life.client, -record.charged)
        self._wait(record)

    def _told(self, member: Member, stats: WorkerStats) -> None:
        member.told(stats)
        self._router.learn(stats)
        if self._observer is not None:
            self._observer.on_stats(member, stats)

    # How requests change.

    def _receive(self, member: Member, output: TokenOutput, now: float) -> None:
        record = self._of(member, output.request_id)
        if record is None:
            return
        have, end = len(record.tokens), output.index + len(output.token_ids)
        if output.token_ids and end <= have:
            if output.finish_reason is None:
                return
            output = replace(output, index=have, token_ids=(), text="", logprobs=None)
        if output.index != have:
            self.fail(record, f"tokens {have} to {output.index} of the answer are missing: a fault of this server, not yours")
            return
        record.tokens.extend(output.token_ids)
        life = record.life
        life.osl = len(record.tokens)
        if self._suspect is record:
            self._suspect = None
        if output.token_ids:
            self._share.charge(life.client, len(output.token_ids))
            if life.first_token_s is None:
                life.first_token_s = now
        if record.attempt:
            output = replace(output, request_id=record.request.id)
        if output.finish_reason is None:
            record.channel.put(output)
            return
        self._drop(record)
        self._end(record, output)

    def _handed_off(self, member: Member, handoff: Handoff, now: float) -> None:
        key, record = handoff.request.id, self._of(member, handoff.request.id)
        remote = handoff.state is None
        if record is None:  # it was cancelled meanwhile
            handoff.done()
            if remote:
                member.send(Release(key))
            return
        merge_times(record, handoff.life, member.local_s, now)
        self._leaving.discard(key)
        self._held[key] = Held(member, member.lives, remote)
        del member.records[key]
        record.member, record.handoff = None, handoff
        self._ready.append(record)

    def _taken(self, member: Member, key: str, now: float) -> None:
        self._let_go(key)
        record = self._of(member, key)
        if record is not None:
            life = record.life
            life.transfer_start_s = now if life.transfer_start_s is None else life.transfer_start_s
            life.transfer_end_s = life.decode_start_s = now

    def _let_go(self, key: str) -> None:
        """Nobody will read the state of this try again."""
        held = self._held.pop(key, None)
        if held is not None and held.remote:
            held.source.send(Release(key))

    def _lost_with(self, record: Record, member: Member) -> bool:
        held = self._held.get(record.key)
        return held is not None and held.remote and held.source is member

    def _retry(self, record: Record, reason: str) -> None:
        self._drop(record)
        if record.attempt >= self._limits.max_retries:
            why = f"was tried {record.attempt + 1} times; last: {reason}"
            self._end(record, TokenOutput(record.request.id, len(record.tokens), (), "", finish_reason="error", error=why))
            return
        record.attempt += 1
        self.retries += 1
        forget_times(record.life)
        self._wait(record)
        if self._observer is not None:
            self._observer.on_retry(record.life, reason)

    def _wait(self, record: Record) -> None:
        self._tries[record.key] = record
        self._queue.add(record)

    def _give(self, record: Record, member: Member) -> None:
        record.member = member
        member.records[record.key] = record

    def _drop(self, record: Record) -> None:
        """Take a request out of wherever it is."""
        key = record.key
        self._tries.pop(key, None)
        self._leaving.discard(key)
        if self._suspect is record:
            self._suspect = None
        if record.member is not None:
            record.member.records.pop(key, None)
            record.member = None  # a receiver says itself when it has done with the state
        elif record.handoff is not None:
            if record in self._ready:
                self._ready.remove(record)
            record.handoff.done()
            record.handoff = None
            self._let_go(key)
        else:
            self._queue.remove(record)

    def _end(self, record: Record, output: TokenOutput) -> None:
        assert output.finish_reason is not None
        self._close(record, output.finish_reason)
        record.channel.put(output)

    def _close(self, record: Record, reason: FinishReason) -> None:
        life = record.life
        life.finish_reason, life.done_s = reason, self._clock()
        del self._records[record.request.id]
        self._share.leave(life.client)
        if self._observer is not None:
            self._observer.on_finish(life)

    def _of(self, member: Member, key: str) -> Record | None:
        record = self._tries.get(key)
        return record if record is not None and record.member is member else None
