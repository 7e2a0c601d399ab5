"""Connections: what happens when clients go, heads never end, or the server stops."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest
from fake_frontend import FakeFrontend
from live_server import BODY, CHAT, DEADLINE_S, Live, eventually, live, make_app, raw_request

from tandem.serve.server import open_socket, url_of
from tandem.spec.errors import SpecError

# Clients that go.


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3}, {"n": 3, "stream": True}])
@pytest.mark.parametrize("before", [0, 3])
def test_a_client_that_goes_frees_all_that_it_held(fields: dict[str, Any], before: int) -> None:
    frontend = FakeFrontend()
    frontend.hold_after = before
    with live(frontend) as server:
        connection = server.raw(raw_request(json.dumps({**BODY, **fields}).encode()))
        eventually(lambda: frontend.in_flight == fields.get("n", 1) and frontend.held.is_set())
        connection.close()
        eventually(lambda: frontend.in_flight == 0)
        assert sorted(frontend.closed) == sorted(request.id for request in frontend.asked)
        eventually(lambda: server.app.state.serving.limits.in_flight == 0 and not server.app.state.serving.running)
        frontend.hold_after = None
        assert server.http.post(CHAT, json=BODY).status_code == 200
        text = server.http.get("/metrics").text
        assert f'tandem_request_total{{finished_reason="cancelled"}} {fields.get("n", 1)}.0' in text


@pytest.mark.parametrize("stream", [False, True])
def test_after_the_last_byte_neither_clients_that_go_nor_a_closing_server_matter(stream: bool) -> None:
    app = make_app(FakeFrontend())
    body = json.dumps({**BODY, "stream": stream}).encode()
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "headers": headers, "http_version": "1.1"}
    sent: list[Any] = []

    async def go() -> None:
        done, asked = asyncio.Event(), False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": body, "more_body": False}
            await done.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                done.set()
                app.state.serving.close()
                for _ in range(5):
                    await asyncio.sleep(0)

        await app({**scope, "asgi": {"version": "3.0"}, "scheme": "http", "server": None}, receive, send)

    asyncio.run(go())
    assert [message.get("more_body", False) for message in sent].count(False) == 2
    text = app.state.serving.metrics.text().decode()
    assert 'tandem_request_total{finished_reason="stop"} 1.0' in text
    assert "cancelled" not in text


def closed(connection: socket.socket) -> bool:
    """Whether the server has closed it; its last words are read."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /he"])
def test_heads_that_never_end_are_given_up(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.serve.server.HEAD_S", 0.2)
    with live(FakeFrontend()) as server, server.raw(sent) as connection:
        assert closed(connection)


def test_a_request_may_take_longer_than_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.serve.server.HEAD_S", 0.2)
    frontend = FakeFrontend()
    frontend.hold_after = 1
    with live(frontend) as server, server.raw(raw_request(json.dumps({**BODY, "stream": True}).encode())) as connection:
        connection.recv(1)
        connection.settimeout(0.5)
        with suppress(TimeoutError):
            while connection.recv(65536):
                pass
            raise AssertionError("the server has closed it")
        assert frontend.loop is not None
        frontend.loop.call_soon_threadsafe(frontend.go.set)
        connection.settimeout(DEADLINE_S)
        text = b""
        while b"[DONE]" not in text:
            text += connection.recv(65536)


def test_heads_have_a_limit() -> None:
    with live(FakeFrontend()) as server:
        long = server.http.get("/health", headers={"x": "y" * 30_000})
        assert long.status_code == 200
        with server.raw(b"GET /health HTTP/1.1\r\n") as connection:
            with suppress(OSError):
                for _ in range(1000):
                    connection.sendall(b"x: " + b"y" * 10_000 + b"\r\n")
            assert closed(connection)
        assert server.http.get("/health").status_code == 200


def test_one_connection_serves_many_requests() -> None:
    with live(FakeFrontend()) as server:
        for i in range(20):
            response = server.http.post(CHAT, json={**BODY, "stream": bool(i % 2)})
            assert response.status_code == 200
            assert "world" in response.text or "[DONE]" in response.text
        assert not server.frontend.closed


# The end.


def held_stream(server: Live) -> tuple[threading.Thread, list[str]]:
    texts: list[str] = []

    def read() -> None:
        with httpx.Client(base_url=str(server.http.base_url), timeout=DEADLINE_S) as client:
            texts.append(client.post(CHAT, json={**BODY, "stream": True}).text)

    server.frontend.hold_after = 3
    thread = threading.Thread(target=read)
    thread.start()
    eventually(server.frontend.held.is_set)
    return thread, texts


def test_draining_finishes_what_runs_and_turns_the_rest_away() -> None:
    with live(FakeFrontend(), drain_s=DEADLINE_S) as server:
        assert server.urls == [f"http://127.0.0.1:{server.port}"]
        thread, texts = held_stream(server)
        server.server.stop()
        refused = server.http.post(CHAT, json=BODY)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert server.http.get("/ready").status_code == 503
        assert server.http.get("/health").status_code == 200
        server.frontend.hold_after = None
        loop_call(server, server.frontend.go.set)
        thread.join(DEADLINE_S)
        assert texts[0].endswith("[DONE]\n\n")
        server.thread.join(DEADLINE_S)
        assert not server.thread.is_alive()


@pytest.mark.parametrize("twice", [False, True])
def test_the_end_of_the_drain_or_a_second_signal_closes(twice: bool) -> None:
    with live(FakeFrontend(), drain_s=DEADLINE_S * 10 if twice else 0.1) as server:
        thread, texts = held_stream(server)
        server.server.handle_exit(signal.SIGTERM, None)
        if twice:
            server.server.handle_exit(signal.SIGTERM, None)
        server.thread.join(DEADLINE_S)
        assert not server.thread.is_alive()
        thread.join(DEADLINE_S)
        assert "the server is closing" in texts[0]
        assert server.frontend.in_flight == 0
        assert server.frontend.closed


def loop_call(server: Live, what: Callable[[], object]) -> None:
    loop = server.frontend.loop
    assert loop is not None
    loop.call_soon_threadsafe(what)


def test_ports_that_cannot_be_had() -> None:
    with open_socket("127.0.0.1", 0) as bound:
        host, port = bound.getsockname()
        assert url_of(bound) == f"http://{host}:{port}"
        with pytest.raises(SpecError, match="cannot be listened on"):
            open_socket("127.0.0.1", port)
    with pytest.raises(SpecError, match="port=99999"):
        open_socket("127.0.0.1", 99999)
    with pytest.raises(SpecError, match="cannot be listened on"):
        open_socket("203.0.113.1", 0)


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from fake_frontend import FakeFrontend, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from live_server import make_app
from tandem.serve.server import run_server
frontend = FakeFrontend()
run_server(make_app(frontend), port=0, on_listening=lambda url: print(url, flush=True))
print("ended", frontend.in_flight, flush=True)
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_process_well(sent: signal.Signals) -> None:
    program = PROGRAM.format(tests=os.path.dirname(__file__))
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        answer = httpx.post(f"{url}{CHAT}", json=BODY, timeout=DEADLINE_S)
        assert answer.json()["choices"][0]["message"]["content"] == "Hello, world"
        process.send_signal(sent)
        out, err = process.communicate(timeout=DEADLINE_S)
        assert (out, err, process.returncode) == ("ended 0\n", "", 0)
