"""A round's sums of clipped gradients as integers with noise.

K sites, L coordinates, M numbers of one site's noise that are drawn at once: those of a few steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lepton_fl.privacy.discrete_gaussian import samples
from lepton_fl.privacy.lattice import Lattice
from lepton_fl.secagg.masks import Keystream
from lepton_fl.training.noise import Noise

AHEAD = 1 << 17
"""Numbers of one site's noise that are drawn at once, at most; of larger models, those of one step."""


class Noising:
    """Rounds the sums of each step of one round to a lattice, and adds a discrete Gaussian share to each.

    Guarantee: a site's noise and rounding come from keys of its own alone, so they are bit by bit the same
    whichever sites are beside it; every number and every word of a stream is for one step. How many steps
    are drawn at once follows from public sizes. What is drawn for later steps stays in this object, and
    `forget` drops it.

    Memory: 4 bytes for each of `AHEAD` numbers a site, or for each coordinate where there are more.
    """

    def __init__(
        self, lattice: Lattice, coordinates: int, noises: Sequence[Noise], round: int, *, steps: int
    ) -> None:
        """For so many steps, at the sites with these keys."""
        self.lattice, self._coordinates = lattice, coordinates
        self._noises, self._round, self._steps = noises, round, steps
        self._at_once = max(1, AHEAD // max(coordinates, 1))
        self._quantiser = lattice.quantiser()
        self._rounding = [Keystream(noise.key("rounding of steps", round)) for noise in noises]
        self._taken = 0
        self._left: list[NDArray[np.int32]] = []
        """Of the steps drawn so far, those to come, the next one last."""

    def __call__(self, sum_KL: NDArray[np.float64]) -> NDArray[np.float64]:
        """The next step's sums as multiples of 1 / scale, with their noise.

        What the integers stand for is exact in float64; what is computed from it costs no privacy.

        Raises:
            ValueError: all steps are taken.
        """
        if self._taken == self._steps:
            raise ValueError(f"noise for {self._steps} steps, and one more is asked for")
        # A multiple of a cipher's block apart.
        start = self._taken * -(-self._coordinates // 4) * 4
        word_KL = self._quantiser.encode_each(sum_KL, weight=1, rounding=self._rounding, start=start)
        # Neither overflows: the lattice's integers are below 2^30, and noise below 2^28.
        integer_KL = word_KL.view(np.int32)
        integer_KL += self._next()
        return integer_KL / self.lattice.scale

    def forget(self) -> None:
        """Drop what is drawn for later steps."""
        self._left.clear()

    def _next(self) -> NDArray[np.int32]:
        if not self._left:
            steps = min(self._at_once, self._steps - self._taken)
            keys = [noise.key(f"noise from step {self._taken}", self._round) for noise in self._noises]
            drawn_KM = samples(self.lattice.share, steps * self._coordinates, keys=keys)
            self._left = list(drawn_KM.reshape(len(keys), steps, -1).swapaxes(0, 1)[::-1])
        self._taken += 1
        return self._left.pop()
