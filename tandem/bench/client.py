"""One streamed completion of an OpenAI-compatible server, and when its parts came."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from tandem.sched.request import Request
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int

_DATA = b"data:"
_LONGEST_LINE = 1 << 22
"""Bytes: a server may send many tokens in one event."""
_ODD = (aiohttp.ClientError, HttpProcessingError, OSError, ValueError, RecursionError)
"""What comes of a server that is not there or answers something else: no connection, no HTTP, no JSON, no protocol."""


def one_line(said: object) -> str:
    """What a server said, fit for a line of a report: printable, and not long."""
    words = " ".join(str(said).split())[:200]
    return "".join(letter if letter.isprintable() else "?" for letter in words)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server, and what it is asked for."""

    url: str
    """Without `/v1`."""
    model: str
    api_key: str | None = None
    timeout_s: float = 600.0
    """Of a whole answer."""

    def __post_init__(self) -> None:
        for name in ("url", "model"):
            if not getattr(self, name).isprintable():
                raise SpecError(f"{name}={getattr(self, name)!r}: must be printable characters")

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


def session(target: Target) -> aiohttp.ClientSession:
    """Connections to a server, as many as there are requests in flight."""
    return aiohttp.ClientSession(
        headers=target.headers,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=target.timeout_s),
        read_bufsize=_LONGEST_LINE,
    )


async def served_model(http: aiohttp.ClientSession, url: str) -> str:
    """The name of the model that a server serves. Raises SpecError where it serves several or does not say."""
    try:
        async with http.get(f"{url}/v1/models") as answer:
            if answer.status != 200:
                raise SpecError(await _refusal(answer))
            names = _names(await answer.json(content_type=None))
    except _ODD as wrong:
        why = one_line(wrong) or type(wrong).__name__
        raise SpecError(f"url={url!r}: does not list its models ({why}); is an OpenAI-compatible server there?") from None
    if len(names) != 1:
        raise SpecError(f"url={url!r}: serves {one_line(', '.join(names)) or 'no model'}; name one with --model")
    return names[0]


def _names(told: Any) -> list[str]:
    cards = told.get("data") if isinstance(told, dict) else None
    names = [card.get("id") if isinstance(card, dict) else None for card in cards] if isinstance(cards, list) else [None]
    if not all(isinstance(name, str) and name and name.isprintable() for name in names):
        raise SpecError(f"it said {one_line(repr(told)[:80])}, no list of names")
    return [str(name) for name in names]


async def ask(
    http: aiohttp.ClientSession, target: Target, request: Request, prompt: list[int], clock: Callable[[], float]
) -> str | None:
    """Send one request and read its stream to the end; why it failed, None where it did not.

    `request` gets the times of its first and last token by `clock`, its tokens as the server counts them, and how it ended.
    Every answer has all of `max_tokens`: its end token is ignored.
    """
    body: dict[str, Any] = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        async with http.post(f"{target.url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise SpecError(await _refusal(answer))
            await _read(answer.content, request, clock)
    except TimeoutError:
        why = f"no whole answer within {target.timeout_s:g} s"
    except _ODD as wrong:
        why = one_line(wrong) or type(wrong).__name__
    else:
        return None
    request.finish_reason, request.done_s = "error", clock()
    return why


async def _refusal(answer: aiohttp.ClientResponse) -> str:
    """A status that is not 200, and the beginning of what was said with it."""
    said = await answer.content.read(2000)
    return one_line(f"HTTP {answer.status}: {said.decode(errors='replace')}")


async def _read(lines: aiohttp.StreamReader, request: Request, clock: Callable[[], float]) -> None:
    """A stream to its end, into its request. Raises SpecError, or another ValueError, for one that is none."""
    last: float | None = None
    usage: dict[str, Any] = {}
    async for line in lines:
        data = line.removeprefix(_DATA).strip()
        if not line.startswith(_DATA) or data == b"[DONE]":
            continue
        now = clock()
        event = _event(data)
        usage = event.get("usage") or usage
        if event.get("choices"):
            last = now
            if request.first_token_s is None:
                request.first_token_s = now
    if last is None:
        raise SpecError("the stream ended without tokens")
    if not usage:
        raise SpecError("the server counted no tokens (stream_options.include_usage)")
    isl, osl = (
        require_int(f"usage.{name}", usage.get(name), low=low) for name, low in (("prompt_tokens", 0), ("completion_tokens", 1))
    )
    request.isl, request.osl, request.finish_reason, request.done_s = isl, osl, "length", last


def _event(data: bytes) -> dict[str, Any]:
    """An event's object, its `choices` and `usage` of the types they must have. An error in it is raised; null is none."""
    event = json.loads(data)
    if not isinstance(event, dict):
        raise SpecError(f"the server sent {data[:80].decode(errors='replace')}, not an object")
    if error := event.get("error"):
        said = error.get("message") if isinstance(error, dict) else None
        raise SpecError(f"the stream broke off: {said or error}")
    for name, kind, what in (("choices", list, "a list"), ("usage", dict, "an object")):
        if not isinstance(event.get(name), kind | None):
            raise SpecError(f"{name}={repr(event[name])[:80]}: must be {what}")
    return event


def clock_from(start_s: float) -> Callable[[], float]:
    """Seconds since a moment of `time.perf_counter`."""
    return lambda: time.perf_counter() - start_s
