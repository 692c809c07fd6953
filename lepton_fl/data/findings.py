"""One pass over a table: what was counted, and what is wrong with it.

Loading and checking share this pass, so that `data check` finds exactly what a run would refuse.

B = rows of a batch, V = units first seen in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lepton_fl.data.cells import Batch, Numbering, Times, codes, times
from lepton_fl.data.columns import Counts
from lepton_fl.data.contract import Contract
from lepton_fl.data.identity import row_keys
from lepton_fl.errors import DataError

FLOOD = 0.2
"""Share of cells beyond the range or vocabulary above which the column means something else."""

IDENTIFIER_RATIO = 0.95
"""Share of different values above which a column names records rather than describes them."""

IDENTIFIER_CELLS = 50
"""Cells below which that share says nothing."""

DISTINCT_KEYS = 1 << 17
"""Different values of a column up to which they are counted exactly."""

Role = Literal["feature", "target", "unit", "time"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one column (or, without a column, with the table)."""

    column: str
    found: str
    fix: str = ""

    def error(self, source: str, *, more: int = 0) -> DataError:
        """The problem as an error, saying how many others there are."""
        where = f"{source}: column {self.column!r}" if self.column else source
        others = f" (and {more} more)" if more else ""
        return DataError(f"{where}: {self.found}{others}", fix=self.fix)


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnCheck:
    """Counts of one column. Never a value."""

    column: str
    role: Role
    cells: int
    missing: int
    unreadable: int
    infinite: int
    out_of_range: int
    out_of_vocabulary: int
    distinct_ratio_flag: bool
    """Nearly every value is different, as in an identifier."""


