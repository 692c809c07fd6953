"""Reading CSV files: UTF-8, a header, one line for each record, and only the columns a study needs.

No error here shows a cell. Headers are shown, since the person who maps them must see them.
"""

from __future__ import annotations

import csv
import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import NoReturn

import numpy as np

from lepton_fl.data.cells import Batch, nfc, numbers
from lepton_fl.data.contract import Contract
from lepton_fl.errors import ConfigError, DataError

BATCH_ROWS = 65_536
"""Rows held as text at a time."""


def read_csv(
    path: Path,
    contract: Contract,
    *,
    columns: Mapping[str, str] | None = None,
    delimiter: str = ",",
    batch_rows: int = BATCH_ROWS,
) -> Iterator[Batch]:
    """The columns that the contract needs, at most `batch_rows` rows at a time.

    `columns` maps the study's names to the institution's own headers; a name not in it is looked
    for as it is. The file is opened when the first batch is asked for. Blank lines are skipped.

    Raises:
        ConfigError: no such file, or unreadable; a delimiter of more than one character; two of the
            study's columns mapped to one header.
        DataError: empty, not UTF-8, a NUL byte, bad quoting, no header, a header twice, a column
            missing, or a line with another number of cells than the header.
    """
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise ConfigError.at(str(path), "delimiter", found=delimiter, allowed="one character")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = _rows(file, delimiter, path)
            header = next(rows, None)
            if header is None:
                raise DataError(f"{path}: the file is empty")
            if len(header) == 1 and (other := re.search(r"[;\t|,]", header[0])):
                raise DataError(
                    f"{path}: the header is one cell when read with delimiter {delimiter!r}",
                    fix=f"delimiter {other[0]!r}",
                )
            yield from batches(
                header, rows, contract, source=str(path), columns=columns, batch_rows=batch_rows
            )
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text", fix="save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def batches(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    contract: Contract,
    *,
    source: str,
    columns: Mapping[str, str] | None = None,
    batch_rows: int = BATCH_ROWS,
) -> Iterator[Batch]:
    """Rows, each as long as the header, as batches of the columns that the contract needs.

    Raises:
        ConfigError: two of the study's columns mapped to one header.
        DataError: no header, a header twice, or a column missing.
    """
    # A tuple: a contract needs a feature and a target at least.
    pick = itemgetter(*places(header, contract, source, columns))
    yield from picked(map(pick, rows), contract, batch_rows)


def picked(rows: Iterable[Sequence[str]], contract: Contract, batch_rows: int) -> Iterator[Batch]:
    """Rows of the columns that the contract needs, in its order, as batches."""
    waiting = iter(rows)
    while some := list(islice(waiting, batch_rows)):
        yield Batch(dict(zip(contract.needed, zip(*some, strict=True), strict=True)))


def _rows(lines: Iterable[str], delimiter: str, path: Path) -> Iterator[list[str]]:
    """The header and the rows: all of one width, without blank lines."""
    # Strict: a stray quote would otherwise swallow the lines after it.
    reader = csv.reader(_without_nul(lines, path), delimiter=delimiter, strict=True)
    width = 0
    try:
        for row in reader:
            width = width or len(row)
            if len(row) == width != 0:
                yield row
            elif row:
                raise DataError(f"{path}: line {reader.line_num}: {len(row)} cells, the header has {width}")
    except csv.Error:
        raise DataError(
            f"{path}: line {reader.line_num}: bad quoting, or a cell of more than 128 KiB"
        ) from None


def _without_nul(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise DataError(f"{path}: line {number}: a NUL byte; is this a text file?")
        yield line


def places(
    header: Sequence[str], contract: Contract, source: str, columns: Mapping[str, str] | None
) -> list[int]:
    """Where each needed column stands in a row, in the order of `contract.needed`.

    `columns` is None where there is no site.toml that could map them.

    Raises:
        ConfigError: two of the study's columns mapped to one header.
        DataError: no header, a header twice, or a column missing.
    """
    own = {nfc(name): nfc(theirs).strip() for name, theirs in (columns or {}).items()}
    wanted = {name: own.get(name, name) for name in contract.needed}
    for theirs, times in Counter(wanted.values()).items():
        if times > 1:
            both = " and ".join(repr(name) for name, h in wanted.items() if h == theirs)
            raise ConfigError(
                f"{source}: {both} are both read from the header {theirs!r}",
                fix="[data.columns] in site.toml: one header for each",
            )
    place = {nfc(text).strip(): i for i, text in enumerate(header)}
    missing = [name for name, theirs in wanted.items() if theirs not in place]
    if len(missing) == len(wanted) and _holds_a_number(header):
        # Said before any header is shown: this line is most likely somebody's record.
        raise DataError(f"{source}: the first line holds data, not the names of columns")
    if missing:
        _refuse_missing(missing, wanted, list(place), contract, source, mapped=columns is not None)
    for text, times in Counter(nfc(text).strip() for text in header).items():
        if times > 1 and text:
            raise DataError(f"{source}: the header {text!r} stands there {times} times")
    return [place[theirs] for theirs in wanted.values()]


def _holds_a_number(header: Sequence[str]) -> bool:
    return bool(np.isfinite(numbers(header).value_B).any())


def _refuse_missing(
    missing: list[str],
    wanted: Mapping[str, str],
    headers: list[str],
    contract: Contract,
    source: str,
    *,
    mapped: bool,
) -> NoReturn:
    # Without the unit there is no promise to keep, so it is said first.
    unit = contract.unit
    name = unit if unit is not None and unit in missing else missing[0]
    theirs = wanted[name]
    lower = {header.casefold(): header for header in headers if header}
    close = difflib.get_close_matches(theirs.casefold(), list(lower), n=3)
    near = f"; near it: {', '.join(repr(lower[c]) for c in close)}" if close else ""
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    own = f" (for {name!r})" if theirs != name else ""
    what = f"no column {theirs!r}{own}{near}{more}"
    if name == unit:
        what = f"the study's privacy unit cannot be protected here: {what}"
    if not mapped:
        raise DataError(
            f"{source}: {what}",
            fix=f"call it {name!r} in {source}, or as it is called there in study {contract.study}",
        )
    key = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else f'"{name}"'
    raise DataError(f"{source}: {what}", fix=f'map it in site.toml: [data.columns] {key} = "..."')
