"""Does training sample as accounting assumes: each unit by itself, at one rate, anew in each step?

Who was sampled is read off a model in which each unit owns one parameter: it moves if and only if its unit is
in the step. R rounds, U units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lepton_fl.audit.finding import Finding
from lepton_fl.audit.subject import BATCH, Records, gradient, linear, lockstep
from lepton_fl.tasks import arrays_of
from lepton_fl.tasks.arrays import flatten
from lepton_fl.tasks.task import BINARY
from lepton_fl.training import SimulationNoise, train_locally

TAIL = 5e-7
_UNITS, _RATE, _STEPS = 500, 0.2, 8
_CLIP = 2.0**-8
"""Far below a gradient's norm of 1/2, so that each step moves a sampled unit's parameter by the same."""
_CHECK = "sampling"


def check_sampling(seed: int, *, full: bool) -> Iterator[Finding]:
    """Rate, batch sizes, pairs of units, rounds, steps."""
    rounds = 2000 if full else 150
    noise = SimulationNoise(seed, "audit")
    model, records = linear(_UNITS), Records.one_each(np.eye(_UNITS, dtype=np.float32))
    plan = lockstep(clip=_CLIP, lattice=None, rate=_RATE)
    taken_RU = np.array(
        [gradient(model, records, plan, noise, round) != 0 for round in range(1, rounds + 1)], np.float64
    )
    z_RU = (taken_RU - _RATE) / math.sqrt(_RATE * (1 - _RATE))
    yield _rate(z_RU)
    variance = _UNITS * _RATE * (1 - _RATE)
    yield _variance(
        "batch sizes vary as those of independent units", taken_RU.sum(axis=1) - _UNITS * _RATE, variance
    )
    yield _variance(
        "units are sampled equally often", taken_RU.sum(axis=0) - rounds * _RATE, rounds * _RATE * (1 - _RATE)
    )
    yield _pairs(z_RU)
    counts_RU = np.array([_counts(records, noise, round) for round in range(1, rounds // 4)])
    yield _variance(
        f"the steps of a round do not remember each other ({_STEPS} steps)",
        (counts_RU - _STEPS * _RATE).ravel(),
        _STEPS * _RATE * (1 - _RATE),
        # Counts are no normals: their fourth moment is that of a binomial.
        kurtosis=3 + (1 - 6 * _RATE * (1 - _RATE)) / (_STEPS * _RATE * (1 - _RATE)),
    )


def _counts(records: Records, noise: SimulationNoise, round: int) -> NDArray[np.float64]:
    """In how many steps of one round each unit was: each moves its parameter by clip / BATCH."""
    plan = replace(lockstep(clip=_CLIP, lattice=None, rate=_RATE), steps=_STEPS, gradient_only=False)
    model = linear(_UNITS)
    update = train_locally(model, BINARY, arrays_of(model), records, plan, noise, round)
    return np.rint(flatten(update.delta).astype(np.float64) * BATCH / _CLIP)


def _rate(z_RU: NDArray[np.float64]) -> Finding:
    count = z_RU.size
    score, allowed = float(z_RU.sum()) / math.sqrt(count), float(-stats.norm.ppf(TAIL))
    off = (allowed + 3.1) * math.sqrt((1 - _RATE) / (_RATE * count))
    return Finding.of(
        _CHECK,
        f"the rate is {_RATE:g}",
        passed=abs(score) < allowed,
        statistic=f"{score:+.2f} deviations over {count} draws, allowed {allowed:.2f} either way",
        power=f"rates that are off by {off:.1%}, 999 in 1000",
    )


def _variance(what: str, centred: NDArray[np.float64], variance: float, *, kurtosis: float = 3.0) -> Finding:
    """The mean square of sums of many draws; by its normal limit where they are few draws each."""
    count = len(centred)
    found = float(np.mean(centred**2)) / variance
    if kurtosis == 3.0:
        low, high = (float(stats.chi2.ppf(p, count)) / count for p in (TAIL, 1 - TAIL))
    else:
        wide = float(-stats.norm.ppf(TAIL)) * math.sqrt((kurtosis - 1) / count)
        low, high = 1 - wide, 1 + wide
    return Finding.of(
        _CHECK,
        what,
        passed=low < found < high,
        statistic=f"variance {found:.3f} of a binomial's, allowed {low:.3f} to {high:.3f}, {count} counts",
        power=f"variances below {low * low:.2f} or above {high * high:.2f} of a binomial's",
    )


def _pairs(z_RU: NDArray[np.float64]) -> Finding:
    """Neighbours in the table, and the same unit in the rounds that follow, at lags up to 8."""
    scores = []
    for lag in range(1, 9):
        scores.append((z_RU[:, lag:] * z_RU[:, :-lag]).ravel())
        scores.append((z_RU[lag:] * z_RU[:-lag]).ravel())
    worst = max(abs(float(s.sum())) / math.sqrt(len(s)) for s in scores)
    allowed = float(-stats.norm.ppf(TAIL / len(scores)))
    return Finding.of(
        _CHECK,
        "units and rounds are independent in pairs",
        passed=worst < allowed,
        statistic=f"largest of {len(scores)} correlations {worst:.2f} deviations, allowed {allowed:.2f}",
        power=f"correlations of {(allowed + 3.1) / math.sqrt(len(scores[-1])):.3f}, 999 in 1000",
    )
