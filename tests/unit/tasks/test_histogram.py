"""Figures from counts by bin: within their bounds whatever the bins hide; told from noise, or not told."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from lepton_fl.config import parse
from lepton_fl.study import EXACT_BINS, Study
from lepton_fl.tasks import histogram as histograms
from lepton_fl.tasks.histogram import bin_of, bounds, histogram, one_of_each, pooled
from lepton_fl.tasks.metrics import FPRS, figures

ORACLES = {"auc": roc_auc_score, "auprc": average_precision_score}
METRICS = sorted(ORACLES)
ROUNDING = 1e-9

SCORE = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.001, 0.5, 0.5001, 0.75, 1.0]))
RECORDS = (
    st.lists(st.tuples(st.sampled_from([0.0, 1.0]), SCORE, st.integers(1, 30)), min_size=2, max_size=60)
    .map(lambda rows: np.repeat(np.array(rows)[:, :2], [n for _, _, n in rows], axis=0).T)
    .filter(lambda records: len(set(records[0])) == 2)
)


def make(**tables):
    raw = {
        "study": {"name": "heart"},
        "task": {"kind": "binary", "target": "ill", **tables.get("task", {})},
        "privacy": {"epsilon": 3.0, "delta": 1e-5, **tables.get("privacy", {})},
        "train": {"rounds": 20, "sample_rate": 0.1, "lr": 0.1, "expected_batch": 20.0},
        "features": {"columns": {"age": {"type": "float", "range": [20, 90]}}},
        "evaluation": tables.get("evaluation", {"release": "exact"}),
    }
    return parse(Study, raw, file="study.toml")


EXACT = make()
NOISY = make(evaluation={"release": "dp", "share": 0.3})
NOISY_AP = make(evaluation={"release": "dp", "share": 0.3}, task={"metric": "auprc"})


@pytest.mark.parametrize("study", [EXACT, NOISY, NOISY_AP])
@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=40)
@given(records=RECORDS)
def test_scikit_learns_figure_is_within_the_bounds(study, metric, records):
    """Few bins hide much, and the bounds say how much."""
    y_N, score_N = records
    counts = histogram(y_N, score_N, study)

    value, low, high = bounds(metric, counts[1], counts[0])[:, 0]

    assert low - ROUNDING <= ORACLES[metric](y_N, score_N) <= high + ROUNDING
    assert low - ROUNDING <= value <= high + ROUNDING


@given(records=RECORDS)
def test_auc_is_off_by_half_the_pairs_that_share_a_bin(records):
    """Neither more nor, for some order in the bins, less."""
    y_N, score_N = records
    place_N = bin_of(score_N, NOISY)
    together = np.mean(place_N[y_N == 1][:, None] == place_N[y_N == 0][None, :])
    counts = histogram(y_N, score_N, NOISY)

    value, low, high = bounds("auc", counts[1], counts[0])[:, 0]

    assert value - low == pytest.approx(together / 2, abs=ROUNDING)
    assert high - value == pytest.approx(together / 2, abs=ROUNDING)
    assert high == pytest.approx(roc_auc_score(y_N, place_N + y_N / 2), abs=ROUNDING)


@given(records=RECORDS)
def test_recall_is_within_the_bounds(records):
    """The figure of the records, which `metrics` holds against scikit-learn's curve."""
    y_N, score_N = records
    counts = histogram(y_N, score_N, NOISY)
    exact_M = figures("auc", y_N, score_N)[1:]

    value_M, low_M, high_M = bounds("auc", counts[1], counts[0])[:, 1:]

    defined = ~np.isnan(exact_M)
    assert (np.isnan(value_M) == ~defined).all()
    assert (low_M[defined] - ROUNDING <= exact_M[defined]).all()
    assert (exact_M[defined] <= high_M[defined] + ROUNDING).all()


@given(st.integers(0, 50), st.integers(1, 50), st.integers(0, 50))
def test_the_worst_precision_is_the_sum(before, positives, false):
    """Its closed form, against fractions."""
    whole = sum(Fraction(before + j, before + j + false) for j in range(1, positives + 1))

    found = histograms._worst_precision(np.array([before]), np.array([positives]), np.array([false]))

    assert found[0] == pytest.approx(float(whole), rel=1e-9)


@pytest.mark.parametrize("prevalence", [None, 0.002])
def test_exact_histograms_are_close(prevalence):
    """Of scores as models give them, dense or rare: AUC to 0.001, average precision to 0.01."""
    rng = np.random.default_rng(3)
    study = make(task={"prevalence": prevalence})
    middle = math.log(prevalence / (1 - prevalence)) if prevalence else 0.0
    for spread in (0.3, 3.0):
        y_N = (rng.random(100_000) < (prevalence or 0.3)).astype(float)
        score_N = 1 / (1 + np.exp(-(middle + spread * (rng.normal(size=len(y_N)) + 1.5 * y_N))))
        counts = histogram(y_N, score_N.astype(np.float32).astype(float), study)

        for metric, close in {"auc": 0.001, "auprc": 0.01}.items():
            _, low, high = bounds(metric, counts[1], counts[0])[:, 0]
            assert high - low < close


@given(st.lists(SCORE, min_size=2, max_size=50))
def test_bins_keep_the_order(scores):
    """A higher score is never in a lower bin, and every score is in one."""
    place_N = bin_of(np.sort(scores), EXACT)

    assert (np.diff(place_N) >= 0).all()
    assert place_N.min() >= 0
    assert place_N.max() < EXACT_BINS


