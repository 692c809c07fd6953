"""Ranking metrics: against scikit-learn, and what their intervals may depend on."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from lepton_fl.tasks import metrics
from lepton_fl.tasks.metrics import FPRS, Bootstrap, _weighted, evaluate, figures

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

    assert _weighted(metric, y_N, score_N, weight_N[None])[0, 0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@given(rows=RECORDS)
def test_a_weight_is_so_many_records(metric, rows):
    """Weight 3, or the same record three times; weight 0, or no such record."""
    y_N, score_N, weight_N = rows
    weight_N[0] -= 1
    times_N = weight_N.astype(int)
    repeated = evaluate(metric, np.repeat(y_N, times_N), np.repeat(score_N, times_N))

    found = _weighted(metric, y_N, score_N, weight_N[None])[0, 0]
    assert found == pytest.approx(repeated, abs=1e-12, nan_ok=True)


@given(rows=st.lists(RECORD, min_size=30, max_size=60), times=st.sampled_from([1, 40]))
def test_recall_at_a_false_positive_rate_is_scikit_learns(rows, times):
    """The highest point of roc_curve that is not to the right of the rate, all thresholds kept."""
    y_N, score_N, weight_N = np.array([(0.0, 0.3, 1), (1.0, 0.3, 1), *rows]).T
    y_N, score_N = np.tile(y_N, times), np.tile(score_N, times)
    weight_N = np.tile(weight_N, times)
    fpr_T, recall_T, _ = roc_curve(y_N, score_N, sample_weight=weight_N, drop_intermediate=False)
    negatives = weight_N[y_N == 0].sum()
    expected = [recall_T[fpr_T <= f + 1e-12].max() if negatives * f >= 1 else math.nan for f in FPRS]

    found = _weighted("auc", y_N, score_N, weight_N[None])[1:, 0]

    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize(("negatives", "defined"), [(99, False), (100, True)])
def test_recall_is_not_defined_on_fewer_negatives_than_one_alarm_takes(negatives, defined):
    """At 1 % of 99 negatives no alarm at all would be allowed."""
    y_N = np.r_[1.0, np.zeros(negatives)]
    score_N = np.r_[0.5, 0.9, np.zeros(negatives - 1)]

    found = figures("auc", y_N, score_N)[1 + FPRS.index(0.01)]

    assert found == 1 if defined else math.isnan(found)


def test_tied_records_are_called_alike():
    """A positive that shares its score with one negative too many is not found."""
    y_N = np.r_[1.0, 1.0, np.zeros(100)]
    score_N = np.r_[0.9, 0.5, 0.5, 0.5, np.zeros(98)]

    assert figures("auc", y_N, score_N)[1 + FPRS.index(0.01)] == 0.5


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("y", [[], [0.0, 0.0], [1.0, 1.0]], ids=["none", "negative", "positive"])
def test_one_class_has_no_metric(metric, y):
    """Not 0.5 and not 1: there is nothing to rank."""
    assert math.isnan(evaluate(metric, np.array(y), np.linspace(0, 1, len(y))))


def bootstrap(metric, seeds, *, seed=0, resamples=200, **arms):
    """Of one arm called `ours`, or of several."""
    return Bootstrap(metric, {"ours": seeds, **arms}, seed=seed, resamples=resamples)


@pytest.mark.parametrize("metric", METRICS)
def test_the_interval_covers_the_point(metric):
    """Each site's, the mean's and that of all records, within bounds of the metric."""
    rng = np.random.default_rng(1)
    per_site, mean, all_records = bootstrap(metric, [arm(rng), arm(rng)]).judge("ours")

    for found in [*per_site.values(), mean, all_records]:
        assert 0 <= found.low < found.mean < found.high <= 1
    assert mean.mean == pytest.approx(np.mean([found.mean for found in per_site.values()]))


def test_all_records_are_judged_as_one_list():
    """Scores of all sites in one ranking, which a site's own offset spoils."""
    rng = np.random.default_rng(1)
    scored = arm(rng)
    scored["south"] = (scored["south"][0], scored["south"][1] + 5)
    y_N, score_N = (np.concatenate(columns) for columns in zip(*scored.values(), strict=True))

    _, mean, all_records = bootstrap("auc", [scored]).judge("ours")

    assert all_records.mean == pytest.approx(roc_auc_score(y_N, score_N))
    assert all_records.high < mean.mean


def test_recall_has_an_interval_like_the_metric():
    """By site, over the sites and over all records; the point is that of the records as they are."""
    rng = np.random.default_rng(2)
    scored = arm(rng, records=400, skill=3.0)

    per_site, mean, all_records = bootstrap("auprc", [scored]).judge("ours", 0.1)

    assert per_site["north"].mean == figures("auprc", *scored["north"])[1 + FPRS.index(0.1)]
    for found in [*per_site.values(), mean, all_records]:
        assert 0 < found.low <= found.mean <= found.high <= 1


