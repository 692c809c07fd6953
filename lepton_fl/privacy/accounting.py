"""How much privacy a sequence of noisy steps costs.

Privacy loss distributions (PLD; Doroshenko, Ghazi, Kamath, Kumar, Manurangsi, "Connect the Dots", PoPETs
2022) by Google's dp-accounting, pessimistically discretised, so every figure is an upper bound. Relation:
add or remove one unit, or one person's units at several sites of a sum. Steps with discrete noise are
Gaussian steps and a gap that is added to delta: docs/accounting.md has the theorem and its proof. Tests
cross-check Opacus's PRV accountant.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from lepton_fl.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
    from numpy.typing import NDArray

GATE = 1e-3
"""Coarsest discretisation of the privacy loss, for decisions."""

SMOOTHING = 2.0
"""Parameter of the rounding that makes a continuous Gaussian discrete (docs/accounting.md, Lemma 4)."""
LEAST_SHARE = 4.0
"""Parameter from which on sums of shares, and that rounding, are as close as `_CLOSENESS` says."""

_CLOSENESS = 2.0**-110
"""Total variation, for a coordinate and step, between a sum of ideal shares and the rounded Gaussian."""
_PER_UNIT = 1e6
_SIGMA_STEP = 1e-4
_SIGMA_MAX = 1e5
_EPSILON_MAX = 1e6


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Gaussian:
    """Poisson-subsampled Gaussian steps on one data set, as data that any accountant can read."""

    noise_multiplier: float
    """Standard deviation of the noise on a step's sum, divided by the clip."""
    sampling_rate: float
    """Probability with which each unit enters a step, independently."""
    steps: int
    sites_per_unit: int = 1
    """Sites of the sum, each sampling by itself, that may hold a unit of one person: added together."""

    def __post_init__(self) -> None:
        _check(self.noise_multiplier, "noise_multiplier", "must be finite, above 0", above=0)
        _check_steps(self.sampling_rate, self.steps, self.sites_per_unit)

    @property
    def gap(self) -> float:
        """Total variation between what ran and what is composed: nothing."""
        return 0.0

    def times(self, rounds: int) -> Gaussian:
        """So many rounds like this one."""
        return replace(self, steps=self.steps * rounds)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class DiscreteGaussian:
    """Poisson-subsampled steps that each open integers under a sum of discrete Gaussian shares, as data.

    **Formal guarantee** (theorem of docs/accounting.md). In a step a site clips, adds up, scales and rounds
    its sampled units' gradients, and adds to each coordinate one share: a discrete Gaussian of parameter
    `share`. Against whoever does not know `shares` of the shares in what is opened, the steps cost a unit of
    the site, or a person's units at `sites_per_unit` of the sites, what as many Poisson-subsampled Gaussian
    steps of multiplier `noise_multiplier` cost, with (1 + e^epsilon) `gap` added to delta.
    """

    clip: float
    """L2 bound on one unit's gradient, before scaling."""
    scale: float
    """Integers for one unit of gradient, a power of two."""
    slack: float
    """What floating point adds: a computed sum moves by at most clip * (1 + slack) with one unit."""
    coordinates: int
    share: float
    """Parameter of one site's discrete Gaussian, in integers: its standard deviation but for 2^-200."""
    shares: int
    """Shares of honest sites at least in what is opened, the site's own among them."""
    sampler_distance: float
    """Bound on the total variation between one drawn share and the discrete Gaussian."""
    sampling_rate: float
    """Probability with which each unit enters a step, independently."""
    steps: int
    sites_per_unit: int = 1
    """Sites of the sum, each sampling by itself, that may hold a unit of one person: added together."""

    def __post_init__(self) -> None:
        _check(self.clip, "clip", "must be finite, above 0", above=0)
        if not (math.isfinite(self.scale) and math.frexp(self.scale)[0] == 0.5):
            raise ValueError(f"scale {self.scale} must be a power of two")
        _check(self.slack, "slack", "must be finite, not negative", least=0)
        _check(self.coordinates, "coordinates", "must be 1 or more", least=1)
        _check(self.share, "share", f"must be finite, {LEAST_SHARE:g} or more", least=LEAST_SHARE)
        if not 1 <= self.shares <= 1 << 32:
            raise ValueError(f"shares {self.shares} must be 1 to 2^32")
        if not 0 <= self.sampler_distance < 1:
            raise ValueError(f"sampler_distance {self.sampler_distance} must be in [0, 1)")
        _check_steps(self.sampling_rate, self.steps, self.sites_per_unit)
        if self.noise_multiplier <= 0:
            raise ValueError(f"share {self.share} is no noise at sensitivity {self.sensitivity}")

    @property
    def sensitivity(self) -> float:
        """L2 bound, in integers, on what one unit at one site changes; see `sensitivity`."""
        return sensitivity(clip=self.clip, scale=self.scale, slack=self.slack, coordinates=self.coordinates)

    @property
    def noise_multiplier(self) -> float:
        """Of the Gaussian steps that these are accounted as, rounded down to 1e-6."""
        variance = self.shares * (self.share * self.share) - SMOOTHING**2
        # 2^-40: more than float64 can have rounded up on the way.
        exact = math.sqrt(variance) / self.sensitivity * (1 - 2.0**-40)
        return math.floor(exact * _PER_UNIT) / _PER_UNIT

    @property
    def gap(self) -> float:
        """Total variation between what ran and the post-processed Gaussian steps, all steps together."""
        return self.steps * self.coordinates * (self.shares * self.sampler_distance + _CLOSENESS)

    def times(self, rounds: int) -> DiscreteGaussian:
        """So many rounds like this one."""
        return replace(self, steps=self.steps * rounds)


