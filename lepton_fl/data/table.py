"""A site's table, encoded and ready to train on, and the two ways to make or judge one.

N = records, F = features, C = columns, U = units.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lepton_fl.data.cells import Batch
from lepton_fl.data.contract import Contract
from lepton_fl.data.findings import ColumnCheck, Findings
from lepton_fl.data.growing import MEMORY, Growing, Room, slices
from lepton_fl.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """Records of one site. Holds the institution's data: it never leaves the process.

    Above the memory of `room` the arrays lie in unlinked files that are mapped into memory, and so do
    those of its subsets.
    """

    x_NF: NDArray[np.float32]
    """Features, each in [-1, 1]."""
    y_N: NDArray[np.float32]
    """1 for positive, else 0."""
    unit_N: NDArray[np.int64]
    """Whose record it is: 0 to units - 1, in order of first appearance."""
    units: int
    key_U: NDArray[np.uint8]
    """Who each unit is, as 16 bytes, uint8 [U, 16]: BLAKE2b of the unit column's normal text.

    Depends on that text alone: not on other columns, records, batches or their order. Where each record is
    a unit, of the texts of its own cells, all that the study reads, by column name. Records that read the
    same are then different units with one key, and a study that reads other columns has other keys.
    """
    time_N: NDArray[np.float64] | None
    """Numbers as they came, or POSIX seconds; None where the study splits by unit."""
    raw_NC: NDArray[np.float64]
    """Numbers as they came, codes as indices, NaN for missing: for a simulation's trees, never federated.

    No columns where the table was loaded without them, as deployed sites do.
    """
    raw_categorical: tuple[bool, ...]
    feature_names: tuple[str, ...]
    room: Room = MEMORY

    def __len__(self) -> int:
        return len(self.y_N)

    @property
    def positives(self) -> int:
        """Records with the positive label."""
        # Not the sum: in float32 that stops counting at 16.8 million.
        return int(np.count_nonzero(self.y_N))

    @property
    def positive_U(self) -> NDArray[np.bool_]:
        """By unit: whether any of its records has the positive label."""
        positive_U = np.zeros(self.units, dtype=bool)
        positive_U[self.unit_N[self.y_N == 1]] = True
        return positive_U

    def subset(self, which: NDArray[np.bool_] | NDArray[np.int64]) -> Table:
        """The records under a mask, or at these places in this order; units are numbered anew."""
        row_N: NDArray[np.int64] = np.flatnonzero(which) if which.dtype == bool else which  # type: ignore[assignment]
        if which.dtype == bool and self.units == len(self):
            # Each record is a unit, in order already: no need to sort them all.
            unit_N, kept_U = np.arange(len(row_N), dtype=np.int64), row_N
        else:
            unit_N, kept_U = _renumbered(self.unit_N[row_N])
        with Growing(self.room) as growing:
            for part in slices(len(row_N)):
                row_B = row_N[part]
                growing.add(
                    x_NF=self.x_NF[row_B], y_N=self.y_N[row_B], unit_N=unit_N[part], raw_NC=self.raw_NC[row_B]
                )
                if self.time_N is not None:
                    growing.add(time_N=self.time_N[row_B])
            for part in slices(len(kept_U)):
                growing.add(key_U=self.key_U[kept_U[part]])
            arrays = growing.arrays()
        return replace(
            self,
            x_NF=arrays["x_NF"],
            y_N=arrays["y_N"],
            unit_N=arrays["unit_N"],
            units=len(kept_U),
            key_U=arrays["key_U"],
            time_N=arrays.get("time_N"),
            raw_NC=arrays["raw_NC"],
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over type, shape and bytes of x, y and unit: evidence of the version of the data.

        Stays at the site: over so few possible tables a digest can be searched.
        """
        digest = hashlib.sha256(b"lepton-fl/table/1\n")
        for array in (self.x_NF, self.y_N, self.unit_N):
            little = array.dtype.newbyteorder("<")
            digest.update(f"{little.str} {array.shape}\n".encode())
            for part in slices(len(array)):
                digest.update(np.ascontiguousarray(array[part], dtype=little).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What `data check` prints. Counts only, never a value."""

    source: str
    rows: int
    units: int
    positives: int
    columns: tuple[ColumnCheck, ...]
    problems: tuple[str, ...]
    """Each as the line that a run would be refused with; empty where the table is fine."""

    @property
    def ok(self) -> bool:
        """Whether a run would accept the table."""
        return not self.problems


def load_table(
    contract: Contract,
    batches: Iterable[Batch],
    *,
    source: str,
    raw: bool = True,
    room: Room = MEMORY,
) -> Table:
    """Encode a table, batch by batch. `source` names it in errors; without `raw` it keeps no `raw_NC`.

    The features and all other arrays are the same however little memory `room` gives.

    Raises:
        ConfigError: the folder of `room` cannot be written, or is full.
        DataError: no rows; cells that are not numbers or infinite; missing features where the study
            refuses them; a missing target, unit or time; a time that is none; more than a fifth of
            a column out of its range or vocabulary; a feature that looks like an identifier. The
            first by column name, with the number of others.
    """
    findings = Findings(contract)
    with Growing(room) as growing:
        for batch in batches:
            rows = findings.add(batch)
            growing.add(
                x_NF=rows.x_BF,
                y_N=rows.y_B,
                unit_N=rows.unit_B,
                key_U=rows.key_V,
                # A copy: a view would keep all of it in memory, uncounted.
                raw_NC=rows.raw_BC if raw else rows.raw_BC[:, :0].copy(),
            )
            if rows.time_B is not None:
                growing.add(time_N=rows.time_B)
        if problems := findings.problems():
            raise problems[0].error(source, more=len(problems) - 1)
        arrays = growing.arrays()
    return Table(
        x_NF=arrays["x_NF"],
        y_N=arrays["y_N"],
        unit_N=arrays["unit_N"],
        units=findings.units,
        key_U=arrays["key_U"],
        time_N=arrays.get("time_N"),
        raw_NC=arrays["raw_NC"],
        raw_categorical=contract.raw_categorical if raw else (),
        feature_names=contract.feature_names,
        room=room,
    )


def check_table(contract: Contract, batches: Iterable[Batch], *, source: str) -> CheckReport:
    """Judge a table as `load_table` would, keep none of it, and list everything.

    What cannot be read at all (a missing column, a ragged line) ends the pass and is listed last.
    """
    findings = Findings(contract)
    broken: list[str] = []
    try:
        for batch in batches:
            findings.add(batch)
    except DataError as error:
        broken.append(str(error))
    problems = [] if broken and not findings.rows else findings.problems()
    return CheckReport(
        source=source,
        rows=findings.rows,
        units=findings.units,
        positives=findings.positives,
        columns=findings.columns(),
        problems=(*(str(problem.error(source)) for problem in problems), *broken),
    )


def pool(tables: Sequence[Table]) -> Table:
    """All records in one table, as no federation may have them: for the pooled comparison only.

    A unit is one person at one site, so the units of different tables stay apart, though a person who is
    at two sites has the same key at both.

    Raises:
        ValueError: the tables were not made by one contract.
    """
    first = tables[0]
    if any(table.feature_names != first.feature_names for table in tables):
        raise ValueError("tables of different contracts cannot be pooled")
    starts = np.cumsum([0, *(table.units for table in tables)])
    times = [table.time_N for table in tables if table.time_N is not None]
    return Table(
        x_NF=np.concatenate([table.x_NF for table in tables]),
        y_N=np.concatenate([table.y_N for table in tables]),
        unit_N=np.concatenate([table.unit_N + start for table, start in zip(tables, starts, strict=False)]),
        units=int(starts[-1]),
        key_U=np.concatenate([table.key_U for table in tables]),
        time_N=np.concatenate(times) if len(times) == len(tables) else None,
        raw_NC=np.concatenate([table.raw_NC for table in tables]),
        raw_categorical=first.raw_categorical,
        feature_names=first.feature_names,
    )


def _renumbered(unit_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Units 0, 1, 2 ... in order of first appearance, and the former number of each."""
    found_U, first_U, index_N = np.unique(unit_N, return_index=True, return_inverse=True)
    number_U = np.empty(len(found_U), dtype=np.int64)
    order_U = np.argsort(first_U)
    number_U[order_U] = np.arange(len(found_U))
    return number_U[index_N], found_U[order_U]