@pytest.mark.parametrize("metric", METRICS)
def test_a_resample_draws_records_within_each_class(metric, monkeypatch):
    """Kinds of record lose nothing: the spread is that of drawing single records with numpy."""
    rng = np.random.default_rng(5)
    y_N, score_N = arm(rng, sites=["north"], records=300)["north"]
    plain = []
    for _ in range(2000):
        index = np.concatenate([rng.choice(np.flatnonzero(y_N == c), int((y_N == c).sum())) for c in (0, 1)])
        plain.append(ORACLES[metric](y_N[index], score_N[index]))

    _, _, found = bootstrap(metric, [{"north": (y_N, score_N)}], resamples=2000).judge("ours")

    low, high = np.percentile(plain, [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_an_interval_of_the_auc_has_the_known_width():
    """Two-sided, against the standard error of Hanley and McNeil 1982."""
    rng = np.random.default_rng(2)
    scored = arm(rng, sites=["north"], records=400)["north"]
    _, found, _ = bootstrap("auc", [{"north": scored}], resamples=1000).judge("ours")

    auc, positives = found.mean, scored[0].sum()
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (q1 - auc**2) + (399 - positives) * (q2 - auc**2)
    error = math.sqrt(variance / (positives * (400 - positives)))
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_seeds_judged_on_the_same_records_share_their_luck():
    """Six seeds whose models agree are as sure as one of them, and no surer."""
    scored = arm(np.random.default_rng(2), sites=["north"], records=400)
    _, one, _ = bootstrap("auc", [scored], resamples=1000).judge("ours")

    _, six, _ = Bootstrap("auc", {"ours": [scored] * 6}, seed=0, same_records=True).judge("ours")

    assert six.mean == one.mean
    assert six.high - six.low == pytest.approx(one.high - one.low, rel=0.1)


def test_other_records_are_not_taken_for_the_same():
    """Their labels tell, where they differ."""
    rng = np.random.default_rng(2)

    with pytest.raises(ValueError, match="different records"):
        Bootstrap("auc", {"ours": [arm(rng), arm(rng)]}, seed=0, same_records=True)


def test_the_same_seed_gives_the_same_interval():
    """And another gives another."""
    seeds = [arm(np.random.default_rng(3))]

    one, same, other = (bootstrap("auc", seeds, seed=seed).judge("ours") for seed in (7, 7, 8))

    assert one == same
    assert one[1].low != other[1].low


def test_large_tables_are_resampled_in_slices(monkeypatch):
    """For memory: the point is the same, and the interval about it alike."""
    seeds = [arm(np.random.default_rng(3))]
    _, whole, _ = bootstrap("auc", seeds).judge("ours")
    monkeypatch.setattr(metrics, "_AT_ONCE", 120 * 7)

    _, sliced, _ = bootstrap("auc", seeds).judge("ours")

    assert sliced.mean == whole.mean
    assert sliced.low == pytest.approx(whole.low, abs=0.05)


def test_many_records_get_fewer_resamples(monkeypatch):
    """And the number says how many there were; never more than asked."""
    seeds = [arm(np.random.default_rng(3))]
    assert bootstrap("auc", seeds, resamples=300).resamples == 300
    monkeypatch.setattr(metrics, "_COUNTS", 1)

    assert bootstrap("auc", seeds, resamples=300).resamples == metrics.LEAST_RESAMPLES
    assert bootstrap("auc", seeds, resamples=20).resamples == 20


def test_a_site_of_one_class_is_left_out_of_the_mean():
    """It has no metric, and does not count as a zero or a half."""
    rng = np.random.default_rng(4)
    sound = arm(rng, sites=["north"])
    lame = {"south": (np.zeros(30), rng.normal(size=30))}

    per_site, mean, _ = bootstrap("auc", [{**sound, **lame}]).judge("ours")

    assert per_site["south"].mean is per_site["south"].low is per_site["south"].high is None
    assert mean.mean == per_site["north"].mean


def test_without_any_metric_there_is_no_interval():
    """None, and no warning of an empty mean."""
    lame = {"south": (np.zeros(30), np.linspace(0, 1, 30))}

    per_site, mean, all_records = bootstrap("auc", [lame]).judge("ours")

    assert per_site["south"].mean is mean.mean is all_records.mean is None


def test_an_arm_gains_nothing_on_itself():
    """Paired: the same seeds and records on both sides, in every resample."""
    arms = [arm(np.random.default_rng(6)), arm(np.random.default_rng(7))]

    _, found = bootstrap("auprc", arms, theirs=arms).gain("ours", dict.fromkeys(arms[0], "theirs"))

    assert found.mean == found.low == found.high == 0


def test_a_paired_gain_is_known_better_than_its_arms():
    """The luck of the held-out records is shared by both arms and cancels."""
    rng = np.random.default_rng(8)
    ours = arm(rng)
    theirs = {site: (y, score + rng.normal(scale=0.2, size=len(y))) for site, (y, score) in ours.items()}
    both = bootstrap("auc", [ours], theirs=[theirs])

    _, found = both.gain("ours", dict.fromkeys(ours, "theirs"))

    _, alone, _ = both.judge("ours")
    assert found.high - found.low < (alone.high - alone.low) / 2
    assert found.low <= found.mean <= found.high


def test_a_gain_changes_sign_with_its_sides():
    """Ours minus theirs is not theirs minus ours."""
    rng = np.random.default_rng(9)
    good = arm(rng, skill=2.0)
    poor = {site: (y, rng.normal(size=len(y))) for site, (y, _) in good.items()}
    both = bootstrap("auc", [good], theirs=[poor])

    _, up = both.gain("ours", dict.fromkeys(good, "theirs"))
    _, down = both.gain("theirs", dict.fromkeys(good, "ours"))

    assert up.low > 0
    assert (down.mean, down.low, down.high) == pytest.approx((-up.mean, -up.high, -up.low))


def test_arms_of_fewer_seeds_are_judged_on_those():
    """An interrupt leaves the arms with unequal numbers of seeds; a gain takes those that both have."""
    first, second = arm(np.random.default_rng(6)), arm(np.random.default_rng(7), skill=3.0)
    both = bootstrap("auc", [first, second], theirs=[first])

    assert both.judge("theirs")[1].mean < both.judge("ours")[1].mean
    assert both.gain("ours", dict.fromkeys(first, "theirs"))[1].mean == 0
