"""A browser that tests of the page share, and the explorer served from this process, where tests can hold its answers back."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Thread
from typing import Any

import pytest
from browser import CHROMIUM, Browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with Browser(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture
def serving() -> Callable[[Any], AbstractContextManager[str]]:
    """Serves an application on a free port: its address."""
    uvicorn = pytest.importorskip("uvicorn", reason="pip install tandem-lm[explore]")

    @contextmanager
    def run(app: Any) -> Iterator[str]:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none", lifespan="off"))
        with socket.create_server(("127.0.0.1", 0)) as listening:
            thread = Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()
            try:
                yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
            finally:
                server.should_exit = True
                thread.join(60)

    return run
