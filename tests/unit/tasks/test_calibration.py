"""Reliability figures against scikit-learn, and the two numbers that mend a scale."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss

from lepton_fl.tasks.calibration import Platt, calibration


def logistic(odds):
    return 1 / (1 + np.exp(-odds))


def drawn(records, *, seed=0, shift=0.0):
    """Scores that are the true probabilities, and labels drawn from them at shifted log odds."""
    rng = np.random.default_rng(seed)
    odds_N = rng.normal(-1, 1.5, records)
    y_N = (rng.random(records) < logistic(odds_N + shift)).astype(float)
    return y_N, logistic(odds_N)


def test_the_figures_are_scikit_learns():
    """Log-loss and Brier score; bins hold all records once, in order of score."""
    y_N, score_N = drawn(1003)

    found = calibration(y_N, score_N)

    assert found.log_loss == pytest.approx(log_loss(y_N, score_N))
    assert found.brier == pytest.approx(brier_score_loss(y_N, score_N))
    assert [b.records for b in found.bins] == [101] * 3 + [100] * 7
    assert sum(b.positives for b in found.bins) == y_N.sum()
    assert [b.score for b in found.bins] == sorted(b.score for b in found.bins)


def test_the_expected_error_is_the_mean_gap():
    """Every record scored 0.9, half of them positive: off by 0.4."""
    y_N = np.tile([0.0, 1.0], 50)

    assert calibration(y_N, np.full(100, 0.9)).expected_error == pytest.approx(0.4)


def test_the_expected_error_counts_each_record_once():
    """25 records make five bins of three and five of two."""
    y_N, score_N = drawn(25)
    parts = np.array_split(np.argsort(score_N), 10)
    expected = sum(abs(score_N[part].sum() - y_N[part].sum()) for part in parts) / 25

    assert calibration(y_N, score_N).expected_error == pytest.approx(expected)


def test_certain_and_wrong_is_dear_but_finite():
    """A score of exactly 0 for a positive costs as much as scikit-learn says."""
    y_N, score_N = np.r_[1.0, 0.0], np.r_[0.0, 0.0]

    assert calibration(y_N, score_N).log_loss == pytest.approx(log_loss(y_N, score_N))


def test_no_records_are_no_calibration():
    """Rather than a mean of nothing."""
    with pytest.raises(ValueError, match="no records"):
        calibration(np.zeros(0), np.zeros(0))


def test_scaling_finds_the_shift_it_is_to_mend():
    """Labels at log odds shifted by two: slope one, intercept two."""
    found = Platt.fit(*drawn(20_000, shift=2.0))

    assert found.slope == pytest.approx(1, abs=0.05)
    assert found.intercept == pytest.approx(2, abs=0.1)


def test_scaling_lowers_log_loss_on_other_records():
    """And leaves their order as it was."""
    platt = Platt.fit(*drawn(2000, shift=-2.0))
    y_N, score_N = drawn(2000, seed=1, shift=-2.0)

    assert calibration(y_N, platt(score_N)).log_loss < calibration(y_N, score_N).log_loss - 0.1
    assert np.array_equal(np.argsort(platt(score_N)), np.argsort(score_N))


def test_separated_classes_have_a_finite_scale():
    """Platt's softened labels: never quite 0 or 1, whatever the scores."""
    y_N, score_N = np.repeat([0.0, 1.0], [60, 20]), np.repeat([0.0, 1.0], [60, 20])

    scaled_N = Platt.fit(y_N, score_N)(score_N)

    assert scaled_N[-1] == pytest.approx(21 / 22, abs=0.01)
    assert scaled_N[0] == pytest.approx(1 / 62, abs=0.01)


def test_scores_that_rank_backwards_are_not_turned_round():
    """The base rate for all: a site must not sell a broken model as its opposite."""
    y_N, score_N = drawn(500)

    scaled_N = Platt.fit(y_N, 1 - score_N)(score_N)

    assert np.ptp(scaled_N) == 0
    assert scaled_N[0] == pytest.approx(y_N.mean(), abs=0.01)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_has_no_scale(label):
    """Two numbers cannot be fitted to it."""
    assert Platt.fit(np.full(9, label), np.linspace(0, 1, 9)) is None
