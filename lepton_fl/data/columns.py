"""One column of the contract: its features' names, and how a batch of its cells becomes them.

An encoder knows only what the study says in public. It is the same at every site, learns nothing
from the rows it sees, and so costs no privacy.

B = rows of a batch, K = features of the column, D = distinct texts of the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lepton_fl.data.cells import MISSING, codes, normal, numbers
from lepton_fl.data.vocabularies import VOCABULARIES
from lepton_fl.errors import ConfigError
from lepton_fl.study import CategoryColumn, FloatColumn

HASH_LABEL = b"lepton-fl/hash/1"
"""Domain separation of feature hashing. Changing it changes every hashed model."""

TREE_CODES = 255
"""Most codes that a tree baseline treats as a category; beyond, the index is a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What was seen in a column. Counts only: safe to print at the site, never a value."""

    cells: int = 0
    missing: int = 0
    unreadable: int = 0
    infinite: int = 0
    out_of_range: int = 0
    out_of_vocabulary: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})

    @property
    def present(self) -> int:
        """Cells that hold a usable value."""
        return self.cells - self.missing - self.unreadable - self.infinite


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A column's part of a batch, besides its features."""

    raw_B: NDArray[np.float64]
    """The number as it came, or the index of the code; NaN where missing."""
    counts: Counts
    keys: NDArray[np.int64] | None
    """One 64-bit key for each distinct value, to count them; None where it can be no identifier."""


class Encoder(Protocol):
    """How one column is encoded."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the features, one for each column of the block."""

    @property
    def categorical(self) -> bool:
        """Whether a tree should treat the raw value as a category."""

    def encode(self, cells: Sequence[str], x_BK: NDArray[np.float32]) -> Encoded:
        """Fill in `x_BK`, which comes zeroed, and say what was seen."""


@dataclass(frozen=True, slots=True)
class FloatEncoder:
    """The public range, after an optional log1p, becomes [-1, 1]; beyond it the bound, counted."""

    name: str
    low: float
    high: float
    log: bool
    flag: bool

    @classmethod
    def of(cls, name: str, column: FloatColumn) -> FloatEncoder:
        """The encoder of a declared column.

        Raises:
            ConfigError: a range so narrow that float64 cannot tell its ends apart once transformed.
        """
        low, high = column.range
        encoder = cls(name, low, high, column.transform == "log1p", column.missing == "flag")
        first, last = encoder._scale(np.array([low, high]))
        if not first < last:
            raise ConfigError.at(
                "study",
                f"features.columns.{name}.range",
                found=list(column.range),
                allowed="a wider range",
            )
        return encoder

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, f"{self.name}:missing") if self.flag else (self.name,)

    @property
    def categorical(self) -> bool:
        return False

    def _scale(self, value_B: NDArray[np.float64]) -> NDArray[np.float64]:
        # Halved, so that the ends of a range as wide as float64 have a finite difference.
        return (np.log1p(value_B) if self.log else value_B) / 2

    def encode(self, cells: Sequence[str], x_BK: NDArray[np.float32]) -> Encoded:
        read = numbers(cells)
        infinite_B = np.isinf(read.value_B)
        raw_B = np.where(infinite_B, np.nan, read.value_B)
        absent_B = np.isnan(raw_B)
        held_B = np.clip(raw_B, self.low, self.high)

        low, high = self._scale(np.array([self.low, self.high]))
        scaled_B = (self._scale(held_B) - low) / (high - low) * 2 - 1
        # Rounding in log1p may step over a bound by one unit in the last place.
        x_BK[:, 0] = np.where(absent_B, 0.0, np.clip(scaled_B, -1.0, 1.0))
        if self.flag:
            x_BK[:, 1] = absent_B

        infinite = int(infinite_B.sum())
        counts = Counts(
            cells=len(cells),
            missing=int(absent_B.sum()) - infinite - read.unreadable,
            unreadable=read.unreadable,
            infinite=infinite,
            out_of_range=int(((raw_B < self.low) | (raw_B > self.high)).sum()),
        )
        value_B = raw_B[~absent_B] + 0.0  # -0.0 and 0.0 become one value.
        # Measurements are all different too; only whole numbers are handed out one to a person.
        whole = bool((value_B == np.floor(value_B)).all())
        return Encoded(raw_B, counts, np.unique(value_B).view(np.int64) if whole else None)


