"""Tables in Parquet files and databases: read only, one SELECT, as text, a batch at a time.

The query is wrapped, `SELECT columns FROM (query)`: so only the needed columns are fetched, and what is
no query is a mistake of syntax. Before any row is read, an error's message is shown, since it can only
quote the query itself; from then on its class alone, since a message may quote a cell.
"""

from __future__ import annotations

import glob
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lepton_fl.data.cells import Batch
from lepton_fl.data.contract import Contract
from lepton_fl.data.read import picked, places
from lepton_fl.data.sources import DuckDB, ParquetFile, Postgres, Source, SQLite
from lepton_fl.errors import ConfigError, ConnectionFailed, DataError

DUCKDB_MEMORY = "1GiB"
"""Of DuckDB itself; a query that sorts or joins more is refused (`OutOfMemoryException`)."""

_DUCKDB: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": False,  # No code that the institution did not install.
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "allow_persistent_secrets": False,
    "python_enable_replacements": False,  # A table's name must not mean a variable of this program.
    "preserve_insertion_order": True,
    # Its temporary files would hold records in the clear, and stay there after a kill.
    "temp_directory": "",
    "memory_limit": DUCKDB_MEMORY,
    "threads": 1,
}


def read_duckdb(
    source: ParquetFile | DuckDB,
    contract: Contract,
    columns: Mapping[str, str] | None,
    batch_rows: int,
) -> Iterator[Batch]:
    """A Parquet file, or a query on a DuckDB file. Numbers are in their shortest exact form."""
    try:
        import duckdb
        import pyarrow as pa
    except ImportError:
        raise _missing(source, "duckdb and pyarrow", "data") from None
    _must_be_file(source.path)
    with closing(duckdb.connect(":memory:", config=_DUCKDB)) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        parameters = None
        if isinstance(source, ParquetFile):
            connection.execute("SET lock_configuration = true")
            # The name of one file, even where it looks like a pattern.
            parameters, inner = [glob.escape(str(source.path.absolute()))], "FROM read_parquet(?)"
            try:
                found = connection.sql(inner, params=parameters)
            except duckdb.Error as error:
                raise DataError(
                    f"{source}: cannot be read as Parquet: {type(error).__name__}", fix="write it anew"
                ) from None
        else:
            with _as_our_own(source, duckdb.Error, "cannot be opened as a DuckDB database"):
                path = _quoted(str(source.path.absolute()), "'")
                connection.execute(f"ATTACH {path} AS source (READ_ONLY)")
            connection.execute("USE source")
            # From here on no other file can be read, and none written. Locked before the query is compiled:
            # DuckDB has functions that set an option as soon as they are.
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            inner = _only_select(connection, source, duckdb)
            try:
                found = connection.sql(f"FROM ({inner}\n)")
            except (duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException) as error:
                _refuse_query(source, str(error))
            except duckdb.Error as error:
                raise _broken(source, error) from None
        names = _names(found.columns, contract, source, columns)
        cells = ", ".join(f"coalesce(CAST({name} AS VARCHAR), '')" for name in _identifiers(names))
        wrapped = inner if parameters else f"FROM ({inner}\n)"
        # After the first batch an error comes through Arrow, in classes of its own.
        with _as_our_own(source, (duckdb.Error, pa.ArrowException, OSError), "cannot be read"):
            for record in connection.sql(f"SELECT {cells} {wrapped}", params=parameters).to_arrow_reader(
                batch_rows
            ):
                texts = (column.to_pylist() for column in record.columns)
                yield Batch(dict(zip(contract.needed, texts, strict=True)))


def _only_select(connection: Any, source: DuckDB, duckdb: Any) -> str:
    """The query, if it is one SELECT."""
    try:
        statements = connection.extract_statements(source.query)
    except duckdb.Error as error:
        _refuse_query(source, str(error))
    kinds = [statement.type.name for statement in statements]
    if kinds != ["SELECT"]:
        raise ConfigError.at(str(source), "query", found=", ".join(kinds) or "nothing", allowed="one SELECT")
    return _bare(str(statements[0].query))


def read_sqlite(
    source: SQLite, contract: Contract, columns: Mapping[str, str] | None, batch_rows: int
) -> Iterator[Batch]:
    """A query on an SQLite file, through the standard library.

    SQLite's own text of a number has 15 digits, which do not read as the same number: values are fetched
    as they are and written by Python.
    """
    _must_be_file(source.path)
    uri = f"{source.path.absolute().as_uri()}?mode=ro"
    inner = _bare(source.query)
    with (
        _as_our_own(source, sqlite3.Error, "cannot be read"),
        closing(sqlite3.connect(uri, uri=True)) as connection,
    ):
        with _as_our_own(source, sqlite3.Error, "cannot be opened as an SQLite database"):
            connection.execute("PRAGMA schema_version").fetchone()
        connection.set_authorizer(_select_only)
        try:
            # Only compiled: an error can quote no cell.
            connection.execute(f"EXPLAIN SELECT * FROM ({inner}\n)")  # noqa: S608 - the site's own query
        except (sqlite3.Error, sqlite3.Warning) as error:
            _refuse_query(source, str(error))
        found = connection.execute(f"SELECT * FROM ({inner}\n) LIMIT 0")  # noqa: S608 - the same
        names = _names([column[0] for column in found.description], contract, source, columns)
        select = ", ".join(_identifiers(names))
        rows = connection.execute(f"SELECT {select} FROM ({inner}\n)")  # noqa: S608 - the same
        texts = ([_text(value, source) for value in row] for row in rows)
        yield from picked(texts, contract, batch_rows)


