"""What the HTTP application needs of whatever serves the model: pools of workers, or a stand-in in a test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from tandem.engine.types import EngineRequest, TokenOutput


class Frontend(Protocol):
    """Accepts requests and streams their tokens."""

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and output together."""
        ...

    @property
    def ready(self) -> bool:
        """Whether requests can be served now: workers of every needed role are up and nothing is draining."""
        ...

    @property
    def in_flight(self) -> int:
        """Requests that were accepted and have not finished."""
        ...

    def stream(self, request: EngineRequest) -> AsyncIterator[TokenOutput]:
        """Outputs until one with a finish_reason. Closing the iterator (or cancelling its task) cancels the request and frees
        all that it holds. A worker's death is not seen: the request goes on elsewhere."""
        ...
