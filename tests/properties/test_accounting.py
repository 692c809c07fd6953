"""Laws of composed steps: never below what they cost, never far above, whatever the mixture."""

import math

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from lepton_fl.privacy import DiscreteGaussian, Gaussian, epsilon
from lepton_fl.privacy.accounting import share_for

FINE = 1e-3 * 2.0**-5


def between(low, high):
    """As many small ones as large ones; of few digits, so that a failure reads well."""
    return st.floats(math.log(low), math.log(high)).map(lambda x: float(f"{math.exp(x):.4g}"))


deltas = between(1e-9, 1e-4)
UNSHRUNK = (Phase.explicit, Phase.reuse, Phase.generate)
"""The finest interval takes seconds, and to make a failure smaller takes it hundreds of times."""


@st.composite
def events(draw):
    """Steps of one kind, their noise continuous or in shares."""
    sigma, rate, steps = draw(between(1.5, 20.0)), draw(between(3e-3, 1.0)), draw(st.integers(1, 200))
    if draw(st.booleans()):
        return Gaussian(noise_multiplier=sigma, sampling_rate=rate, steps=steps)
    shares, coordinates = draw(st.integers(1, 9)), draw(st.integers(1, 10_000))
    return DiscreteGaussian(
        clip=0.1,
        scale=2.0**17,
        slack=2.0**-10,
        coordinates=coordinates,
        share=share_for(
            sigma,
            sensitivity=2**17 * 0.1 * (1 + 2**-10) + math.sqrt(coordinates),
            shares=shares,
        ),
        shares=shares,
        sampler_distance=2.0**-110,
        sampling_rate=rate,
        steps=steps,
    )


@st.composite
def mixtures(draw, most=3):
    """Of an epsilon at which a total variation of 2^-110 a draw is nothing; e^60 makes it something."""
    drawn = draw(st.lists(events(), min_size=1, max_size=most))
    assume(epsilon([matching(event) for event in drawn], 1e-9) < 20)
    return drawn


def matching(event):
    return Gaussian(
        noise_multiplier=event.noise_multiplier, sampling_rate=event.sampling_rate, steps=event.steps
    )


def composed(accountant, mixture, delta):
    """By another accountant, from the matching Gaussian steps."""
    for event in mixture:
        step = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(event.sampling_rate, step), event.steps)
    return accountant.get_epsilon(delta)


def finest(mixture, delta):
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    return composed(PLDAccountant(relation, value_discretization_interval=FINE), mixture, delta)


def renyi(mixture, delta):
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    return composed(RdpAccountant(neighboring_relation=relation), mixture, delta)


def lies_between(mixture, delta):
    ours, fine = epsilon(mixture, delta), finest(mixture, delta)

    # The accountant's own sums are good to nine digits or so.
    assert fine * (1 - 1e-6) <= ours <= 1.05 * fine


@settings(max_examples=3, phases=UNSHRUNK)
@given(mixture=mixtures(), delta=deltas)
@example(mixture=[Gaussian(noise_multiplier=10.0, sampling_rate=2e-3, steps=100_000)], delta=1e-6)
@example(mixture=[Gaussian(noise_multiplier=20.0, sampling_rate=0.01, steps=3)], delta=1e-5)
def test_never_below_the_finest_and_at_most_five_percent_above(mixture, delta):
    """Sigma and rate changing from one part of a history to the next; small losses and few steps too."""
    lies_between(mixture, delta)


@pytest.mark.slow
@settings(max_examples=60, phases=UNSHRUNK)
@given(mixture=mixtures(6), delta=deltas)
def test_never_below_the_finest_and_at_most_five_percent_above_at_length(mixture, delta):
    """More of the same."""
    lies_between(mixture, delta)


@pytest.mark.slow
@settings(max_examples=40, phases=UNSHRUNK)
@given(mixture=mixtures(), delta=deltas)
def test_renyi_is_never_below(mixture, delta):
    """A looser bound, by other means, but for what discretisation costs the tighter one."""
    assert epsilon(mixture, delta) <= 1.05 * renyi(mixture, delta)


def once(sigma, q, eps):
    """Delta of one step in closed form: the larger of the two directions."""
    out = 0.0
    if (odds := (math.exp(eps) - 1 + q) / q) > 0:
        at = sigma**2 * math.log(odds) + 0.5
        with_unit = (1 - q) * norm.sf(at / sigma) + q * norm.sf((at - 1) / sigma)
        out = with_unit - math.exp(eps) * norm.sf(at / sigma)
    if (odds := (math.exp(-eps) - 1 + q) / q) > 0:
        at = sigma**2 * math.log(odds) + 0.5
        with_unit = (1 - q) * norm.cdf(at / sigma) + q * norm.cdf((at - 1) / sigma)
        out = max(out, norm.cdf(at / sigma) - math.exp(eps) * with_unit)
    return out


@settings(max_examples=20)
@given(sigma=between(0.4, 50.0), rate=between(1e-4, 1.0), delta=deltas)
def test_one_step_against_its_closed_form(sigma, rate, delta):
    """The hockey-stick divergence of a normal mixture needs no accountant at all."""
    ours = epsilon([Gaussian(noise_multiplier=sigma, sampling_rate=rate, steps=1)], delta)

    assert once(sigma, rate, ours) <= delta * (1 + 1e-6)
    if once(sigma, rate, 0.0) > delta:
        exact = brentq(lambda eps: once(sigma, rate, eps) - delta, 0.0, 200.0, xtol=1e-12)
        assert ours <= 1.05 * exact + 1e-5


@settings(max_examples=5, phases=UNSHRUNK)
@given(mixture=mixtures(), delta=deltas, more=st.integers(1, 50))
def test_more_steps_of_a_kind_never_cost_less(mixture, delta, more):
    """A ledger only rises while runs of the same kind go on."""
    again = mixture[-1].times(1 + more)

    assert epsilon([*mixture[:-1], again], delta) >= epsilon(mixture, delta)
