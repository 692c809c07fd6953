"""How much privacy a sequence of noisy steps costs.

Privacy loss distributions (PLD; Doroshenko, Ghazi, Kamath, Kumar, Manurangsi, "Connect the Dots", PoPETs
2022) by Google's dp-accounting, pessimistically discretised, so every figure is an upper bound. Relation:
add or remove one unit. Tests cross-check Opacus's PRV accountant.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from lepton_fl.errors import ConfigError

if TYPE_CHECKING:
    from dp_accounting.pld import PLDAccountant

GATE = 1e-3
"""Discretisation of the privacy loss for decisions: at most 0.5 % above the finest, in milliseconds."""

_SIGMA_STEP = 1e-4
_SIGMA_MAX = 1e5


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Gaussian:
    """Poisson-subsampled Gaussian steps on one data set, as data that any accountant can read."""

    noise_multiplier: float
    """Standard deviation of the noise on a step's sum, divided by the clip."""
    sampling_rate: float
    """Probability with which each unit enters a step, independently."""
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ValueError(f"noise_multiplier {self.noise_multiplier} must be finite, above 0")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate {self.sampling_rate} must be in (0, 1]")
        if self.steps < 0:
            raise ValueError(f"steps {self.steps} must not be negative")

    def times(self, rounds: int) -> Gaussian:
        """So many rounds like this one."""
        return replace(self, steps=self.steps * rounds)


def epsilon(events: Iterable[Gaussian], delta: float, *, interval: float = GATE) -> float:
    """Epsilon at `delta` of all `events` composed, per unit, add-or-remove-one.

    Guarantee: never below the true value; `interval` sets how far above. `inf` where no finite epsilon
    is sustained at this delta.
    """
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        steps[event.noise_multiplier, event.sampling_rate] += event.steps
    merged = tuple(sorted((s, q, n) for (s, q), n in steps.items() if n > 0))
    return _epsilon(merged, delta, interval)


def epsilon_by_step(event: Gaussian, delta: float, at: Sequence[int]) -> list[float]:
    """Epsilon after each number of steps in `at`, were the run to stop there."""
    return [
        epsilon(
            [
                Gaussian(
                    noise_multiplier=event.noise_multiplier,
                    sampling_rate=event.sampling_rate,
                    steps=steps,
                )
            ],
            delta,
        )
        for steps in at
    ]


def calibrate(*, epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The smallest noise multiplier, to 1e-4, that keeps `steps` steps within (epsilon, delta).

    Raises:
        ConfigError: no noise multiplier up to 1e5 does.
    """
    return _calibrate(epsilon, delta, sampling_rate, steps)


@lru_cache(maxsize=256)
def _calibrate(target: float, delta: float, sampling_rate: float, steps: int) -> float:
    from scipy.optimize import brentq

    def excess(sigma: float) -> float:
        return _epsilon(((sigma, sampling_rate, steps),), delta, GATE) - target

    # The privacy loss of a tiny sigma is enormous to discretise, so come from above.
    high = 1.0
    while excess(high) > 0:
        high *= 2
        if high > _SIGMA_MAX:
            raise ConfigError(
                f"privacy: no noise multiplier up to {_SIGMA_MAX:g} keeps {steps} steps at sampling "
                f"rate {sampling_rate} within epsilon {target}, delta {delta}"
            )
    low = high / 2
    while excess(low) <= 0:
        if low < _SIGMA_STEP:
            return _SIGMA_STEP
        high, low = low, low / 2
    # On a grid, so that every site and every platform finds the same number; the root only says where.
    step = math.ceil(brentq(excess, low, high, xtol=_SIGMA_STEP / 4) / _SIGMA_STEP)
    while excess(_on_grid(step)) > 0:
        step += 1
    while excess(_on_grid(step - 1)) <= 0:
        step -= 1
    return _on_grid(step)


def _on_grid(step: int) -> float:
    return round(step * _SIGMA_STEP, 10)


@lru_cache(maxsize=4096)
def _epsilon(merged: tuple[tuple[float, float, int], ...], delta: float, interval: float) -> float:
    if not merged:
        return 0.0
    # Where the loss is beyond float64, dp-accounting divides by next to nothing and takes the infinity.
    with np.errstate(over="ignore"):
        return float(_accountant(merged, interval).get_epsilon(delta))


def _accountant(merged: tuple[tuple[float, float, int], ...], interval: float) -> PLDAccountant:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        value_discretization_interval=interval,
    )
    for noise_multiplier, sampling_rate, steps in merged:
        step = dp_accounting.GaussianDpEvent(noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(sampling_rate, step), steps)
    return accountant