Event = Gaussian | DiscreteGaussian
"""What a ledger stores: fields, from which the cost follows."""


def sensitivity(*, clip: float, scale: float, slack: float, coordinates: int) -> float:
    """How far one unit moves a rounded sum, in integers, L2 (docs/accounting.md, Lemma 5).

    scale * clip * (1 + slack), and 1 for each coordinate that rounding may carry over its threshold.
    """
    return scale * clip * (1 + slack) + math.sqrt(coordinates)


def share_for(noise_multiplier: float, *, sensitivity: float, shares: int) -> float:
    """The least parameter of a share, but for 2^-36, with which `shares` of them give the multiplier."""
    # The excess covers what `DiscreteGaussian.noise_multiplier` rounds down.
    noise = noise_multiplier * sensitivity
    return math.sqrt((noise * noise * (1 + 2.0**-36) + SMOOTHING**2) / shares)


def epsilon(events: Iterable[Event], delta: float, *, interval: float | None = None) -> float:
    """Epsilon at `delta` of all `events` composed, per unit, add-or-remove-one.

    Guarantee: never below the true value. How far above is set by `interval`, the discretisation of the
    privacy loss; None chooses one for which it is at most 5 % above the finest. `inf` where no finite
    epsilon is sustained at this delta, or none within 1 of the epsilon without the events' gaps.
    """
    steps: Counter[tuple[float, float, int]] = Counter()
    gap = 0.0
    for event in events:
        steps[event.noise_multiplier, event.sampling_rate, event.sites_per_unit] += event.steps
        gap += event.gap
    merged = tuple(sorted((*kind, n) for kind, n in steps.items() if n > 0))
    return _epsilon(merged, delta, interval, gap)


def gap_allowance(*, epsilon: float, delta: float) -> float:
    """The gap that a promise has room for: 2^-10 of its delta, as `epsilon` uses it."""
    return delta * 2.0**-10 / (1 + math.exp(epsilon + 1))


def calibrate(
    *,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    sites_per_unit: int = 1,
    gap: float = 0.0,
    beside: Gaussian | None = None,
) -> float:
    """The smallest noise multiplier, to 1e-4, that keeps `steps` steps within (epsilon, delta).

    `gap` is the total variation, all steps together, that discrete noise may have to the Gaussian's;
    `beside` is what else is to be within the two, composed with the steps.

    Raises:
        ConfigError: no noise multiplier up to 1e5 does.
    """
    return _calibrate(epsilon, delta, sampling_rate, sites_per_unit, steps, gap, beside)


