"""Logistic regression on ULB's payments: the published figure, through our encoding, and federated."""

import pytest

pytestmark = [pytest.mark.reference, pytest.mark.slow]

TEST_ERROR = 0.04
"""Standard error of an AUPRC on 75 frauds, by bootstrap."""


def auprc(ulb, label, seeds):
    score_SN = [ulb.measured(label, seed) for seed in seeds]
    return ulb.judged(score_SN)["auprc"].mean


def test_the_cutoff_gives_the_published_cut(ulb):
    """227,845 payments before it and 56,962 from it on, with 75 frauds."""
    train, test = ulb.tables()

    assert (len(train), len(test), test.positives) == (227_845, 56_962, 75)


def test_control_gives_the_published_figures(ulb):
    """scikit-learn on z-scores, with no part of ours but the reading and the metric."""
    found = ulb.judged([ulb.measured("scikit-learn, z-scores, as published", 0)])

    assert found["auprc"].mean == pytest.approx(0.750, abs=5e-4)
    assert found["auc"].mean == pytest.approx(0.980, abs=5e-4)


@pytest.mark.parametrize(
    "label",
    [
        "scikit-learn, encoded by public ranges",
        "six banks, no privacy",
        "six banks, epsilon 1, shared noise",
    ],
)
def test_ours_is_not_below_the_published(ulb, label):
    """By no more than two standard errors of the test itself."""
    seeds = ulb.CASES[label][1][:2]

    assert auprc(ulb, label, seeds) >= ulb.PUBLISHED["auprc"] - 2 * TEST_ERROR
