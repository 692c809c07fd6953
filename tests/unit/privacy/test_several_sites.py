"""One person at several sites: against exact divergences of what really happens, and known special cases.

In a step each of m sites samples the person's unit by itself. Under shared noise one sum is opened, which
moves by the sum of what was sampled; under local noise m releases, each with noise of its own.
"""

import itertools
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from scipy.stats import binom, norm

from lepton_fl.errors import ConfigError
from lepton_fl.privacy import Gaussian, Guarantee, calibrate, epsilon
from lepton_fl.privacy.accounting import gap_allowance

DELTA = 1e-5


def event(m, q, sigma, steps=1):
    return Gaussian(noise_multiplier=sigma, sampling_rate=q, steps=steps, sites_per_unit=m)


def worst(m, q, sigma, level, *, added):
    """delta(epsilon) of one step by a sum over one dimension, e^epsilon = `level`: all units pull one way."""
    x, width = np.linspace(-12 * sigma, m + 12 * sigma, 400_001, retstep=True)
    without = norm.pdf(x, 0, sigma)
    with_ = sum(binom.pmf(k, m, q) * norm.pdf(x, k, sigma) for k in range(m + 1))
    one, other = (without, with_) if added else (with_, without)
    return np.maximum(one - level * other, 0).sum() * width


# --- the accountant ---


@pytest.mark.parametrize(("m", "q", "sigma"), [(2, 0.1, 1.0), (3, 0.3, 2.0), (5, 0.05, 0.8), (2, 1.0, 4.0)])
def test_one_step_is_the_divergence_of_the_mixture(m, q, sigma):
    """By integration over a fine grid: at the epsilon stated, delta is that asked for, or just below."""
    found = epsilon([event(m, q, sigma)], DELTA)

    exact = max(worst(m, q, sigma, math.exp(found), added=added) for added in (True, False))
    assert 0.95 * DELTA < exact <= DELTA * (1 + 1e-6)


@pytest.mark.parametrize(("m", "q", "sigma", "steps"), [(3, 0.05, 3.0, 200)])
def test_dp_accountings_own_mixture_agrees(m, q, sigma, steps):
    """Its inverse of the loss is another: point by point."""
    accountant = PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-3
    )
    taken = range(m + 1)
    mixture = dp_accounting.dp_event.MixtureOfGaussiansDpEvent(
        sigma, list(taken), list(binom.pmf(taken, m, q))
    )
    accountant.compose(mixture, steps)

    assert epsilon([event(m, q, sigma, steps)], DELTA, interval=1e-3) == pytest.approx(
        accountant.get_epsilon(DELTA), abs=1e-6
    )


@pytest.mark.parametrize("m", [2, 7])
def test_everybody_every_step_is_m_times_the_sensitivity(m):
    """Without sampling nothing is left to chance."""
    ours = epsilon([event(m, 1.0, 6.0 * m, 20)], DELTA)

    assert ours == pytest.approx(epsilon([event(1, 1.0, 6.0, 20)], DELTA), rel=1e-6)


@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.1, 2.0, 100)])
def test_more_sites_cost_more_and_no_more_than_all_of_them_at_once(q, sigma, steps):
    """Between one site, and one coin for all m: rate 1 - (1 - q)^m, m times the sensitivity."""
    costs = [epsilon([event(m, q, sigma, steps)], DELTA) for m in (1, 2, 4)]

    assert costs == sorted(set(costs))
    for m, cost in zip((2, 4), costs[1:], strict=True):
        assert cost < epsilon([event(1, 1 - (1 - q) ** m, sigma / m, steps)], DELTA)


def test_m_times_the_sensitivity_at_the_same_rate_is_no_bound():
    """What one might take for it states too little: units that are sampled apart show more often."""
    level, (m, q, sigma) = math.exp(0.05), (2, 0.1, 0.5)

    naive = worst(1, q, sigma / m, level, added=False)

    assert worst(m, q, sigma, level, added=False) > 1.1 * naive


def test_kinds_of_steps_compose():
    """Of a person at one site and at three, in either order."""
    one, three = event(1, 0.05, 1.5, 100), event(3, 0.05, 4.0, 100)
    both = epsilon([one, three], DELTA)

    assert both == epsilon([three, one], DELTA)
    assert max(epsilon([one], DELTA), epsilon([three], DELTA)) < both
    assert both < epsilon([one], DELTA / 2) + epsilon([three], DELTA / 2)


# --- the theorem: no directions of the units' gradients cost more ---


@pytest.mark.parametrize("level", [1.0, 1.3, 1.8])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("angle", [0.0, 0.5, math.pi / 2, math.pi])
def test_units_that_pull_apart_cost_no_more(angle, added, level):
    """Two units in the plane, by integration: at most what accounting has, and that if they pull alike."""
    q, sigma = 0.3, 0.9
    axis, width = np.linspace(-8, 10, 1201, retstep=True)
    grid = np.stack(np.meshgrid(axis, axis))
    pulls = np.array([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])

    def density(at):
        return np.exp(-((grid - at[:, None, None]) ** 2).sum(0) / (2 * sigma**2)) / (2 * math.pi * sigma**2)

    without = density(np.zeros(2))
    with_ = sum(
        q ** sum(taken) * (1 - q) ** (2 - sum(taken)) * density(np.array(taken) @ pulls)
        for taken in itertools.product((0, 1), repeat=2)
    )
    one, other = (without, with_) if added else (with_, without)
    found = np.maximum(one - level * other, 0).sum() * width**2
    bound = worst(2, q, sigma, level, added=added)

    # What the grid of the plane is good for.
    assert found <= bound + 1e-5
    assert (angle == 0) == (found == pytest.approx(bound, abs=1e-5))


