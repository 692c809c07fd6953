"""What the text of one cell means: missing, a code, a number or a point in time.

The same at every site, so that two institutions that write one fact differently are read alike.
Works on a batch at a time. Nothing here raises for a bad cell: it is counted, and the counts are
judged once, over the whole table.

B = rows of a batch.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lepton_fl.study import read_instant, read_number

_LISTED = ("", "NA", "N/A", "NaN", "nan", "null", "None", "?")
MISSING = frozenset(form for m in _LISTED for form in (m, m.lower(), m.upper()))
"""Texts that mean no value, after stripping white space."""

_NAN_FOR = dict.fromkeys(MISSING, "nan")
_TRUTH = {"True": "true", "TRUE": "true", "False": "false", "FALSE": "false"}
# No exponents: `1E30` is a code of ICD-11 before it is a number.
_INTEGER = re.compile(r"([+-]?)0*([0-9]+)(?:\.0*)?")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some rows of a table as text: the study's column name to the cells, all of one length."""

    cells: Mapping[str, Sequence[str]]

    def __len__(self) -> int:
        return len(next(iter(self.cells.values()), ()))


def nfc(text: str) -> str:
    """`text` in Unicode's composed form, so that one name typed on two systems is one name."""
    return unicodedata.normalize("NFC", text)


def normal(value: str | int | bool) -> str:
    """The text by which codes are compared: `3`, `"3"`, `" 3.0"` and `"03"` are all `"3"`.

    Integer-valued numbers become the integer, `True` and `"TRUE"` become `"true"`; all else is only
    stripped and composed. Case matters.
    """
    text = nfc(str(value)).strip()
    if number := _INTEGER.fullmatch(text):
        sign, digits = number.groups()
        return f"-{digits}" if sign == "-" and digits != "0" else digits
    return _TRUTH.get(text, text)


def code(cell: str) -> str | None:
    """The normal text of a cell, or None where it is missing."""
    return None if cell.strip() in MISSING else normal(cell)


class Numbering(dict[str, int]):
    """Numbers texts 0, 1, 2 ... in the order in which they are first looked up."""

    def __missing__(self, text: str) -> int:
        self[text] = number = len(self)
        return number


def distinct(cells: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The different texts, in order of first appearance, and for each cell which one it is.

    Whatever follows then works on each text once, however many cells repeat it.
    """
    numbering = Numbering()
    index_B = np.fromiter(map(numbering.__getitem__, cells), np.int64, len(cells))
    return list(numbering), index_B


def codes(cells: Sequence[str]) -> tuple[list[str | None], NDArray[np.int64]]:
    """As `distinct`, with the normal text of each, None for missing; two may be the same code."""
    texts, index_B = distinct(cells)
    return [code(text) for text in texts], index_B


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """A batch of cells read as numbers: NaN where missing and where no number."""

    value_B: NDArray[np.float64]
    unreadable: int


def numbers(cells: Sequence[str]) -> Numbers:
    """Cells as float64, with a decimal point. Infinite values are kept for the caller to count."""
    # float() would read the literal 1_000; a site that writes it means something else.
    if "_" not in "".join(cells):
        # As they are first: a column without missing cells needs no second list.
        for texts in (cells, map(_NAN_FOR.get, cells, cells)):
            try:
                return Numbers(np.fromiter(map(float, texts), np.float64, len(cells)), 0)
            except ValueError:
                continue  # Some cell needs a closer look; which one is found below.
    value_B = np.full(len(cells), np.nan)
    unreadable = 0
    for i, cell in enumerate(cells):
        text = cell.strip()
        if text in MISSING:
            continue
        try:
            value_B[i] = float(text if "_" not in text else "")
        except ValueError:
            unreadable += 1
    return Numbers(value_B, unreadable)


@dataclass(frozen=True, slots=True, eq=False)
class Times:
    """A batch of cells read as times: NaN where missing and where no time."""

    value_B: NDArray[np.float64]
    missing: int
    unreadable: int
    as_numbers: int
    as_dates: int


def times(cells: Sequence[str]) -> Times:
    """Numbers as they are, or ISO 8601 dates and times as POSIX seconds, UTC where they name no zone."""
    value_B = np.full(len(cells), np.nan)
    missing = as_numbers = as_dates = 0
    for i, cell in enumerate(cells):
        text = cell.strip()
        if text in MISSING:
            missing += 1
        elif math.isfinite(number := read_number(text)):
            value_B[i] = number
            as_numbers += 1
        elif math.isfinite(second := read_instant(text)):
            value_B[i] = second
            as_dates += 1
    unreadable = len(cells) - missing - as_numbers - as_dates
    return Times(value_B, missing, unreadable, as_numbers, as_dates)
