"""Figures of a model from counts of its scores: what sites can add up without showing any of them.

Each site counts its held-out records by label and by bin of the score. The sum of these counts over the sites
gives AUC, average precision and recall, each with the bounds between which the figure of the records
themselves lies: a bin hides the order of the records in it, and nothing else.

N records, B bins.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lepton_fl.results import Bounded, Pooled
from lepton_fl.study import Study
from lepton_fl.tasks.metrics import FPRS, Metric, allowed_alarms, figures_of_cells

Counts: TypeAlias = NDArray[np.float64]
"""[2, B]: negatives, then positives, by bin, lowest scores first. Whole numbers where no noise is on them."""

RESAMPLES = 400
MEANINGLESS = 0.2
"""A noisy figure whose range is wider is not shown: it could as well be another."""
LEAST_ALARMS = 100.0
"""Recall at a false positive rate is not shown where negatives x rate x epsilon is below."""

_SPREAD = 2.0
"""Log odds from the middle within which half of all bins lie."""


def bin_of(score_N: np.ndarray, study: Study) -> NDArray[np.int64]:
    """The bin of each score in [0, 1]: a function of the study's public keys and of that score alone.

    Bins are even in x / (2 + |x|), x the log odds of the score less those of the declared prevalence (where a
    model starts): fine in the middle, where a model's scores are dense, and with tails heavy enough that rare
    positives far above it are still told apart. A higher score is in no lower bin.
    """
    bins, prevalence = study.score_bins, study.task.prevalence or 0.5
    even_B = np.arange(1, bins) * 2 / bins - 1
    odds_B = math.log(prevalence / (1 - prevalence)) + _SPREAD * even_B / (1 - np.abs(even_B))
    # exp(710) is beyond float64; at 700 a score is 1 or next to 0 already.
    edge_B = 1 / (1 + np.exp(-np.clip(odds_B, -700, 700)))
    return np.searchsorted(edge_B, score_N, side="right")


def histogram(y_N: np.ndarray, score_N: np.ndarray, study: Study) -> NDArray[np.int64]:
    """The records' counts [2, B]. One record more or less changes one of them, by 1."""
    bins = study.score_bins
    cell_N = np.where(y_N == 1, bins, 0) + bin_of(score_N, study)
    return np.bincount(cell_N, minlength=2 * bins).reshape(2, bins)


