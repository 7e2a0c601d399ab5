"""Who may ask, how much, and what happens when bodies lie."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fake_frontend import FakeFrontend, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from live_server import BODY, CHAT, DEADLINE_S, MODEL, ask, in_app, live, make_app, raw_request

from tandem.model.tokenizer import Tokenizer
from tandem.serve.auth import ApiKeys, hash_key
from tandem.serve.config import ServeConfig
from tandem.serve.encoding import encode_within
from tandem.serve.errors import ApiError
from tandem.spec.errors import SpecError

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
