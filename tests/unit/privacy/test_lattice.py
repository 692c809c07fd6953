"""Which integers: fine enough, with room for sums and noise in 32-bit words, or refused."""

import math

import numpy as np
import pytest

from lepton_fl.errors import ConfigError
from lepton_fl.privacy import Lattice

# coordinates, cohort, expected batch, noise multiplier
FEDERATIONS = [
    (14, 4, 20, 2.5),
    (500, 4, 100, 1.0),
    (5_000, 10, 500, 2.0),
    (100_000, 10, 1000, 1.0),
    (1_000_000, 100, 1000, 1.0),
    (50_000_000, 10, 1000, 0.6),
    (10_000, 1000, 100, 1.0),
    (30, 4, 256, 0.3),
    (10, 2, 20, 10_000.0),
]


def lattice_of(coordinates, cohort, batch, sigma, *, clip=1.0, shares=None):
    return Lattice.of(
        clip=clip,
        noise_multiplier=sigma,
        coordinates=coordinates,
        cohort=cohort,
        shares=cohort - 1 if shares is None else shares,
        expected_batch=batch,
    )


@pytest.mark.parametrize("clip", [1e-4, 0.1, 1.0, 1e4])
@pytest.mark.parametrize("federation", FEDERATIONS, ids=str)
def test_there_is_room_for_the_sums_and_their_noise(federation, clip):
    """All sites' integers and twelve standard deviations of all their noise are below 2^30."""
    coordinates, cohort, batch, _ = federation
    lattice = lattice_of(*federation, clip=clip)

    assert math.log2(lattice.scale).is_integer()
    assert cohort * lattice.half + lattice.tails < 2**30
    assert lattice.tails >= 12 * lattice.share * math.sqrt(cohort)
    assert 2**10 <= lattice.share <= 2**24
    assert lattice.overhead <= 0.01
    assert lattice.overhead * lattice.sensitivity == pytest.approx(math.sqrt(coordinates))
    assert lattice.reach == pytest.approx(lattice.half / (lattice.scale * clip * batch))
    assert lattice.reach >= 1 / 32


@pytest.mark.parametrize("federation", FEDERATIONS, ids=str)
def test_the_shares_give_the_noise_that_was_asked(federation):
    """Of a clip, but for what rounding, slack and smoothing cost: 1.2 % at most."""
    _, cohort, _, sigma = federation
    lattice = lattice_of(*federation)

    event = lattice.event(sampling_rate=0.1, steps=3, sampler_distance=2.0**-110)
    on_the_gradient = math.sqrt(cohort - 1) * lattice.share / lattice.scale

    assert event.noise_multiplier == sigma
    assert event.sensitivity == lattice.sensitivity
    assert event.steps == 3
    assert sigma <= on_the_gradient <= 1.012 * sigma


def test_the_finest_scale_with_room_for_four_batches():
    """Twice as fine would not have it."""
    lattice = lattice_of(500, 4, 100, 1.0)

    assert 4 <= lattice.reach < 8.2


def test_a_large_model_has_a_narrower_range_rather_than_more_noise():
    """Rounding costs 1 % at most; half as fine would cost more."""
    lattice = lattice_of(50_000_000, 10, 1000, 0.6)

    assert 0.005 < lattice.overhead <= 0.01
    assert lattice.reach < 4


def test_where_there_is_no_room_the_keys_are_named():
    """A model too large for so many sites and such batches."""
    with pytest.raises(ConfigError, match=r"1000 sites.*train.expected_batch.*1000000 parameters") as error:
        lattice_of(1_000_000, 1000, 1000, 1.0)

    assert "secure_aggregation" in error.value.message
    assert error.value.fix


@pytest.mark.parametrize("sigma", [1e5, 1e8])
def test_noise_that_no_word_holds_is_refused(sigma):
    """It would wrap around, and the sum with it."""
    with pytest.raises(ConfigError, match="no room"):
        lattice_of(1000, 100, 10, sigma)


def test_the_tails_hold_what_they_say():
    """One discrete Gaussian beyond twelve standard deviations: less than 2 exp(-72), summed up."""
    lattice = lattice_of(14, 1, 100_000, 1.0, shares=1)
    # What is beyond twice the tails does not count: exp(-288).
    j = np.arange(lattice.tails + 1, 2 * lattice.tails)
    beyond = 2 * np.exp(-(j**2) / (2 * lattice.share**2)).sum() / (lattice.share * math.sqrt(2 * math.pi))

    assert 0 < beyond <= 2 * math.exp(-72) < 2**-102
