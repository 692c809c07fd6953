"""What an arm's scores come to, beyond the metric: recall at low false positive rates, and one seed whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from lepton_fl.results import Confusion, FirstSeed, RecallAt
from lepton_fl.study import OperatingPoint
from lepton_fl.tasks.calibration import Platt, calibration
from lepton_fl.tasks.curves import curve, top
from lepton_fl.tasks.metrics import FPRS, Bootstrap, Scored
from lepton_fl.tasks.operating import confusion, threshold

A = TypeVar("A", bound=str)


def recalls(bootstrap: Bootstrap[A], arm: A) -> tuple[RecallAt, ...]:
    """The arm's recall at each of `FPRS`."""
    found = []
    for fpr in FPRS:
        per_site, mean, all_records = bootstrap.judge(arm, fpr)
        found.append(RecallAt(fpr=fpr, per_site=per_site, mean=mean, all_records=all_records))
    return tuple(found)


def first_seed(
    seed: int, scored: Mapping[str, Scored], trained: Mapping[str, Scored], point: OperatingPoint
) -> FirstSeed:
    """One seed's held-out records as one list: curve, top, calibration; and each site at its threshold.

    `trained` holds the sites' scored training records, on which each site sets its threshold and fits its
    calibration as it would in use; what it sets stays there, and is not in the results. Without them,
    neither is evaluated.
    """
    y_N = np.concatenate([y for y, _ in scored.values()])
    score_N = np.concatenate([score for _, score in scored.values()])
    scaled = []
    at_point: dict[str, Confusion | None] = {}
    for site in trained:
        y_K, score_K = scored[site]
        platt = Platt.fit(*trained[site])
        # A site that has seen one class only has nothing to fit, and keeps the scores as they are.
        scaled.append(platt(score_K) if platt else score_K)
        above = threshold(point, *trained[site])
        at_point[site] = None if above is None else confusion(y_K, score_K, above)
    return FirstSeed(
        seed=seed,
        records=len(y_N),
        positives=int(y_N.sum()),
        curve=curve(y_N, score_N),
        top=top(y_N, score_N),
        calibration=calibration(y_N, score_N),
        recalibrated=calibration(
            np.concatenate([scored[site][0] for site in trained]), np.concatenate(scaled)
        )
        if trained
        else None,
        at_point={} if point.alerts_per_day is not None else at_point,
    )