def _select_only(action: int, *_: object) -> int:
    reading = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
    return sqlite3.SQLITE_OK if action in reading else sqlite3.SQLITE_DENY


def _text(value: str | float | bytes | None, source: SQLite) -> str:
    if isinstance(value, bytes):
        raise DataError(f"{source}: a cell holds bytes, not text", fix="CAST(column AS TEXT) in the query")
    return "" if value is None else str(value)


def read_postgres(
    source: Postgres, contract: Contract, columns: Mapping[str, str] | None, batch_rows: int
) -> Iterator[Batch]:
    """A query on a PostgreSQL server, through a cursor that stays there: a batch at a time comes over."""
    try:
        import psycopg
    except ImportError:
        raise _missing(source, "psycopg", "postgres") from None
    inner = _bare(source.query)
    with closing(_connect(source, psycopg)) as connection:
        try:
            # The extended protocol: it takes one statement only. No row is fetched.
            found = connection.execute(f"SELECT * FROM ({inner}\n) AS source LIMIT 0", binary=True)  # noqa: S608 - the same
        except psycopg.Error as error:
            # Of the classes 42 (syntax, names), 0A (not supported) and 25006 (read only).
            if (error.sqlstate or "").startswith(("42", "0A", "25006")):
                _refuse_query(source, error.diag.message_primary or type(error).__name__)
            raise _broken(source, error) from None
        names = _names([column.name for column in found.description or ()], contract, source, columns)
        cells = ", ".join(f"coalesce({name}::text, '')" for name in _identifiers(names))
        with (
            _as_our_own(source, psycopg.Error, "cannot be read"),
            connection.cursor(name="lepton_fl") as cursor,
        ):
            cursor.itersize = batch_rows
            cursor.execute(f"SELECT {cells} FROM ({inner}\n) AS source")  # noqa: S608 - the same
            yield from picked(cursor, contract, batch_rows)


def _connect(source: Postgres, psycopg: Any) -> Any:
    password = None if source.password is None else source.password.read()
    settings = (
        "-c default_transaction_read_only=on -c TimeZone=UTC -c DateStyle=ISO "
        "-c extra_float_digits=1 -c bytea_output=hex"
    )
    tls = {"sslmode": "disable"}
    if source.encrypted:
        authority = "system" if source.ca_file is None else str(source.ca_file)
        tls = {"sslmode": "verify-full", "sslrootcert": authority}
    try:
        return psycopg.connect(
            host=source.host,
            port=source.port,
            dbname=source.dbname,
            user=source.user,
            password=password,
            **tls,
            options=settings,
            connect_timeout=30,
            application_name="lepton_fl",
            # Its own kept passwords are for its own tools.
            passfile="/dev/null",
        )
    except psycopg.Error as error:
        said = _first_line(str(error))
        if password:
            said = said.replace(password, "***")
        raise ConnectionFailed(f"{source}: {said}", fix="[data.database] in site.toml") from None


def _names(
    header: Sequence[str], contract: Contract, source: Source, columns: Mapping[str, str] | None
) -> list[str]:
    return [header[place] for place in places(header, contract, str(source), columns)]


def _identifiers(names: Sequence[str]) -> list[str]:
    return [_quoted(name, '"') for name in names]


def _quoted(text: str, mark: str) -> str:
    return mark + text.replace(mark, mark * 2) + mark


def _bare(query: str) -> str:
    return query.strip().rstrip(";")


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0]


def _must_be_file(path: Path) -> None:
    if not path.is_file():
        what = "not a file" if path.exists() else "No such file or directory"
        raise ConfigError(f"{path}: cannot be read: {what}")


def _missing(source: Source, libraries: str, extra: str) -> ConfigError:
    return ConfigError(
        f"{source}: reading it needs {libraries}, which this installation lacks",
        fix=f"pip install 'lepton-fl[{extra}]'",
    )


def _refuse_query(source: DuckDB | SQLite | Postgres, message: str) -> NoReturn:
    raise ConfigError(f"{source}: {_first_line(message)}", fix="[data] query in site.toml") from None


def _broken(source: Source, error: Exception) -> DataError:
    return DataError(f"{source}: cannot be read: {type(error).__name__}")


@contextmanager
def _as_our_own(
    source: Source, kind: type[Exception] | tuple[type[Exception], ...], what: str
) -> Iterator[None]:
    """A library's errors as ours, by class: the message may quote a cell."""
    try:
        yield
    except kind as error:
        raise DataError(f"{source}: {what}: {type(error).__name__}") from None
