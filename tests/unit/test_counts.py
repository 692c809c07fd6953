"""Counts as integers in a sum: exactly what was added up, with room for the noise, or refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fl.secagg.errors import PolicyViolation
from lepton_fl.secure_rounds import (
    COUNT_STEPS,
    count_noise,
    count_quantiser,
    decode_counts,
    encode_counts,
)

EXACT = {"release": "exact"}
NOISY = {"release": "dp", "share": 0.3}


@pytest.fixture
def noisy(make_study):
    return make_study(evaluation=NOISY)


@pytest.fixture
def exact(make_study):
    return make_study(evaluation=EXACT)


def summed(histograms, quantiser):
    """The counts as a server decodes them."""
    words = [encode_counts(counts, quantiser).astype(np.uint32) for counts in histograms]
    total_L = np.sum(words, axis=0, dtype=np.uint32)
    n = len(histograms)
    return decode_counts(quantiser.decode(total_L, n=n, total_weight=n), quantiser, n)


@pytest.mark.parametrize("evaluation", [EXACT, NOISY])
@pytest.mark.parametrize("sites", [3, 4, 10, 128])
def test_a_sum_of_counts_is_exact(make_study, evaluation, sites):
    """Of few records and of as many as there is room for, at every size of cohort."""
    quantiser = count_quantiser(make_study(evaluation=evaluation), sites)
    steps = round(quantiser.half / quantiser.clip)

    @settings(max_examples=25)
    @given(st.lists(st.integers(0, quantiser.half // 2 // steps), min_size=4, max_size=4))
    def check(counts):
        histograms = [np.roll(counts, shift).reshape(2, 2) for shift in range(sites)]

        assert (summed(histograms, quantiser) == np.sum(histograms, axis=0)).all()

    check()


def test_exact_counts_are_integers_themselves(exact):
    """And noisy ones have steps in between, for noise that is fine."""
    quantiser = count_quantiser(exact, 4)

    assert count_noise(exact, 4) == 0.0
    assert encode_counts(np.array([[0, 1], [2, 7]]), quantiser).tolist() == [0, 1, 2, 7]


def test_noisy_counts_have_steps_in_between(noisy):
    quantiser = count_quantiser(noisy, 4)

    assert encode_counts(np.array([[0, 1], [2, 7]]), quantiser).tolist() == [
        count * COUNT_STEPS for count in (0, 1, 2, 7)
    ]


def test_a_count_beyond_the_room_is_cut(noisy):
    """It may not reach into the part of the range that is for the noise."""
    quantiser = count_quantiser(noisy, 128)
    most = quantiser.half // 2 // COUNT_STEPS

    integers_L = encode_counts(np.array([[most, most + 1], [10**9, 0]]), quantiser)

    assert integers_L.tolist() == [most * COUNT_STEPS] * 3 + [0]
    assert most * COUNT_STEPS + 16 * count_noise(noisy, 128) < quantiser.half


def test_noise_without_room_is_refused(make_study):
    """It would wrap round for some, and tell who has many records."""
    study = make_study(evaluation={"release": "dp", "share": 0.0005}, privacy={"epsilon": 0.5})

    with pytest.raises(PolicyViolation, match=r"has no room beside them; raise evaluation\.share"):
        count_quantiser(study, 4000)


def test_shares_of_the_noise_are_smaller_than_the_whole(make_study, noisy):
    """By the root of the honest survivors, three of four; each is fine enough to be discrete."""
    shared = make_study(evaluation=NOISY, privacy={"noise": "shared"})

    assert count_noise(noisy, 4) / count_noise(shared, 4) == pytest.approx(math.sqrt(3), rel=1e-9)
    assert count_noise(shared, 4) >= 4
    # Of a drawn graph a server may have a part opened: its sites have the whole noise among them.
    assert count_noise(shared, 129) > 1.9 * count_noise(shared, 128)
