"""From the accepted updates to one: their mean, or a rule that a few poisoned ones cannot move far.

All in float64, and the same bits whatever the order in which the updates came: floats do not add up the same
in every order, so the order is that of the names. The updates may be views of messages; beside them only the
result and a few tiles of it are in memory.

P = updates, T = coordinates in a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lepton_fl.study import SecureAggregation
from lepton_fl.tasks.arrays import TILE, Arrays, tiles

MAX_PASSES = 1000
"""Of the geometric median over all updates. Some tens are usual, and more where a few coordinates are all."""
_SMOOTHING, _CLOSE = 1e-6, 1e-9
"""Of the geometric median, relative to how far the updates are from their coordinate-wise median."""

Updates = Mapping[str, Arrays]
"""By the name of the site, or of a group's first; one or more, of the same names and shapes."""


def combine(updates: Updates, members: Mapping[str, int], agreed: SecureAggregation) -> Arrays:
    """The study's one update of a round; `members` says how many sites are in each of `updates`.

    The mean is that over the sites. A robust rule counts each group once, whatever its size: a poisoned one
    must not count for more by being larger.
    """
    match agreed.combine:
        case "mean":
            return mean(updates, weights=members)
        case "median":
            return median(updates)
        case "trimmed-mean":
            return trimmed_mean(updates, trim=agreed.trim or 0)
        case "geometric-median":
            return geometric_median(updates)


def mean(updates: Updates, *, weights: Mapping[str, int] | None = None, tile: int = TILE) -> Arrays:
    """The mean of the updates, each counted by its weight; once, where there are none.

    Guarantee: the bits depend on neither the order of `updates` nor `tile`, numbers added at a time.
    """
    names = sorted(updates)
    counts = [1 if weights is None else weights[name] for name in names]
    return _weighted([updates[name] for name in names], [float(n) for n in counts], tile)


def median(updates: Updates, *, tile: int = TILE) -> Arrays:
    """The coordinate-wise median; of an even number of updates, the middle of the two in the middle.

    Guarantee (Yin et al. 2018): while fewer than half of the updates are poisoned, each coordinate lies
    between the smallest and the largest of the others'. The bits are as those of `mean`.
    """
    return trimmed_mean(updates, trim=(len(updates) - 1) // 2, tile=tile)


def trimmed_mean(updates: Updates, *, trim: int, tile: int = TILE) -> Arrays:
    """The mean, coordinate by coordinate, without the `trim` smallest and the `trim` largest.

    Guarantee (Yin et al. 2018): while at most `trim` of the updates are poisoned, each coordinate lies
    between the smallest and the largest of the others'. The bits are as those of `mean`.

    Raises:
        ValueError: nothing would be left.
    """
    ordered = [updates[name] for name in sorted(updates)]
    count = len(ordered)
    if not 0 <= 2 * trim < count:
        raise ValueError(f"trim = {trim} at each end leaves nothing of {count} updates")
    found: Arrays = {}
    for name, first in ordered[0].items():
        found[name] = np.zeros(first.shape, np.float64)
        total, parts = found[name].reshape(-1), [update[name].reshape(-1) for update in ordered]
        for at in tiles(total.size, max(1, tile // count)):
            sorted_PT = np.sort(np.stack([part[at] for part in parts]).astype(np.float64), axis=0)
            piece = total[at]
            for row_T in sorted_PT[trim : count - trim]:
                piece += row_T
            piece /= count - 2 * trim
    return found


def geometric_median(updates: Updates) -> Arrays:
    """The point whose distances (L2, over all coordinates) to the updates have the least sum.

    By the smoothed Weiszfeld iteration (Pillutla et al. 2022, Algorithm 2), from the coordinate-wise median,
    until it moves no more. Each pass reads all updates twice, since a distance is of whole vectors.

    Guarantee: the sum of distances is the least up to a millionth of the updates' own distances. While a
    share a < 1/2 of the updates is poisoned, the result is within (1 - a) / sqrt(1 - 2a) times r of any point
    that the others are within r of (Minsker 2015, Lemma 2.1). The bits do not depend on the order.
    """
    ordered = [updates[name] for name in sorted(updates)]
    found = median(updates)
    distances = [_distance(update, found) for update in ordered]
    # More than half are as near: it is no more than an honest one's, and nobody poisoned can stretch it.
    scale = sorted(distances)[len(distances) // 2]
    if scale == 0:
        return found
    for _ in range(MAX_PASSES):
        before = found
        found = _weighted(ordered, [1 / max(d, _SMOOTHING * scale) for d in distances], TILE)
        if _distance(found, before) <= _CLOSE * scale:
            break
        distances = [_distance(update, found) for update in ordered]
    return found


def _weighted(ordered: Sequence[Arrays], weights: Sequence[float], tile: int) -> Arrays:
    """The weighted mean of updates, in this order."""
    total = sum(weights)
    found: Arrays = {}
    for name, first in ordered[0].items():
        found[name] = np.zeros(first.shape, np.float64)
        flat, parts = found[name].reshape(-1), [update[name].reshape(-1) for update in ordered]
        for at in tiles(flat.size, tile):
            piece = flat[at]
            for part, weight in zip(parts, weights, strict=True):
                piece += np.multiply(part[at], weight, dtype=np.float64)
            piece /= total
    return found


def _distance(one: Arrays, other: Arrays) -> float:
    """In L2, over all coordinates."""
    return math.sqrt(sum(float(np.square(gap_T).sum()) for gap_T in _gaps(one, other)))


def _gaps(one: Arrays, other: Arrays) -> Iterator[NDArray[np.float64]]:
    for name, array in one.items():
        mine, others = array.reshape(-1), other[name].reshape(-1)
        for at in tiles(mine.size):
            yield np.subtract(mine[at], others[at], dtype=np.float64)
