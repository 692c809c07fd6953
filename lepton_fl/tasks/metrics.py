"""Ranking metrics with bootstrap intervals. N records, R resamples; R x N weights at once.

Checked against scikit-learn's roc_auc_score and average_precision_score in the tests; written out here
because a bootstrap needs thousands of weighted evaluations of the same scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from lepton_fl.results import Interval

Metric = Literal["auc", "auprc"]
Scored = tuple[np.ndarray, np.ndarray]
"""Labels float [N] in {0, 1} and scores float [N]."""

RESAMPLES = 1000
_CELLS = 4_000_000
"""Weights held at once; larger tables are resampled in slices."""


def evaluate(metric: Metric, y_N: np.ndarray, score_N: np.ndarray) -> float:
    """The metric of N scored records; NaN where only one class is present."""
    return float(_weighted(metric, y_N, score_N, np.ones((1, len(y_N))))[0])


def _weighted(metric: Metric, y_N: np.ndarray, score_N: np.ndarray, weight_RN: np.ndarray) -> np.ndarray:
    """The metric [R] under each row of record weights; ties in score count half."""
    if len(y_N) == 0:
        return np.full(len(weight_RN), np.nan)
    order = np.argsort(-score_N, kind="stable")
    y_N, score_N, weight_RN = y_N[order], score_N[order], weight_RN[:, order]
    # G groups of equal score, highest first.
    start_G = np.flatnonzero(np.r_[True, score_N[1:] != score_N[:-1]])
    positive_RG = np.add.reduceat(weight_RN * y_N, start_G, axis=1)
    negative_RG = np.add.reduceat(weight_RN * (1 - y_N), start_G, axis=1)
    above_RG = np.cumsum(positive_RG, axis=1)
    positives_R, negatives_R = above_RG[:, -1], negative_RG.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        if metric == "auc":
            pairs_R = (negative_RG * (above_RG - positive_RG / 2)).sum(axis=1)
            value_R = pairs_R / (positives_R * negatives_R)
        else:
            precision_RG = above_RG / (above_RG + np.cumsum(negative_RG, axis=1))
            value_R = (positive_RG * np.nan_to_num(precision_RG)).sum(axis=1) / positives_R
    undefined_R = (positives_R == 0) | (negatives_R == 0)
    return np.asarray(np.where(undefined_R, np.nan, value_R))


def _resampled(metric: Metric, scored: Scored, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """The metric [R] on records drawn with replacement within each class."""
    y_N, score_N = scored
    slice_size = max(1, _CELLS // max(len(y_N), 1))
    values = []
    for start in range(0, resamples, slice_size):
        rows = min(slice_size, resamples - start)
        weight_RN = np.zeros((rows, len(y_N)))
        for label in (0, 1):
            # Within each class: the number of positives is small, and not what is uncertain here.
            index = np.flatnonzero(y_N == label)
            if len(index):
                share = np.full(len(index), 1 / len(index))
                weight_RN[:, index] = rng.multinomial(len(index), share, size=rows)
        values.append(_weighted(metric, y_N, score_N, weight_RN))
    return np.concatenate(values)


def intervals(
    metric: Metric,
    seeds: Sequence[Mapping[str, Scored]],
    *,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> tuple[dict[str, Interval], Interval]:
    """Each site's metric and their mean over sites, with 95 % percentile bootstrap intervals.

    `seeds` holds, for each seed, the scored held-out records of each site. A resample draws seeds with
    replacement and, within each, records with replacement. Sites where the metric is not defined (one
    class only) in a seed are left out of that seed's mean.
    """
    return _summaries(*_bootstrap(metric, seeds, rng, resamples))


def gain(
    metric: Metric,
    ours: Sequence[Mapping[str, Scored]],
    theirs: Sequence[Mapping[str, Scored]],
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> tuple[dict[str, Interval], Interval]:
    """Our metric minus theirs, by site and as the mean over sites; paired by seed and record.

    Much narrower than the two arms' own intervals, which share the luck of the held-out records.
    """
    # Equal generators and equal labels draw equal resamples.
    sites, our_SK, our_SKR, drawn_SR = _bootstrap(metric, ours, np.random.default_rng(seed), resamples)
    _, their_SK, their_SKR, _ = _bootstrap(metric, theirs, np.random.default_rng(seed), resamples)
    return _summaries(sites, our_SK - their_SK, our_SKR - their_SKR, drawn_SR)


def _bootstrap(
    metric: Metric,
    seeds: Sequence[Mapping[str, Scored]],
    rng: np.random.Generator,
    resamples: int,
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Sites, metric [S, K], resampled metric [S, K, R] and the seeds [S, R] that each resample draws."""
    sites = sorted({site for seed in seeds for site in seed})
    # S seeds, K sites.
    point_SK = np.full((len(seeds), len(sites)), np.nan)
    value_SKR = np.full((len(seeds), len(sites), resamples), np.nan)
    for s, seed in enumerate(seeds):
        for k, site in enumerate(sites):
            if site in seed:
                point_SK[s, k] = evaluate(metric, *seed[site])
                if not np.isnan(point_SK[s, k]):
                    value_SKR[s, k] = _resampled(metric, seed[site], rng, resamples)
    return sites, point_SK, value_SKR, rng.integers(len(seeds), size=(len(seeds), resamples))


def _summaries(
    sites: list[str], point_SK: np.ndarray, value_SKR: np.ndarray, drawn_SR: np.ndarray
) -> tuple[dict[str, Interval], Interval]:
    """Each site's interval, and that of the mean over the sites where a seed defines it."""
    per_site = {
        site: _interval(point_SK[:, k], _over_seeds(value_SKR[:, k, :], drawn_SR))
        for k, site in enumerate(sites)
    }
    mean_SR = _nanmean(value_SKR, axis=1)
    return per_site, _interval(_nanmean(point_SK, axis=1), _over_seeds(mean_SR, drawn_SR))


def _over_seeds(value_SR: np.ndarray, drawn_SR: np.ndarray) -> np.ndarray:
    return _nanmean(np.take_along_axis(value_SR, drawn_SR, axis=0), axis=0)


def _interval(point_S: np.ndarray, value_R: np.ndarray) -> Interval:
    if np.all(np.isnan(point_S)):
        return Interval(mean=None)
    low, high = np.nanpercentile(value_R, [2.5, 97.5])
    return Interval(mean=float(np.nanmean(point_S)), low=float(low), high=float(high))


def _nanmean(values: np.ndarray, *, axis: int) -> np.ndarray:
    """np.nanmean, with NaN and no warning where all is NaN."""
    count = np.sum(~np.isnan(values), axis=axis)
    total = np.nansum(values, axis=axis)
    mean: np.ndarray = np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)
    return mean
