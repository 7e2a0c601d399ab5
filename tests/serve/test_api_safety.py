"""Who may ask, how much, and what happens when clients go, bodies lie or the server stops."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_frontend import FakeFrontend, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from live_server import DEADLINE_S, MODEL, Live, live, make_app

from tandem.model.tokenizer import Tokenizer
from tandem.serve.auth import ApiKeys, hash_key
from tandem.serve.config import ServeConfig
from tandem.serve.encoding import encode_within
from tandem.serve.errors import ApiError
from tandem.serve.server import open_socket, url_of
from tandem.spec.errors import SpecError

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


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


# Keys.


@pytest.fixture
def keys(tmp_path: Path) -> ApiKeys:
    file = tmp_path / "keys"
    file.write_text(f"# people\n\nann:{hash_key('a-secret')}\nteam:b:{hash_key('b-secret')}\nann:{hash_key('new')}\n")
    return ApiKeys.from_file(file)


def test_keys_have_names(keys: ApiKeys) -> None:
    found = [keys.name_of(key) for key in ("a-secret", "b-secret", "new", "", "a-secre", hash_key("a-secret"), "é\ud800")]
    assert found == ["ann", "team:b", "ann", None, None, None, None]


@pytest.mark.parametrize("text", ["ann", "ann:xyz", f":{'0' * 64}", f"ann:{'0' * 62}", "", "# nothing", "ann:" + "g" * 64])
def test_files_that_hold_no_keys_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(SpecError, match="api_keys="):
        ApiKeys.from_file(file)
    with pytest.raises(SpecError, match="cannot be read"):
        ApiKeys.from_file(tmp_path / "none")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Basic a-secret", "a-secret", "Bearer a-secret x"])
def test_without_a_good_key_nothing_is_told(keys: ApiKeys, header: str | None) -> None:
    frontend = FakeFrontend()
    app = make_app(frontend, keys=keys)
    headers = {} if header is None else {"authorization": header}
    for method, path in (("POST", CHAT), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", f"/v1/models/{MODEL}")):
        response = ask(app, method, path, headers=headers, json={"nonsense": 1} if method == "POST" else None)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert ask(app, "GET", "/health").status_code == 200
    assert frontend.asked == []


def test_the_name_of_the_key_is_the_client(keys: ApiKeys) -> None:
    frontend = FakeFrontend()
    app = make_app(frontend, keys=keys)
    assert ask(app, json={**BODY, "user": "somebody"}, headers={"authorization": "Bearer b-secret"}).status_code == 200
    assert frontend.asked[0].client == "team:b"


# Bodies.


@pytest.mark.parametrize(
    ("content", "headers", "named"),
    [
        (b"{}", {}, "content-type"),
        (b"{}", {"content-type": "text/plain"}, "content-type"),
        (b"{}", {"content-type": "application/json; charset=latin-1"}, "content-type"),
        (b"{}", {"content-type": "application/json", "content-encoding": "gzip"}, "content-encoding"),
        (b"", {"content-type": "application/json"}, "body"),
        (b"{", {"content-type": "application/json"}, "body"),
        (b"\xff\xfe", {"content-type": "application/json"}, "body"),
        (b'{"model": "\xff"}', {"content-type": "application/json"}, "body"),
        (b'{"model": "\\ud800"}', {"content-type": "application/json"}, "body"),
        (b"[" * 100_000, {"content-type": "application/json"}, "body"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, {"content-type": "application/json"}, "body"),
        (b"[]", {"content-type": "application/json"}, "body"),
        (b"NaN", {"content-type": "application/json"}, "body"),
    ],
)
def test_what_is_no_json_is_refused(content: bytes, headers: dict[str, str], named: str) -> None:
    response = ask(make_app(FakeFrontend()), content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == named


def test_numbers_that_json_does_not_have_are_refused() -> None:
    text = json.dumps(BODY)[:-1]
    for value in ("NaN", "Infinity", "1e999", "9" * 5000):
        response = ask(
            make_app(FakeFrontend()), content=f'{text}, "temperature": {value}}}', headers={"content-type": "application/json"}
        )
        assert response.status_code == 400


def test_long_bodies_are_refused_before_they_are_read() -> None:
    frontend = FakeFrontend()
    with live(frontend, max_body_bytes=2000) as server:
        for request in (
            raw_request(b"{", length=10**9),
            b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n7d1\r\n%b"
            % (CHAT.encode(), b" " * 2001),
        ):
            connection = server.raw(request)
            answer = connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 413")
            assert b"2,000 bytes" in answer
            connection.close()
        whole = {**BODY, "messages": [{"role": "user", "content": "x" * 1000}]}
        assert server.http.post(CHAT, json=whole).status_code == 200


def test_slow_bodies_are_given_up() -> None:
    with live(FakeFrontend(), body_timeout_s=0.05) as server:
        connection = server.raw(raw_request(b"{", length=100))
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")
        connection.close()


def test_long_bodies_are_prepared_in_a_thread_with_the_same_result() -> None:
    frontend = FakeFrontend(max_context=10**6)
    app = make_app(frontend)
    text = "é" * 20_000
    assert ask(app, json={**BODY, "messages": [{"role": "user", "content": text}]}).status_code == 200
    assert len(frontend.asked[0].prompt_ids) > 40_000
    assert ask(app, json={**BODY, "messages": [{"role": text, "content": text}]}).status_code == 400
    assert ask(app, json={**BODY, "logit_bias": {"x": 1}, "metadata": {"a": text}}).status_code == 400


# Limits.


def test_limits_of_all_and_of_one_client() -> None:
    frontend = FakeFrontend()
    app = make_app(frontend, max_in_flight=5, max_in_flight_per_client=2, retry_after_s=7)

    async def go() -> None:
        frontend.hold_after = 2
        async with in_app(app) as client:
            first = asyncio.create_task(client.post(CHAT, json={**BODY, "user": "ann", "n": 2}))
            await asyncio.wait_for(frontend.held.wait(), DEADLINE_S)
            refused = await client.post(CHAT, json={**BODY, "user": "ann"})
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "7"
            assert refused.json()["error"]["type"] == "rate_limit_error"
            second = asyncio.create_task(client.post(CHAT, json={**BODY, "user": "bob", "n": 2}))
            while app.state.serving.limits.in_flight < 4:
                await asyncio.sleep(0)
            assert (await client.post(CHAT, json={**BODY, "user": "cleo", "n": 2})).status_code == 429
            frontend.in_flight = 5
            assert (await client.post(CHAT, json={**BODY, "user": "cleo"})).status_code == 429
            frontend.in_flight = 4
            frontend.go.set()
            assert [(await task).status_code for task in (first, second)] == [200, 200]
            assert (await client.post(CHAT, json={**BODY, "user": "ann", "n": 2})).status_code == 200
        assert app.state.serving.limits.in_flight == 0

    asyncio.run(go())


@pytest.mark.parametrize(
    "wrong",
    [{"max_in_flight": 0}, {"max_choices": 0}, {"chat_format": "x"}, {"body_timeout_s": 0}, {"max_prompt_tokens": 0}],
)
def test_limits_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(wrong))):
        ServeConfig(**wrong)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_texts_far_beyond_the_context_are_not_encoded_to_their_end(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = Tokenizer.encode

    def encode(self: Tokenizer, text: str, **options: bool) -> list[int]:
        seen.append(len(text))
        return plain(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", encode)
    frontend = FakeFrontend(max_context=1000)
    with live(frontend) as server:
        for text in ("x" * 4_000_000, "x" * 1500):
            prompt = {"prompt": text} if path != CHAT else {"messages": [{"role": "user", "content": text}]}
            response = server.http.post(path, json={"model": MODEL, **prompt})
            error = response.json()["error"]
            assert (response.status_code, error["param"], error["code"]) == (400, "prompt", "context_length_exceeded")
    assert max(seen) <= 8000
    assert frontend.asked == []


@given(st.text(alphabet="ab c", max_size=60), st.integers(1, 4))
def test_texts_are_refused_early_only_if_they_are_too_long(text: str, most: int) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    found: list[int] | None = None
    with suppress(ApiError):
        found = encode_within(tokenizer, text, most)
    assert found == ids if len(text) <= 8 * most or len(ids) <= 2 * most else found is None


def test_prompts_have_a_limit_of_their_own() -> None:
    response = ask(make_app(FakeFrontend(), max_prompt_tokens=10), json=BODY)
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_pools_that_are_not_ready() -> None:
    class Starting(FakeFrontend):
        @property
        def max_context(self) -> int:
            raise SpecError("max_context: is known once the workers are up")

        @max_context.setter
        def max_context(self, value: int) -> None:
            pass

    frontend = Starting()
    frontend.ready = False
    app = make_app(frontend)
    assert ask(app, "GET", "/health").status_code == 200
    for method, path in (("GET", "/ready"), ("GET", "/v1/models"), ("POST", CHAT)):
        response = ask(app, method, path)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"


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
