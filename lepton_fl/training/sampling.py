"""Which units enter a step: each by itself, with one probability, from a secure stream."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lepton_fl.secagg.masks import Keystream

_WHOLE = 1 << 64
_WORDS = 2
"""32-bit words of the stream for one unit in one step."""


class PoissonSampler:
    """Draws the units of each step of a round.

    Guarantee: for a uniform `key` each unit is in each step with probability `rate`, exactly, independently
    of all other units and steps: 64 bits of the key's AES-256-CTR stream against a threshold. So it earns
    the amplification that accounting claims for Poisson sampling at `rate`.
    """

    def __init__(self, units: int, rate: float, key: bytes) -> None:
        """`key` is 32 bytes for this object alone: who knows it knows who was sampled."""
        self._units = units
        self._stream = Keystream(key)
        self._word_W = np.empty(_WORDS * units, np.uint32)
        # A float64 times 2^64 is a whole number down to rates of 2^-11, and else is rounded down.
        self._threshold = int(rate * float(_WHOLE))
        self.rate = self._threshold / _WHOLE
        """Not above the rate asked for."""

    def draw(self, step: int) -> NDArray[np.int64]:
        """Indices of the units in this step, ascending."""
        if self._threshold >= _WHOLE:
            return np.arange(self._units)
        self._stream.fill(self._word_W, start=len(self._word_W) * step)
        drawn_U = self._word_W.astype("<u4", copy=False).view("<u8")
        return np.flatnonzero(drawn_U < np.uint64(self._threshold))
