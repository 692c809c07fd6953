"""The law of the discrete Gaussian's draws, by chi-square: sigma is accepted, 0.97 and 1.03 of it are not.

Keys are fixed, so that a test gives the same each time.
"""

import hashlib
import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lepton_fl.privacy.discrete_gaussian import sample

COUNT = 200_000
FAR = 1e-6
"""A right sampler's chi-square is beyond it, to either side, once in a million keys."""
SIGMAS = [1.0, 4.5, 100.3, 256.0, 300.0, 4096.5, 20_000.0, 2.0**20, 2.0**24]
BENCHMARK = Path(__file__).parents[2] / "simulations" / "benchmarks" / "noise.py"


def key(name):
    return hashlib.shake_256(str(name).encode()).digest(32)


def below(sigma):
    """P(x <= k) as a function of k, from the definition.

    From sigma = 5000 on by the normal's integral, which differs by less than 1 / (24 sigma^2).
    """
    if sigma > 5000:
        return lambda k: stats.norm.cdf((np.asarray(k) + 0.5) / sigma)
    width = int(20 * sigma)
    mass = np.exp(-(np.arange(-width, width + 1) ** 2) / (2 * sigma**2))
    cumulative = mass.cumsum() / mass.sum()
    return lambda k: cumulative[np.clip(np.asarray(k) + width, 0, 2 * width)]


def accepted(drawn, sigma):
    """Whether the draws have the discrete Gaussian's law, by the counts in some 40 intervals."""
    edges = np.unique(np.rint(np.linspace(-3, 3, 41) * sigma)).astype(np.int64)
    expected = np.diff(below(sigma)(edges), prepend=0, append=1) * len(drawn)
    counts = np.bincount(np.searchsorted(edges, drawn), minlength=len(edges) + 1)
    return even(counts, expected)


def even(counts, expected):
    statistic = ((counts - expected) ** 2 / expected).sum()
    return FAR < stats.chi2.sf(statistic, len(counts) - 1) < 1 - FAR


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_draws_have_the_stated_law(sigma):
    assert accepted(sample(sigma, COUNT, key=key(sigma)), sigma)


@pytest.mark.parametrize("wrong", [0.97, 1.03])
@pytest.mark.parametrize("sigma", SIGMAS[1:-1])
def test_another_sigma_would_be_noticed(sigma, wrong):
    """The test above has the power to refuse a sampler that is off, to either side."""
    assert not accepted(sample(sigma * wrong, COUNT, key=key(sigma)), sigma)


@pytest.mark.parametrize("by", [1, -1])
def test_a_shifted_centre_would_be_noticed(by):
    assert not accepted(sample(100.3, COUNT, key=key("shift")) + 3 * by, 100.3)


@pytest.mark.parametrize("sigma", SIGMAS[3:])
def test_the_last_digits_are_even(sigma):
    """Levels leave no comb: every residue is as frequent, of a level's multiplier (11 at 300) or not."""
    drawn = sample(sigma, COUNT, key=key(sigma))
    for modulus in (2, 3, 7, 11, 12, 21, 64):
        counts = np.bincount(drawn % modulus, minlength=modulus)

        assert even(counts, np.full(modulus, COUNT / modulus))


@pytest.mark.parametrize("sigma", [100.3, 4096.5, 2.0**20])
def test_the_tails_are_reached(sigma):
    """Beyond 4 and 4.3 sigma, on each side, as often as they should."""
    drawn = sample(sigma, 4_000_000, key=key("tails"))
    for far in (4, 4.3):
        edge = int(far * sigma)
        expected = below(sigma)(-edge - 1) * len(drawn)
        low, high = stats.poisson.ppf([FAR, 1 - FAR], expected)
        for beyond in (drawn < -edge, drawn > edge):
            assert 0 < low <= np.count_nonzero(beyond) <= high


@pytest.mark.parametrize("sigma", [4.5, 4096.5, 2.0**20])
def test_draws_are_independent(sigma):
    """Of their neighbours, of those a tile or a block further, and of another key's: sizes too."""
    drawn = sample(sigma, COUNT, key=key("one")) / sigma
    other = sample(sigma, COUNT, key=key("other")) / sigma
    pairs = [(drawn[lag:], drawn[:-lag]) for lag in (1, 2, 4, 8, 1 << 16)] + [(drawn, other)]
    for one, two in pairs:
        for x, y in ((one, two), (one**2 - 1, (two**2 - 1) / 2)):
            assert abs((x * y).mean()) < 5 / np.sqrt(len(x))


def test_keys_differ():
    one, other = (sample(4096.5, COUNT, key=key(name)) for name in ("one", "other"))

    assert np.count_nonzero(one == other) < COUNT / 1000
    assert accepted(one - other, np.sqrt(2) * 4096.5)


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_noise", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("sigma", [4.5, 300.0])
def test_exact_rejection_has_the_same_law(benchmark, sigma):
    """An algorithm that shares nothing with ours, so that the law itself is not misunderstood."""
    rng = random.Random(5)
    drawn = np.array([benchmark.rejection(sigma, rng.randrange) for _ in range(10_000)])

    assert accepted(drawn, sigma)
