"""One table, whatever it is kept in; and what a database is not asked, shown or told."""

import os
import sqlite3
import sys
from contextlib import closing

import numpy as np
import pytest

from lepton_fl.data import load_table, open_batches
from lepton_fl.data.sources import CsvFile, DuckDB, ParquetFile, Password, SQLite, file_source
from lepton_fl.errors import ConfigError, DataError

duckdb = pytest.importorskip("duckdb")
pytest.importorskip("pyarrow")

CSV = """\
patient,seen,born,age,dose,paid,visits,smoker,ward,ill
p1,2026-01-02T03:04:05+02:00,1960-02-29,61.25,0.1,12.50,3,true,7,1
p1,2026-01-02T03:04:05.5Z,1960-02-29,0.1,16777216,0.00,,false,,0
p2,2025-12-31T23:30:00-01:00,1999-12-31,,1e-7,99.99,9007199254740993,,07,0
p3,2026-07-01 12:00:00,2000-01-01,NaN,,1000000.01,-4,true,12,1
p4,2026-07-01 12:00:01,2000-01-01,1.2345678901234567e+17,2.5,,0,false,3,1
p5,2026-07-01 12:00:02,2000-01-01,0.30000000000000004,1e30,1.10,1,false,3,1
"""
TYPES = {
    "patient": "VARCHAR",
    "seen": "TIMESTAMPTZ",
    "born": "DATE",
    "age": "DOUBLE",
    "dose": "FLOAT",
    "paid": "DECIMAL(12, 2)",
    "visits": "BIGINT",
    "smoker": "BOOLEAN",
    "ward": "INTEGER",
    "ill": "UTINYINT",
}
WIDE = [-1e31, 1e31]
COLUMNS = {
    "age": {"type": "float", "range": WIDE, "missing": "flag"},
    "dose": {"type": "float", "range": WIDE, "missing": "flag"},
    "paid": {"type": "float", "range": WIDE, "missing": "flag"},
    "visits": {"type": "float", "range": WIDE, "missing": "flag"},
    "smoker": {"type": "category", "vocabulary": [True, False], "missing": "flag"},
    "ward": {"type": "category", "hash": 16, "missing": "flag"},
    "born": {"type": "category", "hash": 16},
}


@pytest.fixture
def seen_contract(make_contract, by_patient):
    """Every kind of column, units and times."""
    evaluation = {"split": "time", "time_column": "seen", "cutoff": "2026-02-01"}
    return make_contract(COLUMNS, privacy=by_patient, evaluation=evaluation)


@pytest.fixture
def typed(write):
    """A DuckDB connection whose table `visits` holds the CSV's records in their own types."""
    path = write(CSV, "visits.csv")
    with closing(duckdb.connect()) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        types = ", ".join(f"'{name}': '{kind}'" for name, kind in TYPES.items())
        connection.execute(
            f"CREATE TABLE visits AS FROM read_csv('{path}', header = true, columns = {{{types}}})"
        )
        yield connection


@pytest.fixture
def csv_file(typed, tmp_path):
    return CsvFile(path=tmp_path / "visits.csv")


@pytest.fixture
def parquet_file(typed, tmp_path):
    typed.execute(f"COPY visits TO '{tmp_path}/visits.parquet' (FORMAT parquet)")
    return ParquetFile(path=tmp_path / "visits.parquet")


@pytest.fixture
def duckdb_file(typed, tmp_path):
    """Its path; the file has been closed."""
    path = tmp_path / "visits.duckdb"
    typed.execute(f"ATTACH '{path}' AS kept; CREATE TABLE kept.visits AS FROM visits; DETACH kept")
    return path


@pytest.fixture
def sqlite_file(tmp_path):
    """Its path. SQLite has no type of times or truths: they are texts, as in the CSV file."""
    path = tmp_path / "visits.sqlite"
    header, *rows = [line.split(",") for line in CSV.splitlines()]
    numeric = {"age", "dose", "paid", "visits", "ward", "ill"}
    kinds = ", ".join(f"{name} {'NUMERIC' if name in numeric else 'TEXT'}" for name in header)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"CREATE TABLE visits ({kinds})")
        marks = ", ".join("?" * len(header))
        connection.executemany(
            f"INSERT INTO visits VALUES ({marks})", [[cell or None for cell in row] for row in rows]
        )
        connection.commit()
    return path


@pytest.fixture
def as_sqlite(tmp_path):
    """An SQLite file of one small table `t`, and a query on it as a source."""
    path = tmp_path / "small.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE t (age, ill); INSERT INTO t VALUES ('secret-cell', 1)")
    return lambda query: SQLite(path=path, query=query)


@pytest.fixture
def as_duckdb(tmp_path):
    """The same in DuckDB."""
    path = tmp_path / "small.duckdb"
    with closing(duckdb.connect(str(path))) as connection:
        connection.execute("CREATE TABLE t (age VARCHAR, ill INT); INSERT INTO t VALUES ('secret-cell', 1)")
    return lambda query: DuckDB(path=path, query=query)