@dataclass(frozen=True, slots=True)
class CategoryEncoder:
    """One indicator for each code or group of codes, and one for codes outside, counted."""

    name: str
    groups: tuple[str, ...]
    listed: dict[str, int] | None
    """Code to group; None where the named vocabulary's own rule decides."""
    vocabulary: str
    flag: bool

    @classmethod
    def of(cls, name: str, column: CategoryColumn) -> CategoryEncoder:
        """The encoder of a declared column.

        Raises:
            ConfigError: unknown named vocabulary, two spellings of one code, or a code that reads
                as missing.
        """
        key = f"features.columns.{name}.vocabulary"
        flag = column.missing == "flag"
        if isinstance(column.vocabulary, str):
            if column.vocabulary not in VOCABULARIES:
                allowed = ", ".join(sorted(VOCABULARIES))
                raise ConfigError.at(
                    "study", key, found=column.vocabulary, allowed=f"{allowed}, or a list of codes"
                )
            groups = VOCABULARIES[column.vocabulary].groups
            return cls(name, groups, None, column.vocabulary, flag)
        listed: dict[str, int] = {}
        for value in column.vocabulary or ():
            text = normal(value)
            if text in MISSING:
                raise ConfigError.at(
                    "study", key, found=value, allowed="codes that do not mean a missing value"
                )
            if text in listed:
                raise ConfigError(f"study: {key}: {value!r} and another entry are the same code")
            listed[text] = len(listed)
        return cls(name, tuple(listed), listed, "", flag)

    @property
    def names(self) -> tuple[str, ...]:
        names = [f"{self.name}={group}" for group in self.groups]
        if self._other == len(self.groups):
            names.append(f"{self.name}=other")
        return (*names, f"{self.name}:missing") if self.flag else tuple(names)

    @property
    def categorical(self) -> bool:
        return max(len(self.groups), self._other + 1) <= TREE_CODES

    @property
    def _other(self) -> int:
        # A list with its own code "other" already has the indicator that unlisted codes need.
        return self.groups.index("other") if "other" in self.groups else len(self.groups)

    def _group_of(self, code: str) -> int | None:
        if self.listed is not None:
            return self.listed.get(code)
        return VOCABULARIES[self.vocabulary].group_of(code)

    def encode(self, cells: Sequence[str], x_BK: NDArray[np.float32]) -> Encoded:
        code_D, index_B = codes(cells)
        group_D = [None if c is None else self._group_of(c) for c in code_D]
        absent_B = np.array([c is None for c in code_D], dtype=bool)[index_B]
        unknown_B = np.array([g is None for g in group_D], dtype=bool)[index_B] & ~absent_B
        other = self._other
        hot_B = np.array([other if g is None else g for g in group_D], dtype=np.int64)[index_B]
        row_B = np.flatnonzero(~absent_B)
        x_BK[row_B, hot_B[row_B]] = 1
        if self.flag:
            x_BK[:, -1] = absent_B
        counts = Counts(
            cells=len(cells),
            missing=int(absent_B.sum()),
            out_of_vocabulary=int(unknown_B.sum()),
        )
        return Encoded(np.where(absent_B, np.nan, hot_B), counts, _keys(code_D))


@dataclass(frozen=True, slots=True)
class HashEncoder:
    """Signed feature hashing into public buckets (Weinberger et al. 2009)."""

    name: str
    buckets: int
    flag: bool

    @classmethod
    def of(cls, name: str, column: CategoryColumn) -> HashEncoder:
        return cls(name, column.hash or 0, column.missing == "flag")

    @property
    def names(self) -> tuple[str, ...]:
        names = tuple(f"{self.name}#{bucket}" for bucket in range(self.buckets))
        return (*names, f"{self.name}:missing") if self.flag else names

    @property
    def categorical(self) -> bool:
        return self.buckets <= TREE_CODES

    def encode(self, cells: Sequence[str], x_BK: NDArray[np.float32]) -> Encoded:
        code_D, index_B = codes(cells)
        place_D = [(0, 0) if c is None else place(self.name, c, self.buckets) for c in code_D]
        bucket_B, sign_B = np.array(place_D, dtype=np.int64).reshape(-1, 2)[index_B].T
        absent_B = sign_B == 0
        row_B = np.flatnonzero(~absent_B)
        x_BK[row_B, bucket_B[row_B]] = sign_B[row_B]
        if self.flag:
            x_BK[:, -1] = absent_B
        counts = Counts(cells=len(cells), missing=int(absent_B.sum()))
        # The bucket, and not a number by first appearance: that would differ from site to site.
        return Encoded(np.where(absent_B, np.nan, bucket_B), counts, _keys(code_D))


def place(column: str, code: str, buckets: int) -> tuple[int, int]:
    """Bucket and sign (-1 or 1) of a code: public, the same in any process and platform."""
    name = column.encode("utf-8", "surrogatepass")
    message = len(name).to_bytes(4, "big") + name + code.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(message, digest_size=8, person=HASH_LABEL).digest()
    number = int.from_bytes(digest, "big")
    return (number >> 1) % buckets, 1 if number & 1 else -1


def encoder_for(name: str, column: FloatColumn | CategoryColumn) -> Encoder:
    """The encoder that the study's declaration of a column asks for, or a ConfigError."""
    if isinstance(column, FloatColumn):
        return FloatEncoder.of(name, column)
    return CategoryEncoder.of(name, column) if column.hash is None else HashEncoder.of(name, column)


def _keys(code_D: Sequence[str | None]) -> NDArray[np.int64]:
    # Python's own hash differs between processes; these keys are only counted, within one.
    return np.unique(np.array([hash(c) for c in code_D if c is not None], dtype=np.int64))
