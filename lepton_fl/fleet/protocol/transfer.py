"""The two ends of a payload that travels in chunks: what is to be sent, and what has come so far."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from lepton_fl.errors import ProtocolError
from lepton_fl.fleet.protocol.fleet_pb2 import Chunk
from lepton_fl.fleet.protocol.payload import CHUNK, Payload

log = logging.getLogger(__name__)


class Incoming:
    """A payload that is arriving: a file of mode 0600 that grows in order, and its digest so far."""

    def __init__(self, path: Path, *, size: int, sha256: bytes) -> None:
        self.path = path
        self.size = size
        self.sha256 = sha256
        self.received = 0
        self._digest = hashlib.sha256()
        # Never over a file that may be mapped: to read what was cut off from under a map ends the process.
        path.unlink(missing_ok=True)
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")

    def take(self, chunk: Chunk) -> bool:
        """Add the next bytes; True once all are here.

        Raises:
            ProtocolError: they are not the next ones, more than announced, or more than a chunk.
        """
        data = chunk.data
        if chunk.offset != self.received or not data or len(data) > CHUNK:
            raise ProtocolError(
                f"chunk: {len(data)} bytes at {chunk.offset}, expected 1 to {CHUNK} at {self.received}"
            )
        if self.received + len(data) > self.size:
            raise ProtocolError(
                f"chunk: ends at {self.received + len(data)}, {self.size} bytes were announced"
            )
        self._digest.update(data)
        self._file.write(data)
        self.received += len(data)
        return self.received == self.size

    def finish(self) -> Payload | None:
        """All of it, or None if the bytes do not have the announced digest: then it is to be sent again."""
        self._file.flush()
        if not hmac.compare_digest(self._digest.digest(), self.sha256):
            self._file.seek(0)
            self._file.truncate()
            self._digest, self.received = hashlib.sha256(), 0
            return None
        self._file.close()
        return Payload(size=self.size, sha256=self.sha256, path=self.path)

    def discard(self) -> None:
        """Forget it, and the file with it."""
        # Where the disk is full, closing fails: it flushes.
        with contextlib.suppress(OSError):
            self._file.close()
        self.path.unlink(missing_ok=True)


class Outbox:
    """What one stream is to send: control messages in order and at once, chunks of transfers in turn between.

    So a heartbeat never waits for a gigabyte, and of two transfers neither waits for the other.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake` is called whenever there may be something new to send."""
        self._wake = wake
        self._control: deque[object] = deque()
        self._transfers: dict[bytes, Iterator[tuple[int, bytes]]] = {}

    def put(self, message: object) -> None:
        """Send a control message."""
        self._control.append(message)
        self._wake()

    def transfer(self, exchange: bytes, payload: Payload, offset: int) -> None:
        """Send a payload from `offset` on, instead of what was being sent of it."""
        self.drop(exchange)
        if offset < payload.size:
            self._transfers[exchange] = payload.chunks(offset)
            self._wake()

    def drop(self, exchange: bytes) -> None:
        """Send no more of a payload."""
        self._transfers.pop(exchange, None)

    def clear(self) -> None:
        """Send nothing of what was to be sent."""
        self._control.clear()
        self._transfers.clear()
        self._wake()

    def __len__(self) -> int:
        """Control messages that are not sent yet."""
        return len(self._control)

    def next(self) -> object | Chunk | None:
        """The next message; None if there is none now."""
        if self._control:
            return self._control.popleft()
        while self._transfers:
            exchange, chunks = next(iter(self._transfers.items()))
            # To the end of the line.
            del self._transfers[exchange]
            try:
                found = next(chunks, None)
            except (OSError, ProtocolError) as error:
                # Withdrawn, or a fault of the disk: the others go on.
                log.warning("exchange %s: cannot be read any more: %s", exchange.hex(), error)
                continue
            if found is not None:
                self._transfers[exchange] = chunks
                return Chunk(exchange=exchange, offset=found[0], data=found[1])
        return None
