"""The privacy loss of a person whose units are at several sites of one sum, each of which samples by itself.

In a step k of these units are sampled, k binomial, and the sum moves by at most k sensitivities. The worst
case is a mixture of Gaussians in one dimension (docs/accounting.md, "One person at several sites"), whose
loss dp-accounting discretises; what is ours is how the loss is inverted: for all grid points at once.
dp-accounting takes a call of Python for each, and five to ten times as long.
"""

from __future__ import annotations

import numpy as np
from dp_accounting.pld.pld_pmf import PLDPmf, create_pmf_pessimistic_connect_dots_fixed_gap
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, MixtureGaussianPrivacyLoss
from numpy.typing import NDArray
from scipy.special import logsumexp

_HALVINGS = 40
"""Of 60 standard deviations of the noise and more, to 2^-34 of one. Since delta is greatest where the loss is
inverted exactly, it is off by the square of that."""


class _SeveralSites(MixtureGaussianPrivacyLoss):  # type: ignore[misc]  # dp-accounting has no types
    """dp-accounting's mixture, with an inverse of many points at once."""

    def inverse_privacy_losses(
        self,
        privacy_losses: NDArray[np.float64],
        precision: float = 0.0,  # noqa: ARG002 - as fine as `_HALVINGS`
    ) -> NDArray[np.float64]:
        """Where the loss, which falls in x, is each of these."""
        tail = self.privacy_loss_tail()
        width = tail.upper_x_truncation - tail.lower_x_truncation
        # The outermost grid points are beyond the truncation, by less than an interval of the loss.
        low = np.full(len(privacy_losses), tail.lower_x_truncation - width)
        high = np.full(len(privacy_losses), tail.upper_x_truncation + width)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            above = self._losses(middle) > privacy_losses
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return high

    def _losses(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        sign = 1.0 if self.adjacency_type is AdjacencyType.ADD else -1.0
        exponent = (
            self._precompute_privacy_loss_constants + sign * np.outer(x, self.sensitivities) / self._variance
        )
        loss: NDArray[np.float64] = -sign * logsumexp(exponent, axis=1)
        return loss


def privacy_loss(
    noise_multiplier: float, chance_K: NDArray[np.float64], interval: float
) -> PrivacyLossDistribution:
    """Of one step in which k units of a person are sampled with probability `chance_K[k]`, either relation.

    Pessimistic: at most what dp-accounting's connecting of dots adds at this interval of the loss.
    """
    return PrivacyLossDistribution(
        *(
            _discretised(
                _SeveralSites(noise_multiplier, np.arange(len(chance_K)), chance_K, adjacency_type=adjacency),
                interval,
            )
            for adjacency in (AdjacencyType.REMOVE, AdjacencyType.ADD)
        )
    )


def _discretised(loss: _SeveralSites, interval: float) -> PLDPmf:
    bounds = loss.connect_dots_bounds()
    low = int(np.floor(bounds.epsilon_lower / interval))
    high = int(np.ceil(bounds.epsilon_upper / interval))
    delta = loss.get_delta_for_epsilon(np.arange(low, high + 1) * interval)
    return create_pmf_pessimistic_connect_dots_fixed_gap(interval, low, high, delta)
