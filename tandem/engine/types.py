"""What goes into an engine and what comes out: sampling parameters, requests, outputs. Plain data that pickles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tandem.sched.request import FinishReason
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int

MAX_LOGPROBS = 20
"""Most alternatives that an answer lists beside each token, as the OpenAI API has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grammar:
    """What the output must be: `json_schema` (`text` is the schema as JSON), `json_object`, `regex` or `lark` (a grammar)."""

    kind: Literal["json_schema", "json_object", "regex", "lark"]
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("json_schema", "json_object", "regex", "lark"):
            raise SpecError(f"grammar.kind={self.kind!r}: must be json_schema, json_object, regex or lark")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    Temperature 0 takes the likeliest token. The token at output position i of a request is drawn with a number that depends
    on `seed` and i alone, so it is the same whatever else is served and wherever the request goes on.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int | None = None
    """Alternatives to list beside each token's own log-probability; None for no log-probabilities at all."""
    tempered_logprobs: bool = False
    """Log-probabilities of the logits divided by the temperature, as a policy's gradient needs them, not as they are."""
    stop: tuple[str, ...] = ()
    """Texts that end the output; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    thinking_budget: int | None = None
    """Thinking tokens after which the block is closed, at the next newline or 500 tokens later (paper A section 3.4)."""
    grammar: Grammar | None = None
    """Holds for the answer; thinking before it is free."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text (never out of token_ids)."""

    def __post_init__(self) -> None:
        require_int("max_tokens", self.max_tokens)
        require_int("seed", self.seed, low=0, high=2**63 - 1)
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise SpecError(f"{name}={value!r}: must be from {low:g} to {high:g}")
        for name, high in (("top_p", 1.0), ("repetition_penalty", 10.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= high:
                raise SpecError(f"{name}={value!r}: must be above 0 and at most {high:g}")
        if self.top_k is not None:
            require_int("top_k", self.top_k)
        if self.logprobs is not None:
            require_int("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS)
        if self.thinking_budget is not None:
            require_int("thinking_budget", self.thinking_budget, low=0)
        for token, bias in self.logit_bias.items():
            require_int("logit_bias", token, low=0)
            if not -100 <= bias <= 100:
                raise SpecError(f"logit_bias[{token}]={bias!r}: must be from -100 to 100")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise SpecError(f"stop={list(self.stop)!r}: must hold texts that are not empty")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """A prompt and how to go on from it. With `output_ids` the request was served before: it goes on after them."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    client: str = ""
    thinking: bool = False
    """The prompt ends inside a thinking block (its template opened one)."""
    output_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural logarithm of the probability of a token, before bias and mostly temperature, and of the likeliest ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """Tokens of one request that have become known, and the text that has become certain through them."""

    request_id: str
    index: int
    """Output tokens before these."""
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[Logprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    """Why, where finish_reason is `error`: one line that may be shown to the client."""
    cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache; with the first output."""


@dataclass(frozen=True, slots=True)
class Generation:
    """All that one prompt brought."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    logprobs: tuple[Logprobs, ...] | None
    cached_tokens: int

    @classmethod
    def of(cls, outputs: Sequence[TokenOutput]) -> Generation:
        """The outputs of one request, joined."""
        listed = [entry for output in outputs for entry in output.logprobs or ()]
        return cls(
            token_ids=tuple(token for output in outputs for token in output.token_ids),
            text="".join(output.text for output in outputs),
            finish_reason=outputs[-1].finish_reason if outputs else None,
            logprobs=tuple(listed) or None,
            cached_tokens=sum(output.cached_tokens or 0 for output in outputs),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Counts of one engine at one moment; those of what has happened since it began come last."""

    waiting: int
    running: int
    queued_tokens: int
    """Of waiting prompts, still to be computed."""
    context_tokens: int
    """Of running requests."""
    blocks: int
    free_blocks: int
    """Also those that only the prefix cache holds."""
    slots: int
    free_slots: int
    prefix_bytes: int
    last_step_s: float
    last_step_rows: int
    last_step_tokens: int
    """Prefilled ones."""

    steps: int
    preemptions: int
    prompt_tokens: int
    prefix_tokens: int
    """Of prompt_tokens, found in the prefix cache."""
