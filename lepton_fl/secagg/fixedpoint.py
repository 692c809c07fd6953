"""Fixed point: real updates as integers mod 2^32 whose sum is the sum of what they stand for.

K = updates, L = coordinates of each.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import BadReply, VerificationFailed
from lepton_fl.secagg.masks import Keystream, Words

LIMBS = 4
_LIMB_BITS = 16
MAX_PARTIES = 1 << 16
"""Largest cohort whose limbs add up below 2^32."""

ROOM = (1 << 30) - 1
"""Largest sum either way: half of the words stay impossible, so that what was not unmasked is noticed."""

_TILE = 1 << 15
Update: TypeAlias = NDArray[np.float32] | NDArray[np.float64]
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def most_bits(max_n: int, tails: int = 0) -> int:
    """The most bits of one site's integer, where so many are added up with `tails` beside them."""
    return ((ROOM - tails) // max_n + 1).bit_length()


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiser:
    """How the updates of a cohort become integers. Every field changes what a sum means.

    Guarantee (headroom): a site's integer is at most `half` = 2^(bits - 1) - 1 either way, so the sum over
    `max_n` sites and `tails` are below 2^30 and never wrap; among all 2^32 words at most half can be such a
    sum, so that `d` uniform words, a sum that was not unmasked, pass `decode` with a probability of at most
    2^-d.

    Raises:
        ValueError: there is no such headroom; or a field is out of range.
    """

    clip: float
    """A coordinate beyond it, either way, is cut to it."""
    bits: int
    """Of one site's integer, its sign included."""
    max_n: int
    """Most sites in a sum."""
    max_weight: int = 1
    """A site of this weight uses all of the bits; one of a sixteenth of it has four fewer."""
    tails: int = 0
    """Room, in a sum, for what sites add to their integers: their shares of the noise, all together."""

    def __post_init__(self) -> None:
        if not _SMALLEST <= self.clip <= _LARGEST:
            raise ValueError(f"clip = {self.clip}: {_SMALLEST:.3g} to {_LARGEST:.3g}, as float32 can hold")
        if not 1 <= self.max_n <= MAX_PARTIES:
            raise ValueError(f"max_n = {self.max_n}: 1 to {MAX_PARTIES}")
        if not 1 <= self.max_weight < 1 << LIMBS * _LIMB_BITS:
            raise ValueError(f"max_weight = {self.max_weight}: 1 to 2^64 - 1")
        if self.bits < 2 or self.tails < 0 or self.max_n * self.half + self.tails > ROOM:
            raise ValueError(
                f"bits = {self.bits}, tails = {self.tails}, sums of {self.max_n} sites: bits are 2 to "
                f"{most_bits(self.max_n, self.tails)}"
            )

    @classmethod
    def at_scale(cls, scale: float, *, max_n: int, tails: int = 0) -> Quantiser:
        """All the bits that there is room for, and `scale` integers for one unit of an update."""
        bits = most_bits(max_n, tails)
        return cls(clip=((1 << (bits - 1)) - 1) / scale, bits=bits, max_n=max_n, tails=tails)

    @property
    def half(self) -> int:
        """Largest integer of one site."""
        return (1 << (self.bits - 1)) - 1

    def clip_ratio(self, vector_L: Update) -> float:
        """Share of the coordinates that `encode` cuts. A fact about records: for the site's own eyes."""
        cut = sum(
            int(np.count_nonzero(np.abs(vector_L[at : at + _TILE]) > self.clip))
            for at in range(0, len(vector_L), _TILE)
        )
        return cut / max(len(vector_L), 1)

    def encode(self, vector_L: Update, *, weight: int, rounding_key: bytes) -> Words:
        """`weight` times the clipped update, in steps of clip * max_weight / half, as two's complement.

        `rounding_key` is 32 bytes from os.urandom, used for this call alone and then forgotten: who knows
        it knows how each coordinate was rounded.

        Guarantee: each integer is one of the two next to the exact product, the upper one with a
        probability equal to the fraction, so that the mean over keys is the product (within 2^-20 of a
        step, what float64 leaves out); a product that is an integer is not changed. No integer exceeds
        `half`, for any input. For any one key no two updates end up further apart, in steps, than they were
        and 1 more in each coordinate.

        Raises:
            BadReply: a coordinate is not finite, or the weight is not a whole number in 1 ... max_weight.
            ValueError: the vector is not one-dimensional float32 or float64.
        """
        encoded_1L = self.encode_each(vector_L[np.newaxis], weight=weight, rounding=[Keystream(rounding_key)])
        return encoded_1L.reshape(-1)

    def encode_each(
        self, vector_KL: Update, *, weight: int, rounding: Sequence[Keystream], start: int = 0
    ) -> Words:
        """Rows as `encode` encodes each of them, by the words from `start` on of its stream.

        A word of a stream is for one coordinate of one update, ever.

        Raises:
            BadReply: as `encode`.
            ValueError: as `encode`; or `start` is negative.
        """
        if vector_KL.dtype not in (np.float32, np.float64) or vector_KL.ndim != 2:
            raise ValueError(
                "an update is one-dimensional float32 or float64, "
                f"not {vector_KL.ndim - 1}-d {vector_KL.dtype}"
            )
        weight = self._checked(weight)
        bound = float(Fraction(self.half * weight, self.max_weight))
        scale = float(Fraction(self.half * weight) / (Fraction(self.clip) * self.max_weight))
        rows, coordinates = vector_KL.shape
        encoded_KL: Words = np.empty((rows, coordinates), np.uint32)
        at_once = max(1, _TILE // max(coordinates, 1))
        for first in range(0, rows, at_once):
            row = slice(first, first + at_once)
            for at in range(0, coordinates, _TILE):
                part_KT = vector_KL[row, at : at + _TILE]
                if not np.isfinite(part_KT).all():
                    raise BadReply("an update has a coordinate that is not finite")
                exact_KT = np.multiply(part_KT, scale, dtype=np.float64)
                np.clip(exact_KT, -bound, bound, out=exact_KT)
                below_KT = np.floor(exact_KT)
                word_KT = np.empty(part_KT.shape, np.uint32)
                for stream, word_T in zip(rounding[row], word_KT, strict=True):
                    stream.fill(word_T, start=start + at)
                # floor(v + u), in an order that rounds nothing: adding u first would push 2^26 - 1 + u up.
                exact_KT -= below_KT
                exact_KT *= 2.0**32
                integer_KT = encoded_KL[row, at : at + _TILE].view(np.int32)
                integer_KT[:] = below_KT
                integer_KT += word_KT < exact_KT
        return encoded_KL

    def decode(self, sum_L: Words, *, n: int, total_weight: int) -> NDArray[np.float64]:
        """The weighted mean of the clipped updates of `n` sites, from the sum of their encodings.

        Guarantee: each coordinate is within `n` steps of clip * max_weight / (half * total_weight) of the
        exact weighted mean (and 2^-20 of that for float64), and right on average; roundings are independent,
        so the error's standard deviation is at most sqrt(n) / 2 steps.

        Raises:
            VerificationFailed: a coordinate is not a sum of `n` encodings and what may be added to them, so
                somebody did not encode.
            ValueError: the sum is not one-dimensional uint32, or n or the weight is out of range.
        """
        if sum_L.dtype != np.uint32 or sum_L.ndim != 1:
            raise ValueError(f"a sum is one-dimensional uint32, not {sum_L.ndim}-d {sum_L.dtype}")
        if not 1 <= n <= self.max_n or not 1 <= total_weight <= n * self.max_weight:
            raise ValueError(f"n = {n} of {self.max_n}, total weight {total_weight}")
        signed_L = sum_L.view(np.int32)
        limit = n * self.half + self.tails
        beyond = int(np.count_nonzero((signed_L > limit) | (signed_L < -limit)))
        if beyond:
            raise VerificationFailed(f"{beyond} of {len(sum_L)} sums are beyond what {n} sites can add up to")
        step = float(Fraction(self.clip) * self.max_weight / (self.half * total_weight))
        return np.multiply(signed_L, step, dtype=np.float64)

    def weight_limbs(self, weight: int) -> Words:
        """A weight as four words of 16 bits, lowest first, to be masked and added with the update.

        Guarantee: the sum over at most 65,536 sites is exact; see `total_weight`.

        Raises:
            BadReply: the weight is not a whole number in 1 ... max_weight.
        """
        weight = self._checked(weight)
        return np.array([weight >> _LIMB_BITS * limb & 0xFFFF for limb in range(LIMBS)], np.uint32)

    def total_weight(self, limbs: Words, *, n: int) -> int:
        """The sum of the weights of `n` sites, exact, from the sum of their limbs.

        Raises:
            VerificationFailed: it is not a sum of `n` weights in 1 ... max_weight.
        """
        total = sum(int(limb) << _LIMB_BITS * place for place, limb in enumerate(limbs))
        within = all(int(limb) <= n * 0xFFFF for limb in limbs)
        if len(limbs) != LIMBS or not within or not n <= total <= n * self.max_weight:
            raise VerificationFailed(f"the weights of {n} sites add up to what they cannot")
        return total

    def _checked(self, weight: int) -> int:
        try:
            whole = operator.index(weight)
        except TypeError:
            whole = 0
        if not 1 <= whole <= self.max_weight:
            raise BadReply(f"weight {weight!r}: a whole number, 1 to {self.max_weight}")
        return whole
