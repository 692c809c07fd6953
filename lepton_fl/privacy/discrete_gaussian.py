"""The discrete Gaussian on the integers, P(k) proportional to exp(-k^2 / (2 sigma^2)): noise for fixed point.

A draw of a small sigma is an inversion: 128 uniform bits against the steps of the cumulative distribution,
held to 128 bits. Most draws need only their first 16 bits, which a table of 2^16 cells turns into the value;
a cell with a step inside leaves it open, and the other 112 bits decide.

A draw of a large sigma is put together from L small ones (Micciancio and Walter, CRYPTO 2017; Peikert,
CRYPTO 2010), x = b_1 + m (b_2 + m (... + m b_L)): with the largest m such that 2 m^L <= sigma, all but b_L
have the parameter 2 m, and b_L the one with which the variances add up to sigma^2, as a fraction. `distance`
has the proof.

Why the attack of Mironov (CCS 2012) finds nothing: it reads a query's answer from the holes and the uneven
weights that rounding leaves in floating-point noise. Here the noise and what it hides are integers, each of
which adds to the other exactly; every probability comes from whole numbers of 128 bits, and the whole
difference from the ideal is in `distance`. Floats are in what is asked for (a `sigma`, which is taken as the
fraction that it is) and in the bound that is reported, never in a draw.

Bits are of the key's mask (`secagg.masks`), little-endian, cut into lanes of 2^64 blocks, two a level. Lane
2 j holds two bytes for each draw of b_{j+1}, its first 16 bits; lane 2 j + 1 holds a block for each one that
was left open, in order: its first six bytes are the next 48 bits, its last eight the last 64.

K = keys, T = draws of one tile, O = those of them that their first 16 bits left open.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lepton_fl.secagg import masks

SMALLEST, LARGEST = 1.0, float(1 << 24)
"""The sigmas that are served."""

_MOST = (1 << 8, 1 << 14)
"""Up to which sigma one level is used, and two; above, three. A matter of speed alone."""
_CUT = 13
"""Standard deviations at which a table ends."""
_PRECISION = 256
"""Bits after the point in which a table's weights are computed."""
_OPEN = 1 << 14
"""Added, in a table's cells, to the value before the first step inside; over twice the largest value."""
_NEXT = np.uint64((1 << 48) - 1)
_TILE = 1 << 17
_LANE_WORDS = 1 << 66


def sample(sigma: float, count: int, *, key: bytes) -> NDArray[np.int32]:
    """`count` independent draws of the centred discrete Gaussian with the parameter `sigma`.

    `key` is 32 bytes from os.urandom, used for this call alone and then forgotten: who knows it knows the
    noise.

    Guarantee: for uniform bits the draws are independent, and the law of each is within `distance(sigma)` of
    the discrete Gaussian in total variation. So what is (epsilon, delta)-private with ideal noise is
    (epsilon, delta + (1 + e^epsilon) d)-private with ours, d the sum of the distances of all draws. For a
    uniform key nobody tells the bits from uniform ones without breaking AES-256, or luck of at most
    q^2 / 2^129 over q blocks of 16 bytes. Equal arguments give equal draws, and a smaller count their
    beginning.

    Timing: how long it takes tells how many draws were left open by their first 16 bits, a count over all
    of them; who shares the processor's caches may learn which parts of the tables were read, and so
    something of single draws. Run it where no stranger shares the core.

    Every draw is below 2^28 in size. Memory: the result, and below 4 MB whatever the count.

    Raises:
        ValueError: sigma is not in SMALLEST ... LARGEST, the count is negative or the key not 32 bytes.
    """
    return samples(sigma, count, keys=[key]).reshape(-1)