@pytest.fixture(params=["sqlite", "duckdb"])
def query(request):
    """A query as a source, on either kind of database file."""
    return request.getfixturevalue(f"as_{request.param}")


@pytest.fixture
def small(make_contract):
    return make_contract({"age": {"type": "float", "range": [0, 9]}})


def same(one, other):
    """Whether two tables hold the same records, units and times."""
    np.testing.assert_array_equal(one.x_NF, other.x_NF)
    np.testing.assert_array_equal(one.y_N, other.y_N)
    np.testing.assert_array_equal(one.unit_N, other.unit_N)
    np.testing.assert_array_equal(one.key_U, other.key_U)
    np.testing.assert_array_equal(one.time_N, other.time_N)
    np.testing.assert_array_equal(one.raw_NC, other.raw_NC)


def load(source, contract, **options):
    return load_table(contract, open_batches(source, contract, **options), source=str(source))


def test_parquet_is_read_as_csv_is(csv_file, parquet_file, seen_contract):
    """Doubles, floats, decimals, integers, truths, dates, times with zones, NULL and NaN."""
    same(load(csv_file, seen_contract), load(parquet_file, seen_contract))


@pytest.mark.parametrize("batch_rows", [1, 4, 100])
def test_a_duckdb_query_is_read_as_csv_is(csv_file, duckdb_file, seen_contract, batch_rows):
    """In batches of any size."""
    source = DuckDB(path=duckdb_file, query="SELECT * FROM visits;")

    same(load(csv_file, seen_contract), load(source, seen_contract, batch_rows=batch_rows))


@pytest.mark.parametrize("batch_rows", [1, 4, 100])
def test_an_sqlite_query_is_read_as_csv_is(csv_file, sqlite_file, seen_contract, batch_rows):
    """Numbers keep all their digits, though SQLite's own text of them does not."""
    source = SQLite(path=sqlite_file, query="SELECT * FROM visits -- all")

    same(load(csv_file, seen_contract), load(source, seen_contract, batch_rows=batch_rows))


def test_the_machines_time_zone_changes_nothing(csv_file, parquet_file, seen_contract, monkeypatch):
    """A time with a zone is one instant wherever the agent stands."""
    monkeypatch.setenv("TZ", "America/New_York")

    same(load(csv_file, seen_contract), load(parquet_file, seen_contract))


def test_columns_are_mapped_in_any_source(duckdb_file, csv_file, seen_contract):
    """The study's name to the query's."""
    renamed = DuckDB(path=duckdb_file, query='SELECT * RENAME (age AS "AGE\'S") FROM visits')

    same(load(csv_file, seen_contract), load(renamed, seen_contract, columns={"age": "AGE'S"}))


def test_a_column_that_a_query_lacks_is_refused(duckdb_file, seen_contract):
    """As a header that a file lacks."""
    source = DuckDB(path=duckdb_file, query="SELECT * EXCLUDE (age) FROM visits")
    with pytest.raises(DataError, match="no column 'age'"):
        load(source, seen_contract)


def test_a_parquet_file_is_known_by_its_suffix(tmp_path):
    """Everything else is CSV, as before."""
    assert isinstance(file_source(tmp_path / "a.Parquet"), ParquetFile)
    assert isinstance(file_source(tmp_path / "a.txt"), CsvFile)


def test_a_name_like_a_pattern_is_one_file(parquet_file, csv_file, seen_contract):
    """`*` and `[` in a file's name match nothing else."""
    odd = parquet_file.path.with_name("[a]*.parquet")
    odd.write_bytes(parquet_file.path.read_bytes())
    odd.with_name("another.parquet").write_bytes(b"not Parquet")

    same(load(csv_file, seen_contract), load(ParquetFile(path=odd), seen_contract))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_missing_file_is_refused(tmp_path, small, suffix):
    """By its name."""
    with pytest.raises(ConfigError, match=f"none.{suffix}: cannot be read: No such file"):
        load(file_source(tmp_path / f"none.{suffix}"), small)


def test_what_is_no_parquet_is_refused(write, small):
    """Without a word of what it holds."""
    with pytest.raises(DataError, match="cannot be read as Parquet") as refused:
        load(ParquetFile(path=write("secret-cell", "a.parquet")), small)

    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("kind", [DuckDB, SQLite])
def test_what_is_no_database_is_refused(write, small, kind):
    """By the error's class."""
    path = write("secret-cell" * 1000, "a.db")
    with pytest.raises(DataError, match="database: ") as refused:
        load(kind(path=path, query="SELECT 1"), small)

    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "DROP TABLE t",
        "INSERT INTO t VALUES ('a', 1)",
        "CREATE TABLE u AS SELECT * FROM t",
        "ATTACH ':memory:' AS other",
        "PRAGMA table_info('t')",
        "SELECT * FROM t; SELECT * FROM t",
        "SELECT * FROM t; DROP TABLE t",
        "SELECT * FROM t) ; DROP TABLE t; --",
        "",
    ],
)
def test_only_one_select_is_run(query, small, text):
    """Everything else is refused, and changes nothing."""
    source = query(text)
    before = source.path.read_bytes()
    with pytest.raises(ConfigError):
        load(source, small)

    assert source.path.read_bytes() == before


