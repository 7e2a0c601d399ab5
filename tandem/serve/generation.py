"""The answer to one HTTP request while it is made: outputs in, bytes out, the client watched all the while."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from time import time, time_ns
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tandem.engine.types import EngineRequest, TokenOutput
from tandem.serve.choices import Choice
from tandem.serve.errors import ApiError, refused
from tandem.serve.frontend import Frontend
from tandem.serve.limits import Limits
from tandem.serve.metrics import Metrics
from tandem.serve.requests import Work
from tandem.serve.tracing import Tracing
from tandem.spec.errors import SpecError

log = logging.getLogger("tandem.serve")
DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_WAITING_OUTPUTS = 64
"""Outputs of several answers that may wait to be sent; beyond them the pools wait."""


class Serving:
    """What all answers of one application share."""

    def __init__(
        self,
        *,
        frontend: Frontend,
        limits: Limits,
        metrics: Metrics,
        tracing: Tracing,
        clock: Callable[[], float],
        model_name: str,
        fingerprint: str,
    ) -> None:
        self.frontend = frontend
        self.limits = limits
        self.metrics = metrics
        self.tracing = tracing
        self.clock = clock
        self.model_name = model_name
        self.fingerprint = fingerprint
        self.draining = False
        """Whether new requests are turned away because the server is about to stop."""
        self.running: set[Generation] = set()

    def close(self) -> None:
        """Stop all answers that still run; their clients are told why."""
        for generation in list(self.running):
            generation.stop()


class _Times:
    """When an answer began, when its first and its last tokens came; on the clock of `Serving`."""

    __slots__ = ("first_s", "last_s", "start_s")

    def __init__(self, start_s: float) -> None:
        self.start_s = start_s
        self.first_s: float | None = None
        self.last_s = start_s


class Generation(Response):
    """An ASGI answer. It asks for its outputs when it is sent, and gives up all that it holds when the client is gone."""

    def __init__(self, serving: Serving, work: Work) -> None:
        super().__init__()
        self._serving = serving
        self._work = work
        self._task: asyncio.Task[Any] | None = None
        self._why: str | None = None
        self._begun = False
        self._complete = False
        self._now_s = int(time())
        self._start_ns = time_ns()
        self._times = {request.id: _Times(serving.clock()) for request in work.requests}

    def stop(self) -> None:
        """End this answer because the server closes."""
        self._end("closing")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, or the error that there is instead."""
        self._task = asyncio.current_task()
        watch = asyncio.create_task(self._watch(receive))
        self._serving.running.add(self)
        error: ApiError | None = None
        try:
            with self._serving.limits.admit(self._work.client, len(self._work.requests)):
                await (self._send_stream(send) if self._work.stream else self._send_whole(send))
        except asyncio.CancelledError:
            if self._why is None or self._task is None:
                raise
            self._task.uncancel()
            if self._why == "closing":
                error = ApiError(
                    503, "the server is closing; try again elsewhere", code="closing", headers={"retry-after": "1"}
                )
        except ApiError as wrong:
            error = wrong
        except SpecError as wrong:
            error = refused(str(wrong))
        except Exception:
            log.exception("request %s failed", self._work.id)
            error = ApiError(500, f"something went wrong here; the server's log has it as {self._work.id}", code="internal")
        finally:
            self._complete = True
            watch.cancel()
            self._serving.running.discard(self)
            self._record(None if error is None else "error")
        if error is not None:
            await self._send_error(error, scope, receive, send)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._end("gone")

    def _end(self, why: str) -> None:
        if not self._complete and self._why is None and self._task is not None:
            self._why = why
            self._task.cancel()

    async def _send_stream(self, send: Send) -> None:
        work, by_id = self._work, self._by_id()
        usage = b',"usage":null' if work.include_usage else b""
        kind = "chat.completion.chunk" if work.kind == "chat.completion" else work.kind
        opening = orjson.dumps(self._envelope(kind))[:-1]
        for choice in work.choices:
            choice.start(b'data: %b,"choices":[' % opening, b"]%b}\n\n" % usage)
        left = len(work.choices)
        outputs = open_outputs(self._serving.frontend, work.requests)
        try:
            async for output in outputs:
                choice = by_id[output.request_id]
                if choice.finish_reason is not None:
                    continue
                data = choice.chunk(output)
                self._observe(output)
                if choice.finish_reason is not None:
                    left -= 1
                    if not left:
                        break
                if data:
                    await self._begin(send)
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            if left:
                raise RuntimeError("the pools ended a stream without a reason")
        finally:
            await close_outputs(outputs)
        if work.include_usage:
            data += b'data: %b,"choices":[],"usage":%b}\n\n' % (opening, orjson.dumps(self._usage()))
        await self._begin(send)
        self._complete = True
        await send({"type": "http.response.body", "body": data + DONE, "more_body": False})

    async def _begin(self, send: Send) -> None:
        if not self._begun:
            self._begun = True
            headers = [*_HEADERS, (b"x-request-id", self._work.id.encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _send_whole(self, send: Send) -> None:
        by_id, left = self._by_id(), len(self._work.choices)
        outputs = open_outputs(self._serving.frontend, self._work.requests)
        try:
            async for output in outputs:
                choice = by_id[output.request_id]
                if choice.finish_reason is not None:
                    continue
                choice.collect(output)
                self._observe(output)
                if choice.finish_reason is not None:
                    left -= 1
                    if not left:
                        break
            if left:
                raise RuntimeError("the pools ended a stream without a reason")
        finally:
            await close_outputs(outputs)
        body = self._envelope(self._work.kind)
        body["choices"] = [choice.result() for choice in self._work.choices]
        body["usage"] = self._usage()
        raw = orjson.dumps(body)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
        headers.append((b"x-request-id", self._work.id.encode()))
        self._begun = self._complete = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": raw})

    async def _send_error(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._begun:
            await error.response()(scope, receive, send)
        else:
            await send({"type": "http.response.body", "body": b"data: %b\n\n" % error.body(), "more_body": False})

    def _by_id(self) -> dict[str, Choice]:
        return dict(zip((request.id for request in self._work.requests), self._work.choices, strict=True))

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._work.id,
            "object": kind,
            "created": self._now_s,
            "model": self._serving.model_name,
            "system_fingerprint": self._serving.fingerprint,
        }

    def _usage(self) -> dict[str, Any]:
        choices = self._work.choices
        prompt = sum(choice.prompt_tokens for choice in choices if choice.counts_prompt)
        completion = sum(choice.completion_tokens for choice in choices)
        cached = sum(choice.cached_tokens for choice in choices if choice.counts_prompt)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)},
        }

    def _observe(self, output: TokenOutput) -> None:
        times, metrics, now = self._times[output.request_id], self._serving.metrics, self._serving.clock()
        tokens = len(output.token_ids)
        if not tokens:
            return
        if times.first_s is None:
            times.first_s = now
            metrics.observe_first_token(now - times.start_s)
            metrics.count_first_tokens(tokens)
        else:
            metrics.observe_tokens(now - times.last_s, tokens)
        times.last_s = now

    def _record(self, instead: str | None) -> None:
        now = self._serving.clock()
        for request, choice in zip(self._work.requests, self._work.choices, strict=True):
            times = self._times[request.id]
            ttft_s = None if times.first_s is None else times.first_s - times.start_s
            e2e_s = (times.last_s if choice.finish_reason else now) - times.start_s
            reason = choice.finish_reason or instead or "cancelled"
            isl, osl = choice.prompt_tokens, choice.completion_tokens
            self._serving.metrics.observe_request(
                reason, isl=isl, osl=osl, cached=choice.cached_tokens, ttft_s=ttft_s, e2e_s=e2e_s
            )
            self._serving.tracing.record(
                request.id, start_ns=self._start_ns, e2e_s=e2e_s, ttft_s=ttft_s, finish_reason=reason, isl=isl, osl=osl
            )


def open_outputs(frontend: Frontend, requests: Sequence[EngineRequest]) -> AsyncIterator[TokenOutput]:
    """Outputs of all requests in the order in which they come."""
    if len(requests) == 1:
        return frontend.stream(requests[0])
    return _merged(frontend, requests)


async def close_outputs(outputs: AsyncIterator[TokenOutput]) -> None:
    """Give up what has not come yet."""
    close = getattr(outputs, "aclose", None)
    if close is not None:
        await close()


async def _merged(frontend: Frontend, requests: Sequence[EngineRequest]) -> AsyncIterator[TokenOutput]:
    queue: asyncio.Queue[TokenOutput | BaseException | None] = asyncio.Queue(_WAITING_OUTPUTS)

    async def follow(request: EngineRequest) -> None:
        outputs = frontend.stream(request)
        try:
            async for output in outputs:
                await queue.put(output)
            await queue.put(None)
        except Exception as wrong:
            await queue.put(wrong)
        finally:
            await close_outputs(outputs)

    tasks = [asyncio.create_task(follow(request)) for request in requests]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
