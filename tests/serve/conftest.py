"""A server that the tests of the API share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_frontend import FakeFrontend, byte_tokenizer
from live_server import Live, live


@pytest.fixture(scope="module")
def shared() -> Iterator[Live]:
    with live(FakeFrontend(), tokenizer=byte_tokenizer(plain=("</think>",))) as server:
        yield server


@pytest.fixture
def server(shared: Live) -> Live:
    shared.frontend.__init__()  # type: ignore[misc]
    return shared
