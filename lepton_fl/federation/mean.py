"""The mean of the accepted updates."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lepton_fl.tasks.arrays import TILE, Arrays, tiles


def mean(updates: Mapping[str, Arrays], *, tile: int = TILE) -> Arrays:
    """The mean of one or more updates, by site name, in float64; each counts once.

    Guarantee: the same bits whatever the order in which the updates came and whatever the `tile`, numbers
    that are added at a time: floats do not add up the same in every order, so the order is that of the names.
    Beside the updates, which may be views, only the result and a tile of it are in memory.
    """
    ordered = [updates[site] for site in sorted(updates)]
    found: Arrays = {}
    for name, first in ordered[0].items():
        found[name] = np.empty(first.shape, np.float64)
        total = found[name].reshape(-1)
        parts = [update[name].reshape(-1) for update in ordered]
        for at in tiles(total.size, tile):
            piece = total[at]
            piece[:] = parts[0][at]
            for part in parts[1:]:
                piece += part[at]
            piece /= len(parts)
    return found
