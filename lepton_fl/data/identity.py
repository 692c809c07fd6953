"""Who a unit is, as 16 bytes that depend on nobody else.

By these a unit keeps its side of the split whatever records come or go, in whatever order they stand.

B = rows of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

UNIT_LABEL = b"lepton-fl/unit/1"
"""Domain separation of units' keys. Changing it draws every split anew."""

KEY_BYTES = 16
"""Length of a key: two of a billion units share one with a chance below 1e-20."""


def row_keys(columns: Sequence[Sequence[str]]) -> NDArray[np.uint8]:
    """A key for each row of these columns, uint8 [B, 16]: BLAKE2b over its cells and nothing else.

    Hashed are the number of cells, the length of each in characters (all of them as 8 bytes, big-endian)
    and the texts in UTF-8, so that two different rows are never the same bytes.

    The hash is not keyed: whoever can guess a row can recognise its key, which so never leaves the site.
    """
    rows = len(columns[0])
    size_BC = np.empty((rows, 1 + len(columns)), dtype=">u8")
    size_BC[:, 0] = len(columns)
    for place, cells in enumerate(columns, start=1):
        size_BC[:, place] = np.fromiter(map(len, cells), np.uint64, rows)
    # Rows of one buffer, since making an array of each would take longer than to hash it.
    width = size_BC.shape[1] * size_BC.itemsize
    sizes = size_BC.tobytes()
    digests = bytearray()
    for row, cells in enumerate(zip(*columns, strict=True)):
        message = sizes[row * width : (row + 1) * width] + "".join(cells).encode("utf-8", "surrogatepass")
        digests += hashlib.blake2b(message, digest_size=KEY_BYTES, person=UNIT_LABEL).digest()
    return np.frombuffer(bytes(digests), dtype=np.uint8).reshape(rows, KEY_BYTES)
