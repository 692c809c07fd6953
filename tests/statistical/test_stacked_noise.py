"""Sites that are trained together have noise of their own: as much as alone, and none of another's."""

from itertools import combinations

import numpy as np
import pytest
from torch import nn

from lepton_fl.privacy.lattice import Lattice
from lepton_fl.tasks.arrays import flatten
from lepton_fl.tasks.models import _OneLogit
from lepton_fl.tasks.task import BINARY
from lepton_fl.training.local import LocalPlan
from lepton_fl.training.noise import SimulationNoise
from lepton_fl.training.stacked import Part, Stacked, train_together

FEATURES, SITES, STEPS = 2000, 8, 4
BOUND = 5.0
"""Standard deviations; 28 pairs of sites and 24 of steps exceed it by chance once in 30,000 runs."""


class Nobody:
    """One record without features: its gradient is in the bias alone."""

    x_NF = np.zeros((1, FEATURES), np.float32)
    y_N = np.zeros(1, np.float32)
    unit_N = np.zeros(1, np.int64)
    units = 1


def noise_of(names):
    """The noise on each weight, in standard deviations that the lattice states: [steps, sites, weights]."""
    model = _OneLogit(nn.Linear(FEATURES, 1))
    lattice = Lattice.of(
        clip=1.0, noise_multiplier=1.0, coordinates=FEATURES + 1, cohort=1, shares=1, expected_batch=1.0
    )
    plan = LocalPlan(
        clip=1.0,
        lattice=lattice,
        sample_rate=0.5,
        expected_batch=1.0,
        steps=1,
        optimizer="sgd",
        lr=1.0,
        gradient_only=True,
    )
    stacked = Stacked(model, BINARY, features=FEATURES)
    arrays = {name: np.zeros_like(array) for name, array in stacked.template.items()}
    parts = [Part.of(name, Nobody(), SimulationNoise(11, name, "study"), plan) for name in names]
    rounds = [train_together(stacked, arrays, parts, plan, number) for number in range(STEPS)]
    drawn = np.stack([[flatten(update.delta)[:FEATURES] for update in updates] for updates in rounds])
    return drawn * lattice.scale / lattice.share


def largest_correlation(rows):
    """In standard deviations of that of independent rows, over all pairs of them, either way."""
    return max(abs(np.mean(one * other)) * np.sqrt(FEATURES) for one, other in combinations(rows, 2))


def test_the_noise_of_sites_and_of_rounds_is_independent():
    drawn = noise_of([f"site-{k}" for k in range(SITES)])

    assert all(largest_correlation(sites) < BOUND for sites in drawn)
    assert all(largest_correlation(drawn[:, k]) < BOUND for k in range(SITES))


def test_it_is_as_much_at_each_site_as_is_accounted():
    """Two-sided: neither 0.9 nor 1.1 of it would pass."""
    drawn = noise_of([f"site-{k}" for k in range(SITES)])
    of_site = drawn.std(axis=(0, 2))

    assert (abs(of_site - 1) < BOUND / np.sqrt(2 * STEPS * FEATURES)).all()
    assert abs(of_site * 0.9 - 1).min() > BOUND / np.sqrt(2 * STEPS * FEATURES)
    assert abs(drawn.mean()) < BOUND / np.sqrt(drawn.size)


@pytest.mark.parametrize("names", [["a", "b", "a"], ["c", "c", "d"]])
def test_noise_that_two_sites_share_would_be_found(names):
    """Under one name, and so one key, it is the same."""
    assert largest_correlation(noise_of(names)[0]) > BOUND
