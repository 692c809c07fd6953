"""Where a site's table comes from, and the one function that reads it: CSV, Parquet or a query.

Whatever the source, a cell is text before anything looks at it, so that the same records are the same
features: a NULL is an empty cell, a number is written so that it reads as itself, a boolean is `true`
or `false`, a time is in UTC.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lepton_fl.data.cells import Batch
from lepton_fl.data.contract import Contract
from lepton_fl.data.read import BATCH_ROWS, read_csv
from lepton_fl.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class CsvFile:
    """A CSV file."""

    path: Path
    delimiter: str = ","

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetFile:
    """A Parquet file."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class _QueryOnFile:
    path: Path
    query: str

    def __str__(self) -> str:
        return f"query on {self.path}"


class DuckDB(_QueryOnFile):
    """A query on a DuckDB database file, which is opened to be read only."""

    __slots__ = ()


class SQLite(_QueryOnFile):
    """A query on an SQLite database file, which is opened to be read only."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Password:
    """Where a password is: read when it is used, and kept nowhere."""

    env: str | None = None
    file: Path | None = None

    def read(self) -> str:
        """The password.

        Raises:
            ConfigError: the variable is not set, or the file cannot be read, is no regular file, or may
                be read by others than its owner.
        """
        if self.file is None:
            password = os.environ.get(self.env or "")
            if password is None:
                raise ConfigError(f"environment: {self.env} is not set, and the database needs its password")
            return password
        try:
            # Not waiting for the other end, should it be a pipe. What was opened is what is looked at.
            with os.fdopen(os.open(self.file, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                about = os.fstat(file.fileno())
                if not stat.S_ISREG(about.st_mode):
                    raise ConfigError(f"{self.file}: not a regular file, so no password is read from it")
                if mode := about.st_mode & 0o077:
                    raise ConfigError.at(
                        str(self.file),
                        "mode",
                        found=f"{stat.S_IMODE(about.st_mode):04o}",
                        allowed=f"nothing for group and others, who have {mode:03o}",
                        fix=f"chmod 600 {self.file}",
                    )
                return file.read().decode().rstrip("\r\n")
        except OSError as error:
            raise ConfigError(f"{self.file}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{self.file}: not UTF-8 text") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Postgres:
    """A query on a PostgreSQL server, in a transaction that can only read."""

    host: str
    """A name or address, or the folder of the server's Unix socket."""
    port: int = 5432
    dbname: str
    user: str
    password: Password | None = None
    ca_file: Path | None = None
    """Who vouches for the server; None for the machine's own list of authorities."""
    encrypted: bool = True
    """TLS with the server's name verified; a Unix socket has none, and needs none."""
    query: str

    def __str__(self) -> str:
        return f"query on postgres {self.dbname} at {self.host}"


Source = CsvFile | ParquetFile | DuckDB | SQLite | Postgres


def file_source(path: Path, *, delimiter: str = ",") -> CsvFile | ParquetFile:
    """The file at `path` as a source: Parquet by its suffix, else CSV."""
    if path.suffix.lower() == ".parquet":
        return ParquetFile(path=path)
    return CsvFile(path=path, delimiter=delimiter)


def open_batches(
    source: Source,
    contract: Contract,
    *,
    columns: Mapping[str, str] | None = None,
    batch_rows: int = BATCH_ROWS,
) -> Iterator[Batch]:
    """The columns that the contract needs, at most `batch_rows` rows at a time, from any source.

    `columns` maps the study's names to the institution's own; None where no site.toml could. Nothing is
    opened before the first batch is asked for. No error shows a cell or a password.

    Raises:
        ConfigError: a file, database, password or extra that is not there, a query that is refused or not
            understood, or two of the study's columns mapped to one header.
        ConnectionFailed: the database server cannot be reached, or does not let us in.
        DataError: the table cannot be read, or lacks a column.
    """
    if isinstance(source, CsvFile):
        yield from read_csv(
            source.path, contract, columns=columns, delimiter=source.delimiter, batch_rows=batch_rows
        )
        return
    # Only here: most sites read a file, and have none of these libraries.
    from lepton_fl.data import databases

    if isinstance(source, SQLite):
        yield from databases.read_sqlite(source, contract, columns, batch_rows)
    elif isinstance(source, Postgres):
        yield from databases.read_postgres(source, contract, columns, batch_rows)
    else:
        yield from databases.read_duckdb(source, contract, columns, batch_rows)