def test_the_ends_of_the_scores_have_bins():
    """A saturated model's, and what is no number."""
    assert bin_of(np.array([0.0, 1.0, np.nan, 0.5]), EXACT).tolist() == [
        0,
        EXACT_BINS - 1,
        EXACT_BINS - 1,
        EXACT_BINS // 2,
    ]


def test_the_declared_prevalence_is_in_the_middle():
    """A model starts there, and its scores are dense there."""
    around = bin_of(np.array([0.0099, 0.0101]), make(task={"prevalence": 0.01}))

    assert (around < EXACT_BINS / 2).tolist() == [True, False]
    assert (abs(around - EXACT_BINS / 2) < 20).all()


@given(records=RECORDS, y=st.sampled_from([0.0, 1.0]), score=SCORE)
def test_a_record_moves_one_count_by_one(records, y, score):
    """The sensitivity that the noise is made for."""
    y_N, score_N = records
    before = histogram(y_N, score_N, NOISY)

    after = histogram(np.r_[y_N, y], np.r_[score_N, score], NOISY)

    moved = after - before
    assert sorted(set(moved.ravel())) == [0, 1]
    assert moved.sum() == 1


def test_one_record_of_each_unit():
    """Neither more, of a unit with many, nor less."""
    unit_N = np.array([0, 1, 1, 2, 2, 2, 0, 3])

    for seed in range(20):
        assert sorted(unit_N[one_of_each(unit_N, np.random.default_rng(seed))]) == [0, 1, 2, 3]


def test_each_record_of_a_unit_is_drawn_alike():
    """And what is drawn of one unit says nothing of another's: all 3 x 2 pairs come as often."""
    unit_N = np.array([0, 1, 0, 1, 0])
    rng = np.random.default_rng(5)
    drawn = [tuple(sorted(one_of_each(unit_N, rng))) for _ in range(6000)]

    _, times = np.unique(drawn, axis=0, return_counts=True)

    assert len(times) == 6
    # Chi-square of five degrees of freedom: beyond 25.7 by chance in one case of ten thousand.
    assert ((times - 1000) ** 2 / 1000).sum() < 25.7


def scored(rng, records, prevalence=0.3):
    y_N = (rng.random(records) < prevalence).astype(float)
    return y_N, 1 / (1 + np.exp(-(rng.normal(size=records) + 1.5 * y_N - 0.75)))


@pytest.mark.parametrize("study", [NOISY, NOISY_AP])
def test_noisy_figures_are_near_the_records(study):
    """Low and high are for 95 of 100 cases, and wider by what the bins hide: 35 of 40 at the least."""
    rng = np.random.default_rng(11)
    metric, noise, within, spread = study.task.metric, 8.0, 0, []
    for _ in range(40):
        y_N, score_N = scored(rng, 6000)
        counts = histogram(y_N, score_N, study) + noise * rng.normal(size=(2, study.score_bins))
        found = pooled(counts, study, sites=4, noise=noise).metric
        within += found.low <= ORACLES[metric](y_N, score_N) <= found.high
        spread.append(found.high - found.low)

    assert within >= 35
    assert np.mean(spread) < 0.2


def test_negative_counts_are_mended():
    """What is computed from them are counts again, and their total is kept as far as noise lets it."""
    rng = np.random.default_rng(0)
    mended = histograms._mended(rng.normal(2, 10, (2, 16)))

    assert (mended >= 0).all()
    assert histograms._mended(mended) == pytest.approx(mended)


def test_counts_that_are_some_are_not_mended():
    """Isotonic regression leaves alone what is rising."""
    counts = np.array([[3.0, 0.0, 2.0], [0.0, 1.0, 5.0]])

    assert histograms._mended(counts).tolist() == counts.tolist()


def test_a_meaningless_figure_is_not_shown():
    """Few records under much noise."""
    rng = np.random.default_rng(2)
    counts = histogram(*scored(rng, 100), NOISY) + 20 * rng.normal(size=(2, NOISY.score_bins))

    found = pooled(counts, NOISY, sites=4, noise=20.0)

    assert found.metric.value is None
    assert "not to be told from noise" in found.metric.withheld
    assert all(recall.value is None for recall in found.recall.values())


def test_a_figure_of_a_wide_range_is_not_shown():
    """Though there are records enough to be seen."""
    rng = np.random.default_rng(2)
    counts = histogram(*scored(rng, 1000), NOISY) + 14 * rng.normal(size=(2, NOISY.score_bins))

    found = pooled(counts, NOISY, sites=4, noise=14.0)

    assert found.metric.withheld.startswith("noise and bins leave a range of 0.")


def test_recall_below_the_noise_is_not_shown():
    """Negatives x rate x epsilon below 100 (0.9 here): of 14,000 at 0.001. At 0.01 the bins hide too much."""
    counts = histogram(*scored(np.random.default_rng(2), 20_000), NOISY).astype(float)

    recall = pooled(counts, NOISY, sites=4, noise=1.0).recall

    assert [recall[f"{fpr:g}"].value is None for fpr in FPRS] == [True, True, False]
    assert recall["0.001"].withheld == "negatives x rate x epsilon is 13, and noise hides what is below 100"
    assert recall["0.01"].withheld.startswith("noise and bins leave a range of 0.")


def test_figures_of_one_class_are_not_defined():
    """Of exact counts: no negative, no figure."""
    found = pooled(
        histogram(np.ones(5), np.linspace(0, 1, 5), EXACT).astype(float), EXACT, sites=4, noise=0.0
    )

    assert found.metric.withheld == "not defined on so few records"
