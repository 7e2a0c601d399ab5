"""Bodies of requests, field by field: OpenAI's names, and a few of vLLM's that clients send beside them.

A field that is not here is refused, so that nothing is silently left undone. Fields of the OpenAI API that change nothing
in an answer of this server are named in `Ignored` and accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tandem.engine.types import MAX_LOGPROBS

Id = Annotated[int, Field(ge=0, lt=1 << 31)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Text = Annotated[str, Field(min_length=1, max_length=10_000)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
Object = dict[str, Any]


class Body(BaseModel):
    """Takes no field that it does not name, and no text where a number belongs."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Body):
    """A piece of text; pictures and sound are refused."""

    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class SystemMessage(Body):
    """Instructions."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(Body):
    """A function's name and its arguments as JSON text."""

    name: str
    arguments: str


class CalledTool(Body):
    """A call that an earlier answer made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Body):
    """An earlier answer, as this API gave it."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: list[CalledTool] | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


class ToolMessage(Body):
    """What a tool returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Body):
    """A tool: its name, what it is for, and the JSON schema of its arguments."""

    name: Name
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class Tool(Body):
    """The one kind of tool that there is."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """Names one of the tools."""

    name: str


class NamedTool(Body):
    """Asks for a call of one tool."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(Body):
    """What an answer in JSON must be."""

    name: Name
    description: str | None = None
    schema_: Object = Field(alias="schema")
    strict: bool | None = None


class PlainFormat(Body):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


Format = Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")]


class StreamOptions(Body):
    """What a stream holds beside the tokens."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Ignored(Body):
    """Fields of the OpenAI API that are accepted and change nothing here."""

    metadata: Object | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class Sampling(Ignored):
    """What chats and completions have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=10**9, description="0 and -1 switch it off")] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10.0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] | None = Field(default=None, max_length=1024)
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    stop_token_ids: Annotated[list[Id], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    thinking_budget: Annotated[int, Field(ge=0, le=10**9)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    response_format: Format | None = None


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Object | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionRequest(Sampling):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[Id] | list[list[Id]]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None
