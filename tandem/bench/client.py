"""One streamed completion of an OpenAI-compatible server, and when its parts came."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from tandem.sched.request import Request
from tandem.spec.errors import SpecError

_DATA = b"data:"
_LONGEST_LINE = 1 << 22
"""Bytes: a server may send many tokens in one event."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server, and what it is asked for."""

    url: str
    """Without `/v1`."""
    model: str
    api_key: str | None = None
    timeout_s: float = 600.0
    """Of a whole answer."""

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
            told = await answer.json(content_type=None)
            names = [str(card["id"]) for card in told["data"]]
    except (TimeoutError, aiohttp.ClientError, ValueError, KeyError, TypeError) as wrong:
        why = " ".join(str(wrong).split()) or type(wrong).__name__
        raise SpecError(f"url={url!r}: does not list its models ({why[:200]}); is an OpenAI-compatible server there?") from None
    if len(names) != 1:
        raise SpecError(f"url={url!r}: serves {', '.join(names) or 'no model'}; name one with --model")
    return names[0]


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
    last: float | None = None
    usage: dict[str, Any] | None = None
    why: str | None = None
    try:
        async with http.post(f"{target.url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                why = f"HTTP {answer.status}: {' '.join((await answer.text()).split())[:200]}"
            else:
                async for line in answer.content:
                    if not line.startswith(_DATA) or line[len(_DATA) :].strip() == b"[DONE]":
                        continue
                    now = clock()
                    event = json.loads(line[len(_DATA) :])
                    if "error" in event:
                        why = f"the stream broke off: {' '.join(str(event['error']).split())[:200]}"
                        break
                    usage = event.get("usage") or usage
                    if event.get("choices"):
                        last = now
                        if request.first_token_s is None:
                            request.first_token_s = now
    except (TimeoutError, aiohttp.ClientError, ValueError) as wrong:
        why = " ".join(str(wrong).split())[:200] or type(wrong).__name__
    if why is None and (last is None or usage is None):
        counted = "the server counted no tokens (stream_options.include_usage)"
        why = "the stream ended without tokens" if last is None else counted
    if why is not None or usage is None:
        request.finish_reason, request.done_s = "error", clock()
        return why
    request.isl, request.osl = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    request.finish_reason, request.done_s = "length", last
    return None


def clock_from(start_s: float) -> Callable[[], float]:
    """Seconds since a moment of `time.perf_counter`."""
    return lambda: time.perf_counter() - start_s