# --- the study ---


@pytest.mark.parametrize("noise", ["local", "shared"])
def test_the_promise_is_for_all_of_a_persons_sites(make_study, noise):
    """The event's epsilon is the study's; one site alone would have needed less noise."""
    privacy = {"noise": noise, "max_sites_per_unit": 2}
    one, two = Guarantee.of(make_study(privacy={"noise": noise})), Guarantee.of(make_study(privacy=privacy))

    assert 2.99 < epsilon([two.event], DELTA) <= 3.0
    assert two.event.noise_multiplier > one.event.noise_multiplier


def test_of_local_noise_every_site_is_a_release_of_its_own(make_study):
    """What m sites release is what one releases, m times as often."""
    study = make_study(privacy={"max_sites_per_unit": 3})
    guarantee = Guarantee.of(study)

    assert guarantee.event.steps == 3 * study.charged_steps
    assert guarantee.event.sites_per_unit == 1
    assert guarantee.event.noise_multiplier == calibrate(
        epsilon=3.0,
        delta=DELTA,
        sampling_rate=study.train.sample_rate,
        steps=3 * study.charged_steps,
        gap=gap_allowance(epsilon=3.0, delta=DELTA),
    )


@pytest.mark.parametrize("noise", ["local", "shared"])
def test_a_site_charges_what_the_person_is_promised(make_study, noise):
    """All rounds on the lattice, as a ledger has them: within the promise, and more than one site's part."""
    study = make_study(privacy={"noise": noise, "max_sites_per_unit": 2})
    guarantee = Guarantee.of(study)
    cohort = 4 if noise == "shared" else 1
    lattice = guarantee.lattice(coordinates=500, cohort=cohort)

    charge = guarantee.discrete(lattice, sampler_distance=2.0**-110).times(study.train.charged_rounds)

    own = lattice.event(
        sampling_rate=study.train.sample_rate, steps=study.charged_steps, sampler_distance=2.0**-110
    )
    assert 2.99 < epsilon([charge], DELTA) <= 3.0
    assert epsilon([own], DELTA) < 0.9 * epsilon([charge], DELTA)


@pytest.mark.parametrize("noise", ["local", "shared"])
def test_metrics_are_of_all_sites_too(make_study, noise):
    """A person's held-out records are in a count at each of their sites."""
    study = make_study(
        privacy={"noise": noise, "max_sites_per_unit": 2}, evaluation={"release": "dp", "share": 0.2}
    )
    guarantee = Guarantee.of(study)
    alone = Guarantee.of(make_study(privacy={"noise": noise}, evaluation={"release": "dp", "share": 0.2}))

    assert 0.59 < epsilon([guarantee.metrics], DELTA) <= 0.6
    assert epsilon([guarantee.event, guarantee.metrics], DELTA) <= 3.0
    # Two releases of unit sensitivity, or one of twice that.
    ratio = guarantee.metrics.noise_multiplier / alone.metrics.noise_multiplier
    assert ratio == pytest.approx(2.0 if noise == "shared" else math.sqrt(2), rel=1e-3)


def test_who_has_all_other_members_knows_the_person_there(make_study):
    """Left to protect is one unit at one site, by one share; insiders and readers see what they ever saw."""
    guarantee = Guarantee.of(make_study(privacy={"noise": "shared", "max_sites_per_unit": 2}))
    charge = guarantee.discrete(guarantee.lattice(coordinates=500, cohort=4), sampler_distance=2.0**-110)

    readers, server, insider, all_others = guarantee.exposures(charge, 4)

    assert readers.epsilon < server.epsilon == insider.epsilon <= 3.0
    sigma = guarantee.event.noise_multiplier / math.sqrt(3)
    alone = event(1, charge.sampling_rate, sigma, charge.steps * guarantee.study.train.charged_rounds)
    assert all_others.epsilon == pytest.approx(epsilon([alone], DELTA), rel=1e-4)


@pytest.mark.parametrize(
    ("privacy", "sentence"),
    [
        (
            {},
            (
                "The unit is one record at one site: whoever is at several sites has a unit at each, and "
                "what each costs adds up."
            ),
        ),
        (
            {"unit": "patient"},
            (
                "The unit is one patient at one site, with all its records there: whoever is at several "
                "sites has a unit at each, and what each costs adds up."
            ),
        ),
        (
            {"unit": "patient", "max_sites_per_unit": 3},
            (
                "The unit is one patient at each of up to 3 sites, with all its records there: whoever is at "
                "more than 3 sites has several units, and what each costs adds up."
            ),
        ),
    ],
    ids=["record", "patient", "three sites"],
)
def test_what_the_unit_is_in_a_sentence(make_study, privacy, sentence):
    """And what it is not."""
    assert Guarantee.of(make_study(privacy=privacy)).unit_said == sentence


def test_the_promise_names_the_sites(make_study):
    """An epsilon over several sites is not one of this site."""
    sentence = Guarantee.of(make_study(privacy={"unit": "patient", "max_sites_per_unit": 3})).sentence()

    start = "Epsilon 3, delta 1e-05 per patient (all records of one, at up to 3 sites together), against the "
    assert sentence.startswith(start)


@pytest.mark.parametrize("wrong", [0, 101])
def test_sites_of_one_person_are_one_to_a_hundred(make_study, wrong):
    """More would be no person's."""
    with pytest.raises(ConfigError, match="max_sites_per_unit"):
        make_study(privacy={"max_sites_per_unit": wrong})


def test_no_sites_are_no_event():
    """Refused where it is made, so that no ledger holds it."""
    with pytest.raises(ValueError, match="sites_per_unit 0"):
        event(0, 0.1, 1.0)
