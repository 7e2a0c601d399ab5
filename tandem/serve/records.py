"""What pools remember of one request from its arrival until its last token, through every worker that it passes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tandem.engine.handoff import Handoff
from tandem.engine.types import EngineRequest, TokenOutput
from tandem.sched.metrics import CHAIN
from tandem.sched.request import Request

if TYPE_CHECKING:
    from tandem.serve.members import Member

_MARKS = tuple(f"{part}_s" for part in CHAIN)


class Channel:
    """Outputs on their way from the pools to the one client that reads them."""

    def __init__(self) -> None:
        self._outputs: deque[TokenOutput] = deque()
        self._reader: asyncio.Future[None] | None = None

    def put(self, output: TokenOutput) -> None:
        """Add one; never waits."""
        self._outputs.append(output)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def next(self) -> TokenOutput:
        """The oldest one, once there is one."""
        while not self._outputs:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self._outputs.popleft()


@dataclass(slots=True, eq=False)
class Record:
    """One request. `tokens` are those that were received, and so the place from where another worker may go on."""

    request: EngineRequest
    life: Request
    tokens: list[int]
    hashes: tuple[int, ...] = ()
    """Of the prompt's beginnings, for the router."""
    channel: Channel = field(default_factory=Channel)
    charged: int = 0
    """Tokens of its prompt that its client was charged for when it was sent."""
    waited_at: str | None = None
    """The worker that it was asked back from, until it is sent again."""
    waited_with: int = 0
    """Tokens of its prompt that were cached there when it was sent there."""
    attempt: int = 0
    member: Member | None = None
    """Who has it; None while it waits for a worker."""
    handoff: Handoff | None = None
    """Its state, while it waits for a worker to decode it."""

    @property
    def key(self) -> str:
        """Its id at workers: each try has its own, so that an answer to an earlier one is never taken for a later one's."""
        return f"{self.request.id}~{self.attempt}" if self.attempt else self.request.id

    @property
    def context(self) -> int:
        """Tokens of prompt and received output."""
        return self.life.isl + len(self.tokens)

    @property
    def finished(self) -> bool:
        """Whether its last output has been put into the channel."""
        return self.life.finish_reason is not None

    def to_send(self) -> EngineRequest:
        """The request as a worker gets it now."""
        return replace(self.request, id=self.key, output_ids=tuple(self.tokens))


@dataclass(slots=True)
class Held:
    """A state between two workers: in memory of a life of `source`, or anywhere in this process."""

    source: Member
    life: int
    remote: bool
    receiver: Member | None = None


def merge_times(record: Record, told: Request, local: Callable[[float], float], now: float) -> None:
    """Take over what a worker told of the times of a request, by this server's clock; what is known already stays.

    A retried request keeps the times of its first prefill, if that brought its first token: they explain what its client felt.
    """
    life, floor = record.life, record.life.arrival_s
    for name in _MARKS[1:-1]:
        known = getattr(life, name)
        value = getattr(told, name)
        if known is None and value is not None:
            ceiling = now if life.first_token_s is None or not name.startswith("prefill") else life.first_token_s
            known = max(floor, min(local(value), ceiling))
            setattr(life, name, known)
        floor = floor if known is None else max(floor, known)
    life.cached = life.cached or told.cached
    life.preemptions = max(life.preemptions, told.preemptions)


def forget_times(life: Request) -> None:
    """Drop the times of a try that came to nothing."""
    if life.first_token_s is None:
        life.prefill_start_s = life.prefill_end_s = None
    life.transfer_start_s = life.transfer_end_s = life.decode_start_s = None
