"""Bodies of answers, for the OpenAPI description: what is sent is built without these classes and tested against them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """Has these fields and no others."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Answer):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Answer):
    """Body of every answer that is no success."""

    error: ErrorDetail


class PromptDetails(Answer):
    """Of prompt_tokens."""

    cached_tokens: int


class CompletionDetails(Answer):
    """Of completion_tokens."""

    reasoning_tokens: int


class Usage(Answer):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TopLogprob(Answer):
    """A token that might have been."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """Every token of the output, thinking and tags included."""

    content: list[TokenLogprob]
    refusal: None


class AnswerFunction(Answer):
    """What is called."""

    name: str
    arguments: str


class AnswerCall(Answer):
    """A tool call."""

    id: str
    type: Literal["function"]
    function: AnswerFunction


class AnswerMessage(Answer):
    """The message of a choice."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[AnswerCall] | None = None


class ChatChoice(Answer):
    """One of n answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Answer):
    """Answer to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(Answer):
    """Lists with one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Answer):
    """One of n texts."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Answer):
    """Answer to POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class ModelCard(Answer):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Answer):
    """Answer to GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class PoolWorker(Answer):
    """One worker."""

    id: str
    role: Literal["prefill", "decode", "colocated"]
    up: bool
    draining: bool
    running: int
    waiting: int
    queued_tokens: int
    context_tokens: int
    free_tokens: int
    max_batch: int


class ScalingDecision(Answer):
    """What a scaling policy aimed at, why, and what was done."""

    at_s: float
    targets: dict[str, int]
    reason: str
    steps: list[str]


class Percentiles(Answer):
    """Of a time in seconds."""

    p50: float
    p90: float


class RecentRequests(Answer):
    """Requests that ended in the last seconds, and what their clients felt."""

    window_s: float
    requests: int
    tokens_per_s: float
    ttft_s: Percentiles | None
    tpot_s: Percentiles | None


class PoolState(Answer):
    """Answer to GET /pools and to POST /pools/pause and /pools/resume."""

    mode: Literal["off", "running", "paused", "dry-run"]
    changing: bool
    at_s: float
    workers: list[PoolWorker]
    decisions: list[ScalingDecision]
    recent: RecentRequests


class Status(Answer):
    """Answer to GET /health and /ready."""

    status: str
