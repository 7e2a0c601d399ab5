"""Messages over a socket between a server and its own worker process: a length, then a pickle.

Pickle is safe here alone: both ends are one program, and the socket pair has no name that a stranger could connect to.
"""

from __future__ import annotations

import pickle
import socket
import struct
from collections.abc import Iterator

_LENGTH = struct.Struct("<I")


def packed(message: object) -> bytes:
    """The bytes of one message."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


class Unpacker:
    """Messages out of bytes that come in pieces of any size."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[object]:
        """The messages that have become whole."""
        self._bytes += data
        begin = 0
        while len(self._bytes) >= begin + _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._bytes, begin)
            end = begin + _LENGTH.size + size
            if len(self._bytes) < end:
                break
            with memoryview(self._bytes) as view:
                message = pickle.loads(view[begin + _LENGTH.size : end])
            begin = end
            yield message
        del self._bytes[:begin]


def received(channel: socket.socket) -> Iterator[object]:
    """Messages from a socket until the other end closes it or dies."""
    unpacker = Unpacker()
    while True:
        try:
            data = channel.recv(1 << 16)
        except ConnectionError:
            return
        if not data:
            return
        yield from unpacker.feed(data)
