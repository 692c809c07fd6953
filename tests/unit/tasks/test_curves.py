"""Curves against scikit-learn, thin enough to draw; precision among the highest scores."""

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve, roc_curve

from lepton_fl.tasks.curves import POINTS, curve, top


def scored(records, *, share=0.3, digits=None):
    rng = np.random.default_rng(records)
    y_N = (rng.random(records) < share).astype(float)
    score_N = 1 / (1 + np.exp(-(2 * y_N + rng.normal(size=records))))
    return y_N, score_N if digits is None else score_N.round(digits)


@pytest.mark.parametrize("digits", [None, 1], ids=["distinct", "tied"])
def test_a_short_curve_is_scikit_learns(digits):
    """Every threshold of roc_curve and precision_recall_curve, in one."""
    y_N, score_N = scored(150, digits=digits)
    fpr_T, recall_T, _ = roc_curve(y_N, score_N, drop_intermediate=False)
    precision_T, _, _ = precision_recall_curve(y_N, score_N)

    found = curve(y_N, score_N)

    assert found.fpr == pytest.approx(fpr_T[1:], abs=1e-5)
    assert found.recall == pytest.approx(recall_T[1:], abs=1e-5)
    assert found.precision == pytest.approx(precision_T[:-1][::-1], abs=1e-5)


def test_a_long_curve_is_thinned_where_nobody_sees_it():
    """About 200 of 20,000 points; drawn by steps, the recall is within 2 % at every rate from 0.1 % up."""
    y_N, score_N = scored(20_000, share=0.05)
    fpr_T, recall_T, _ = roc_curve(y_N, score_N, drop_intermediate=False)

    found = curve(y_N, score_N)

    assert 100 < len(found.fpr) <= POINTS + 1
    for fpr in np.geomspace(1e-3, 1, 50):
        step = max(r for f, r in zip(found.fpr, found.recall, strict=True) if f <= fpr)
        assert step == pytest.approx(recall_T[fpr_T <= fpr].max(), abs=0.02)
    assert found.fpr[-1] == found.recall[-1] == 1


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_has_no_curve(label):
    """There is nothing to rank."""
    assert curve(np.full(5, label), np.linspace(0, 1, 5)) is None


def test_the_top_counts_positives():
    """Of the highest scores; sizes that are not less than all records are left out."""
    y_N = np.r_[1.0, 0.0, 1.0, np.zeros(7)]

    found = top(y_N, np.linspace(1, 0, 10), (1, 3, 10))

    assert [(t.records, t.positives) for t in found] == [(1, 1), (3, 2)]
    assert found[1].precision.mean == pytest.approx(2 / 3)


def test_tied_records_come_in_random_order():
    """Two of four tied records, one of them positive: half a positive is expected."""
    y_N = np.r_[0.0, 0.0, 0.0, 1.0, 0.0]

    assert top(y_N, np.r_[0.5, 0.5, 0.5, 0.5, 0.1], (2,))[0].positives == 0.5


def test_no_records_have_no_top():
    """And no error."""
    assert top(np.zeros(0), np.zeros(0)) == ()
