"""What an engine does in its next step: who decodes, who enters, who prefills how far, and who must give its room back.

Blocks hold the state that grows with the context, slots the state that does not (windows, SSM). A request holds
ceil(computed / block_size) blocks and one slot from its first prefilled token until it is done, handed off or preempted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tandem.sched.fair import FairQueue, by_age
from tandem.sched.request import Request
from tandem.spec.units import require_int


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLimits:
    """How much an engine takes on at once."""

    max_batch: int
    """Most requests that hold state together, decoding or partly prefilled."""
    step_tokens: int
    """Tokens of a step, one for each decoding request and the rest for prefill."""
    pass_tokens: int = 256
    """Prefills are cut at multiples of this from the prompt's start, so that a prompt's numbers never depend on the load."""
    block_size: int = 16
    """Tokens of a block."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "step_tokens", "pass_tokens", "block_size"):
            require_int(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """Blocks and slots that nobody holds; what a prefix cache would give back counts."""

    blocks: int
    slots: int

    def __post_init__(self) -> None:
        require_int("blocks", self.blocks, low=0)
        require_int("slots", self.slots, low=0)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `tokens` tokens of a prefill. An engine that finds a prefix in its cache as it begins goes on from there: such a
    prefix is whole passes, so the chunk, cut at the end of the prompt, still ends where a pass may end."""

    request: Request
    tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, to be carried out in the order preempt, admit, decode, prefill."""

    decode: tuple[Request, ...] = ()
    """Each gets one token: all running ones that are not preempted, then those admitted."""
    admit: tuple[Request, ...] = ()
    """Of the arrived: their state takes its room now."""
    prefill: tuple[Chunk, ...] = ()
    preempt: tuple[Request, ...] = ()
    """Give all their room back, are to be computed anew (computed = 0, preemptions + 1) and wait again."""

    def __bool__(self) -> bool:
        return bool(self.decode or self.admit or self.prefill or self.preempt)


def plan_step(
    *,
    running: Sequence[Request],
    waiting: Sequence[Request],
    arrived: Sequence[Request],
    limits: BatchLimits,
    room: Room,
    served: Mapping[str, float],
    frees: Callable[[Request], int] | None = None,
) -> StepPlan:
    """The next step of an engine. Pure: the same arguments, the same plan.

    `running` decode; `waiting` have tokens to prefill, those with computed > 0 are partly prefilled; `arrived` came with their
    state, which waits outside for room; `served` is what each client has had (`FairShare.served`); `frees` says how many blocks
    come free if a request alone goes, where that is fewer than it holds because it shares some.

    1. Every running request decodes. Where blocks do not suffice, the youngest arrival among all who hold any gives its room
       back until they do. The oldest never does, and a request that is alone always fits: whoever accepts requests refuses
       those that could outgrow all blocks, of which a prefill needs one token more than its prompt.
    2. Partly prefilled requests go on, oldest first.
    3. Others enter: first those once preempted, oldest first, then the arrived as they came, then new prompts from the client
       served least, in order of arrival within a client. Nobody overtakes one who finds no room, or long prompts would starve.
       Whoever enters must fit with one token to spare, beside what the partly prefilled still need, and leave a block for each
       that decodes. Nobody enters in a step that preempts.

    Prefill takes what decode leaves of step_tokens, in whole passes, and at least one pass, whatever decodes: it cannot starve.
    """
    begun = sorted((request for request in waiting if request.computed > 0), key=by_age)
    step = _Step(limits, room, running, begun, frees)
    preempt = step.preempt()
    others = [request for request in waiting if request.computed == 0]
    resumed = sorted((request for request in others if request.preemptions > 0), key=by_age)
    admit: list[Request] = []
    if not preempt and not resumed:
        for request in arrived:
            if not step.admit(request):
                break
            admit.append(request)
    chunks: list[Chunk] = []
    stalled = False
    for request in step.begun:
        tokens = step.go_on(request, first=not chunks)
        if not tokens:
            stalled = True
            break
        chunks.append(Chunk(request, tokens))
    if not preempt and not stalled and step.open:
        new = [request for request in others if request.preemptions == 0] if len(admit) == len(arrived) else []
        for request in _in_order(resumed, new, served, chunks):
            tokens = step.begin(request, first=not chunks)
            if not tokens:
                break
            chunks.append(Chunk(request, tokens))
    return StepPlan(tuple(step.decode), tuple(admit), tuple(chunks), tuple(preempt))


def _in_order(
    resumed: list[Request], new: list[Request], served: Mapping[str, float], chunks: list[Chunk]
) -> Iterator[Request]:
    """Who enters next; each answer must have become the newest chunk before the next is asked for."""
    yield from resumed
    queue = FairQueue(new, served)
    while (request := queue.pop()) is not None:
        yield request
        queue.charge(request.client, chunks[-1].tokens)


class _Step:
    """The account of one step: what is free, what is promised, and who uses it."""

    def __init__(
        self,
        limits: BatchLimits,
        room: Room,
        running: Sequence[Request],
        begun: list[Request],
        frees: Callable[[Request], int] | None,
    ) -> None:
        self._limits = limits
        self._blocks = room.blocks
        self._frees = frees or (lambda request: self._held(request.computed))
        self._slots = min(room.slots, limits.max_batch - len(running) - len(begun))
        self._prefilled = 0
        self._promised = 0
        """Blocks that the partly prefilled still need."""
        self.decode = list(running)
        self.begun = begun

    @property
    def open(self) -> bool:
        """Whether there is a slot for one more."""
        return self._slots > 0

    def _held(self, tokens: int) -> int:
        return -(-tokens // self._limits.block_size)

    def _grown(self, request: Request) -> int:
        """Blocks that a request needs for all its tokens and one more."""
        return self._held(request.computed + request.to_prefill + 1)

    def preempt(self) -> list[Request]:
        """Let the youngest go until the rest can take its step; then take the blocks of that step."""
        by_youth = sorted([*self.decode, *self.begun], key=by_age)
        gone: list[Request] = []
        while len(by_youth) > 1 and self._demand() > self._blocks:
            youngest = by_youth.pop()
            self._blocks += self._frees(youngest)
            (self.begun if youngest in self.begun else self.decode).remove(youngest)
            gone.append(youngest)
        self._blocks -= self._decode_demand()
        self._promised = sum(self._grown(request) - self._held(request.computed) for request in self.begun)
        return gone

    def _decode_demand(self) -> int:
        return sum(request.computed % self._limits.block_size == 0 for request in self.decode)

    def _demand(self) -> int:
        if self.decode or not self.begun:
            return self._decode_demand()
        head = self.begun[0]
        return self._held(head.computed + self._one_pass(head)) - self._held(head.computed)

    def _one_pass(self, request: Request) -> int:
        size = self._limits.pass_tokens
        return min(request.to_prefill, size - request.computed % size)

    def _fits(self, blocks: int) -> bool:
        return self._slots > 0 and blocks + self._promised + len(self.decode) <= self._blocks

    def admit(self, request: Request) -> bool:
        """Take an arrived request in, if it fits; it decodes at once."""
        need = self._grown(request)
        if not self._fits(need):
            return False
        self._blocks -= need
        self._slots -= 1
        self.decode.append(request)
        return True

    def begin(self, request: Request, *, first: bool) -> int:
        """Tokens of the first chunk of a request that holds nothing yet; 0 where it does not fit or no budget is left."""
        need = self._grown(request)
        if not self._fits(need):
            return 0
        self._promised += need
        tokens = self.go_on(request, first=first)
        if tokens:
            self._slots -= 1
        else:
            self._promised -= need
        return tokens

    def go_on(self, request: Request, *, first: bool) -> int:
        """Tokens of the next chunk of a prefill: as many passes as budget and blocks allow, a first one whatever the budget."""
        held, size = self._held(request.computed), self._limits.pass_tokens
        budget = self._limits.step_tokens - len(self.decode) - self._prefilled
        if first:
            budget = max(budget, self._one_pass(request))
        end = request.computed + min(
            budget, request.to_prefill, (held + self._blocks) * self._limits.block_size - request.computed
        )
        if end < request.computed + request.to_prefill:
            end = end // size * size
        tokens = max(0, end - request.computed)
        if tokens:
            used = self._held(end) - held
            self._blocks -= used
            self._promised -= used
            self._prefilled += tokens
        return tokens
