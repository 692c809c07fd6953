"""Masks: AES-256-CTR keystreams, added to a vector in Z/2^32.

A keystream is the AES-256-CTR encryption of zeros, counter blocks 0, 1, 2, ... as 16 bytes big-endian
(NIST SP 800-38A, 6.5), read as little-endian 32-bit words. Word w is in block w // 4, so that any part of a
mask can be made without what comes before it.

L = coordinates of a vector.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

Words: TypeAlias = NDArray[np.uint32]

KEY_BYTES = 32
TILE = 1 << 15
"""Words that are masked by every key before the next ones are looked at: 128 KiB, well inside an L2 cache."""

_WORD = 4
_BLOCK = 16
_ZEROS = memoryview(bytes(_WORD * TILE))


def apply(
    vector_L: Words,
    signed_keys: Iterable[tuple[int, bytes]],
    *,
    start: int = 0,
    tile: int = TILE,
    threads: int = 1,
) -> None:
    """Add each key's mask to the vector, or subtract it where its sign is -1, in place and mod 2^32.

    `vector_L` is the part of a longer vector that begins at word `start`.

    Guarantee: a word's result depends on its position and the keys alone, not on `tile`, `threads`, the
    order of the keys or how a vector was cut into parts; what +1 added, -1 takes away. If one of the keys
    is uniform, used for no other mask and unknown to a reader, the result is to that reader as good as
    uniform: telling them apart is breaking AES-256, or luck of at most q^2 / 2^129 over q blocks of 16 bytes.

    A key's keystream always begins at counter 0: a key is for one mask of one vector, ever.

    Memory: two vectors of `tile` words a thread, whatever the number of keys.

    Raises:
        ValueError: the vector is not one-dimensional uint32, a sign is not 1 or -1, a key is not 32 bytes,
            or `start` is negative.
    """
    if vector_L.dtype != np.uint32 or vector_L.ndim != 1:
        raise ValueError(f"a masked vector is one-dimensional uint32, not {vector_L.ndim}-d {vector_L.dtype}")
    if tile < 1 or threads < 1:
        raise ValueError(f"tile = {tile}, threads = {threads}: both at least 1")
    keys = list(signed_keys)
    if any(sign not in (1, -1) for sign, _ in keys):
        raise ValueError("the sign of a mask is 1 or -1")
    if threads == 1 or len(vector_L) <= tile:
        _apply(vector_L, keys, start, tile)
        return
    # AES runs outside Python's lock.
    part = -(-len(vector_L) // (threads * tile)) * tile
    with ThreadPoolExecutor(threads) as pool:
        parts = [
            pool.submit(_apply, vector_L[at : at + part], keys, start + at, tile)
            for at in range(0, len(vector_L), part)
        ]
    for done in parts:
        done.result()


class Keystream:
    """Any parts of one key's mask, in any order: making the cipher takes longer than many a part."""

    def __init__(self, key: bytes) -> None:
        """Raises ValueError: the key is not 32 bytes."""
        self._cipher = _cipher(key)

    def fill(self, out_L: Words, *, start: int = 0) -> None:
        """Overwrite `out_L`, contiguous, with words `start`, `start + 1`, ... of the mask.

        Raises:
            ValueError: `start` is negative.
        """
        _seek(self._cipher, start)
        # A view of numpy's would take longer than a short part does; one of no bytes cannot be cast.
        out = out_L.data.cast("B") if len(out_L) else memoryview(b"")
        for at in range(0, len(out), len(_ZEROS)):
            part = out[at : at + len(_ZEROS)]
            self._cipher.update_into(_ZEROS[: len(part)], part)
        if sys.byteorder == "big":
            out_L.byteswap(inplace=True)


def keystream(key: bytes, *, start: int = 0, count: int) -> Words:
    """Words `start` to `start + count` of the key's mask.

    Raises:
        ValueError: the key is not 32 bytes, or `start` or `count` is negative.
    """
    if count < 0:
        raise ValueError(f"count = {count}: not negative")
    words_L: Words = np.empty(count, np.uint32)
    Keystream(key).fill(words_L, start=start)
    return words_L


def _apply(vector_L: Words, keys: Sequence[tuple[int, bytes]], start: int, tile: int) -> None:
    streams = [(np.add if sign == 1 else np.subtract, _cipher(key)) for sign, key in keys]
    for _, stream in streams:
        _seek(stream, start)
    tile = min(tile, len(vector_L))
    zeros = bytes(_WORD * tile)
    mask = bytearray(_WORD * tile)
    words_T = np.frombuffer(mask, "<u4")
    for at in range(0, len(vector_L), max(tile, 1)):
        part_T = vector_L[at : at + tile]
        size = len(part_T)
        plain, out = memoryview(zeros)[: _WORD * size], memoryview(mask)[: _WORD * size]
        for combine, stream in streams:
            stream.update_into(plain, out)
            combine(part_T, words_T[:size], out=part_T)


def _cipher(key: bytes) -> CipherContext:
    if len(key) != KEY_BYTES:
        raise ValueError(f"a mask's key is {KEY_BYTES} bytes, not {len(key)}")
    return Cipher(algorithms.AES(key), modes.CTR(bytes(_BLOCK))).encryptor()


def _seek(cipher: CipherContext, start: int) -> None:
    """Have the cipher go on with word `start` of its key's mask."""
    if start < 0:
        raise ValueError(f"start = {start}: not negative")
    block, offset = divmod(_WORD * start, _BLOCK)
    cipher.reset_nonce(block.to_bytes(_BLOCK, "big"))
    if offset:
        cipher.update(bytes(offset))
