"""The content of a Flower message as a payload, and back, without a second copy of its arrays.

A payload is `LFP1`, the length of a header (4 bytes, little-endian), the header (`PayloadHeader`: Flower's
records without the arrays' bytes, and the sizes of these), then the arrays' bytes one after another. What
arrives in a file is mapped, and the arrays are views of the map.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from google.protobuf.message import DecodeError

from lepton_fl.errors import ProtocolError
from lepton_fl.fleet.protocol.fleet_pb2 import PayloadHeader
from lepton_fl.fleet.protocol.payload import CHUNK, SMALL, Payload

_MAGIC = b"LFP1"
_MAX_HEADER = 16 << 20
"""Bytes. A study of ten thousand columns has about one million, and each message carries it."""
REPLY_HEADER = 1 << 20
"""Bytes of a reply's header, which has no study: parsed, a header takes up to sixty times its bytes."""


def pack(content: RecordDict, path: Path) -> Payload:
    """Write `content` once: into memory where it is small, else into a new file at `path`, mode 0600."""
    arrays = [array for record in content.array_records.values() for array in record.values()]
    header = _header(content, [len(array.data) for array in arrays])
    size = len(header) + sum(len(array.data) for array in arrays)
    parts: Iterable[bytes | memoryview] = (header, *(array.data for array in arrays))
    if size <= SMALL:
        return Payload.of(b"".join(parts))
    digest = hashlib.sha256()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                view = memoryview(part)
                for start in range(0, len(view), CHUNK):
                    chunk = view[start : start + CHUNK]
                    digest.update(chunk)
                    file.write(chunk)
    except BaseException:
        # On a disk that is full half a payload would keep it so.
        path.unlink(missing_ok=True)
        raise
    return Payload(size=size, sha256=digest.digest(), path=path)


def unpack(view: memoryview, *, max_header: int = _MAX_HEADER) -> RecordDict:
    """The records in a payload, whose header has `max_header` bytes at most; their arrays are views of it.

    Raises:
        ProtocolError: it is not a whole payload.
    """
    if len(view) < 8 or bytes(view[:4]) != _MAGIC:
        raise ProtocolError("payload: does not begin as one")
    end = 8 + int.from_bytes(view[4:8], "little")
    if end > min(len(view), 8 + max_header):
        raise ProtocolError("payload: its header is longer than it, or than any")
    try:
        header = PayloadHeader.FromString(bytes(view[8:end]))
        content = recorddict_from_proto(ProtoRecordDict.FromString(header.records))
    except (DecodeError, ValueError, TypeError, KeyError, AttributeError):
        raise ProtocolError("payload: its header is not one") from None
    arrays = [array for record in content.array_records.values() for array in record.values()]
    if len(arrays) != len(header.sizes) or end + sum(header.sizes) != len(view):
        raise ProtocolError("payload: does not hold the bytes that its header names")
    for array, size in zip(arrays, header.sizes, strict=True):
        # Flower's constructor takes bytes only, which would be a copy.
        array.data = view[end : end + size]  # type: ignore[assignment]
        end += size
    return content


def _header(content: RecordDict, sizes: list[int]) -> bytes:
    bare = RecordDict(
        {
            name: _without_data(record) if isinstance(record, ArrayRecord) else record
            for name, record in content.items()
        }
    )
    records = recorddict_to_proto(bare).SerializeToString(deterministic=True)
    header = PayloadHeader(records=records, sizes=sizes).SerializeToString(deterministic=True)
    return _MAGIC + len(header).to_bytes(4, "little") + header


def _without_data(record: ArrayRecord) -> ArrayRecord:
    return ArrayRecord(
        {name: Array(dtype=a.dtype, shape=a.shape, stype=a.stype, data=b"") for name, a in record.items()}
    )
