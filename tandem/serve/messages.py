"""What pools and workers say to each other: small plain data that pickles, the same in a thread, a process or an actor.

Commands go to a worker in order, events come back in order. Bulk state never travels here: a `Handoff` carries the state
itself only inside one process, else a receipt.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem.engine.handoff import Handoff
from tandem.engine.types import EngineRequest, EngineStats, TokenOutput
from tandem.sched.request import Request


@dataclass(frozen=True, slots=True)
class Submit:
    """Serve a request; with `hand_off` only until its first token, then give it away as `HandedOff`."""

    request: EngineRequest
    hand_off: bool = False
    waited_s: float = 0.0
    """How long ago the request arrived, when the command was sent: clocks of two machines differ, durations do not."""


@dataclass(frozen=True, slots=True)
class Accept:
    """Go on with a request that another worker has prefilled."""

    handoff: Handoff


@dataclass(frozen=True, slots=True)
class Export:
    """Give a request away as `HandedOff` as soon as it decodes, so that this worker is empty sooner."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Recall:
    """Give a submitted request back, as `Returned`, if nothing of it was computed; else go on as if this had not come."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget a request and free what it holds."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Release:
    """The state that was handed off is not needed any more: its receiver has taken it, or never will."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Ping:
    """Answer with `Pong` of the same number once all earlier commands have been handled."""

    number: int


@dataclass(frozen=True, slots=True)
class Inspect:
    """Check what the engine holds, and answer with `Inspected`."""

    number: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End. What still runs is dropped."""


Command = Submit | Accept | Export | Recall | Cancel | Release | Ping | Inspect | Stop


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What a worker can hold, said once when it is up."""

    max_context: int
    """Most tokens of prompt and output together."""
    max_batch: int
    """Most requests that hold state at once."""
    tokens: int
    """Tokens of context that its cache has room for, over all requests."""
    pid: int | None = None
    """Of its process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerStats:
    """How busy a worker is. `handled` counts the `Submit` and `Accept` commands that these numbers already include."""

    handled: int
    engine: EngineStats
    free_tokens: int
    """Context that fits still; what the prefix cache can give back counts as free, states that wait for room as taken."""
    deferred: int = 0
    """Requests that wait until the state they will have has somewhere to go."""
    deferred_tokens: int = 0
    arriving: int = 0
    """Handed-off requests that have come and wait for room."""
    arriving_tokens: int = 0
    """Their context."""
    held_states: int = 0
    """States that were handed off and are kept until the receiver has them."""
    taken: int = 0
    """Hand-offs whose state was copied in, since the start."""
    taken_bytes: int = 0
    taken_s: float = 0.0
    """From the command to the copy, waiting for room included."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """Tokens of one step."""

    outputs: tuple[TokenOutput, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """What happened when to a request that has finished, as its last worker saw it. Comes before its last output."""

    life: Request


@dataclass(frozen=True, slots=True)
class HandedOff:
    """A prefilled request, to be accepted by another worker. Its first token came in the `Outputs` before."""

    handoff: Handoff


@dataclass(frozen=True, slots=True)
class Taken:
    """The state of a handed-off request is not read any more: it was copied, or the request is gone."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A hand-off that cannot be gone on with: its state is damaged or gone."""

    request_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Returned:
    """Answer to `Recall`: the request is not here any more."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Pong:
    """Answer to `Ping`."""

    number: int


@dataclass(frozen=True, slots=True)
class Inspected:
    """Answer to `Inspect`: what is wrong, or None."""

    number: int
    error: str | None


Event = Outputs | Finished | HandedOff | Taken | Refused | Returned | WorkerStats | Pong | Inspected


@dataclass(frozen=True, slots=True)
class Batch:
    """Events of one step, and the worker's clock when they were sent."""

    now_s: float
    events: tuple[Event, ...]