def one_of_each(unit_N: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """The places of one record of each unit, drawn evenly from the unit's own.

    A histogram of these changes in one count, by 1, if a unit with all its records is added or removed: draws
    of different units are independent, so that what is drawn of the others has the same law with and without.
    """
    order_N = rng.permutation(len(unit_N))
    _, first_U = np.unique(unit_N[order_N], return_index=True)
    return order_N[first_U]


def pooled(counts_2B: Counts, study: Study, *, sites: int, noise: float) -> Pooled:
    """What the sum of the histograms of so many sites tells of the model.

    `noise` is the standard deviation of the noise on each count, 0 for exact ones. Noisy counts may be
    negative: the counts up to each bin are made rising (isotonic regression, so nearest in squares) and not
    negative, which needs no look at anything but the noisy counts.

    Guarantee: of exact counts, the figure of the records is within each figure's `low` and `high`. Of noisy
    ones, these are widened by what noise of the same law, drawn again, does to the figure in 95 of 100 cases.
    """
    metric, epsilon = study.task.metric, study.metrics_epsilon
    found_2B = _mended(counts_2B) if noise else counts_2B
    value_M, low_M, high_M = bounds(metric, found_2B[1], found_2B[0])
    why = [""] * len(value_M)
    if epsilon is not None:
        reach_M = _reach(metric, found_2B, noise)
        low_M, high_M = np.maximum(low_M - reach_M, 0), np.minimum(high_M + reach_M, 1)
        why = _why_not(found_2B, high_M - low_M, noise, epsilon)
    first, *recall = (_bounded(*figure) for figure in zip(value_M, low_M, high_M, why, strict=True))
    return Pooled(
        release="exact" if epsilon is None else "dp",
        sites=sites,
        epsilon=epsilon,
        metric=first,
        recall={f"{fpr:g}": figure for fpr, figure in zip(FPRS, recall, strict=True)},
    )


def _why_not(counts_2B: Counts, width_M: np.ndarray, noise: float, epsilon: float) -> list[str]:
    """Why each figure of noisy counts is not shown; empty where it is."""
    # Five standard deviations of the noise on all counts of a class together.
    least = 5 * noise * math.sqrt(counts_2B.shape[1])
    if counts_2B.sum(axis=1).min() < least:
        return [f"fewer than {least:.0f} records of a class: not to be told from noise"] * len(width_M)
    negatives = float(counts_2B[0].sum())
    alarms_M = [math.inf, *(negatives * fpr * epsilon for fpr in FPRS)]
    return [
        f"negatives x rate x epsilon is {alarms:.0f}, and noise hides what is below {LEAST_ALARMS:.0f}"
        if alarms < LEAST_ALARMS
        else f"noise and bins leave a range of {width:.2g}"
        if width > MEANINGLESS
        else ""
        for alarms, width in zip(alarms_M, width_M, strict=True)
    ]


def bounds(metric: Metric, positive_B: np.ndarray, negative_B: np.ndarray) -> np.ndarray:
    """The metric and recall at each of `FPRS` from counts by bin, lowest scores first: [value, low, high].

    The value takes the records of a bin for tied. Guarantee: whatever their order within the bins, the figure
    of the records is between low and high. Those are, for

    * AUC: the value less and plus half the share of pairs of a positive and a negative that are in one bin;
    * average precision: in a bin with p positives and n negatives after T and F in the bins above, the j-th
      positive has a precision of (T + j) / (T + j + F + n) or more, n negatives before it, and of at most
      (T + p) / (T + p + F), tied with the others and no negative before it;
    * recall: the value, since every edge of a bin is a threshold; and with the positives of the first bin
      that has more negatives than are allowed.
    """
    positive_1B, negative_1B = positive_B[None, ::-1], negative_B[None, ::-1]
    value_M = figures_of_cells(metric, positive_1B, negative_1B)[:, 0]
    low_M, high_M = value_M.copy(), value_M.copy()
    p_B, n_B = positive_1B[0], negative_1B[0]
    positives, negatives = p_B.sum(), n_B.sum()
    if positives == 0 or negatives == 0:
        return np.stack([value_M, low_M, high_M])
    found_B, false_B = np.cumsum(p_B), np.cumsum(n_B)
    if metric == "auc":
        open_ = (p_B * n_B).sum() / (2 * positives * negatives)
        low_M[0], high_M[0] = value_M[0] - open_, value_M[0] + open_
    else:
        some_B = p_B > 0
        p_C, found_C, false_C = p_B[some_B], found_B[some_B], false_B[some_B]
        before_C = false_C - n_B[some_B]
        low_M[0] = _worst_precision(found_C - p_C, p_C, false_C).sum() / positives
        high_M[0] = (p_C * found_C / (found_C + before_C)).sum() / positives
    for m, fpr in enumerate(FPRS, start=1):
        first = np.searchsorted(false_B, allowed_alarms(fpr, negatives), side="right")
        if not math.isnan(value_M[m]):
            high_M[m] = found_B[min(int(first), len(found_B) - 1)] / positives
    return np.stack([value_M, low_M, high_M])


def _worst_precision(before_C: np.ndarray, p_C: np.ndarray, false_C: np.ndarray) -> np.ndarray:
    """The sum of (T + j) / (T + j + F) over j = 1 ... p: p - F (psi(T + p + F + 1) - psi(T + F + 1))."""
    from scipy.special import digamma

    start_C = before_C + false_C + 1
    value_C: np.ndarray = p_C - false_C * (digamma(start_C + p_C) - digamma(start_C))
    return value_C


def _mended(counts_2B: Counts) -> Counts:
    """The nearest counts that could be some: up to each bin rising, and none negative."""
    from scipy.optimize import isotonic_regression

    rising = [np.maximum(isotonic_regression(np.cumsum(row_B)).x, 0.0) for row_B in counts_2B]
    return np.diff(np.stack(rising), axis=1, prepend=0.0)


def _reach(metric: Metric, counts_2B: Counts, noise: float) -> np.ndarray:
    """How far each figure is moved, in 95 of 100 cases, by noise drawn again on top of these counts: [M]."""
    # Of noisy counts, so nothing is told by it: any seed does, and one that is fixed gives equal reports.
    rng = np.random.default_rng(0)
    mended = [_mended(counts_2B + noise * rng.standard_normal(counts_2B.shape)) for _ in range(RESAMPLES)]
    stacked_R2B = np.stack(mended)[:, :, ::-1]
    value_MR = figures_of_cells(metric, stacked_R2B[:, 1], stacked_R2B[:, 0])
    value_M = figures_of_cells(metric, counts_2B[None, 1, ::-1], counts_2B[None, 0, ::-1])[:, 0]
    # One that is not defined has been moved beyond all bounds.
    moved_MR = np.nan_to_num(np.abs(value_MR - value_M[:, None]), nan=np.inf)
    reach_M: np.ndarray = np.quantile(moved_MR, 0.95, axis=1, method="higher")
    return reach_M


def _bounded(value: float, low: float, high: float, why: str) -> Bounded:
    if math.isnan(value):
        return Bounded(withheld="not defined on so few records")
    if why:
        return Bounded(withheld=why)
    return Bounded(value=float(value), low=float(low), high=float(high))
