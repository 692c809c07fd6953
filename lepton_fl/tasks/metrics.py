"""Ranking figures with paired bootstrap intervals.

N records, R resamples, C cells, U kinds of record, M figures, S seeds, K lists (the sites, then all records).

Checked against scikit-learn's roc_auc_score, average_precision_score and roc_curve in the tests; written out
here because a bootstrap needs thousands of weighted evaluations of the same scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic, Literal, TypeVar

import numpy as np

from lepton_fl.results import Interval

Metric = Literal["auc", "auprc"]
A = TypeVar("A", bound=str)
"""How an arm is called."""
Scored = tuple[np.ndarray, np.ndarray]
"""Labels float [N] in {0, 1} and scores float [N]."""

RESAMPLES = 1000
FPRS = (0.001, 0.01, 0.1)
"""False positive rates at which recall is always told."""
LEAST_RESAMPLES = 200
_COUNTS = 200_000_000
"""Counts drawn in one bootstrap, about ten seconds of one core; more records get fewer resamples."""
_AT_ONCE = 4_000_000
"""Counts held at once; larger lists are resampled in slices."""
_ROUNDING = 1e-9
"""0.29 x 100 negatives is 28.999999999999996 in floating point, and means 29."""


def evaluate(metric: Metric, y_N: np.ndarray, score_N: np.ndarray) -> float:
    """The metric of N scored records; NaN where only one class is present."""
    return float(figures(metric, y_N, score_N)[0])


def figures(metric: Metric, y_N: np.ndarray, score_N: np.ndarray) -> np.ndarray:
    """The metric, then recall at each of `FPRS`, [M]; NaN where one is not defined."""
    return _weighted(metric, y_N, score_N, np.ones((1, len(y_N))))[:, 0]


def allowed_alarms(fpr: float, negatives: int) -> int:
    """Negatives that may be called positive at a false positive rate of at most `fpr`."""
    return int(np.floor(fpr * negatives + _ROUNDING))


def _weighted(metric: Metric, y_N: np.ndarray, score_N: np.ndarray, weight_RN: np.ndarray) -> np.ndarray:
    """The figures [M, R] under each row of record weights."""
    cell_N = _cells(y_N, score_N)
    cells = int(cell_N.max(initial=-1)) + 1
    return figures_of_cells(
        metric, _sums(weight_RN * y_N, cell_N, cells), _sums(weight_RN * (1 - y_N), cell_N, cells)
    )


def _cells(y_N: np.ndarray, score_N: np.ndarray) -> np.ndarray:
    """Each record's cell [N], 0 for the highest scores: as coarse as leaves every figure exact.

    Records of one score share a cell, and so do all negatives between two neighbouring scores of
    positives: only how many they are, and not their order, enters any figure. Rare positives so make
    few cells, however many records there are.
    """
    if len(y_N) == 0:
        return np.zeros(0, dtype=np.int64)
    order = np.argsort(-score_N, kind="stable")
    score_N = score_N[order]
    group_N = np.cumsum(np.r_[False, score_N[1:] != score_N[:-1]])
    positive_G = np.bincount(group_N, weights=y_N[order]) > 0
    cell_G = np.cumsum(np.r_[False, positive_G[1:] | positive_G[:-1]])
    cell_N = np.empty(len(order), dtype=np.int64)
    cell_N[order] = cell_G[group_N]
    return cell_N


def _sums(weight_RU: np.ndarray, cell_U: np.ndarray, cells: int) -> np.ndarray:
    """The weights [R, C] added up by cell."""
    sum_RC = np.zeros((len(weight_RU), cells))
    if len(cell_U):
        order = np.argsort(cell_U, kind="stable")
        sorted_U = cell_U[order]
        first = np.flatnonzero(np.r_[True, sorted_U[1:] != sorted_U[:-1]])
        sum_RC[:, sorted_U[first]] = np.add.reduceat(weight_RU[:, order], first, axis=1)
    return sum_RC


def figures_of_cells(metric: Metric, positive_RC: np.ndarray, negative_RC: np.ndarray) -> np.ndarray:
    """The figures [M, R] from the weights of both classes in each cell, highest scores first.

    AUC: ties in score count half. AUPRC: average precision, without interpolation. Recall at FPR f: the
    highest recall of any threshold (records of one score are called alike) at which at most a share f of
    the negatives is called positive; a property of the ranking on these records, so it carries no threshold
    anywhere. Not defined on fewer than 1 / f negatives, where one false alarm is already too many.
    """
    found_RC, false_RC = np.cumsum(positive_RC, axis=1), np.cumsum(negative_RC, axis=1)
    positives_R, negatives_R = positive_RC.sum(axis=1), negative_RC.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        if metric == "auc":
            pairs_R = (negative_RC * (found_RC - positive_RC / 2)).sum(axis=1)
            values = [pairs_R / (positives_R * negatives_R)]
        else:
            precision_RC = np.nan_to_num(found_RC / (found_RC + false_RC))
            values = [(positive_RC * precision_RC).sum(axis=1) / positives_R]
        for fpr in FPRS:
            allowed_R = fpr * negatives_R + _ROUNDING
            recall_R = (positive_RC * (false_RC <= allowed_R[:, None])).sum(axis=1) / positives_R
            values.append(np.where(allowed_R < 1, np.nan, recall_R))
    value_MR = np.stack(values)
    value_MR[:, (positives_R == 0) | (negatives_R == 0)] = np.nan
    return value_MR


class _List:
    """The records of one list as all arms score them: kinds that no arm's figures tell apart."""

    def __init__(self, y_N: np.ndarray, scores: Sequence[np.ndarray]) -> None:
        cell_AN = np.stack([_cells(y_N, score_N) for score_N in scores])
        self.cells = cell_AN.max(axis=1, initial=-1) + 1
        # Each class: the cell of every kind in every arm [A, U], and how many records are of the kind [U].
        self.kinds = [np.unique(cell_AN[:, y_N == label], axis=1, return_counts=True) for label in (1, 0)]
        self.counts = sum(len(count_U) for _, count_U in self.kinds)

    def figures(self, metric: Metric, rng: np.random.Generator | None, resamples: int) -> np.ndarray:
        """Each arm's figures [A, M, R] on records drawn with replacement within each class.

        All arms are judged on the same draws. Without a generator, on the records as they are.
        """
        if any(len(count_U) == 0 for _, count_U in self.kinds):
            return np.full((len(self.cells), 1 + len(FPRS), resamples), np.nan)
        rows = max(1, _AT_ONCE // self.counts)
        slices = []
        for start in range(0, resamples, rows):
            size = min(rows, resamples - start)
            # Within each class: the number of positives is small, and not what is uncertain here.
            drawn = [
                count_U[None] if rng is None else rng.multinomial(total, count_U / total, size=size)
                for _, count_U in self.kinds
                for total in [count_U.sum()]
            ]
            slices.append(
                np.stack(
                    [
                        figures_of_cells(
                            metric,
                            *(
                                _sums(weight_RU, cell_AU[a], cells)
                                for weight_RU, (cell_AU, _) in zip(drawn, self.kinds, strict=True)
                            ),
                        )
                        for a, cells in enumerate(self.cells)
                    ]
                )
            )
        return np.concatenate(slices, axis=2)


class Bootstrap(Generic[A]):
    """Figures of several arms over seeds and held-out records, with 95 % percentile intervals.

    `arms` holds, for each arm and seed, the scored held-out records of each site; all arms share the
    records of a seed. A resample draws seeds with replacement and, within each, records with replacement,
    the same for every arm: differences between arms are paired. Besides the sites there is one more list:
    all records of a seed together. Where sites are not defined in a seed they are left out of its mean.

    `same_records`: every seed is judged on the same records in the same order, as where a cutoff in time
    divides them. They are then drawn once for all seeds: drawn anew for each, their luck would average out
    as if every seed had brought records of its own, and the intervals would be too narrow.

    Every resample is exact. `resamples` says how many there are: as asked, or fewer (`LEAST_RESAMPLES`
    at the least) where so many positives and negatives interleave that it would take minutes.
    """

    def __init__(
        self,
        metric: Metric,
        arms: Mapping[A, Sequence[Mapping[str, Scored]]],
        *,
        seed: int,
        resamples: int = RESAMPLES,
        same_records: bool = False,
    ) -> None:
        self._seed = seed
        self._arms = {arm: len(seeds) for arm, seeds in arms.items() if seeds}
        self.sites = sorted({site for seeds in arms.values() for scored in seeds for site in scored})
        total = max(self._arms.values(), default=0)
        lists: list[tuple[int, list[tuple[A, int]], _List]] = []
        for group in [range(total)] if same_records else [range(s, s + 1) for s in range(total)]:
            judged = [(arm, s) for arm, seeds in self._arms.items() for s in group if s < seeds]
            for k, names in enumerate([*([site] for site in self.sites), self.sites]):
                columns = [
                    [arms[arm][s][name] for name in names if name in arms[arm][s]] for arm, s in judged
                ]
                if columns and columns[0]:
                    y_N, *others = (np.concatenate([y for y, _ in column]) for column in columns)
                    if not all(np.array_equal(y_N, other) for other in others):
                        raise ValueError("scores of different records cannot be paired")
                    scores = [np.concatenate([score for _, score in column]) for column in columns]
                    lists.append((k, judged, _List(y_N, scores)))
        counts = sum(found.counts for _, _, found in lists)
        self.resamples = min(resamples, max(LEAST_RESAMPLES, _COUNTS // max(counts, 1)))
        rng = np.random.default_rng(seed)
        shape = (1 + len(FPRS), total, len(self.sites) + 1)
        self._point = {arm: np.full(shape, np.nan) for arm in self._arms}
        self._value = {arm: np.full((*shape, self.resamples), np.nan) for arm in self._arms}
        for k, judged, found in lists:
            point_AM = found.figures(metric, None, 1)[:, :, 0]
            value_AMR = found.figures(metric, rng, self.resamples)
            for a, (arm, s) in enumerate(judged):
                self._point[arm][:, s, k] = point_AM[a]
                self._value[arm][:, s, k] = value_AMR[a]

    def judge(self, arm: A, fpr: float | None = None) -> tuple[dict[str, Interval], Interval, Interval]:
        """An arm's metric (or recall at `fpr`) by site, their mean, and over all records as one list."""
        m = 0 if fpr is None else 1 + FPRS.index(fpr)
        seeds = self._arms[arm]
        point_SK, value_SKR = self._point[arm][m, :seeds], self._value[arm][m, :seeds]
        per_site, mean = self._summaries(point_SK[:, :-1], value_SKR[:, :-1])
        return per_site, mean, self._interval(point_SK[:, -1], value_SKR[:, -1])

    def gain(self, arm: A, others: Mapping[str, A]) -> tuple[dict[str, Interval], Interval]:
        """The arm's metric minus that of each site's arm in `others`, and the mean over the sites.

        Much narrower than the arms' own intervals, which share the luck of the held-out records.
        """
        seeds = min(self._arms[name] for name in (arm, *others.values()))
        columns = [self._difference(arm, others[site], k, seeds) for k, site in enumerate(self.sites)]
        points, values = zip(*columns, strict=True)
        return self._summaries(np.stack(points, axis=1), np.stack(values, axis=1))

    def _difference(self, ours: A, theirs: A, k: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
        """One site's points [S] and resamples [S, R]."""
        return (
            self._point[ours][0, :seeds, k] - self._point[theirs][0, :seeds, k],
            self._value[ours][0, :seeds, k] - self._value[theirs][0, :seeds, k],
        )

    def _summaries(self, point_SK: np.ndarray, value_SKR: np.ndarray) -> tuple[dict[str, Interval], Interval]:
        per_site = {
            site: self._interval(point_SK[:, k], value_SKR[:, k]) for k, site in enumerate(self.sites)
        }
        return per_site, self._interval(_nanmean(point_SK, axis=1), _nanmean(value_SKR, axis=1))

    def _interval(self, point_S: np.ndarray, value_SR: np.ndarray) -> Interval:
        if np.all(np.isnan(point_S)):
            return Interval(mean=None)
        # As many seeds, the same draw of seeds: for every arm, site and figure.
        drawn_SR = np.random.default_rng([self._seed, len(point_S)]).integers(
            len(point_S), size=(len(point_S), self.resamples)
        )
        value_R = _nanmean(np.take_along_axis(value_SR, drawn_SR, axis=0), axis=0)
        low, high = np.nanpercentile(value_R, [2.5, 97.5])
        return Interval(mean=float(np.nanmean(point_S)), low=float(low), high=float(high))


def _nanmean(values: np.ndarray, *, axis: int) -> np.ndarray:
    """np.nanmean, with NaN and no warning where all is NaN."""
    count = np.sum(~np.isnan(values), axis=axis)
    total = np.nansum(values, axis=axis)
    mean: np.ndarray = np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)
    return mean
