"""What one list of scored records shows: its thresholds, and how good its top is. N records, T thresholds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lepton_fl.results import Curve, TopRecords

POINTS = 200
"""Points of a curve, at most about."""
TOPS = (10, 30, 100, 300, 1000)
"""How many records a desk might look at."""
_DIGITS = 6


def curve(y_N: np.ndarray, score_N: np.ndarray) -> Curve | None:
    """ROC and precision-recall in one: every threshold's figures, thinned to about `POINTS`.

    Kept are thresholds evenly spaced in recall and in the logarithm of the false positive rate, since that
    is how they are drawn. None where only one class is present.
    """
    positives, negatives = int((y_N == 1).sum()), int((y_N == 0).sum())
    if not positives or not negatives:
        return None
    found_T, called_T = _thresholds(y_N, score_N)
    false_T = called_T - found_T
    recall_T, fpr_T = found_T / positives, false_T / negatives
    if len(called_T) > POINTS:
        half = POINTS // 2
        kept = np.unique(
            np.concatenate(
                [
                    np.searchsorted(fpr_T, np.geomspace(1 / negatives, 1, half)),
                    np.searchsorted(recall_T, np.linspace(0, 1, half)),
                    [len(called_T) - 1],
                ]
            ).clip(max=len(called_T) - 1)
        )
        recall_T, fpr_T, found_T, called_T = recall_T[kept], fpr_T[kept], found_T[kept], called_T[kept]
    return Curve(fpr=_column(fpr_T), recall=_column(recall_T), precision=_column(found_T / called_T))


def top(y_N: np.ndarray, score_N: np.ndarray, sizes: Sequence[int] = TOPS) -> tuple[TopRecords, ...]:
    """Positives among the highest scores, for each of `sizes` that is less than all records."""
    if len(y_N) == 0:
        return ()
    found_T, called_T = (np.r_[0, counts_T] for counts_T in _thresholds(y_N, score_N))
    return tuple(
        # Between two thresholds lie tied records: the expectation over their order is a straight line.
        TopRecords(records=size, positives=round(float(np.interp(size, called_T, found_T)), _DIGITS))
        for size in sizes
        if size < len(y_N)
    )


def _thresholds(y_N: np.ndarray, score_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At each distinct score, highest first: positives [T] and records [T] with that score or a higher."""
    order = np.argsort(-score_N, kind="stable")
    sorted_N = score_N[order]
    last_T = np.flatnonzero(np.r_[sorted_N[1:] != sorted_N[:-1], True])
    return np.cumsum(y_N[order], dtype=np.float64)[last_T], last_T + 1


def _column(values_T: np.ndarray) -> tuple[float, ...]:
    return tuple(float(f"{value:.{_DIGITS}g}") for value in values_T)
