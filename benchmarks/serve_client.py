"""A client for benchmarks that costs next to nothing: raw sockets, one thread, answers not parsed but for their end.

    python benchmarks/serve_client.py URL CONCURRENCY < bodies.jsonl

Posts one JSON body a line to URL, so many at once, and prints a JSON list with the seconds (monotonic clock) at which each
was sent, its first event came and it ended, its output tokens as the server counts them, and what went wrong.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
_TAIL = 4096


@dataclass
class Answer:
    """One request: when it was sent, when its first event came, when it ended; seconds of the monotonic clock."""

    sent_s: float
    first_s: float | None = None
    end_s: float | None = None
    tokens: int = 0
    error: str | None = None


def connect(url: str, body: bytes, *, receive_bytes: int | None = None) -> socket.socket:
    """A socket over which `body` has been posted; `receive_bytes` is the size of its buffer for what comes back."""
    parts = urlsplit(url)
    opened = socket.socket()
    if receive_bytes is not None:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    opened.connect((parts.hostname, parts.port))
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    opened.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return opened


class _Stream:
    def __init__(self, url: str, body: bytes) -> None:
        self.answer = Answer(time.monotonic())
        self.socket = connect(url, body)
        self.socket.setblocking(False)
        self._head, self._tail = b"", b""

    def read(self) -> bool:
        """Take what has come; whether there is more to come."""
        data = self.socket.recv(1 << 16)
        now = time.monotonic()
        if self.answer.first_s is None:
            self._head += data
            if b"data: " in self._head:
                self.answer.first_s = now
        self._tail = (self._tail + data)[-_TAIL:]
        if data:
            return True
        self.answer.end_s = now
        found = _USAGE.findall(self._tail)
        self.answer.tokens = int(found[-1]) if found else 0
        if self.answer.first_s is None or not found:
            self.answer.error = (self._head or self._tail)[-300:].decode(errors="replace")
        self.socket.close()
        return False


def ask(url: str, bodies: Sequence[bytes], concurrency: int) -> list[Answer]:
    """Post all bodies, so many at once, and read the answers to their ends."""
    waiting, answers = list(reversed(bodies)), []
    with selectors.DefaultSelector() as selector:

        def start() -> None:
            stream = _Stream(url, waiting.pop())
            answers.append(stream.answer)
            selector.register(stream.socket, selectors.EVENT_READ, stream)

        for _ in range(min(concurrency, len(waiting))):
            start()
        while selector.get_map():
            for key, _ in selector.select():
                try:
                    more = key.data.read()
                except OSError as wrong:
                    key.data.answer.error, more = str(wrong), False
                if not more:
                    selector.unregister(key.fileobj)
                    if waiting:
                        start()
    return answers


def main(url: str, concurrency: int) -> None:
    bodies = [line.strip() for line in sys.stdin.buffer if line.strip()]
    found: list[dict[str, Any]] = [asdict(answer) for answer in ask(url, bodies, concurrency)]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
