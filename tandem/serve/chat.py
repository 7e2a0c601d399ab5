"""From messages to a prompt: the chat template, the tools in it, and what can be read back from the answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tandem.align import chat
from tandem.align.parsers import CLOSE, NANO2, OPEN, ToolSyntax
from tandem.model.tokenizer import Tokenizer
from tandem.serve.config import ChatFormat
from tandem.serve.encoding import MOST_TOKENS, encode_within
from tandem.serve.schemas import AssistantMessage, Content, Message, Tool
from tandem.serve.tools import syntax_of
from tandem.spec.errors import SpecError

_RESERVED = ("messages", "tools", "add_generation_prompt", "self")


class Prompt(NamedTuple):
    """Token ids of a prompt, and whether it ends inside a thinking block."""

    ids: tuple[int, ...]
    thinking: bool = False


class ChatTemplate:
    """Renders conversations for one model and knows how that model writes thoughts and tool calls."""

    def __init__(self, tokenizer: Tokenizer, chat_format: ChatFormat | None = None) -> None:
        if chat_format is None:
            chat_format = "nano2" if tokenizer.template in (None, chat.nano2_template()) else "template"
        if chat_format == "template" and tokenizer.template is None:
            raise SpecError("chat_format='template': the model has no chat template; nano2 needs none")
        self.format = chat_format
        self.tokenizer = tokenizer
        self.syntax: ToolSyntax | None = NANO2 if chat_format == "nano2" else syntax_of(tokenizer.template)
        """How calls are written; None where the template has no form of them that is known."""
        tags = [OPEN, CLOSE, *([self.syntax.open, self.syntax.close] if self.syntax else [])]
        added = tokenizer.backend.get_added_tokens_decoder()
        self.tag_ids = {token.content: i for i, token in added.items() if token.special and token.content in tags}
        """Tags that are special tokens, whose text a decoder leaves out unless told otherwise."""
        self.close_id = next((i for i, token in added.items() if token.content == CLOSE), None)

    def prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        variables: Mapping[str, Any] | None = None,
        most: int = MOST_TOKENS,
    ) -> Prompt:
        """The prompt of a conversation, not encoded to its end if that is far beyond `most` tokens. Raises SpecError where the
        template refuses it, ApiError where it is that long."""
        text, pieces = self._text(
            [as_mapping(message, i) for i, message in enumerate(messages)],
            [tool.model_dump(exclude_none=True) for tool in tools],
            dict(variables or {}),
        )
        ids = encode_within(self.tokenizer, pieces, most, add_special_tokens=False)
        return Prompt(tuple(ids), thinking=text.rstrip().endswith(OPEN))

    def _text(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], variables: Mapping[str, Any]
    ) -> tuple[str, Iterable[str]]:
        """The end of a conversation's text up to where the answer begins, and the text in pieces to be encoded one by one."""
        if tools and self.syntax is None:
            raise SpecError("tools: this model's chat template has no form of tool calls that can be read; leave them out")
        for name in variables:
            if name in _RESERVED or name in self.tokenizer.special or not name.isidentifier():
                raise SpecError(f"chat_template_kwargs.{name[:60]}: cannot be set; a request's other fields do that")
        if self.format == "nano2":
            return self._nano2(messages, tools, variables)
        try:
            text = self.tokenizer.chat(messages, tools=tools or None, **variables)
            return text, [text]
        except SpecError:
            raise
        except Exception as wrong:  # Templates are programs: they fail in ways of their own on what they do not expect.
            raise SpecError(f"messages: the chat template fails on them ({' '.join(str(wrong).split())[:200]})") from None

    def _nano2(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], variables: Mapping[str, Any]
    ) -> tuple[str, Iterable[str]]:
        unknown = next((name for name in variables if name != "enable_thinking"), None)
        if unknown is not None:
            raise SpecError(f"chat_template_kwargs.{unknown[:60]}: is not known; enable_thinking is")
        enable = variables.get("enable_thinking")
        if enable is not None and not isinstance(enable, bool):
            raise SpecError(f"chat_template_kwargs.enable_thinking={enable!r}: must be true or false")
        found = chat.segments(messages, tools=tools, enable_thinking=enable, tokenizer=self.tokenizer)
        return found[-1].text, (piece for segment in found for piece in segment.pieces())


def as_mapping(message: Message, position: int) -> dict[str, Any]:
    """A message as templates expect it: one text, `system` for developers, arguments of calls as objects."""
    plain: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    plain["content"] = _text(message.content)
    if message.name is not None:
        plain["name"] = message.name
    if message.role == "tool":
        plain["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        if message.reasoning_content is not None:
            plain["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            plain["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _arguments(
                            call.function.arguments, f"messages[{position}].tool_calls[{i}].function.arguments"
                        ),
                    },
                }
                for i, call in enumerate(message.tool_calls)
            ]
    return plain


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _arguments(text: str, field: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise SpecError(f"{field}={text[:60]!r}: must be a JSON object as text")
    return value