@dataclass(slots=True)
class Distinct:
    """How many different keys were seen, in memory that does not grow with them.

    Exact up to `DISTINCT_KEYS`. Above, of the hashes of the keys a half, a quarter ... is kept, so that
    they fit, and the count is scaled: Wegman's adaptive sampling (Flajolet, On adaptive sampling, 1990),
    with a relative standard error of 1.2 / sqrt(DISTINCT_KEYS), here 0.33 %.
    """

    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    waiting: list[NDArray[np.uint64]] = field(default_factory=list)
    waits: int = 0
    depth: int = 0
    """Lowest bits of a hash that have to be zero for it to be kept."""
    possible: bool = True
    """False once a value was seen that no identifier holds; counting then stops."""

    def add(self, keys: NDArray[np.int64] | None) -> None:
        if keys is None:
            self.possible = False
            self.hashes, self.waiting = np.empty(0, dtype=np.uint64), []
        elif self.possible:
            self.waiting.append(self._sampled(_mixed(keys)))
            self.waits += len(self.waiting[-1])
            # Merging at every batch would sort the whole column again for each.
            if self.waits > DISTINCT_KEYS:
                self._merge()

    def count(self) -> int:
        self._merge()
        return len(self.hashes) << self.depth

    def _merge(self) -> None:
        self.hashes = np.unique(np.concatenate([self.hashes, *self.waiting]))
        self.waiting, self.waits = [], 0
        while len(self.hashes) > DISTINCT_KEYS:
            self.depth += 1
            self.hashes = self._sampled(self.hashes)

    def _sampled(self, hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
        kept: NDArray[np.uint64] = hashes[hashes & np.uint64((1 << self.depth) - 1) == 0]
        return kept


def _mixed(keys: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A bijection of 64 bits in which the lowest depend on all (splitmix64, Steele et al. 2014)."""
    z: NDArray[np.uint64] = keys.view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A batch, encoded: what a table keeps of it."""

    x_BF: NDArray[np.float32]
    y_B: NDArray[np.float32]
    unit_B: NDArray[np.int64]
    key_V: NDArray[np.uint8]
    """Keys of the units that no batch before had, in the order of their numbers."""
    time_B: NDArray[np.float64] | None
    raw_BC: NDArray[np.float64]


class Findings:
    """Encodes batch after batch and counts.

    Its memory does not grow with the rows, but for the names of the units where the study has a column
    of them.
    """

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self.rows = 0
        self.positives = 0
        self._unit = Numbering()
        self._feature = {name: Counts() for name, _ in contract.columns}
        self._distinct = {name: Distinct() for name, _ in contract.columns}
        self._missing_target = 0
        self._missing_unit = 0
        self._time = Counts()
        self._as_numbers = 0
        self._as_dates = 0

    @property
    def units(self) -> int:
        """Privacy units seen so far."""
        return self.rows if self.contract.unit is None else len(self._unit)

    def add(self, batch: Batch) -> Rows:
        """Encode and count a batch. Bad cells are counted, not raised."""
        contract = self.contract
        encoded = contract.encode(batch)
        for name, column in encoded.columns.items():
            self._feature[name] += column.counts
            self._distinct[name].add(column.keys)
        y_B = self._target(batch)
        unit_B, key_V = self._units(batch)
        time_B = self._times(batch)
        self.rows += len(batch)
        self.positives += int(y_B.sum())
        raw_BC = np.column_stack([column.raw_B for column in encoded.columns.values()])
        return Rows(encoded.x_BF, y_B, unit_B, key_V, time_B, raw_BC)

    def _target(self, batch: Batch) -> NDArray[np.float32]:
        label_D, index_B = codes(batch.cells[self.contract.target])
        absent_B = np.array([label is None for label in label_D], dtype=bool)[index_B]
        self._missing_target += int(absent_B.sum())
        positive = self.contract.positive
        return np.array([label == positive for label in label_D], dtype=np.float32)[index_B]

    def _units(self, batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        if self.contract.unit is None:
            number_B = np.arange(self.rows, self.rows + len(batch), dtype=np.int64)
            # Sorted, so that a column's part in the study (feature, target) does not matter.
            return number_B, row_keys([batch.cells[name] for name in sorted(self.contract.needed)])
        # Two spellings of one number count as one person: merging never weakens the promise.
        unit_D, index_B = codes(batch.cells[self.contract.unit])
        # By first appearance, as they are numbered.
        new_V = list(dict.fromkeys(u for u in unit_D if u is not None and u not in self._unit))
        number_D = np.array([-1 if u is None else self._unit[u] for u in unit_D], dtype=np.int64)
        unit_B = number_D[index_B]
        self._missing_unit += int((unit_B < 0).sum())
        return unit_B, row_keys([new_V])

    def _times(self, batch: Batch) -> NDArray[np.float64] | None:
        if self.contract.time is None:
            return None
        read: Times = times(batch.cells[self.contract.time])
        self._time += Counts(cells=len(batch), missing=read.missing, unreadable=read.unreadable)
        self._as_numbers += read.as_numbers
        self._as_dates += read.as_dates
        return read.value_B

    def columns(self) -> tuple[ColumnCheck, ...]:
        """Counts by column: features by name, then target, unit and time."""
        checks = [
            _check(name, "feature", self._feature[name], self._identifies(name))
            for name, _ in self.contract.columns
        ]
        contract = self.contract
        target = Counts(cells=self.rows, missing=self._missing_target)
        checks.append(_check(contract.target, "target", target))
        if contract.unit is not None:
            unit = Counts(cells=self.rows, missing=self._missing_unit)
            checks.append(_check(contract.unit, "unit", unit))
        if contract.time is not None:
            checks.append(_check(contract.time, "time", self._time))
        return tuple(checks)

    def problems(self) -> list[Problem]:
        """Everything that a run would refuse, by column name."""
        if not self.rows:
            return [Problem("", "no rows")]
        problems = []
        allowed = {name: column.missing == "flag" for name, column in self.contract.columns}
        keep = {name for name, column in self.contract.columns if column.identifier == "allow"}
        for check in self.columns():
            if check.role == "feature":
                problems += _of_feature(
                    check,
                    flagged=allowed[check.column],
                    distinct=self._distinct[check.column].count() if check.cells else 0,
                    keep=check.column in keep,
                )
            else:
                problems += self._of_other(check)
        return sorted(problems, key=lambda problem: problem.column)

    def _identifies(self, name: str) -> bool:
        counter, present = self._distinct[name], self._feature[name].present
        if not counter.possible or present < IDENTIFIER_CELLS:
            return False
        return counter.count() / present > IDENTIFIER_RATIO

    def _of_other(self, check: ColumnCheck) -> list[Problem]:
        name, of = check.column, f"of {check.cells} cells"
        problems = []
        if check.missing:
            use = {
                "target": "has no label",
                "unit": "has nobody to protect",
                "time": "has no place",
            }
            problems.append(
                Problem(
                    name,
                    f"{check.missing} {of} of the {check.role} column are missing: such a record "
                    f"{use[check.role]}",
                    fix="leave such records out of the extract",
                )
            )
        if check.unreadable:
            problems.append(
                Problem(
                    name,
                    f"{check.unreadable} {of} are neither numbers nor ISO 8601 dates or times",
                    fix="write times as 2026-01-31T12:00:00",
                )
            )
        if check.role == "time" and self._as_numbers and self._as_dates:
            problems.append(
                Problem(
                    name,
                    f"{self._as_numbers} {of} are numbers and {self._as_dates} are dates",
                    fix="write all of them in one way",
                )
            )
        return problems


def _check(name: str, role: Role, counts: Counts, flag: bool = False) -> ColumnCheck:
    return ColumnCheck(
        column=name,
        role=role,
        cells=counts.cells,
        missing=counts.missing,
        unreadable=counts.unreadable,
        infinite=counts.infinite,
        out_of_range=counts.out_of_range,
        out_of_vocabulary=counts.out_of_vocabulary,
        distinct_ratio_flag=flag,
    )


def _of_feature(check: ColumnCheck, *, flagged: bool, distinct: int, keep: bool) -> list[Problem]:
    name, of = check.column, f"of {check.cells} cells"
    table = f"study.toml: [features.columns.{name}]"
    present = check.cells - check.missing - check.unreadable - check.infinite
    problems = []
    if check.unreadable:
        fix = "write numbers with a decimal point, and leave unknown cells empty"
        problems.append(Problem(name, f"{check.unreadable} {of} are not numbers", fix))
    if check.infinite:
        fix = "leave unknown cells empty"
        problems.append(Problem(name, f"{check.infinite} {of} are infinite", fix))
    if check.missing and not flagged:
        found = f"{check.missing} {of} are missing, which the study refuses here"
        problems.append(Problem(name, found, f'{table} missing = "flag"'))
    if check.out_of_range > FLOOD * present:
        found = f"{check.out_of_range} {of} lie outside the public range; another unit of measure?"
        problems.append(Problem(name, found, f"convert them, or {table} range = [LOW, HIGH]"))
    if check.out_of_vocabulary > FLOOD * present:
        found = f"{check.out_of_vocabulary} {of} are out of the vocabulary: a flood; another coding?"
        problems.append(Problem(name, found, f"recode them, or {table} vocabulary = [...]"))
    if check.distinct_ratio_flag and not keep:
        found = f"{distinct} {of} are different, as in an identifier: it names records"
        problems.append(Problem(name, found, f'leave the column out, or {table} identifier = "allow"'))
    return problems
