"""The operating point: a threshold that a site sets on its own records, and what comes of it. N records."""

from __future__ import annotations

import numpy as np

from lepton_fl.results import Confusion
from lepton_fl.study import OperatingPoint
from lepton_fl.tasks.metrics import Metric, allowed_alarms

DEFAULT_FPR: dict[Metric, float] = {"auc": 0.1, "auprc": 0.01}
"""Where a study names no operating point: 90 % specificity, or what a desk can bear for rare events."""


def threshold(point: OperatingPoint, y_N: np.ndarray, score_N: np.ndarray) -> float | None:
    """The threshold for `point` on these records: a record is called positive where its score is above it.

    fpr: the lowest at which at most that share of the negatives is above; None on fewer than 1 / fpr
    negatives. cost_fn, cost_fp: where the records' cost is least, and of several the fewest alarms; None
    where only one class is present. alerts_per_day: None, since no study says how many records a day has.

    Set on training records, so that the held-out ones can tell what it achieves. It stays at the site.
    """
    if point.fpr is not None:
        negative_N = np.sort(score_N[y_N == 0])[::-1]
        alarms = allowed_alarms(point.fpr, len(negative_N))
        if alarms < 1:
            return None
        return float(negative_N[alarms]) if alarms < len(negative_N) else -np.inf
    if point.cost_fn is None or point.cost_fp is None or len(np.unique(y_N)) < 2:
        return None
    order = np.argsort(-score_N, kind="stable")
    sorted_N = score_N[order]
    # Calling the first n records positive, for every n at which the score changes.
    below_N = np.r_[sorted_N, -np.inf]
    steps_N = np.where(y_N[order] == 1, -point.cost_fn, point.cost_fp)
    cost_N = np.r_[0.0, np.cumsum(steps_N, dtype=np.float64)]
    cost_N[np.flatnonzero(below_N[1:-1] == below_N[:-2]) + 1] = np.inf
    return float(below_N[int(np.argmin(cost_N))])


def confusion(y_N: np.ndarray, score_N: np.ndarray, above: float) -> Confusion:
    """The records by label and by whether their score is above the threshold."""
    called_N, positive_N = score_N > above, y_N == 1
    return Confusion(
        true_positives=int((called_N & positive_N).sum()),
        false_positives=int((called_N & ~positive_N).sum()),
        false_negatives=int((~called_N & positive_N).sum()),
        true_negatives=int((~called_N & ~positive_N).sum()),
    )
