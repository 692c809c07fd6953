"""Stochastic rounding is unbiased: the test accepts ours, and rejects roundings that are a little off."""

import numpy as np
import pytest

from lepton_fl.secagg.fixedpoint import Quantiser

SIZE = 400_000
FAR = 5.0
"""Standard deviations; by chance one fair rounding in 1.7 million is further out."""


def deviations(up_L, fraction_L):
    """How far the ups are from their fractions, as a whole and with the fraction, in standard deviations."""
    error_L, variance_L = up_L - fraction_L, fraction_L * (1 - fraction_L)
    lean_L = fraction_L - 0.5
    return (
        error_L.sum() / np.sqrt(variance_L.sum()),
        (error_L * lean_L).sum() / np.sqrt((variance_L * lean_L**2).sum()),
    )


@pytest.fixture
def product_L(rng):
    """What is rounded, between -127 and 127: exact in float32, as are the steps."""
    return (rng.integers(-127 * 4096, 127 * 4096, SIZE) / 4096).astype(np.float32)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_encoding_is_unbiased(product_L, rng):
    """127 steps to a clip of 127: the product is the coordinate."""
    q = Quantiser(clip=127.0, bits=8, max_n=1)
    encoded_L = q.encode(product_L, weight=1, rounding_key=rng.bytes(32)).view(np.int32)
    below_L = np.floor(product_L.astype(np.float64))

    assert max(map(abs, deviations(encoded_L - below_L, product_L - below_L))) < FAR


@pytest.mark.parametrize(
    "rounding",
    [
        lambda v, u: np.floor(v),
        lambda v, u: np.rint(v),
        lambda v, u: np.floor(v + u * 0.98),
        lambda v, u: np.floor(v + 0.01 + u * 0.98),
        lambda v, u: np.floor(v - 0.01 + u * 1.02),
        lambda v, u: np.floor(v + np.sqrt(u)),
    ],
    ids=["down", "nearest", "short", "narrow", "wide", "skewed"],
)
def test_a_biased_rounding_is_found(rounding, product_L, rng):
    v = product_L.astype(np.float64)
    below_L = np.floor(v)
    found = max(map(abs, deviations(rounding(v, rng.random(SIZE)) - below_L, v - below_L)))
    assert found > FAR


def test_two_roundings_of_one_update_are_independent(product_L, rng):
    """Errors of two keys do not go together, so they shrink in a mean."""
    q = Quantiser(clip=127.0, bits=8, max_n=1)
    one_L, other_L = (
        q.encode(product_L, weight=1, rounding_key=rng.bytes(32)).view(np.int32) - product_L for _ in range(2)
    )
    spread = np.sqrt((one_L**2).mean() * (other_L**2).mean() / SIZE)

    assert abs((one_L * other_L).mean()) < FAR * spread
    assert (one_L**2).mean() > 40 * spread, "the same key twice would be found"
