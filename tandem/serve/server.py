"""The application on a socket: told when it listens, drained when it is asked to stop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tandem.serve.generation import Serving
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int

_POLL_S = 0.05
HEAD_S = 30.0
"""For the head of a request to arrive, from the connection or the head's first byte on."""
HEAD_BYTES = 64 << 10
"""Of a head that is not complete: uvicorn itself takes any number."""
_BACKLOG = 2048
_ACCEPTED = 32
"""New connections that one turn of the event loop takes: libuv takes one for each socket that listens. Under load, when a turn
takes long, they would wait far longer than requests on connections that are open."""


def open_socket(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes any that is free. Raises SpecError where it cannot be had."""
    require_int("port", port, low=0, high=65535)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as wrong:
        raise SpecError(f"host={host!r}, port={port}: cannot be listened on ({wrong})") from None


def accepting(bound: socket.socket) -> list[socket.socket]:
    """The socket, and more that share its queue of connections."""
    return [bound, *(bound.dup() for _ in range(_ACCEPTED - 1))]


def url_of(bound: socket.socket) -> str:
    """Where clients find it."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class BoundedHeads(HttpToolsProtocol):
    """HTTP of a connection whose requests' heads arrive in time and are short, or it is closed."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first head."""
        super().connection_made(transport)
        self._head_timer: asyncio.TimerHandle | None = None
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, and count what is not a whole head yet."""
        super().data_received(data)
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._close()

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        """A head is there."""
        self._end_head()
        super().on_headers_complete()

    def _await_head(self) -> None:
        self._end_head()
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_S, self._close)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close(self) -> None:
        self._end_head()
        self.transport.close()


class Server(uvicorn.Server):
    """Serves until the first signal, then turns new requests away, finishes what runs within `drain_s`, and closes.

    A second signal closes at once. `stop` is what a signal does, for servers that run in a thread.
    """

    def __init__(self, app: FastAPI, *, drain_s: float = 30.0, on_listening: Callable[[str], None] | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                http=BoundedHeads,
                ws="none",
                timeout_keep_alive=30,
                timeout_graceful_shutdown=2,
                backlog=_BACKLOG,
            )
        )
        self._serving: Serving = app.state.serving
        self._drain_s = drain_s
        self._on_listening = on_listening
        self._stops = 0

    def stop(self) -> None:
        """Ask for the end; ask again to have it at once. Safe in signal handlers and from other threads."""
        self._stops += 1
        self._serving.draining = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come. It is not raised again afterwards: a drained server has ended well."""
        self.stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started and self._on_listening is not None and sockets:
            self._on_listening(url_of(sockets[0]))

    async def main_loop(self) -> None:
        """Wait for the end, then drain."""
        ticker = asyncio.ensure_future(super().main_loop())
        try:
            while not self._stops and not ticker.done():
                await asyncio.sleep(_POLL_S)
            loop = asyncio.get_running_loop()
            deadline = loop.time() + self._drain_s
            while self._serving.running and self._stops < 2 and loop.time() < deadline:
                await asyncio.sleep(_POLL_S)
        finally:
            self.should_exit = True
            self._serving.close()
            await ticker


async def serve(
    app: FastAPI,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    drain_s: float = 30.0,
    on_listening: Callable[[str], None] | None = None,
) -> None:
    """`run_server` inside a running event loop."""
    sockets = accepting(open_socket(host, port))
    try:
        await Server(app, drain_s=drain_s, on_listening=on_listening).serve(sockets)
    finally:
        for bound in sockets:
            bound.close()


def run_server(
    app: FastAPI,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    drain_s: float = 30.0,
    on_listening: Callable[[str], None] | None = None,
) -> None:
    """Serve `app` until SIGTERM or SIGINT, and return when it has drained.

    `on_listening` is called with the URL once clients can connect. Nothing is printed. Raises SpecError where host and port
    cannot be had.
    """
    sockets = accepting(open_socket(host, port))
    try:
        Server(app, drain_s=drain_s, on_listening=on_listening).run(sockets)
    finally:
        for bound in sockets:
            bound.close()
