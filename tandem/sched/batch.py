"""What an engine does in its next step: who decodes, who enters, who prefills how far, and who must give its room back.

Blocks hold the state that grows with the context, slots the state that does not (windows, SSM). A request holds
ceil(computed / block_size) blocks and one slot from its first prefilled token until it is done, handed off or preempted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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
    decode = list(running)
    slots = min(room.slots, limits.max_batch - len(running) - len(begun))
    blocks, preempt = _make_room(decode, begun, limits, room.blocks, frees)
    account = StepAccount(limits, blocks=blocks, slots=slots, decoding=len(decode), begun=begun)
    others = [request for request in waiting if request.computed == 0]
    resumed = sorted((request for request in others if request.preemptions > 0), key=by_age)
    new = FairQueue((request for request in others if request.preemptions == 0), served)
    admit, chunks = fill_step(account, begun=begun, resumed=resumed, arrived=arrived, new=new, enter=not preempt)
    return StepPlan((*decode, *admit), tuple(admit), tuple(chunks), tuple(preempt))


class NewPrompts(Protocol):
    """New prompts in the order in which they enter; `FairQueue` is one, over all that wait."""

    def pop(self) -> Request | None:
        """The next one; None when there is none."""
        ...

    def charge(self, client: str, tokens: float) -> None:
        """The one popped last, of `client`, got its first chunk."""
        ...


def fill_step(
    account: StepAccount,
    *,
    begun: Sequence[Request],
    resumed: Sequence[Request],
    arrived: Collection[Request],
    new: NewPrompts,
    enter: bool = True,
) -> tuple[list[Request], list[Chunk]]:
    """Points 2 and 3 of `plan_step`, for those who keep count themselves of what is free and who decodes: who of the arrived
    is admitted, and which chunks are prefilled. `begun` and `resumed` come oldest first; nobody enters unless `enter`."""
    admit: list[Request] = []
    all_admitted = not arrived or not resumed
    if enter and not resumed:
        for request in arrived:
            if not account.admit(request):
                all_admitted = False
                break
            admit.append(request)
    chunks: list[Chunk] = []
    for request in begun:
        tokens = account.go_on(request, first=not chunks)
        if not tokens:
            return admit, chunks
        chunks.append(Chunk(request, tokens))
    if not enter or not account.open:
        return admit, chunks
    for request in resumed:
        tokens = account.begin(request, first=not chunks)
        if not tokens:
            return admit, chunks
        chunks.append(Chunk(request, tokens))
    while all_admitted and account.open and (head := new.pop()) is not None:
        tokens = account.begin(head, first=not chunks)
        if not tokens:
            break
        chunks.append(Chunk(head, tokens))
        new.charge(head.client, tokens)
    return admit, chunks


def _held(tokens: int, limits: BatchLimits) -> int:
    return -(-tokens // limits.block_size)


def _one_pass(request: Request, limits: BatchLimits) -> int:
    size = limits.pass_tokens
    return min(request.to_prefill, size - request.computed % size)


def _decode_demand(decode: Iterable[Request], limits: BatchLimits) -> int:
    return sum(request.computed % limits.block_size == 0 for request in decode)


def _demand(decode: list[Request], begun: list[Request], limits: BatchLimits) -> int:
    if decode or not begun:
        return _decode_demand(decode, limits)
    head = begun[0]
    return _held(head.computed + _one_pass(head, limits), limits) - _held(head.computed, limits)


def _make_room(
    decode: list[Request],
    begun: list[Request],
    limits: BatchLimits,
    blocks: int,
    frees: Callable[[Request], int] | None,
) -> tuple[int, list[Request]]:
    """Let the youngest go, out of both lists, until the rest can take its step; what is free after the decodes of that step,
    and who went."""
    gone: list[Request] = []
    if _demand(decode, begun, limits) > blocks:
        by_youth = sorted([*decode, *begun], key=by_age)
        while len(by_youth) > 1 and _demand(decode, begun, limits) > blocks:
            youngest = by_youth.pop()
            blocks += _held(youngest.computed, limits) if frees is None else frees(youngest)
            (begun if youngest in begun else decode).remove(youngest)
            gone.append(youngest)
    return blocks - _decode_demand(decode, limits), gone


class StepAccount:
    """The account of one step: what is free once all who decode have their blocks of it, and what is promised."""

    __slots__ = ("_blocks", "_decoding", "_limits", "_prefilled", "_promised", "_slots")

    def __init__(self, limits: BatchLimits, *, blocks: int, slots: int, decoding: int, begun: Sequence[Request]) -> None:
        self._limits, self._blocks, self._slots, self._decoding = limits, blocks, slots, decoding
        self._prefilled = 0
        self._promised = sum(self._grown(request) - _held(request.computed, limits) for request in begun) if begun else 0
        """Blocks that the partly prefilled still need."""

    @property
    def open(self) -> bool:
        """Whether there is a slot for one more."""
        return self._slots > 0

    def _grown(self, request: Request) -> int:
        """Blocks that a request needs for all its tokens and one more."""
        return -(-(request.computed + request.to_prefill + 1) // self._limits.block_size)

    def _fits(self, blocks: int) -> bool:
        return self._slots > 0 and blocks + self._promised + self._decoding <= self._blocks

    def admit(self, request: Request) -> bool:
        """Take an arrived request in, if it fits; it decodes at once."""
        need = self._grown(request)
        if not self._fits(need):
            return False
        self._blocks -= need
        self._slots -= 1
        self._decoding += 1
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
        limits, computed, to_prefill = self._limits, request.computed, request.to_prefill
        block, size = limits.block_size, limits.pass_tokens
        held = -(-computed // block)
        tokens = limits.step_tokens - self._decoding - self._prefilled
        if first and tokens < size:
            tokens = max(tokens, _one_pass(request, limits))
        tokens = min(tokens, to_prefill, (held + self._blocks) * block - computed)
        if tokens < to_prefill and size > 1:
            tokens = (computed + tokens) // size * size - computed
        if tokens <= 0:
            return 0
        used = -(-(computed + tokens) // block) - held
        self._blocks -= used
        self._promised -= used
        self._prefilled += tokens
        return tokens
