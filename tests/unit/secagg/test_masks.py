"""Masks: what apply refuses, and what it costs in memory."""

import tracemalloc

import numpy as np
import pytest

from lepton_fl.secagg import masks

KEY = bytes(range(32))


@pytest.mark.parametrize("tile", [1 << 10, masks.TILE])
def test_memory_does_not_grow_with_the_number_of_keys(tile):
    """Forty masks of 300,000 words pass through two tiles, not through 48 MB."""
    vector_L = np.zeros(300_000, np.uint32)
    keys = [(1, bytes([k]) * 32) for k in range(40)]
    tracemalloc.start()
    try:
        masks.apply(vector_L, keys, tile=tile)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 2 * 4 * tile + 1024 * len(keys)


@pytest.mark.parametrize(
    "vector_L",
    [np.zeros(4, np.int32), np.zeros(4, np.uint64), np.zeros(4, np.float32), np.zeros((2, 2), np.uint32)],
    ids=["int32", "uint64", "float32", "two dimensions"],
)
def test_another_type_of_vector_is_refused(vector_L):
    with pytest.raises(ValueError, match="one-dimensional uint32"):
        masks.apply(vector_L, [(1, KEY)])


@pytest.mark.parametrize("sign", [0, 2, -2])
def test_another_sign_is_refused(sign):
    with pytest.raises(ValueError, match="sign"):
        masks.apply(np.zeros(4, np.uint32), [(sign, KEY)])


@pytest.mark.parametrize("length", [0, 16, 24, 31, 33])
def test_a_key_of_another_length_is_refused(length):
    """AES-128 and AES-192 keys too: the suite has one cipher."""
    with pytest.raises(ValueError, match="32 bytes"):
        masks.apply(np.zeros(4, np.uint32), [(1, bytes(length))])


@pytest.mark.parametrize("arguments", [{"start": -1}, {"tile": 0}, {"threads": 0}])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        masks.apply(np.zeros(4, np.uint32), [(1, KEY)], **arguments)


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="count"):
        masks.keystream(KEY, count=-1)


def test_a_refused_key_leaves_the_vector_as_it_was():
    """Half a mask on a vector would be neither hidden nor readable."""
    vector_L = np.arange(100, dtype=np.uint32)
    with pytest.raises(ValueError, match="32 bytes"):
        masks.apply(vector_L, [(1, KEY), (1, b"short")])

    assert vector_L.tolist() == list(range(100))


def test_an_empty_vector_stays_empty():
    vector_L = np.zeros(0, np.uint32)
    masks.apply(vector_L, [(1, KEY)])

    assert len(vector_L) == 0
