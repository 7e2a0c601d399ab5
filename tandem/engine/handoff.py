"""A request on its way from one engine to another: what it asked for, what it has got, and its state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tandem.engine.types import EngineRequest
from tandem.model.state import LayerState, SequenceState
from tandem.sched.request import Request


class StateSink(Protocol):
    """Takes a sequence's state layer by layer while its prefill still runs, and says at the end where it can be had."""

    def put(self, layer: int, state: LayerState, begin: int, end: int, *, final: bool) -> None:
        """Layer `layer` of the (one-row) state has its tokens up to `end`, of which those from `begin` on are new. Windows and
        SSM states are worth taking when `final`: no tokens follow."""
        ...

    def close(self) -> Any:
        """The receipt: small, picklable, enough to open the state elsewhere."""
        ...

    def abort(self) -> None:
        """Nothing more will come, and nobody will ask."""
        ...


@dataclass(slots=True)
class Handoff:
    """One request between engines. `request.output_ids` are all tokens so far; the state covers all but the newest.

    `state` is the object itself (by reference); `receipt` what a sink gave instead. `release` is called once the state has
    been copied or is not needed any more.
    """

    request: EngineRequest
    life: Request
    state: SequenceState | None = None
    receipt: Any = None
    release: Callable[[], None] | None = None

    def done(self) -> None:
        """Let go of the state."""
        self.state, release, self.release = None, self.release, None
        if release is not None:
            release()