@lru_cache(maxsize=256)
def _calibrate(
    target: float,
    delta: float,
    sampling_rate: float,
    sites_per_unit: int,
    steps: int,
    gap: float,
    beside: Gaussian | None,
) -> float:
    from scipy.optimize import brentq

    def excess(sigma: float) -> float:
        kinds = [(sigma, sampling_rate, sites_per_unit, steps)]
        if beside is not None:
            kinds.append((beside.noise_multiplier, beside.sampling_rate, beside.sites_per_unit, beside.steps))
        # Where the gap leaves no finite epsilon there is a way to go still.
        return min(_epsilon(tuple(sorted(kinds)), delta, None, gap), _EPSILON_MAX) - target

    # The privacy loss of a tiny sigma is enormous to discretise, so come from above.
    high = float(sites_per_unit)
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


_Merged = tuple[tuple[float, float, int, int], ...]
"""(noise multiplier, sampling rate, sites per unit, steps), each kind once."""


@lru_cache(maxsize=4096)
def _epsilon(merged: _Merged, delta: float, interval: float | None, gap: float) -> float:
    import numpy as np

    if not merged:
        return 0.0
    # Where the loss is beyond float64, dp-accounting divides by next to nothing and takes the infinity.
    with np.errstate(over="ignore"):
        loss = _composed(merged, _interval(merged) if interval is None else interval)
        without = float(loss.get_epsilon_for_delta(delta))
        if gap == 0:
            return without
        # delta pays for the gap at an epsilon of 1 more, and so at any below it: no search for the least.
        if without + 1 >= math.log(delta / gap):
            return math.inf
        left = delta - (1 + math.exp(without + 1)) * gap
        within = float(loss.get_epsilon_for_delta(left)) if left > 0 else math.inf
        return within if within <= without + 1 else math.inf


def _interval(merged: _Merged) -> float:
    """Half the standard deviation of the smallest loss of one step, as far as that is worth its time.

    A loss that is smaller than the interval is discretised to one many times as large. The choice depends on
    the kinds of steps and not on their number, so that more of a kind never seem to cost less.
    """
    import numpy as np

    # No larger than GATE, whatever the loss: there are sigmas whose loss float64 does not hold.
    spreads, widest = [], -math.inf
    for sigma, q, sites, _ in merged:
        taken, chance = np.arange(sites + 1), _taken(q, sites)
        with np.errstate(divide="ignore"):
            # Ten standard deviations of noise out, where sampled units show most.
            most = np.log(chance) + taken * (20 * sigma + 2 * sites - taken) / (2 * sigma**2)
        widest = max(widest, most[1:].max())
        # The chi-squared divergence of the mixture: of one site, q^2 (exp(1 / sigma^2) - 1).
        pairs = np.expm1(np.minimum(np.outer(taken, taken) / sigma**2, 100.0))
        spreads.append(math.sqrt(chance @ pairs @ chance))
    # Finer than that, of what the largest loss asks, takes seconds and changes next to nothing.
    fine = max(min(spreads) / 2, max(spreads) * 2.0**-8, widest * 2.0**-13)
    return GATE * 2.0 ** -max(0, math.ceil(math.log2(GATE / fine)))


def _composed(merged: _Merged, interval: float) -> PrivacyLossDistribution:
    from functools import reduce

    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    from lepton_fl.privacy.several_sites import privacy_loss

    losses = (
        (
            from_gaussian_mechanism(sigma, sampling_prob=q, value_discretization_interval=interval)
            if sites == 1
            else privacy_loss(sigma, _taken(q, sites), interval)
        ).self_compose(steps)
        for sigma, q, sites, steps in merged
    )
    return reduce(lambda one, other: one.compose(other), losses)


def _taken(sampling_rate: float, sites: int) -> NDArray[np.float64]:
    """How likely 0, 1, ... of a person's units at so many sites are sampled in one step."""
    import numpy as np
    from scipy.stats import binom

    chance: NDArray[np.float64] = binom.pmf(np.arange(sites + 1), sites, sampling_rate)
    return chance


def _check(value: float, name: str, rule: str, *, above: float = -math.inf, least: float = -math.inf) -> None:
    if not (math.isfinite(value) and value > above and value >= least):
        raise ValueError(f"{name} {value} {rule}")


def _check_steps(sampling_rate: float, steps: int, sites_per_unit: int) -> None:
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"sampling_rate {sampling_rate} must be in (0, 1]")
    _check(steps, "steps", "must not be negative", least=0)
    _check(sites_per_unit, "sites_per_unit", "must be 1 or more", least=1)
