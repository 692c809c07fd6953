"""Which units enter a step: each by itself, with one probability, from a secure stream.

Eight units are drawn at once, by inversion. With the rate a fraction t / 2^64, each of the 256 ways in which
eight units can be in or out has a probability that is a whole number of 2^-512, t^in (2^64 - t)^out: so 512
uniform bits and a table of whole numbers draw one of them exactly. Nearly always the first 16 bits decide,
which for rare units say "none of them" by a comparison; where a step of the table lies among the numbers that
begin with these bits, the other 496 are read.

Of the key's mask (`secagg.masks`), lane 0 holds two bytes for each eight units of each step, steps one after
another; lane 1 has room for 64 bytes for each, of which a step uses the first ones, in order: of every 64
bytes, which are eight 64-bit numbers, the first gives its lower 48 bits, the others follow, highest first.

S = steps drawn at once, G = groups of eight units in a step, O = those that their first 16 bits left open.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lepton_fl.secagg.masks import Keystream, Words

AHEAD = 1 << 19
"""Bytes of stream and of indices, about, that are drawn at once; a step that needs more comes by itself."""

_ARRAY = 256
"""Bytes of an array of none, and of what finds it."""
_WHOLE = 1 << 64
_UNITS = 8
"""Of a group."""
_OFTEN = 3 << 14
"""Of 2^16, for a group without any unit to be worth a look of its own."""
_FURTHER = 16
"""32-bit words for a group that is left open."""
_LANE_WORDS = 1 << 66
_NEXT = np.uint64((1 << 48) - 1)


class PoissonSampler:
    """Draws the units of each step of a round.

    Guarantee: for a uniform `key` each unit is in each step with probability `rate`, exactly, independently
    of all other units and steps. No two groups and steps share a bit of the key's AES-256-CTR stream; and 512
    uniform bits, as a whole number, fall below the sum of some of the table's weights with a probability that
    is that sum of 2^-512, so that a group is in each of its states with the product of its units'
    probabilities. So it earns the amplification that accounting claims for Poisson sampling at `rate`.

    Memory: `AHEAD` for what is drawn, or a quarter of a byte for each unit and eight for each of a step's
    where that is more; and, while drawing, one to two bytes for each unit of the steps drawn at once.
    """

    def __init__(self, units: int, rate: float, key: bytes, *, steps: int = 1) -> None:
        """`key` is 32 bytes for this object alone: who knows it knows who was sampled.

        `steps` is how many will be drawn. What a step draws does not depend on it, nor on the order of calls.
        """
        self._units = units
        self._stream = Keystream(key)
        # A float64 times 2^64 is a whole number down to rates of 2^-11, and else is rounded down.
        self._threshold = int(rate * float(_WHOLE))
        self.rate = self._threshold / _WHOLE
        """Not above the rate asked for."""
        # An even number, so that a step begins with a whole word of the stream.
        self._groups = -(-units // (2 * _UNITS)) * 2
        per_step = _ARRAY + 2 * self._groups + 8 * units * self.rate
        self._at_once = max(1, min(steps, int(AHEAD // per_step)))
        self._first = -1
        self._drawn: list[NDArray[np.int64]] = []
        """Of the steps from `_first` on."""

    def draw(self, step: int) -> NDArray[np.int64]:
        """Indices of the units in this step, ascending."""
        if self._threshold >= _WHOLE:
            return np.arange(self._units)
        if not self._threshold or not self._units:
            return np.empty(0, np.int64)
        if not self._first <= step < self._first + len(self._drawn):
            self._first = step // self._at_once * self._at_once
            self._drawn = self._draw(self._first, self._at_once)
        return self._drawn[step - self._first]

    def _draw(self, first: int, steps: int) -> list[NDArray[np.int64]]:
        table, words = _table(self._threshold), self._groups // 2
        word_W: Words = np.empty(steps * words, np.uint32)
        self._stream.fill(word_W, start=first * words)
        # Flat: the groups of all steps.
        first_M = word_W.astype("<u4", copy=False).view("<u2")
        at_M = np.flatnonzero(first_M >= table.none) if table.none else None
        if at_M is not None:
            first_M = first_M.take(at_M)
        state_M = table.cells.take(first_M)
        open_O = np.flatnonzero(state_M < 0)
        if len(open_O):
            group_O = open_O if at_M is None else at_M[open_O]
            further_O8 = self._read_further(first, group_O // self._groups)
            state_M[open_O] = table.invert(first_M[open_O], further_O8)
        is_in_M8 = np.unpackbits(state_M.astype(np.uint8), bitorder="little").view(np.bool_)
        unit_B = np.flatnonzero(is_in_M8)
        if at_M is not None:
            unit_B = (at_M.take(unit_B >> 3) << 3) + (unit_B & 7)
        # A step's last groups are not full.
        width = _UNITS * self._groups
        begin_S = range(0, steps * width, width)
        limits_2S = [*begin_S, *(begin + self._units for begin in begin_S)]
        start_end_2S = np.searchsorted(unit_B, limits_2S).tolist()
        return [
            unit_B[start:end] - begin
            for begin, start, end in zip(begin_S, start_end_2S[:steps], start_end_2S[steps:], strict=True)
        ]

    def _read_further(self, first: int, step_O: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Eight 64-bit numbers for each group that was left open, given whose step it is."""
        word_W: Words = np.empty(_FURTHER * len(step_O), np.uint32)
        at = 0
        for step, count in enumerate(np.bincount(step_O).tolist(), start=first):
            if count:
                start = _LANE_WORDS + _FURTHER * self._groups * step
                self._stream.fill(word_W[at : at + _FURTHER * count], start=start)
                at += _FURTHER * count
        return word_W.astype("<u4", copy=False).view("<u8").reshape(-1, _FURTHER // 2)


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Inversion of the law of eight units, their states in an order in which rare ones are neighbours."""

    steps: list[int]
    """P(a state before this one) in units of 2^-512, for each state in order: it begins with 0."""
    high: NDArray[np.uint64]
    """Their upper 64 bits."""
    states: NDArray[np.int16]
    """In order: bit i is set where unit i is in."""
    cells: NDArray[np.int16]
    """The state by the first 16 bits, or -1 where there is a step with these first 16 bits."""
    none: int
    """First 16 bits below it say that no unit is in; 0 where that is too seldom to be looked at first."""

    def invert(self, first_O: NDArray[np.uint16], further_O8: NDArray[np.uint64]) -> NDArray[np.int16]:
        """The last state whose step is at most the 512 bits."""
        high_O = first_O.astype(np.uint64) << np.uint64(48) | further_O8[:, 0] & _NEXT
        index_O = np.searchsorted(self.high, high_O, side="right") - 1
        # Where 64 bits are a step's own, the other 448 tell.
        for i in np.flatnonzero(self.high[index_O] == high_O):
            bits = int(high_O[i])
            for word in further_O8[i, 1:].tolist():
                bits = bits << 64 | word
            index_O[i] = bisect_right(self.steps, bits) - 1
        return self.states[index_O]


@lru_cache(maxsize=8)
def _table(threshold: int) -> _Table:
    """For 0 < threshold < 2^64; made in a few milliseconds, and kept: a study has one rate."""
    states = sorted(range(1 << _UNITS), key=int.bit_count)
    each = [threshold**count * (_WHOLE - threshold) ** (_UNITS - count) for count in range(_UNITS + 1)]
    # The last sum is 2^512, no state's beginning.
    *steps, _ = itertools.accumulate((each[state.bit_count()] for state in states), initial=0)
    high = np.array([step >> 448 for step in steps], np.uint64)
    top = (high >> np.uint64(48)).astype(np.int64)
    in_order = np.array(states, np.int16)
    cells = in_order[np.searchsorted(top, np.arange(1 << 16), side="right") - 1]
    # A step at the very beginning of a cell leaves nothing open.
    cells[[cell for cell, step in zip(top.tolist(), steps, strict=True) if step != cell << 496]] = -1
    return _Table(steps, high, in_order, cells, none=int(top[1]) if top[1] > _OFTEN else 0)
