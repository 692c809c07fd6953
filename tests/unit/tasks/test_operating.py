"""Thresholds that a site sets on its own records, and the counts they lead to."""

import math

import numpy as np
import pytest

from lepton_fl.results import Confusion
from lepton_fl.study import OperatingPoint
from lepton_fl.tasks.operating import confusion, threshold


def counts(found):
    return found.true_positives, found.false_positives, found.false_negatives, found.true_negatives


@pytest.mark.parametrize("fpr", [0.01, 0.1, 0.29])
@pytest.mark.parametrize("digits", [8, 1], ids=["distinct", "tied"])
def test_the_threshold_is_the_lowest_that_keeps_the_rate(fpr, digits):
    """One negative more, with all that share its score, would be too many."""
    rng = np.random.default_rng(1)
    y_N, score_N = (rng.random(400) < 0.3).astype(float), rng.random(400).round(digits)

    above = threshold(OperatingPoint(fpr=fpr), y_N, score_N)

    negative_N = score_N[y_N == 0]
    assert (negative_N > above).mean() <= fpr < (negative_N >= above).mean()


def test_too_few_negatives_set_no_threshold():
    """At 1 % of 99 negatives none may be called positive."""
    point = OperatingPoint(fpr=0.01)

    assert threshold(point, np.zeros(99), np.linspace(0, 1, 99)) is None
    assert threshold(point, np.zeros(100), np.linspace(0, 1, 100)) == pytest.approx(98 / 99)


def test_a_rate_that_allows_every_negative_calls_all():
    """No score is too low."""
    point = OperatingPoint(fpr=1 - 1e-12)

    assert threshold(point, np.r_[0.0, 1.0], np.r_[0.4, 0.2]) == -math.inf


@pytest.mark.parametrize(("cost_fn", "cost_fp"), [(250.0, 5.0), (1.0, 1.0), (1.0, 1000.0), (1000.0, 1.0)])
@pytest.mark.parametrize("digits", [8, 1], ids=["distinct", "tied"])
def test_the_threshold_costs_least(cost_fn, cost_fp, digits):
    """Of all there are, tried one by one."""
    rng = np.random.default_rng(2)
    y_N = (rng.random(300) < 0.2).astype(float)
    score_N = (y_N + rng.normal(size=300)).round(digits)

    above = threshold(OperatingPoint(cost_fn=cost_fn, cost_fp=cost_fp), y_N, score_N)

    tried = [confusion(y_N, score_N, t).cost(cost_fn, cost_fp) for t in [-math.inf, *score_N]]
    assert confusion(y_N, score_N, above).cost(cost_fn, cost_fp) == pytest.approx(min(tried))


def test_one_class_has_no_least_cost():
    """Without a positive, silence would seem free."""
    point = OperatingPoint(cost_fn=250, cost_fp=5)

    assert threshold(point, np.zeros(50), np.linspace(0, 1, 50)) is None


def test_alerts_a_day_set_no_threshold():
    """Nothing says how many records a day has."""
    assert threshold(OperatingPoint(alerts_per_day=9), np.r_[0.0, 1.0], np.r_[0.1, 0.9]) is None


def test_confusion_counts_what_is_above():
    """Above, and not at: the threshold is the score of a negative that was one too many."""
    y_N, score_N = np.r_[1.0, 1.0, 0.0, 0.0, 0.0], np.r_[0.9, 0.5, 0.7, 0.5, 0.1]

    found = confusion(y_N, score_N, 0.5)

    assert counts(found) == (1, 1, 1, 2)
    assert (found.recall.mean, found.fpr.mean, found.precision.mean) == (0.5, pytest.approx(1 / 3), 0.5)
    assert found.cost(250, 5) == 51


def test_sites_are_added_up():
    """Counts, and not rates."""
    part = Confusion(true_positives=1, false_positives=2, false_negatives=3, true_negatives=4)

    assert counts(Confusion.total([part, part])) == (2, 4, 6, 8)
