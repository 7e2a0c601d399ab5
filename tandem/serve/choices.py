"""One answer among n: takes the engine's outputs and writes them, piece by piece or whole, as the OpenAI API has them."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from typing import Any

import orjson

from tandem.align.parsers import ReasoningParser, ToolCall, ToolParser
from tandem.engine.types import Logprobs, TokenOutput
from tandem.serve.errors import ApiError, refused
from tandem.serve.spelling import TokenTexts

_NULL = b"null"


class Choice(ABC):
    """What chats and completions have in common: counts, the end, and the order in which to use it.

    `chunk` for a stream or `collect` for a whole answer is called with every output; after either, `finish_reason` is None
    while more is to come.
    """

    def __init__(self, index: int, texts: TokenTexts | None) -> None:
        self.index = index
        self.texts = texts
        """Writes log-probabilities; None where they are not asked for."""
        self.finish_reason: str | None = None
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.cached_tokens = 0
        self.counts_prompt = True
        """Of several answers to one prompt, only the first counts it."""

    def count(self, output: TokenOutput) -> None:
        """Take the counts and the end of an output. Raises ApiError for one that ends without being an answer."""
        reason = output.finish_reason
        if reason is not None and reason != "stop" and reason != "length":
            raise _failure(output)
        self.completion_tokens += len(output.token_ids)
        if output.cached_tokens is not None:
            self.cached_tokens = output.cached_tokens
        self.finish_reason = reason

    @abstractmethod
    def start(self, head: bytes, foot: bytes) -> None:
        """What stands before and after each choice in the chunks of this stream."""

    @abstractmethod
    def chunk(self, output: TokenOutput) -> bytes:
        """What to send for an output; nothing if no text has become certain."""

    @abstractmethod
    def collect(self, output: TokenOutput) -> None:
        """Keep an output for `result`."""

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """The whole choice."""


class ChatChoice(Choice):
    """The message of a chat: thinking, text and tool calls apart."""

    def __init__(
        self,
        index: int,
        texts: TokenTexts | None,
        *,
        thinking: bool,
        close_id: int | None,
        tools: ToolParser | None,
        parallel: bool,
    ) -> None:
        super().__init__(index, texts)
        self._reasoning = ReasoningParser(thinking=thinking)
        self._close_id = close_id
        self._tools = tools
        self._parallel = parallel
        self._calls = 0
        self._parts: tuple[list[str], list[str]] = [], []
        self._kept: list[ToolCall] = []
        self._logprobs: list[bytes] = []

    def start(self, head: bytes, foot: bytes) -> None:
        """Set what stands around each chunk."""
        choice = b'%b{"index":%d,"delta":' % (head, self.index)
        self._role = choice + b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}' + foot
        self._head = choice
        self._head_text = choice + b'{"content":'
        self._foot_text = b'},"logprobs":null,"finish_reason":null}' + foot
        self._foot = foot

    def chunk(self, output: TokenOutput) -> bytes:
        """What to send for an output."""
        reasoning, content, calls = self._read(output)
        role, self._role = self._role, b""
        if not reasoning and not calls and self.finish_reason is None and self.texts is None:
            if not content:
                return role
            return b"".join((role, self._head_text, orjson.dumps(content), self._foot_text))
        logprobs = _NULL
        if self.texts is not None and output.logprobs:
            logprobs = b'{"content":[%b],"refusal":null}' % self.texts.chat(output.logprobs)
        pieces = [role]
        # Thoughts come before what follows them, so they get a chunk of their own where one output holds both.
        if reasoning:
            pieces.append(self._delta(b'{"reasoning_content":%b}' % orjson.dumps(reasoning), logprobs))
            logprobs = _NULL
        if content or calls or (logprobs is not _NULL):
            delta: dict[str, Any] = {"content": content} if content or not calls else {}
            if calls:
                first = self._calls - len(calls)
                delta["tool_calls"] = [{"index": first + i, **_as_json(call)} for i, call in enumerate(calls)]
            pieces.append(self._delta(orjson.dumps(delta), logprobs))
        if self.finish_reason is not None:
            pieces.append(self._delta(b"{}", _NULL, orjson.dumps(self.finish_reason)))
        return b"".join(pieces)

    def collect(self, output: TokenOutput) -> None:
        """Keep an output."""
        reasoning, content, calls = self._read(output)
        for part, text in zip(self._parts, (reasoning, content), strict=True):
            if text:
                part.append(text)
        self._kept.extend(calls)
        if self.texts is not None and output.logprobs:
            self._logprobs.append(self.texts.chat(output.logprobs))

    def result(self) -> dict[str, Any]:
        """The whole choice."""
        reasoning, content = ("".join(part) for part in self._parts)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._kept:
            message["content"] = content or None
            message["tool_calls"] = [_as_json(call) for call in self._kept]
        if reasoning:
            message["reasoning_content"] = reasoning
        logprobs: Any = None
        if self.texts is not None:
            logprobs = {"content": orjson.Fragment(b"[%b]" % b",".join(self._logprobs)), "refusal": None}
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def _read(self, output: TokenOutput) -> tuple[str, str, list[ToolCall]]:
        self.count(output)
        parser = self._reasoning
        if parser.thinking:
            ids = output.token_ids
            closed = self._close_id is not None and self._close_id in ids
            self.reasoning_tokens += ids.index(self._close_id) + 1 if closed else len(ids)
        reasoning, content = parser.feed(output.text)
        ended = self.finish_reason is not None
        if ended:
            more, rest = parser.finish()
            reasoning, content = reasoning + more, content + rest
        if self._tools is None:
            return reasoning, content, []
        content, calls = self._tools.feed(content) if content else ("", [])
        if ended and (self._parallel or not calls):
            rest, late = self._tools.finish()
            content, calls = content + rest, calls + late
        if calls and not self._parallel:
            calls, self.finish_reason = calls[:1], "stop"
        self._calls += len(calls)
        if self._calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        return reasoning, content, calls

    def _delta(self, delta: bytes, logprobs: bytes, reason: bytes = _NULL) -> bytes:
        return b'%b%b,"logprobs":%b,"finish_reason":%b}%b' % (self._head, delta, logprobs, reason, self._foot)


class TextChoice(Choice):
    """The text of a completion, as it comes."""

    def __init__(self, index: int, texts: TokenTexts | None) -> None:
        super().__init__(index, texts)
        self._text: list[str] = []
        self._entries: list[Logprobs] = []
        self._offset = 0

    def start(self, head: bytes, foot: bytes) -> None:
        """Set what stands around each chunk."""
        self._head = b'%b{"index":%d,"text":' % (head, self.index)
        self._plain = b',"logprobs":null,"finish_reason":null}' + foot
        self._foot = foot

    def chunk(self, output: TokenOutput) -> bytes:
        """What to send for an output."""
        self.count(output)
        if self.finish_reason is None and self.texts is None:
            return self._head + orjson.dumps(output.text) + self._plain if output.text else b""
        logprobs = _NULL
        if self.texts is not None and output.logprobs:
            lists = self.texts.plain(output.logprobs, self._offset)
            self._offset += sum(len(str(text)) for text in lists["tokens"])
            logprobs = orjson.dumps(lists)
        elif not output.text and self.finish_reason is None:
            return b""
        reason = _NULL if self.finish_reason is None else orjson.dumps(self.finish_reason)
        text = orjson.dumps(output.text)
        return b'%b%b,"logprobs":%b,"finish_reason":%b}%b' % (self._head, text, logprobs, reason, self._foot)

    def collect(self, output: TokenOutput) -> None:
        """Keep an output."""
        self.count(output)
        if output.text:
            self._text.append(output.text)
        if self.texts is not None and output.logprobs:
            self._entries.extend(output.logprobs)

    def result(self) -> dict[str, Any]:
        """The whole choice."""
        logprobs = None if self.texts is None else self.texts.plain(tuple(self._entries), 0)
        return {
            "index": self.index,
            "text": "".join(self._text),
            "logprobs": logprobs,
            "finish_reason": self.finish_reason,
        }


def _as_json(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _failure(output: TokenOutput) -> ApiError:
    reason = output.error or f"the request was {output.finish_reason}"
    if output.finish_reason == "cancelled":
        return ApiError(503, "the request was cancelled by the server; try again", code="cancelled")
    # Engines refuse before the first token what they cannot serve; that a grammar cannot be followed shows later.
    if reason.startswith("grammar.") or (output.index == 0 and not output.token_ids):
        return refused(reason)
    return ApiError(500, reason, code="failed")