def test_a_query_that_is_wrong_is_explained(query, small):
    """Nothing has been read yet, so the database's own words are shown."""
    with pytest.raises(ConfigError, match="no_such_table"):
        load(query("SELECT * FROM no_such_table"), small)
    with pytest.raises(ConfigError, match="no_such_column"):
        load(query("SELECT no_such_column FROM t"), small)
    with pytest.raises(ConfigError, match="syntax error"):
        load(query("SELECT * FROM t WHERE"), small)


def test_a_duckdb_error_never_shows_a_cell(as_duckdb, small):
    """A cast that fails quotes what it failed on; we do not."""
    with pytest.raises(DataError, match="ConversionException") as refused:
        load(as_duckdb("SELECT CAST(age AS INT) AS age, ill FROM t"), small)

    assert "secret" not in str(refused.value)


def test_a_late_duckdb_error_never_shows_a_cell(as_duckdb, small):
    """In a later batch it comes another way, and is the same to us."""
    late = "CASE WHEN i = 150000 THEN 'secret-cell' ELSE '1' END"
    query = f"SELECT CAST({late} AS INT) AS age, i % 2 AS ill FROM range(200000) AS r(i)"
    with pytest.raises(DataError, match="cannot be read: ") as refused:
        load(as_duckdb(query), small)

    assert "secret" not in str(refused.value)


def test_an_sqlite_error_never_shows_a_cell(as_sqlite, small):
    """By its class alone."""
    with pytest.raises(DataError, match="OperationalError") as refused:
        load(as_sqlite("SELECT json_extract(age, '$.a') AS age, ill FROM t"), small)

    assert "secret" not in str(refused.value)
    assert "malformed" not in str(refused.value)


def test_a_duckdb_query_reads_no_other_file(as_duckdb, small, write):
    """Only the database that was named: not the machine's files, not the program's variables."""
    other = write("age,ill\n1,0\n")
    with pytest.raises((ConfigError, DataError)):
        load(as_duckdb(f"SELECT * FROM read_csv('{other}')"), small)
    with pytest.raises(ConfigError, match="columns"):
        load(as_duckdb("SELECT * FROM columns"), small)


@pytest.mark.parametrize("option", ["enable_logging", "enable_profiling"])
def test_a_duckdb_query_sets_no_option(as_duckdb, small, option):
    """DuckDB would set these while it compiles the query."""
    with pytest.raises(DataError, match="InvalidInputException"):
        load(as_duckdb(f"SELECT 1 AS age, 1 AS ill FROM {option}()"), small)


def test_an_sqlite_query_loads_no_code(as_sqlite, small):
    """Extensions are code."""
    with pytest.raises(DataError, match="OperationalError"):
        load(as_sqlite("SELECT load_extension('libc.so.6') AS age, 1 AS ill"), small)


def test_bytes_are_no_text(as_sqlite, small):
    """Whoever keeps text as bytes says so in the query."""
    with pytest.raises(DataError, match="holds bytes"):
        load(as_sqlite("SELECT x'00' AS age, ill FROM t"), small)


@pytest.mark.parametrize("library", ["duckdb", "pyarrow"])
def test_without_the_extra_one_line_says_so(parquet_file, small, monkeypatch, library):
    """With the command that installs it."""
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=r"fix: pip install 'lepton-fl\[data\]'"):
        load(parquet_file, small)


def test_a_password_comes_from_the_environment(monkeypatch):
    """It is in no representation of the source."""
    monkeypatch.setenv("DB_PASSWORD", "hunter2")
    password = Password(env="DB_PASSWORD")

    assert password.read() == "hunter2"
    assert "hunter2" not in repr(password)


def test_a_variable_that_is_not_set_is_refused(monkeypatch):
    """By its name."""
    monkeypatch.delenv("DB_PASSWORD", raising=False)
    with pytest.raises(ConfigError, match="DB_PASSWORD is not set"):
        Password(env="DB_PASSWORD").read()


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_password_file_of_the_owner_is_read(write, mode):
    """Without its last line end."""
    path = write("hunter2\n", "password")
    path.chmod(mode)

    assert Password(file=path).read() == "hunter2"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_password_file_that_others_may_open_is_refused(write, mode):
    """As ssh refuses a key, and without a word of it."""
    path = write("hunter2", "password")
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"found '0{mode:o}'.*chmod 600") as refused:
        Password(file=path).read()

    assert "hunter2" not in str(refused.value)


def test_a_pipe_is_no_password_file(tmp_path):
    """And is not waited for."""
    os.mkfifo(tmp_path / "password", 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        Password(file=tmp_path / "password").read()
