"""From a request's fields to sampling parameters and grammars."""

from __future__ import annotations

import json
from typing import Any, Literal

from tandem.align.parsers import ToolSyntax
from tandem.engine.types import Grammar, SamplingParams
from tandem.serve.chat import ChatTemplate
from tandem.serve.errors import bad_request
from tandem.serve.schemas import ChatRequest, NamedTool, Sampling, SchemaFormat, Tool
from tandem.serve.tools import tool_grammar
from tandem.spec.errors import SpecError

SEEDS = 2**63


def sampling_of(
    body: Sampling,
    *,
    max_tokens: int,
    seed: int,
    vocabulary: int,
    logprobs: int | None,
    grammar: Grammar | None,
    skip_special_tokens: bool = True,
) -> SamplingParams:
    """Sampling parameters of the first choice; the others differ in their seed. Raises SpecError."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    bias = {}
    for key, value in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 12 and int(key) < vocabulary):
            raise SpecError(f"logit_bias={key[:40]!r}: keys must be token ids from 0 to {vocabulary - 1}")
        bias[int(key)] = value
    for token in body.stop_token_ids or ():
        if token >= vocabulary:
            raise SpecError(f"stop_token_ids={token}: must be from 0 to {vocabulary - 1}")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=body.top_k if body.top_k is not None and body.top_k > 0 else None,
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        seed=seed % SEEDS,
        logit_bias=bias,
        logprobs=logprobs,
        stop=tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        thinking_budget=body.thinking_budget,
        grammar=grammar,
        skip_special_tokens=skip_special_tokens,
    )


def chosen_tools(body: ChatRequest) -> list[Tool]:
    """The tools that the answer may call: none of them if tool_choice says so. Raises ApiError."""
    tools, choice = body.tools or [], body.tool_choice
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise bad_request(f"tools={names[:20]}: two tools must not share a name", param="tools")
    if choice == "none":
        return []
    if choice is not None and choice != "auto" and not tools:
        raise bad_request("tool_choice: needs tools", param="tool_choice")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise bad_request(f"tool_choice.function.name={choice.function.name[:60]!r}: must be one of {names[:20]}")
    return tools


def grammar_of(body: Sampling, *, template: ChatTemplate | None = None) -> Grammar | None:
    """What the answer must be: calls where tool_choice asks for them, JSON where response_format does. Raises ApiError."""
    schema: dict[str, Any] | None = None
    if isinstance(body.response_format, SchemaFormat):
        schema = body.response_format.json_schema.schema_
    elif body.response_format is not None and body.response_format.type == "json_object":
        schema = {"type": "object"}
    if isinstance(body, ChatRequest) and template is not None and template.syntax is not None:
        text = _calls(body, template, template.syntax, schema)
        if text is not None:
            return Grammar(kind="lark", text=text)
    if schema is None:
        return None
    if isinstance(body.response_format, SchemaFormat):
        return Grammar(kind="json_schema", text=json.dumps(schema))
    return Grammar(kind="json_object")


def _calls(body: ChatRequest, template: ChatTemplate, syntax: ToolSyntax, schema: dict[str, Any] | None) -> str | None:
    """The grammar of an answer that has to call, may call instead of giving JSON, or may call tools that are strict."""
    tools, choice = chosen_tools(body), body.tool_choice
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    must = isinstance(choice, NamedTool) or choice == "required"
    strict = any(tool.function.strict for tool in tools)
    if not tools or not (must or strict or schema is not None):
        return None
    functions = [
        {"name": tool.function.name, "parameters": tool.function.parameters if must or tool.function.strict else None}
        for tool in tools
    ]
    parallel = body.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
    instead: Literal["text", "nothing"] | dict[str, Any] = "nothing" if must else "text" if schema is None else schema
    return tool_grammar(syntax, functions, tags=template.tag_ids, parallel=parallel, instead=instead)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
