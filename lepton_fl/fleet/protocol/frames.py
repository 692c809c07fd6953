"""Messages between two processes of one machine: a length, 4 bytes little-endian, and the bytes."""

from __future__ import annotations

import asyncio
import selectors
import socket
from typing import Generic, TypeVar

from google.protobuf.message import Message

LIMIT = 8 << 20
"""Bytes of one frame. Payloads above `payload.SMALL` go through files."""

M = TypeVar("M", bound=Message)


def frame(message: Message) -> bytes:
    """`message` as it is sent."""
    data = message.SerializeToString()
    return len(data).to_bytes(4, "little") + data


class Frames(Generic[M]):
    """One end of a socket pair, read and written by one thread."""

    def __init__(self, sock: socket.socket, kind: type[M]) -> None:
        """`kind` is what the other end sends."""
        self._socket = sock
        self._kind = kind
        self._buffer = bytearray()
        self._selector = selectors.DefaultSelector()
        self._selector.register(sock, selectors.EVENT_READ)

    def send(self, message: Message) -> None:
        """Blocks until the other end has room.

        Raises:
            OSError: it is gone.
        """
        self._socket.sendall(frame(message))

    def receive(self, timeout: float) -> M | None:
        """The next message, or None if none comes within `timeout` seconds.

        Raises:
            EOFError: the other end is gone.
        """
        while (found := self._whole()) is None:
            if not self._selector.select(timeout):
                return None
            data = self._socket.recv(1 << 16)
            if not data:
                raise EOFError("the other process is gone")
            self._buffer += data
        return found

    def _whole(self) -> M | None:
        size = int.from_bytes(self._buffer[:4], "little")
        if len(self._buffer) < 4 + size or len(self._buffer) < 4:
            return None
        data = bytes(self._buffer[4 : 4 + size])
        del self._buffer[: 4 + size]
        return self._kind.FromString(data)


async def read_frame(reader: asyncio.StreamReader, kind: type[M]) -> M | None:
    """The next message of an asyncio stream; None at its end."""
    try:
        size = int.from_bytes(await reader.readexactly(4), "little")
        if size > LIMIT:
            return None
        return kind.FromString(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
