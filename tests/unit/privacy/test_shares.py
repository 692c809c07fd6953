"""The lemmas and the theorem of docs/accounting.md, in numbers: sums enumerated, no proof relied on."""

import itertools
import math
from dataclasses import replace
from decimal import Decimal, localcontext

import numpy as np
import pytest

from lepton_fl.privacy import DiscreteGaussian, Gaussian, epsilon
from lepton_fl.privacy.accounting import share_for
from lepton_fl.secagg.fixedpoint import Quantiser
from lepton_fl.secagg.masks import keystream

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803")


def smoothing(s):
    """e(s) of the page: how far a sum of a Gaussian over shifted integers is from its integral."""
    return sum(2 * (-2 * PI * PI * s * s * k * k).exp() for k in range(1, 9))


def discrete_gaussian(parameter, reach):
    """Its probabilities from -reach to reach."""
    weights = [(-Decimal(j * j) / (2 * parameter * parameter)).exp() for j in range(-reach, reach + 1)]
    return [w / sum(weights) for w in weights]


def convolve(one, other):
    total = [Decimal(0)] * (len(one) + len(other) - 1)
    for (i, a), (j, b) in itertools.product(enumerate(one), enumerate(other)):
        total[i + j] += a * b
    return total


def closeness(found, ideal):
    """The largest log-ratio of two lists of probabilities about the same centre, in the middle of them."""
    middle, half = len(found) // 2, len(ideal) // 2
    return max(abs((found[middle + j] / ideal[half + j]).ln()) for j in range(-half // 4, half // 4 + 1))


@pytest.mark.parametrize("centre", ["0", "0.25", "0.5", "0.9"])
@pytest.mark.parametrize("s", ["0.4", "0.7", "1", "2"])
def test_lemma_1_sums_over_shifted_integers(s, centre):
    """s sqrt(2 pi) within 1 +- e(s); met at the centres 0 and 1/2."""
    with localcontext(prec=80):
        s, centre = Decimal(s), Decimal(centre)
        total = sum((-((j - centre) ** 2) / (2 * s * s)).exp() for j in range(-60, 61))

        off = abs(total / (s * (2 * PI).sqrt()) - 1)

        assert off <= smoothing(s) * (1 + Decimal("1e-30"))
        if centre == 0:
            assert off >= smoothing(s) * (1 - Decimal("1e-30"))


@pytest.mark.parametrize("shares", [2, 3, 5])
@pytest.mark.parametrize("tau", ["0.6", "1", "1.5", "4"])
def test_lemma_3_a_sum_of_shares_is_one_discrete_gaussian(tau, shares):
    """Within the lemma's bound, which is less than that of Kairouz, Liu and Steinke, and not idle."""
    with localcontext(prec=120):
        tau = Decimal(tau)
        one = discrete_gaussian(tau, int(30 * tau))
        total = one
        for _ in range(shares - 1):
            total = convolve(total, one)
        spread = tau * Decimal(shares).sqrt()

        found = closeness(total, discrete_gaussian(spread, int(30 * spread)))

        terms = [smoothing(tau * (Decimal(k) / (k + 1)).sqrt()) for k in range(1, shares)]
        bound = sum(2 * e / (1 - e * e) for e in terms)
        published = 10 * sum((-2 * PI * PI * tau * tau * k / (k + 1)).exp() for k in range(1, shares))
        assert found <= bound <= published
        if shares == 2:
            assert found >= bound / 3
        if tau >= 4:
            assert bound < shares * Decimal(2) ** -224


@pytest.mark.parametrize("s", [0.5, 0.6, 0.8, 2.0])
@pytest.mark.parametrize("r", [0.1, 1.5])
def test_lemma_4_a_discrete_gaussian_is_a_continuous_one_rounded_at_random(r, s):
    """By quadrature over the continuous noise, for every integer within five standard deviations.

    Little continuous noise averages little, and shows that the bound is not idle.
    """
    y = np.arange(-24, 24, 1 / 256)
    density = np.exp(-(y**2) / (2 * r * r)) / 256 / (r * math.sqrt(2 * math.pi))
    integers = np.arange(-60, 61)
    kernel = np.exp(-((integers[:, None] - y[None, :]) ** 2) / (2 * s * s))
    rounded = (kernel / kernel.sum(axis=0) * density).sum(axis=1)
    t2 = r * r + s * s
    ideal = np.exp(-(integers**2) / (2 * t2)) / np.exp(-(integers**2) / (2 * t2)).sum()

    near = np.abs(integers) <= 5 * math.sqrt(t2)
    found = np.abs(np.log(rounded[near] / ideal[near])).max()

    e = float(smoothing(Decimal(s)))
    bound = math.log((1 + e) / (1 - e))
    assert found <= bound + 1e-12
    if r < 0.2:
        assert found >= bound / 100 - 1e-12


def test_the_closeness_that_is_charged_covers_both_lemmas():
    """2^-110 for a coordinate and step, up to the most shares that an event may name."""
    step = DiscreteGaussian(
        clip=1.0,
        scale=1024.0,
        slack=0.0,
        coordinates=1,
        share=1024.0,
        shares=1,
        sampler_distance=0.0,
        sampling_rate=1.0,
        steps=1,
    )
    with localcontext(prec=80):
        e = smoothing(Decimal(2))
        rounding = ((1 + e) / (1 - e)).ln()

        assert rounding + 2**32 * Decimal(2) ** -224 <= Decimal(step.gap)


def rounded(vector, key, quantiser):
    return quantiser.encode(vector, weight=1, rounding_key=key).view(np.int32).astype(np.float64)


@pytest.mark.parametrize("length", [1e-6, 0.01, 1.0, 30.0])
def test_lemma_5_rounding_moves_by_no_more_than_the_root_of_the_coordinates(length):
    """Under the same randomness, for 200 random neighbours of any distance."""
    quantiser = Quantiser(clip=1024.0, bits=20, max_n=4)
    rng = np.random.default_rng(5)
    d = 64
    scale = quantiser.half / quantiser.clip
    worst = 0.0
    for _ in range(200):
        before = rng.normal(size=d).astype(np.float32)
        unit = rng.normal(size=d) * rng.choice([0, 1, 5], size=d)
        after = (before + length * unit / max(np.linalg.norm(unit), 1e-9)).astype(np.float32)
        key = rng.bytes(32)
        moved = np.linalg.norm(rounded(after, key, quantiser) - rounded(before, key, quantiser))
        apart = np.linalg.norm(after.astype(np.float64) - before.astype(np.float64))
        worst = max(worst, moved - scale * apart)

    assert worst <= math.sqrt(d)


def test_lemma_5_is_met():
    """A tiny step carries every coordinate over its threshold: nothing less than the root would do."""
    quantiser = Quantiser(clip=1.0, bits=8, max_n=4)
    key, scale = bytes(32), quantiser.half / quantiser.clip
    threshold = keystream(key, start=0, count=64) / 2.0**32
    below, above = ((threshold + off).astype(np.float32) / np.float32(scale) for off in (-1e-4, 1e-4))

    moved = np.linalg.norm(rounded(above, key, quantiser) - rounded(below, key, quantiser))

    assert moved == 8.0


def subsampled(tau, shares, shift, q, *, steps=1):
    """Both outcomes' probabilities, and the neighbour's: of `steps` steps of one coordinate, enumerated."""
    reach = int(11 * tau * math.sqrt(shares)) + shift
    j = np.arange(-reach, reach + 1)
    one = np.exp(-(j**2) / (2 * tau * tau))
    one /= one.sum()
    noise = one
    for _ in range(shares - 1):
        noise = np.convolve(noise, one)
    without = np.concatenate([noise, np.zeros(shift)])
    with_unit = (1 - q) * without + q * np.concatenate([np.zeros(shift), noise])
    # Beyond float64's exponents there is nothing that a delta of 1e-9 could see.
    p, p0 = with_unit, without
    for _ in range(steps - 1):
        p, p0 = np.outer(p, with_unit).ravel(), np.outer(p0, without).ravel()
    return p, p0


def exact_delta(p, p0, eps):
    """The smallest delta at this epsilon, in both directions."""
    return max(np.maximum(a - math.exp(eps) * b, 0).sum() for a, b in ((p, p0), (p0, p)))


def discrete(tau, shares, q, steps, **changes):
    """A unit moves one coordinate by 32 at most; the event knows 31.5 and its rounding."""
    fields = {
        "clip": 31.5,
        "scale": 1.0,
        "slack": 0.0,
        "coordinates": 1,
        "share": tau,
        "shares": shares,
        "sampler_distance": 0.0,
        "sampling_rate": q,
        "steps": steps,
    }
    return DiscreteGaussian(**{**fields, **changes})


@pytest.mark.parametrize(
    ("tau", "shares", "q", "steps"),
    [
        (48.0, 1, 1.0, 1),
        (24.0, 3, 1.0, 1),
        (40.0, 2, 0.2, 1),
        (12.0, 4, 0.01, 1),
        (4.0, 3, 0.5, 1),
        (16.0, 3, 0.3, 2),
        (20.0, 1, 0.05, 2),
    ],
)
@pytest.mark.parametrize("delta", [1e-3, 1e-7])
def test_the_enumerated_mechanism_costs_no_more_than_is_charged(tau, shares, q, steps, delta):
    """And not much less; with one share fewer, or two thirds of the noise, it costs more."""
    charged = epsilon([discrete(tau, shares, q, steps)], delta)

    exact = subsampled(tau, shares, 32, q, steps=steps)
    assert exact_delta(*exact, charged) <= delta
    assert exact_delta(*exact, 0.8 * charged) > delta
    assert exact_delta(*subsampled(tau * 2 / 3, shares, 32, q, steps=steps), charged) > delta


@pytest.mark.parametrize("shares", [1, 2, 7])
@pytest.mark.parametrize("sensitivity", [200.0, 1e5 + math.pi, 3e7])
@pytest.mark.parametrize("sigma", [0.31, 1.0, 2.4567, 98765.4321])
def test_a_share_gives_the_multiplier_it_was_made_for(sigma, sensitivity, shares):
    """To the last digit, so that cohorts of all sizes are one kind of step."""
    clip = sensitivity - 1
    event = discrete(share_for(sigma, sensitivity=sensitivity, shares=shares), shares, 0.1, 1, clip=clip)

    assert event.noise_multiplier == sigma
    assert math.sqrt(shares) * event.share <= math.sqrt((sigma * sensitivity) ** 2 + 4) * (1 + 1e-10)


def test_discrete_steps_cost_what_gaussian_steps_cost():
    """Their multiplier's, to the last digit, where the gap is too small to see; mixed with others too."""
    step = discrete(100.0, 2, 0.1, 50)
    as_gaussian = Gaussian(noise_multiplier=step.noise_multiplier, sampling_rate=0.1, steps=50)
    other = Gaussian(noise_multiplier=2.0, sampling_rate=0.05, steps=30)

    assert step.gap < 1e-30
    assert epsilon([step], 1e-6) == pytest.approx(epsilon([as_gaussian], 1e-6), rel=1e-9)
    assert epsilon([step, other], 1e-6) == pytest.approx(epsilon([as_gaussian, other], 1e-6), rel=1e-9)
    assert epsilon([step], 1e-6) >= epsilon([as_gaussian], 1e-6)


def test_a_gap_is_paid_from_delta():
    """(1 + e^epsilon) times the gap, at an epsilon no lower than the answer; gaps of two runs add up."""
    delta = 1e-6
    far = discrete(100.0, 2, 0.1, 50, sampler_distance=1e-10, coordinates=1)
    gaussian = Gaussian(noise_multiplier=far.noise_multiplier, sampling_rate=0.1, steps=50)
    cost = epsilon([far], delta)

    assert far.gap == pytest.approx(50 * 2 * 1e-10)
    assert epsilon([gaussian], delta) < cost < epsilon([gaussian], delta) + 1
    assert cost >= epsilon([gaussian], delta - (1 + math.exp(cost)) * far.gap)
    assert far.times(2).gap == 2 * far.gap
    assert epsilon([far] * 2, delta) == epsilon([far.times(2)], delta)


def test_a_gap_that_eats_delta_leaves_no_epsilon():
    """Rather than one that is not proven."""
    assert epsilon([discrete(100.0, 2, 0.1, 50, sampler_distance=1e-8)], 1e-6) == math.inf
    assert epsilon([discrete(100.0, 2, 0.1, 50, sampler_distance=1e-4)], 1e-6) == math.inf


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip": 0.0},
        {"clip": math.nan},
        {"scale": 3.0},
        {"scale": -2.0},
        {"scale": math.inf},
        {"scale": 0.0},
        {"slack": -1e-9},
        {"slack": math.inf},
        {"coordinates": 0},
        {"share": 3.99},
        {"share": math.nan},
        {"share": math.inf},
        {"shares": 0},
        {"shares": 2**33},
        {"sampler_distance": -1e-30},
        {"sampler_distance": math.nan},
        {"sampling_rate": 0.0},
        {"steps": -1},
        {"share": 4.0, "clip": 1e12},
    ],
    ids=str,
)
def test_an_event_without_meaning_is_refused(wrong):
    """It would be composed into a figure all the same."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(discrete(100.0, 2, 0.1, 50), **wrong)
