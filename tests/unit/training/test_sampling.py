"""Poisson sampling from a stream: the law that amplification is claimed for."""

import numpy as np
import pytest

from lepton_fl.training.sampling import PoissonSampler

KEY = bytes(range(32))


def test_the_rate_is_exact_or_below():
    """Of 64 bits: what is claimed is what is drawn at."""
    for rate in (1e-6, 0.1, 1 / 3, 0.999999999, 1.0):
        found = PoissonSampler(1, rate, KEY).rate
        assert rate - 2.0**-64 <= found <= rate


@pytest.mark.parametrize("rate", [0.02, 0.5, 0.97])
def test_units_come_independently_at_the_rate(rate):
    """Two-sided, over 400,000 draws: the rate, and the law of the batch's size."""
    units, steps = 2000, 200
    sampler = PoissonSampler(units, rate, KEY)
    sizes = np.array([len(sampler.draw(step)) for step in range(steps)])

    variance = units * rate * (1 - rate)
    assert sizes.mean() == pytest.approx(units * rate, abs=4 * np.sqrt(variance / steps))
    assert sizes.var() == pytest.approx(variance, rel=4 * np.sqrt(2 / steps))
    assert sizes.mean() != pytest.approx(units * rate * 1.1, abs=4 * np.sqrt(variance / steps))


def test_a_step_is_the_same_whatever_came_before():
    """Cut at any place, the stream is one; steps and keys have draws of their own."""
    one, other = PoissonSampler(500, 0.3, KEY), PoissonSampler(500, 0.3, KEY)
    first = one.draw(0)

    assert np.array_equal(other.draw(7), one.draw(7))
    assert not np.array_equal(first, one.draw(7))
    assert not np.array_equal(first, PoissonSampler(500, 0.3, KEY[::-1]).draw(0))


def test_the_extremes():
    """All, or nearly nobody."""
    assert np.array_equal(PoissonSampler(100, 1.0, KEY).draw(3), np.arange(100))
    assert len(PoissonSampler(100, 1e-12, KEY).draw(0)) == 0
    assert len(PoissonSampler(0, 0.5, KEY).draw(0)) == 0
