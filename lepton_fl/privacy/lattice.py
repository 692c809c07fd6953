"""Which integers a federation's gradients and noise become: fine enough, and with room in 32-bit words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from lepton_fl.errors import ConfigError
from lepton_fl.privacy.accounting import DiscreteGaussian, sensitivity, share_for
from lepton_fl.secagg.fixedpoint import ROOM, Quantiser

SLACK = 2.0**-10
"""What training promises: a computed sum moves by at most clip * (1 + SLACK) with one unit.

docs/accounting.md says for which batches and precisions that holds.
"""

_TAIL = 12
"""Standard deviations of all sites' noise that have room: a coordinate leaves it with 2^-102."""
_OVERHEAD = 0.01
"""Most that rounding may add, of the sensitivity."""
_ENOUGH_REACH, _LEAST_REACH = 4.0, 1 / 32
_LEAST_SHARE, _LARGEST_SHARE = 2.0**10, 2.0**24
"""From where on smoothing costs less than 2e-6 of the noise; and what the sampler is made for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lattice:
    """How a site's sum of gradients becomes integers, and how much noise each site adds to them.

    Guarantee (headroom): `cohort` * `half` + `tails` < 2^30, so that a sum of integers within +-`half` and
    of `cohort` shares never wraps, and leaves +-(cohort * half + tails) in one coordinate with a
    probability of at most 2^-102.
    """

    clip: float
    slack: float
    scale: float
    """Integers for one unit of gradient, a power of two."""
    coordinates: int
    expected_batch: float
    """Of one site, in units."""
    cohort: int
    """Most sites in a sum."""
    shares: int
    """Honest shares at least in what is opened."""
    share: float
    """Parameter of the discrete Gaussian that each site adds to each coordinate, in integers."""

    @classmethod
    @lru_cache(maxsize=256)
    def of(
        cls,
        *,
        clip: float,
        noise_multiplier: float,
        coordinates: int,
        cohort: int,
        shares: int,
        expected_batch: float,
        slack: float = SLACK,
    ) -> Lattice:
        """The finest scale with `reach` 4 and 1 % `overhead`, else the coarsest with 1 % and a reach of 1/32.

        Raises:
            ConfigError: no power of two has room for both the sums and their noise.
        """
        usable = []
        for power in range(-16, 64):
            scale = 2.0**power
            moved = sensitivity(clip=clip, scale=scale, slack=slack, coordinates=coordinates)
            lattice = cls(
                clip=clip,
                slack=slack,
                scale=scale,
                coordinates=coordinates,
                expected_batch=expected_batch,
                cohort=cohort,
                shares=shares,
                share=share_for(noise_multiplier, sensitivity=moved, shares=shares),
            )
            if (
                lattice.overhead <= _OVERHEAD
                and _LEAST_SHARE <= lattice.share <= _LARGEST_SHARE
                and lattice.reach >= _LEAST_REACH
            ):
                usable.append(lattice)
        if not usable:
            raise ConfigError(
                f"sums of 32 bits have no room for {cohort} sites (secure_aggregation), batches of "
                f"{expected_batch:g} (train.expected_batch), {coordinates} parameters (model) and noise of "
                f"{noise_multiplier:g} x {math.sqrt(cohort / shares):.3g} clips "
                "(privacy.epsilon, train.rounds)",
                fix="take a smaller model, a smaller expected_batch, fewer sites, or a larger epsilon",
            )
        roomy = [lattice for lattice in usable if lattice.reach >= _ENOUGH_REACH]
        return roomy[-1] if roomy else usable[0]

    @property
    def sensitivity(self) -> float:
        """L2 bound, in integers, on what one unit changes."""
        return sensitivity(clip=self.clip, scale=self.scale, slack=self.slack, coordinates=self.coordinates)

    @property
    def overhead(self) -> float:
        """Part of the sensitivity, and so of the noise, that rounding costs."""
        return math.sqrt(self.coordinates) / self.sensitivity

    @property
    def tails(self) -> int:
        """Room for the noise of a whole cohort in one coordinate of a sum, either way."""
        return math.ceil(_TAIL * self.share * math.sqrt(self.cohort))

    @property
    def half(self) -> int:
        """Largest integer of one site before noise, either way; a sum beyond it is cut to it."""
        return (ROOM - self.tails) // self.cohort

    @property
    def reach(self) -> float:
        """Expected batches that may pull along one coordinate with their whole clip before it is cut."""
        return self.half / (self.scale * self.clip * self.expected_batch)

    def quantiser(self, *, divisor: float = 1.0) -> Quantiser:
        """What rounds sums of gradients, divided by `divisor`, to this lattice.

        Its largest integer is the largest 2^k - 1 up to `half`.
        """
        return Quantiser.at_scale(self.scale * divisor, max_n=self.cohort, tails=self.tails)

    def event(
        self, *, sampling_rate: float, steps: int, sampler_distance: float, sites_per_unit: int = 1
    ) -> DiscreteGaussian:
        """What so many steps on this lattice cost, given the total variation of one drawn share."""
        return DiscreteGaussian(
            clip=self.clip,
            scale=self.scale,
            slack=self.slack,
            coordinates=self.coordinates,
            share=self.share,
            shares=self.shares,
            sampler_distance=sampler_distance,
            sampling_rate=sampling_rate,
            steps=steps,
            sites_per_unit=sites_per_unit,
        )
