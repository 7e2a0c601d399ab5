"""An open-loop client that costs next to nothing: bodies are posted when they are due, whatever has been answered.

    python benchmarks/emulated_client.py URL < plan.jsonl

Each line is [seconds after the start, tokens that the answer must have, body]. Connections are kept and used again. Prints a
JSON object: how many were sent and answered in full, what went wrong, seconds from due to answered, how late they were sent.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import sys
import time
from collections import Counter, deque
from typing import Any
from urllib.parse import urlsplit

_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
IDLE_S = 10.0
"""A connection that was not used for so long is not used again: the server may be about to close it."""
PATIENCE_S = 60.0
"""After the last was sent."""


class _Connection:
    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port), timeout=PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.due_s, self.wanted, self.data, self.since_s = 0.0, 0, b"", 0.0

    def complete(self) -> bool:
        head, end, body = self.data.partition(b"\r\n\r\n")
        found = _LENGTH.search(head)
        return bool(end) and found is not None and len(body) >= int(found[1])

    def wrong(self) -> str | None:
        """What is wrong with the answer that has come."""
        if not self.data.startswith(b"HTTP/1.1 200"):
            return self.data[:12].decode(errors="replace") or "closed"
        found = _USAGE.search(self.data)
        return None if found is not None and int(found[1]) == self.wanted else "tokens"


def ask(url: str, plan: list[tuple[float, int, bytes]]) -> dict[str, Any]:
    """Post everything when it is due and wait for the answers."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 80
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\nContent-Length: ".encode()
    idle: deque[_Connection] = deque()
    open_now, most = 0, 0
    errors: Counter[str] = Counter()
    took, late = [], []
    start_s = time.monotonic() + 0.5
    last_s = start_s
    with selectors.DefaultSelector() as selector:
        number = 0
        while number < len(plan) or open_now:
            now = time.monotonic()
            while number < len(plan) and start_s + plan[number][0] <= now:
                due_s, wanted, body = plan[number]
                number += 1
                while idle and idle[0].since_s < now - IDLE_S:
                    idle.popleft().socket.close()
                connection = idle.pop() if idle else _Connection(host, port)
                connection.due_s, connection.wanted, connection.data = start_s + due_s, wanted, b""
                connection.socket.sendall(b"%b%d\r\n\r\n%b" % (head, len(body), body))
                last_s = time.monotonic()
                late.append(last_s - connection.due_s)
                selector.register(connection.socket, selectors.EVENT_READ, connection)
                open_now += 1
                most = max(most, open_now)
            if number == len(plan) and now > last_s + PATIENCE_S:
                errors["no answer"] += open_now
                break
            wait_s = start_s + plan[number][0] - now if number < len(plan) else 1.0
            for key, _ in selector.select(max(0.0, wait_s)):
                connection = key.data
                data = connection.socket.recv(1 << 16)
                connection.data += data
                if data and not connection.complete():
                    continue
                selector.unregister(connection.socket)
                open_now -= 1
                wrong = connection.wrong()
                if wrong is None:
                    took.append(time.monotonic() - connection.due_s)
                else:
                    errors[wrong] += 1
                if data:
                    connection.since_s = time.monotonic()
                    idle.append(connection)
                else:
                    connection.socket.close()
    return {
        "sent": len(plan),
        "answered": len(took),
        "errors": dict(errors),
        "most_open": most,
        "sending_s": last_s - start_s,
        "took_s": took,
        "late_s": late,
    }


def main(url: str) -> None:
    rows = [json.loads(line) for line in sys.stdin]
    json.dump(ask(url, [(due, tokens, json.dumps(body).encode()) for due, tokens, body in rows]), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
