"""Lower bounds on privacy loss: against values worked out by hand, accountants, and games that are fair."""

import math

import numpy as np
import pytest
from scipy import stats

from lepton_fl.audit.bounds import (
    gdp_epsilon,
    many_run_mu,
    one_run_epsilon,
    one_run_mu,
    one_run_p_value,
    one_run_refutes_gdp,
)
from lepton_fl.privacy.accounting import Gaussian, epsilon


def game(mu, canaries, guesses, rng):
    """Right guesses of the best attack on a mechanism that is exactly mu-GDP, each canary by itself."""
    there = rng.random(canaries) < 0.5
    order = np.argsort(there * mu + rng.normal(size=canaries))
    half = guesses // 2
    return int((~there[order[:half]]).sum() + there[order[-half:]].sum())


@pytest.mark.parametrize(("sigma", "delta"), [(1.0, 1e-5), (2.0, 1e-6), (0.5, 1e-3)])
def test_gdp_is_the_gaussian_step(sigma, delta):
    """PLD's epsilon of one unsampled step, discretised from above, is that of 1 / sigma-GDP."""
    pld = epsilon([Gaussian(noise_multiplier=sigma, sampling_rate=1.0, steps=1)], delta)

    assert gdp_epsilon(1 / sigma, delta) == pytest.approx(pld, abs=2e-3)


def test_no_loss_has_no_epsilon():
    assert gdp_epsilon(0.0, 1e-5) == 0.0
    assert gdp_epsilon(1e-7, 1e-5) == 0.0


def test_pure_privacy_is_randomised_response():
    """Delta 0: right guesses are at most those of fair answers with probability e^eps / (1 + e^eps)."""
    p = one_run_p_value(canaries=50, guesses=20, right=17, epsilon=1.0, delta=0.0)

    assert p == pytest.approx(stats.binom.sf(16, 20, math.e / (1 + math.e)))


def test_delta_is_charged_for_the_worst_count():
    """Two guesses, both right: P[B = 2] + 2 m delta max(P[B = 1], P[B <= 1] / 2), by hand."""
    q = math.e / (1 + math.e)
    one, none = 2 * q * (1 - q), (1 - q) ** 2
    expected = q * q + 2 * 3 * 0.01 * max(one, (one + none) / 2)

    p = one_run_p_value(canaries=3, guesses=2, right=2, epsilon=1.0, delta=0.01)
    assert p == pytest.approx(expected)


def test_the_largest_refuted_epsilon_is_where_p_is_reached():
    given = {"canaries": 1000, "guesses": 200, "right": 190, "delta": 1e-6}
    found = one_run_epsilon(**given, p=0.01)

    assert one_run_p_value(**given, epsilon=found) <= 0.01
    assert one_run_p_value(**given, epsilon=found + 0.02) > 0.01


def test_coins_refute_nothing():
    """Half of the guesses right say nothing, by any bound."""
    assert one_run_epsilon(canaries=1000, guesses=200, right=100, delta=1e-6, p=0.01) == 0.0
    assert one_run_mu(canaries=1000, guesses=200, right=100, p=0.01) == 0.0
    assert many_run_mu(absent=100, absent_right=50, present=100, present_right=50, p=0.01) == 0.0


def test_more_right_guesses_refute_more():
    found = [one_run_mu(canaries=1000, guesses=200, right=right, p=0.01) for right in range(120, 201, 10)]

    assert found == sorted(found)
    assert found[-1] > found[0]


@pytest.mark.parametrize("mu", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("guesses", [40, 400])
def test_a_mechanism_that_keeps_its_promise_is_seldom_refuted(mu, guesses):
    """At p = 5 % no more than 5 % of the games are refuted, by three deviations; the best attack plays."""
    rng = np.random.default_rng([int(100 * mu), guesses])
    games = 400
    refuted = sum(
        one_run_refutes_gdp(canaries=1000, guesses=guesses, right=game(mu, 1000, guesses, rng), mu=mu, p=0.05)
        for _ in range(games)
    )

    assert refuted <= stats.binom.ppf(0.9987, games, 0.05)


def test_half_the_noise_is_refuted():
    """The power that docs/audit.md states, of both bounds, at the size of the short form."""
    rng = np.random.default_rng(5)
    canaries, guesses, games = 20_000, 1600, 20
    stated = gdp_epsilon(0.5, 1e-5)
    plain = refined = 0
    for _ in range(games):
        right = game(1.0, canaries, guesses, rng)
        given = {"canaries": canaries, "guesses": guesses, "right": right}
        plain += one_run_epsilon(**given, delta=1e-5, p=0.01) > stated
        refined += one_run_mu(**given, p=0.01) > 0.5

    assert plain >= 15
    assert refined == games


def test_many_runs_come_close_to_the_truth():
    """A million runs of a 1-GDP test, cut in the middle: within a hundredth of it, and not above."""
    right = round(1e6 * stats.norm.cdf(0.5))

    found = many_run_mu(absent=10**6, absent_right=right, present=10**6, present_right=right, p=0.01)
    assert 0.98 < found < 1.0


def test_many_runs_count_errors_with_clopper_and_pearson():
    """All of 10 right, twice: each rate is at most 1 - (p / 2)^(1/10)."""
    most = 1 - 0.005**0.1

    found = many_run_mu(absent=10, absent_right=10, present=10, present_right=10, p=0.01)
    assert found == pytest.approx(max(0.0, -2 * stats.norm.ppf(most)))
