"""Ranking metrics: against scikit-learn, and what their intervals may depend on."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from lepton_fl.tasks.metrics import _weighted, evaluate, gain, intervals

ORACLES = {"auc": roc_auc_score, "auprc": average_precision_score}
METRICS = sorted(ORACLES)

# Few distinct scores: most records are tied with another.
RECORD = st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.integers(1, 4))
RECORDS = (
    st.lists(RECORD, min_size=2, max_size=40)
    .filter(lambda rows: len({y for y, _, _ in rows}) == 2)
    .map(lambda rows: np.array(rows).T)
)


def arm(rng, *, sites=("north", "south"), records=120, skill=1.0):
    """Scored records of each site."""
    found = {}
    for site in sites:
        y_N = (rng.random(records) < 0.3).astype(float)
        found[site] = (y_N, skill * y_N + rng.normal(size=records))
    return found


@pytest.mark.parametrize("metric", METRICS)
@given(rows=RECORDS)
def test_the_metric_is_scikit_learns(metric, rows):
    """With ties, which a coarse score has many of."""
    y_N, score_N, _ = rows

    assert evaluate(metric, y_N, score_N) == pytest.approx(ORACLES[metric](y_N, score_N), abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@given(rows=RECORDS)
def test_the_weighted_metric_is_scikit_learns(metric, rows):
    """A bootstrap resample is a weight for each record."""
    y_N, score_N, weight_N = rows
    expected = ORACLES[metric](y_N, score_N, sample_weight=weight_N)

    assert _weighted(metric, y_N, score_N, weight_N[None])[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@given(rows=RECORDS)
def test_a_weight_is_so_many_records(metric, rows):
    """Weight 3, or the same record three times; weight 0, or no such record."""
    y_N, score_N, weight_N = rows
    weight_N[0] -= 1
    times_N = weight_N.astype(int)
    repeated = evaluate(metric, np.repeat(y_N, times_N), np.repeat(score_N, times_N))

    found = _weighted(metric, y_N, score_N, weight_N[None])[0]
    assert found == pytest.approx(repeated, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("y", [[], [0.0, 0.0], [1.0, 1.0]], ids=["none", "negative", "positive"])
def test_one_class_has_no_metric(metric, y):
    """Not 0.5 and not 1: there is nothing to rank."""
    assert math.isnan(evaluate(metric, np.array(y), np.linspace(0, 1, len(y))))


@pytest.mark.parametrize("metric", METRICS)
def test_the_interval_covers_the_point(metric):
    """Each site's, and the mean's, within bounds of the metric."""
    rng = np.random.default_rng(1)
    per_site, mean = intervals(metric, [arm(rng), arm(rng)], rng=rng, resamples=200)

    for found in [*per_site.values(), mean]:
        assert 0 <= found.low < found.mean < found.high <= 1
    assert mean.mean == pytest.approx(np.mean([found.mean for found in per_site.values()]))


def test_an_interval_of_the_auc_has_the_known_width():
    """Two-sided, against the standard error of Hanley and McNeil 1982."""
    rng = np.random.default_rng(2)
    scored = arm(rng, sites=["north"], records=400)["north"]
    _, found = intervals("auc", [{"north": scored}], rng=rng, resamples=1000)

    auc, positives = found.mean, scored[0].sum()
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (q1 - auc**2) + (399 - positives) * (q2 - auc**2)
    error = math.sqrt(variance / (positives * (400 - positives)))
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_the_same_generator_gives_the_same_interval():
    """And another gives another."""
    seeds = [arm(np.random.default_rng(3))]

    one, same, other = (
        intervals("auc", seeds, rng=np.random.default_rng(seed), resamples=100) for seed in (7, 7, 8)
    )

    assert one == same
    assert one[1].low != other[1].low


def test_large_tables_are_resampled_in_slices(monkeypatch):
    """For memory: the point is the same, and the interval about it alike."""
    seeds = [arm(np.random.default_rng(3))]
    whole = intervals("auc", seeds, rng=np.random.default_rng(7), resamples=50)
    monkeypatch.setattr("lepton_fl.tasks.metrics._CELLS", 120 * 7)

    sliced = intervals("auc", seeds, rng=np.random.default_rng(7), resamples=50)

    assert sliced[1].mean == whole[1].mean
    assert sliced[1].low == pytest.approx(whole[1].low, abs=0.05)


def test_a_site_of_one_class_is_left_out_of_the_mean():
    """It has no metric, and does not count as a zero or a half."""
    rng = np.random.default_rng(4)
    sound = arm(rng, sites=["north"])
    lame = {"south": (np.zeros(30), rng.normal(size=30))}

    per_site, mean = intervals("auc", [{**sound, **lame}], rng=rng, resamples=100)

    assert per_site["south"].mean is per_site["south"].low is per_site["south"].high is None
    assert mean.mean == per_site["north"].mean


def test_without_any_metric_there_is_no_interval():
    """None, and no warning of an empty mean."""
    lame = {"south": (np.zeros(30), np.linspace(0, 1, 30))}

    per_site, mean = intervals("auc", [lame], rng=np.random.default_rng(5), resamples=10)

    assert per_site["south"].mean is mean.mean is None


def test_an_arm_gains_nothing_on_itself():
    """Paired: the same seeds and records on both sides, in every resample."""
    arms = [arm(np.random.default_rng(6)), arm(np.random.default_rng(7))]

    _, found = gain("auprc", arms, arms, seed=1, resamples=100)

    assert found.mean == found.low == found.high == 0


def test_a_paired_gain_is_known_better_than_its_arms():
    """The luck of the held-out records is shared by both arms and cancels."""
    rng = np.random.default_rng(8)
    ours = arm(rng)
    theirs = {site: (y, score + rng.normal(scale=0.2, size=len(y))) for site, (y, score) in ours.items()}

    _, found = gain("auc", [ours], [theirs], seed=1, resamples=300)

    _, alone = intervals("auc", [ours], rng=np.random.default_rng(1), resamples=300)
    assert found.high - found.low < (alone.high - alone.low) / 2
    assert found.low <= found.mean <= found.high


def test_a_gain_changes_sign_with_its_sides():
    """Ours minus theirs is not theirs minus ours."""
    rng = np.random.default_rng(9)
    good = arm(rng, skill=2.0)
    poor = {site: (y, rng.normal(size=len(y))) for site, (y, _) in good.items()}

    _, up = gain("auc", [good], [poor], seed=1)
    _, down = gain("auc", [poor], [good], seed=1)

    assert up.low > 0
    assert (down.mean, down.low, down.high) == pytest.approx((-up.mean, -up.high, -up.low))
