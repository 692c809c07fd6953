"""Whether scores are probabilities, and two numbers that a site keeps to make them so. N records."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lepton_fl.results import Bin, Calibration

BINS = 10
_EPS = float(np.finfo(np.float64).eps)
"""Scores of exactly 0 or 1 are taken for this far from it, as scikit-learn does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Platt:
    """p = sigmoid(slope * logit(score) + intercept): Platt 1999, section 2, on the log odds.

    Fitted to a site's own training records and kept there; the order of the scores does not change.
    """

    slope: float
    intercept: float

    @classmethod
    def fit(cls, y_N: np.ndarray, score_N: np.ndarray) -> Platt | None:
        """Least log-loss, towards Platt's softened labels; None where only one class is present.

        The labels (P + 1) / (P + 2) and 1 / (Q + 2) for P positives and Q negatives keep the fit finite
        where the scores separate the classes.
        """
        from sklearn.linear_model import LogisticRegression

        positives, negatives = int((y_N == 1).sum()), int((y_N == 0).sum())
        if not positives or not negatives:
            return None
        soft_N = np.where(y_N == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
        # A label in between is one record of each class, by weight.
        logit_2N1 = np.tile(_logit(score_N), 2)[:, None]
        label_2N = np.repeat([1, 0], len(y_N))
        model = LogisticRegression(C=np.inf, max_iter=1000, tol=1e-8)
        model.fit(logit_2N1, label_2N, sample_weight=np.concatenate([soft_N, 1 - soft_N]))
        slope = float(model.coef_[0, 0])
        if slope <= 0:
            # Scores that rank the training records backwards: say the base rate rather than turn them round.
            share = float(soft_N.mean())
            return cls(slope=0.0, intercept=float(np.log(share / (1 - share))))
        return cls(slope=slope, intercept=float(model.intercept_[0]))

    def __call__(self, score_N: np.ndarray) -> np.ndarray:
        """Scores [N] on the new scale."""
        odds_N = self.slope * _logit(score_N) + self.intercept
        scaled_N: np.ndarray = 1 / (1 + np.exp(-odds_N.clip(-700, 700)))
        return scaled_N


def calibration(y_N: np.ndarray, score_N: np.ndarray) -> Calibration:
    """Reliability in `BINS` bins of equally many records, expected calibration error, log-loss and Brier.

    Raises:
        ValueError: there are no records.
    """
    if len(y_N) == 0:
        raise ValueError("no records to calibrate on")
    order = np.argsort(score_N, kind="stable")
    parts = [part for part in np.array_split(order, BINS) if len(part)]
    bins = tuple(
        Bin(records=len(part), positives=int(y_N[part].sum()), score=float(score_N[part].mean()))
        for part in parts
    )
    error = sum(abs(b.score - b.positives / b.records) * b.records for b in bins) / len(y_N)
    clipped_N = score_N.astype(np.float64).clip(_EPS, 1 - _EPS)
    return Calibration(
        bins=bins,
        expected_error=float(error),
        log_loss=float(-np.where(y_N == 1, np.log(clipped_N), np.log1p(-clipped_N)).mean()),
        brier=float(np.square(score_N - y_N).mean()),
    )


def _logit(score_N: np.ndarray) -> np.ndarray:
    clipped_N = score_N.astype(np.float64).clip(_EPS, 1 - _EPS)
    logit_N: np.ndarray = np.log(clipped_N) - np.log1p(-clipped_N)
    return logit_N
