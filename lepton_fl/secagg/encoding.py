"""The one encoding of whatever is signed or hashed: injective, so that no two meanings share their bytes.

Every element is `u64le(length of value) || type byte || value`::

    s   text, UTF-8
    b   bytes
    i   whole number, 16 bytes, two's complement, little-endian
    l   list: its elements, encoded one after another

JSON, protobuf and pickles have many encodings of one value and are never signed or hashed.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, TypeAlias

from lepton_fl.errors import VerificationFailed

Value: TypeAlias = "str | bytes | int | Sequence[Value]"

_HEAD = 9
_INT = 16
_INT_HEAD = _INT.to_bytes(8, "little") + b"i"
_MAX_DEPTH = 8


def encode(*values: Value) -> bytes:
    """`values` as bytes.

    Guarantee: different values, or the same in another grouping, are different bytes.

    Raises:
        TypeError: a value is none of text, bytes, whole number and list; True and False are neither.
        OverflowError: a number needs more than 16 bytes.
    """
    return b"".join([_element(value) for value in values])


def _element(value: Value) -> bytes:
    # The commonest first: a round encodes some thousand values for each site.
    if isinstance(value, bytes):
        return len(value).to_bytes(8, "little") + b"b" + value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bool):
        raise TypeError("encode a bool as a number or a text")
    if isinstance(value, int):
        return _INT_HEAD + value.to_bytes(_INT, "little", signed=True)
    if isinstance(value, list | tuple):
        body = encode(*value)
        return len(body).to_bytes(8, "little") + b"l" + body
    raise TypeError(f"cannot encode a {type(value).__name__}")


@functools.lru_cache(maxsize=256)
def _text(value: str) -> bytes:
    """Labels, most of them."""
    body = value.encode()
    return len(body).to_bytes(8, "little") + b"s" + body


def digest(tag: str, *values: Value) -> bytes:
    """SHA-256 over the encoding; `tag`, as `lepton-fl/roster/1`, says what for and serves nothing else."""
    return hashlib.sha256(encode(tag, *values)).digest()


def decode(data: bytes, *types: type) -> tuple[Any, ...]:
    """The values of which `data` is the encoding, lists as tuples; of these types where any are named.

    Guarantee: what this returns encodes to `data` again, byte for byte.

    Raises:
        VerificationFailed: `data` is no such encoding, or of other values.
    """
    values = _decode(data, _MAX_DEPTH)
    return shaped(values, *types) if types else values


def shaped(values: tuple[Any, ...], *types: type) -> tuple[Any, ...]:
    """`values`, which are as many as `types` and of these.

    Raises:
        VerificationFailed: they are not.
    """
    if len(values) != len(types) or not all(map(isinstance, values, types)):
        raise VerificationFailed("malformed document: other values than its kind has")
    return values


def _decode(data: bytes, depth: int) -> tuple[Any, ...]:
    if depth == 0:
        raise VerificationFailed("malformed document: lists too deep")
    values, at = [], 0
    while at < len(data):
        start = at + _HEAD
        length = int.from_bytes(data[at : at + 8], "little")
        if start > len(data) or length > len(data) - start:
            raise VerificationFailed("malformed document: cut short")
        kind, body = data[at + 8 : start], data[start : start + length]
        values.append(_value(kind, body, depth))
        at = start + length
    return tuple(values)


def _value(kind: bytes, body: bytes, depth: int) -> Any:
    if kind == b"s":
        try:
            return body.decode()
        except UnicodeDecodeError:
            raise VerificationFailed("malformed document: text is not UTF-8") from None
    if kind == b"b":
        return body
    if kind == b"i" and len(body) == _INT:
        return int.from_bytes(body, "little", signed=True)
    if kind == b"l":
        return _decode(body, depth - 1)
    raise VerificationFailed("malformed document: unknown kind of value")
