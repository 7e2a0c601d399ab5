"""What an operator decides about the HTTP application: limits, keys, formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tandem.serve.auth import ApiKeys
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int

ChatFormat = Literal["template", "nano2"]
"""`template`: the checkpoint's own; `nano2`: the one of Nemotron Nano 2 (`tandem.align.chat`), for checkpoints that bring it
or none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Limits and choices of the HTTP application. None: no limit of its own, or decided from the model."""

    keys: ApiKeys | None = None
    """Who may ask; None lets everybody in."""
    chat_format: ChatFormat | None = None
    """None: the checkpoint's template where it has another one, else nano2."""
    fingerprint: str | None = None
    """`system_fingerprint` of all answers; None: from the version and the model's name."""
    max_body_bytes: int = 8 << 20
    body_timeout_s: float = 30.0
    """For the whole body of a request to arrive."""
    max_prompt_tokens: int | None = None
    max_choices: int = 64
    """Answers of one HTTP request: prompts times n."""
    max_in_flight: int = 1024
    """Answers that run or wait, of everybody; more get 429."""
    max_in_flight_per_client: int | None = None
    """The same, of one key (or of one `user` where there are no keys)."""
    default_max_tokens: int | None = None
    """Output tokens of a chat whose request does not say; None: as many as the context has room for."""
    retry_after_s: int = 1
    """What clients that are turned away are told to wait."""

    def __post_init__(self) -> None:
        if self.chat_format not in (None, "template", "nano2"):
            raise SpecError(f"chat_format={self.chat_format!r}: must be template or nano2")
        require_int("max_body_bytes", self.max_body_bytes, low=1024, high=1 << 40)
        require_int("max_choices", self.max_choices)
        require_int("max_in_flight", self.max_in_flight)
        require_int("retry_after_s", self.retry_after_s)
        for name in ("max_prompt_tokens", "max_in_flight_per_client", "default_max_tokens"):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name))
        if not self.body_timeout_s > 0:
            raise SpecError(f"body_timeout_s={self.body_timeout_s!r}: must be above 0")
