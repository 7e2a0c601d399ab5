"""The life of one request, the same in the simulator and in the live server: what it asks for, what has happened, when.

    arrival <= prefill start <= prefill end <= transfer start <= transfer end <= decode start <= done

Times are seconds on one clock; what has not happened is None. `metrics` turns them into TTFT, TPOT and the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""`stop`: an end token, a stop string or a finished grammar; `length`: max_tokens or the model's context is used up."""


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One request as policies see it: counts and times, no tokens and never the output length that it will have."""

    id: str
    isl: int
    """Prompt tokens."""
    max_tokens: int
    """Most output tokens that the client accepts."""
    arrival_s: float
    client: str = ""
    """Who asks, for fairness; requests of one client are served in order of arrival."""

    cached: int = 0
    """Prompt tokens found in a prefix cache when the prefill began."""
    computed: int = 0
    """Tokens whose state is held: of the prompt and, of the output, all but the newest."""
    osl: int = 0
    """Output tokens so far."""
    preemptions: int = 0
    finish_reason: FinishReason | None = None

    prefill_start_s: float | None = None
    prefill_end_s: float | None = None
    transfer_start_s: float | None = None
    transfer_end_s: float | None = None
    decode_start_s: float | None = None
    first_token_s: float | None = None
    done_s: float | None = None

    @property
    def context(self) -> int:
        """Tokens of prompt and output."""
        return self.isl + self.osl

    @property
    def to_prefill(self) -> int:
        """Tokens that a prefill has still to read before the next token can be chosen by a decode step; 0 while decoding."""
        osl = self.osl
        tokens = self.isl - self.computed + (osl - 1 if osl > 1 else 0)
        return tokens if tokens > 0 else 0
