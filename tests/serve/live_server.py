"""The application on a real socket, in a thread of this process."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from fake_frontend import FakeFrontend, byte_tokenizer
from fastapi import FastAPI
from openai import OpenAI
from openai.types.chat import ChatCompletion

from tandem.model.tokenizer import Tokenizer
from tandem.serve.app import create_app
from tandem.serve.config import ServeConfig
from tandem.serve.server import Server, open_socket

MODEL = "toy/model"
DEADLINE_S = 20.0
CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
USER: Any = [{"role": "user", "content": "Hi"}]
TOOLS: Any = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}},
    {"type": "function", "function": {"name": "g"}},
]


def make_app(frontend: FakeFrontend, *, tokenizer: Tokenizer | None = None, **config: Any) -> FastAPI:
    return create_app(frontend, model_name=MODEL, tokenizer=tokenizer or byte_tokenizer(), config=ServeConfig(**config))


class Live:
    def __init__(self, frontend: FakeFrontend, app: FastAPI, drain_s: float) -> None:
        self.frontend = frontend
        self.app = app
        self.socket = open_socket("127.0.0.1", 0)
        self.port: int = self.socket.getsockname()[1]
        self.urls: list[str] = []
        self._listening = threading.Event()
        self.server = Server(app, drain_s=drain_s, on_listening=self._heard)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=DEADLINE_S)
        self.client = OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S)

    def _heard(self, url: str) -> None:
        self.urls.append(url)
        self._listening.set()

    def start(self) -> None:
        self.thread.start()
        assert self._listening.wait(DEADLINE_S)

    def raw(self, request: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_S)
        connection.sendall(request)
        return connection

    def close(self) -> None:
        self.http.close()
        self.client.close()
        self.server.stop()
        self.server.stop()
        self.thread.join(DEADLINE_S)
        self.socket.close()
        assert not self.thread.is_alive()


@contextmanager
def live(frontend: FakeFrontend, *, tokenizer: Tokenizer | None = None, drain_s: float = 10.0, **config: Any) -> Iterator[Live]:
    server = Live(frontend, make_app(frontend, tokenizer=tokenizer, **config), drain_s)
    server.start()
    try:
        yield server
    finally:
        server.close()


def eventually(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.005)


def in_app(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x")


def ask(app: Any, method: str = "POST", path: str = CHAT, **arguments: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with in_app(app) as client:
            return await client.request(method, path, **arguments)

    return asyncio.run(go())


def raw_request(body: bytes, *, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        CHAT.encode(), size, body,
    )  # fmt: skip


def chat(server: Live, **fields: Any) -> ChatCompletion:
    made: ChatCompletion = server.client.chat.completions.create(model=MODEL, messages=fields.pop("messages", USER), **fields)
    return made


def gather(server: Live, **fields: Any) -> tuple[list[Any], dict[int, dict[str, Any]]]:
    """All chunks of a chat, and per choice its joined deltas."""
    chunks = list(server.client.chat.completions.create(model=MODEL, messages=USER, stream=True, **fields))
    joined: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            whole = joined.setdefault(choice.index, {"content": "", "reasoning": "", "calls": [], "logprobs": []})
            whole["content"] += choice.delta.content or ""
            whole["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            whole["calls"] += [(c.index, c.id, c.function.name, c.function.arguments) for c in choice.delta.tool_calls or []]
            whole["logprobs"] += choice.logprobs.content if choice.logprobs else []
            whole["finish"] = choice.finish_reason
    return chunks, joined
