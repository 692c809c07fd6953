"""The noise on summed histograms of scores, by chi-square: what is told is accepted, more or less is not."""

import numpy as np
import pytest
from scipy import stats

from lepton_fl.config import parse
from lepton_fl.messages import Assignment
from lepton_fl.privacy import Guarantee
from lepton_fl.secagg.context import Cohort
from lepton_fl.secure_rounds import COUNT_STEPS, count_noise, count_quantiser, decode_counts, noise_on_counts
from lepton_fl.site.secure import encoded_counts
from lepton_fl.study import Study
from lepton_fl.training import SimulationNoise

SITES, BINS, ROUNDS = 4, 16, 500
TAIL = 5e-7
NAMES = tuple(f"site-{i}" for i in range(SITES))


def make(noise):
    raw = {
        "study": {"name": "heart"},
        "task": {"kind": "binary", "target": "ill"},
        "privacy": {"epsilon": 3.0, "delta": 1e-5, "noise": noise},
        "train": {"rounds": 20, "sample_rate": 0.1, "lr": 0.1, "expected_batch": 20.0},
        "features": {"columns": {"age": {"type": "float", "range": [20, 90]}}},
        "evaluation": {"release": "dp", "share": 0.3},
    }
    return parse(Study, raw, file="study.toml")


class Sum:
    """What `encoded_counts` looks at of a context."""

    def __init__(self, study):
        self.quantiser = count_quantiser(study, SITES)
        self.cohort = Cohort(parties=tuple(range(101, 101 + SITES)), colluders=1)


def summed(study, survivors):
    """The decoded sums of `survivors` sites' histograms, less the true one: [rounds x 2 x bins]."""
    where, found = Sum(study), []
    counts = np.arange(2 * BINS).reshape(2, BINS) * 1000
    for seed in range(ROUNDS):
        of = Assignment(study=study, run="0" * 32, round=study.evaluation_round, cohort=NAMES)
        words = [encoded_counts(counts, of, where, SimulationNoise(seed, name)) for name in NAMES[:survivors]]
        total_L = np.sum(words, axis=0, dtype=np.uint32)
        mean_L = where.quantiser.decode(total_L, n=survivors, total_weight=survivors)
        found.append(decode_counts(mean_L, where.quantiser, survivors) - survivors * counts)
    return np.ravel(found)


def accepted(residual, deviation):
    """Whether the residuals are normal with this standard deviation, by their sum of squares."""
    low, high = stats.chi2.ppf([TAIL, 1 - TAIL], len(residual))
    return low < ((residual / deviation) ** 2).sum() < high


@pytest.mark.parametrize(("noise", "survivors", "shares"), [("local", 4, 4), ("shared", 4, 4 / 3)])
def test_the_sum_has_the_noise_that_is_told(noise, survivors, shares):
    """Shared: of four survivors and one colluder, three make up the whole; local: each site by itself."""
    study = make(noise)
    sigma = Guarantee.of(study).metrics.noise_multiplier
    residual = summed(study, survivors)
    told = noise_on_counts(study, cohort=SITES, sites=survivors)

    assert told == pytest.approx(sigma * np.sqrt(shares), rel=0.01)
    assert accepted(residual, told)
    assert not accepted(residual, told * 2 / 3)
    assert not accepted(residual, told * 1.5)
    assert abs(residual.mean()) < 5 * told / np.sqrt(len(residual))


@pytest.mark.parametrize(("noise", "honest"), [("local", 1), ("shared", 3)])
def test_what_the_fewest_honest_sites_add_is_what_is_charged(noise, honest):
    """And no less: the rest is for the rounding that makes it discrete."""
    study = make(noise)
    sigma = Guarantee.of(study).metrics.noise_multiplier

    added = honest * count_noise(study, SITES) ** 2 - 4

    assert added == pytest.approx((COUNT_STEPS * sigma) ** 2, rel=1e-9)
