"""The application on a real socket, in a thread of this process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from fake_frontend import FakeFrontend, byte_tokenizer
from fastapi import FastAPI
from openai import OpenAI

from tandem.model.tokenizer import Tokenizer
from tandem.serve.app import create_app
from tandem.serve.config import ServeConfig
from tandem.serve.server import Server, open_socket

MODEL = "toy/model"
DEADLINE_S = 20.0


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
