"""The noise that training adds, by chi-square over all its coordinates: sigma is accepted, others are not.

The test is two-sided and sharp: with 20,000 coordinates the standard deviation is known to 0.5 %, and the
quantiles let a right implementation fail once in a million seeds. Seeds are fixed.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from lepton_fl.privacy.lattice import Lattice
from lepton_fl.tasks import arrays_of
from lepton_fl.tasks.task import BINARY
from lepton_fl.training import LocalPlan, SimulationNoise, bookkeeping, train_locally

SIGMA, CLIP, BATCH = 1.7, 0.3, 25.0
FEATURES, HIDDEN = 199, 100
TAIL = 5e-7


@dataclass
class Records:
    x_NF: np.ndarray
    y_N: np.ndarray
    unit_N: np.ndarray
    units: int


@pytest.fixture
def records():
    """60 units of two records each."""
    rng = np.random.default_rng(5)
    x_NF = rng.uniform(-1, 1, (120, FEATURES)).astype(np.float32)
    y_N = (rng.random(120) < 0.5).astype(np.float32)
    return Records(x_NF, y_N, np.repeat(np.arange(60), 2), 60)


@pytest.fixture
def nobody():
    """A table without units: what is released is noise alone."""
    return Records(np.zeros((0, FEATURES), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), 0)


def lattice(sigma):
    """For a gradient of one row more than the model has: what is tested is the noise, not its share."""
    return Lattice.of(
        clip=CLIP,
        noise_multiplier=sigma,
        coordinates=(FEATURES + 2) * HIDDEN + 1,
        cohort=1,
        shares=1,
        expected_batch=BATCH,
    )


def update(records, sigma, *, steps=1, round=1, party="north"):
    """All coordinates of the update, as one float64 vector."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1), nn.Flatten(0))
    plan = LocalPlan(
        clip=CLIP,
        lattice=lattice(sigma) if sigma else None,
        sample_rate=0.5,
        expected_batch=BATCH,
        steps=steps,
        optimizer="sgd",
        lr=1.0,
    )
    noise = SimulationNoise(11, party)
    delta = train_locally(model, BINARY, arrays_of(model), records, plan, noise, round).delta
    return np.concatenate([value.ravel() for value in delta.values()]).astype(np.float64)


def residual(records, sigma, **where):
    """What the noise added: the same round with and without it. Sampling has a stream of its own."""
    return update(records, sigma, **where) - update(records, 0.0, **where)


def accepted(residual_L, std):
    """Whether the residuals are normal with this standard deviation, by their sum of squares."""
    statistic = ((residual_L / std) ** 2).sum()
    low, high = stats.chi2.ppf([TAIL, 1 - TAIL], len(residual_L))
    return low < statistic < high


STATED = lattice(SIGMA).share / lattice(SIGMA).scale / BATCH


def test_the_stated_deviation_is_hardly_more_than_the_gaussians():
    """Of the noise, what integers cost is below 2 %."""
    assert SIGMA * CLIP / BATCH < STATED < 1.02 * SIGMA * CLIP / BATCH


def test_the_noise_has_the_stated_deviation(records):
    """The share over the scale on the sum, so that over the public divisor on the update."""
    assert accepted(residual(records, SIGMA), STATED)


@pytest.mark.parametrize("wrong", [2 / 3, 0.95, 1.05, 1.5])
def test_another_deviation_would_be_noticed(records, wrong):
    """The test above has the power to refuse an implementation that is off, to either side."""
    assert not accepted(residual(records, SIGMA * wrong), STATED)


def test_nobody_is_hidden_by_the_same_noise(nobody):
    """An empty batch adds neither less nor more."""
    assert accepted(update(nobody, SIGMA), STATED)


def test_blocks_share_one_noise(records, monkeypatch):
    """Once a step: not once a block, and not in the last one's share."""
    monkeypatch.setattr(bookkeeping, "MOST_ROWS", 32)

    assert accepted(residual(records, SIGMA), STATED)


def test_each_step_adds_noise_of_its_own(nobody):
    """Four steps add four independent draws: twice the deviation, not four times and not once."""
    assert accepted(update(nobody, SIGMA, steps=4), 2 * STATED)


def test_the_noise_is_normal_and_centred(records):
    """Not only its variance: the whole distribution, by Kolmogorov and Smirnov."""
    assert stats.kstest(residual(records, SIGMA) / STATED, "norm").pvalue > 1e-4


@pytest.mark.parametrize(
    "other", [{"round": 2}, {"party": "south"}, {"round": 12, "party": "south"}], ids=str
)
def test_noise_of_other_rounds_and_parties_is_independent(nobody, other):
    """A difference of two updates keeps the noise of both."""
    difference = update(nobody, SIGMA) - update(nobody, SIGMA, **other)

    assert accepted(difference, np.sqrt(2) * STATED)


def test_coordinates_are_independent(nobody):
    """Every layer has draws of its own, and none repeats at a lag."""
    noise_L = update(nobody, SIGMA) / STATED
    for lag in (1, FEATURES, HIDDEN, FEATURES * HIDDEN // 2):
        correlation = (noise_L[lag:] * noise_L[:-lag]).mean()

        assert abs(correlation) < 5 / np.sqrt(len(noise_L) - lag)


def test_noise_does_not_touch_the_sampling(records):
    """The second step samples the units that it would without noise, or faint noise would drown in them."""
    assert accepted(
        residual(records, 0.01, steps=2), np.sqrt(2) * lattice(0.01).share / lattice(0.01).scale / BATCH
    )
