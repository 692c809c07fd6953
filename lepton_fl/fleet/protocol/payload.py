"""The bytes of one message: in memory where they are few, else in a file. What they say: records.py."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lepton_fl.errors import ProtocolError
from lepton_fl.fleet.protocol.fleet_pb2 import Body

CHUNK = 1 << 20
"""Bytes of a payload in one message of the stream, at most."""
SMALL = 256 << 10
"""Bytes up to which a payload travels inside the message that announces it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """Bytes at rest, with their digest: in memory (`inline`) or in a file."""

    size: int
    sha256: bytes
    inline: bytes = b""
    path: Path | None = None

    @classmethod
    def of(cls, content: bytes) -> Payload:
        """A payload held in memory."""
        return cls(size=len(content), sha256=hashlib.sha256(content).digest(), inline=content)

    def chunks(self, offset: int = 0) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) from `offset` on, each of at most `CHUNK` bytes."""
        if self.path is None:
            for start in range(offset, self.size, CHUNK):
                yield start, self.inline[start : start + CHUNK]
            return
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            while offset < self.size:
                data = file.read(min(CHUNK, self.size - offset))
                if not data:
                    raise ProtocolError(f"{self.path}: shorter than it was")
                yield offset, data
                offset += len(data)

    def open(self) -> memoryview:
        """The bytes, read only; those of a file are mapped, and stay while the view does."""
        if self.path is None:
            return memoryview(self.inline)
        with self.path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ))

    def body(self) -> Body:
        """Where it is, for another process of this machine."""
        file = "" if self.path is None else str(self.path)
        return Body(inline=self.inline, file=file, size=self.size)

    @classmethod
    def at(cls, body: Body, sha256: bytes = b"") -> Payload:
        """The payload that another process of this machine means."""
        path = Path(body.file) if body.file else None
        return cls(size=body.size, sha256=sha256, inline=body.inline, path=path)
