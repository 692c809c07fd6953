"""Which records a unit owns. N records, U units, S sampled units, B their records."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class RecordsOfUnits:
    """Looks up the records of sampled units."""

    def __init__(self, unit_N: np.ndarray, units: int) -> None:
        # Records grouped by unit: unit u owns _order[_start[u] : _start[u + 1]].
        order = np.argsort(unit_N, kind="stable")
        self._order_N = torch.from_numpy(order)
        counts_U = np.bincount(unit_N, minlength=units)
        self._one_each = bool((counts_U == 1).all())
        self._count_U = torch.from_numpy(counts_U)
        self._start_U = torch.from_numpy(np.concatenate([[0], np.cumsum(counts_U)[:-1]]))

    def of(self, unit_S: Tensor) -> tuple[Tensor, Tensor]:
        """Record indices [B] of the sampled units [S], and each record's position in the sample [B]."""
        if self._one_each:
            return self._order_N[unit_S], torch.arange(len(unit_S))
        count_S = self._count_U[unit_S]
        owner_B = torch.repeat_interleave(torch.arange(len(unit_S)), count_S)
        first_S = torch.cumsum(count_S, 0) - count_S
        within_B = torch.arange(len(owner_B)) - first_S[owner_B]
        return self._order_N[self._start_U[unit_S][owner_B] + within_B], owner_B