def samples(sigma: float, count: int, *, keys: Sequence[bytes]) -> NDArray[np.int32]:
    """For each of `keys` what `sample` draws under it, as rows; all together, which is faster.

    Raises:
        ValueError: as `sample`.
    """
    if count < 0:
        raise ValueError(f"count = {count}: not negative")
    for key in keys:
        if len(key) != masks.KEY_BYTES:
            raise ValueError(f"a key for noise is {masks.KEY_BYTES} bytes, not {len(key)}")
    m, variances = _levels(sigma)
    tables = [_table(variance) for variance in variances]
    # int32: the largest |x| is below 16 LARGEST = 2^28.
    drawn: NDArray[np.int32] = np.empty((len(keys), count), np.int32)
    at_once = max(1, _TILE // max(count, 1))
    for first in range(0, len(keys), at_once):
        streams = [masks.Keystream(key) for key in keys[first : first + at_once]]
        levels = [_Level(table, streams, lane) for lane, table in enumerate(tables)]
        for at in range(0, count, _TILE):
            size = min(_TILE, count - at)
            sum_KT = drawn[first : first + at_once, at : at + size]
            sum_KT[:] = levels[-1].draw(size)
            for level in reversed(levels[:-1]):
                sum_KT *= m
                sum_KT += level.draw(size)
    return drawn


@lru_cache(maxsize=64)
def distance(sigma: float) -> float:
    """A bound on the total-variation distance between one draw and the ideal: below 2^-110 for every sigma.

    The sum of what is not ideal:

    * A table is cut at K >= 13 s on both sides, which loses at most 2 exp(-K^2 / (2 s^2)), the discrete
      Gaussian being subgaussian (Canonne, Kamath and Steinke 2020), and its steps are rounded down to
      2^-128, which moves at most 2^-128 a value, the error of the weights (below 2^-200) with it.
    * x = b + m y, with ideal b and y of the variances s^2 and v, has at x the weight exp(-x^2 / (2 (s^2 +
      m^2 v))) times the sum of exp(-(k - c x)^2 / (2 t^2)) over the integers k, t^2 = s^2 v / (s^2 + m^2 v)
      (complete the square). By Poisson's summation that sum is within a factor of 1 +- e of t sqrt(2 pi),
      with e = 2 (exp(-2 pi^2 t^2) + exp(-8 pi^2 t^2) + ...). So x is within e / (1 - e) of the ideal.

    Distances add up: each step is a function of independent draws that are close to ideal ones.

    Raises:
        ValueError: sigma is not in SMALLEST ... LARGEST.
    """
    m, variances = _levels(sigma)
    total = 0.0
    for variance in variances:
        width = _half_width(variance)
        total += (2 * width + 1) * 2.0**-128 + 2 * math.exp(-(width**2) / (2 * variance))
    whole = Fraction(sigma) ** 2
    for fine in variances[:-1]:
        rest = (whole - fine) / m**2
        # 2.01 exp(-2 pi^2 t^2) is above e / (1 - e) where t > 1; ours are near 2.
        total += 2.01 * math.exp(-2 * math.pi**2 * fine * rest / whole)
        whole = rest
    return total * (1 + 2.0**-20)


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Inversion of the discrete Gaussian of one variance, on -K ... K."""

    steps: list[int]
    """P(x < k) in units of 2^-128, rounded down, for k = -K ... K: it begins with 0."""
    high: NDArray[np.uint64]
    """Their upper 64 bits, and one that is above all of them."""
    cells: NDArray[np.int16]
    """The value by the first 16 bits; where there is a step with these bits, the one before it + _OPEN."""

    def invert(
        self, cell_O: NDArray[np.int16], high_O: NDArray[np.uint64], low_O: NDArray[np.uint64]
    ) -> NDArray[np.int64]:
        """The largest value whose step is at most the 128 bits, of which an open cell has the first 16."""
        zero = len(self.steps) // 2
        # Of the first step inside; nearly always it is the only one.
        index_O = np.add(cell_O, zero + 1 - _OPEN, dtype=np.int64)
        index_O += self.high.take(index_O) < high_O
        rest_R = np.flatnonzero(self.high.take(index_O) <= high_O)
        if len(rest_R):
            high_R = high_O[rest_R]
            index_R = np.searchsorted(self.high, high_R, side="right")
            # Where 64 bits are a step's own, the other 64 tell.
            for i in np.flatnonzero(self.high[index_R - 1] == high_R):
                index_R[i] = bisect_right(self.steps, int(high_R[i]) << 64 | int(low_O[rest_R[i]]))
            index_O[rest_R] = index_R
        return index_O - (zero + 1)


class _Level:
    """The draws of one b under each of K keys, from two lanes of each."""

    def __init__(self, table: _Table, streams: Sequence[masks.Keystream], lane: int) -> None:
        self._table = table
        self._streams = streams
        self._first = 2 * lane * _LANE_WORDS
        self._further = [self._first + _LANE_WORDS] * len(streams)

    def draw(self, count: int) -> NDArray[np.int16]:
        """The next draws, [K, count]. All calls but the last are for an even count."""
        words = -(-count // 2)
        word_KT = np.empty((len(self._streams), words), np.uint32)
        for stream, row_T in zip(self._streams, word_KT, strict=True):
            stream.fill(row_T, start=self._first)
        self._first += words
        # Flat: numpy takes several times as long to find places in two dimensions.
        first_T = word_KT.reshape(-1).astype("<u4", copy=False).view("<u2")
        value_T = self._table.cells.take(first_T)
        at_O = np.flatnonzero(value_T >= _OPEN // 2)
        end_K = np.searchsorted(at_O, 2 * words * np.arange(1, len(self._streams) + 1)).tolist()
        further_O2 = self._read_further(end_K)
        high_O = first_T.take(at_O).astype(np.uint64) << np.uint64(48) | further_O2[:, 0] & _NEXT
        value_T[at_O] = self._table.invert(value_T.take(at_O), high_O, further_O2[:, 1])
        return value_T.reshape(len(self._streams), -1)[:, :count]

    def _read_further(self, end_K: list[int]) -> NDArray[np.uint64]:
        """A block, as two halves, for each draw that was left open: key after key, to their ends."""
        word_W: masks.Words = np.empty(4 * end_K[-1], np.uint32)
        for key, (at, end) in enumerate(itertools.pairwise([0, *end_K])):
            if end > at:
                self._streams[key].fill(word_W[4 * at : 4 * end], start=self._further[key])
                self._further[key] += 4 * (end - at)
        return word_W.astype("<u4", copy=False).view("<u8").reshape(-1, 2)


@lru_cache(maxsize=64)
def _levels(sigma: float) -> tuple[int, tuple[Fraction, ...]]:
    """The multiplier m, and the variances of b_1 ... b_L."""
    if not SMALLEST <= sigma <= LARGEST:
        raise ValueError(f"sigma = {sigma}: {SMALLEST:.0f} to {LARGEST:.0f}")
    levels = 1 + sum(sigma > most for most in _MOST)
    m = int((sigma / 2) ** (1 / levels))
    # The root is a float: near a whole number it may be one off.
    if 2 * m**levels > sigma:
        m -= 1
    elif 2 * (m + 1) ** levels <= sigma:
        m += 1
    fine, rest = Fraction(4 * m**2), Fraction(sigma) ** 2
    for _ in range(levels - 1):
        rest = (rest - fine) / m**2
    return m, (*[fine] * (levels - 1), rest)


def _half_width(variance: Fraction) -> int:
    """The smallest K with K >= _CUT standard deviations."""
    return math.isqrt(math.ceil(_CUT**2 * variance) - 1) + 1


@lru_cache(maxsize=8)
def _table(variance: Fraction) -> _Table:
    """Made in milliseconds, and kept: a study has one sigma, so one or two tables."""
    context = Context(prec=100)
    ratio = context.divide(Decimal(-variance.denominator), Decimal(2 * variance.numerator))
    # exp(-(k + 1)^2 / 2v) = exp(-k^2 / 2v) * exp(-(2k + 1) / 2v), and that factor shrinks by exp(-1 / v).
    factor = int(context.multiply(context.exp(ratio), Decimal(1 << _PRECISION)))
    shrink = factor**2 >> _PRECISION
    half = [1 << _PRECISION]
    for _ in range(_half_width(variance)):
        half.append(half[-1] * factor >> _PRECISION)
        factor = factor * shrink >> _PRECISION
    weights = half[:0:-1] + half
    total = sum(weights)
    steps, below = [], 0
    for weight in weights:
        steps.append((below << 128) // total)
        below += weight
    high = np.array([step >> 64 for step in steps], np.uint64)
    top = (high >> np.uint64(48)).astype(np.int64)
    values = np.searchsorted(top, np.arange(1 << 16), side="right") - len(half)
    cells = values.astype(np.int16)
    cells[top[::-1]] = np.arange(len(steps))[::-1] - len(half) + _OPEN
    return _Table(steps, np.append(high, np.uint64((1 << 64) - 1)), cells)
