"""A completions server of a few lines, whose answers are known, for the tests of `tandem bench`."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from tandem.bench.client import Target
from tandem.bench.load import Load
from tandem.bench.run import BenchRun, run


class Stub:
    """A completions server. `hold` requests are in flight before any is answered; `answer` may write something else."""

    def __init__(self, hold: int = 1, answer: Callable[[web.StreamResponse, dict[str, Any]], Awaitable[None]] | None = None):
        self.hold, self.answer = hold, answer or self.whole
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        self.now = self.most = 0
        self.names = ["served"]
        self.listed: bytes | None = None  # instead of the names
        self.status = 200
        self._full = asyncio.Event()

    @staticmethod
    async def event(stream: web.StreamResponse, data: dict[str, Any]) -> None:
        await stream.write(f"data: {json.dumps(data)}\n\n".encode())

    @staticmethod
    async def lines(stream: web.StreamResponse, *data: bytes) -> None:
        """Events of these bytes, whatever they are."""
        for each in data:
            await stream.write(b"data: " + each + b"\n\n")

    async def whole(self, stream: web.StreamResponse, body: dict[str, Any]) -> None:
        for _ in range(body["max_tokens"]):
            await self.event(stream, {"choices": [{"text": "x"}], "usage": None})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        await self.event(stream, {"choices": [], "usage": usage})
        await stream.write(b"data: [DONE]\n\n")

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(request.headers.get("Authorization"))
        if self.status != 200:
            return web.Response(status=self.status, text="no room\nhere")
        self.now += 1
        self.most = max(self.most, self.now)
        if self.now >= self.hold:
            self._full.set()
        await self._full.wait()
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        await self.answer(stream, body)
        self.now -= 1
        return stream

    async def models(self, request: web.Request) -> web.Response:
        if self.listed is not None:
            return web.Response(body=self.listed, content_type="application/json")
        return web.json_response({"data": [{"id": name} for name in self.names]})

    def serve(self) -> TestServer:
        app = web.Application()
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_get("/v1/models", self.models)
        return TestServer(app)


def measured(
    load: Load, stub: Callable[[], Stub] = Stub, *, warmup: int = 0, key: str | None = None, timeout_s: float = 30.0
) -> tuple[BenchRun, Stub]:
    """A load sent to a stub, and the stub."""

    async def go() -> tuple[BenchRun, Stub]:
        made = stub()
        async with made.serve() as server:
            target = Target(url=str(server.make_url("")).rstrip("/"), model="served", api_key=key, timeout_s=timeout_s)
            return await run(target, load, warmup=warmup), made

    return asyncio.run(go())


@contextmanager
def in_thread(stub: Callable[[], Stub]) -> Iterator[tuple[str, Stub]]:
    """A stub that serves beside the test: its address without a slash."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    found: dict[str, Any] = {}

    async def serve() -> None:
        found["stub"] = stub()
        found["stop"] = asyncio.Event()
        async with found["stub"].serve() as server:
            found["url"] = str(server.make_url("")).rstrip("/")
            ready.set()
            await found["stop"].wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield found["url"], found["stub"]
    finally:
        loop.call_soon_threadsafe(found["stop"].set)
        thread.join(30)
        loop.close()
