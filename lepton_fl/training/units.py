"""Which records a unit owns, and which count. N records, U units, S sampled units, B their records."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lepton_fl.secagg.masks import keystream

_WORDS = 2
"""32-bit words of the stream for one record."""


class RecordsOfUnits:
    """Looks up the records of sampled units, and what each of them weighs in its unit's gradient.

    Guarantee: which records stand for a unit, and their weights, depend on the unit's own records and on
    words of the key's stream that serve no other unit. So the gradient of every unit has the same law
    whichever other units there are, and neighbouring tables differ in the one unit's gradient alone.
    """

    def __init__(
        self, unit_N: np.ndarray, units: int, *, most: int | None = None, mean: bool = False
    ) -> None:
        """`most`: records of one unit that count in a step, None for all of them.

        `mean`: a unit's gradient is the mean over the records that count, not their sum.
        """
        # Records grouped by unit: unit u owns _order[_start[u] : _start[u + 1]].
        order = np.argsort(unit_N, kind="stable")
        self._order, self._order_N = order, torch.from_numpy(order)
        counts_U = np.bincount(unit_N, minlength=units)
        self.one_each = bool((counts_U == 1).all())
        """Each unit has one record."""
        self._in_order = self.one_each and bool((order == np.arange(units)).all())
        self._count_U = torch.from_numpy(counts_U)
        self._start_U = torch.from_numpy(np.concatenate([[0], np.cumsum(counts_U)[:-1]]))
        self._most = most if most is not None and bool((counts_U > most).any()) else None
        self._mean = mean

    def of(self, unit_S: Tensor, key: bytes) -> tuple[Tensor, Tensor, Tensor]:
        """The records [B] of the sampled units [S]; whose each is, as a place in the sample; and its weight.

        Of a unit with more than `most` records that many are drawn, evenly, by the stream of `key`: 32 bytes,
        one key for each step, the same for all parts of its sample. So every record of a unit counts in
        some of the steps, and where it stands in the file decides nothing.
        """
        if self.one_each:
            return self._order_N[unit_S], torch.arange(len(unit_S)), torch.ones(len(unit_S))
        count_S = self._count_U[unit_S]
        owner_B = torch.repeat_interleave(torch.arange(len(unit_S)), count_S)
        first_S = torch.cumsum(count_S, 0) - count_S
        place_B = self._start_U[unit_S][owner_B] + torch.arange(len(owner_B)) - first_S[owner_B]
        if self._most is not None:
            kept_B = torch.from_numpy(
                self._drawn(place_B.numpy(), owner_B.numpy(), first_S.numpy(), self._most, key)
            )
            owner_B, place_B = owner_B[kept_B], place_B[kept_B]
            count_S = count_S.clamp(max=self._most)
        weight_B = 1 / count_S[owner_B].float() if self._mean else torch.ones(len(owner_B))
        return self._order_N[place_B], owner_B, weight_B

    def only(self, unit_S: NDArray[np.int64]) -> NDArray[np.int64]:
        """The one record of each of the sampled units [S], of a table where `one_each`."""
        return unit_S if self._in_order else self._order[unit_S]

    def _drawn(
        self,
        place_B: NDArray[np.int64],
        owner_B: NDArray[np.int64],
        first_S: NDArray[np.int64],
        most: int,
        key: bytes,
    ) -> NDArray[np.int64]:
        """Those that count, ascending: of each unit the `most` with the smallest 64-bit words."""
        words_N = keystream(key, start=0, count=_WORDS * len(self._order_N)).view("<u8")
        order_B = np.lexsort((words_N[place_B], owner_B))
        # In that order a unit's records still begin where they began.
        rank_B = np.arange(len(owner_B)) - first_S[owner_B]
        return np.sort(order_B[rank_B < most])
