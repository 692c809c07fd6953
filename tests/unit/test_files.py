"""A file is the old one or the whole new one, and a lock has one holder."""

import itertools
import os
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from lepton_fl import files
from lepton_fl.files import lock, open_database, transaction, write_atomic


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    """A full disk, or a crash before the file has its name."""
    path = tmp_path / "f.json"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(broken, fail)

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_bytes_are_on_disk_before_they_have_the_name(tmp_path, monkeypatch):
    """The other order could leave an empty file under the right name after a power cut."""
    path, at_fsync = tmp_path / "f.json", []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (at_fsync.append(path.exists()), real(handle)))

    write_atomic(path, b"new")

    # The file while it has no name yet, then its folder.
    assert at_fsync == [False, True]
    assert path.read_bytes() == b"new"


def test_a_secret_is_never_readable_by_others(tmp_path):
    """The mode holds from the first byte, whatever the old file's was."""
    path = tmp_path / "key"
    path.write_bytes(b"old")
    path.chmod(0o644)

    write_atomic(path, b"new", mode=0o600)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_secret_is_not_written_through_what_others_have_laid_out(tmp_path):
    """In a folder that is theirs too, under the name that is written first."""
    path, theirs = tmp_path / "key", tmp_path / "theirs"
    (tmp_path / f".key.{os.getpid()}.tmp").symlink_to(theirs)

    write_atomic(path, b"new", mode=0o600)

    assert not theirs.exists()
    assert not path.is_symlink()
    assert path.read_bytes() == b"new"


def test_a_lock_has_one_holder_until_that_lets_go(tmp_path):
    """Whoever comes second gets nothing, also where it has waited."""
    path = tmp_path / "lock"
    first = lock(path)

    assert first is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert lock(path) is None
    assert lock(path, patience=0.1) is None

    os.close(first)
    again = lock(path)
    assert again is not None
    os.close(again)


@pytest.fixture
def database(tmp_path):
    with closing(open_database(tmp_path / "f.db")) as db:
        db.execute("CREATE TABLE t (i INTEGER NOT NULL UNIQUE) STRICT")
        yield db


def test_a_database_is_its_owners_and_each_commit_on_disk(database, tmp_path):
    """synchronous 2 is FULL: 1 would not wait for the write-ahead log."""
    assert stat.S_IMODE((tmp_path / "f.db").stat().st_mode) == 0o600
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert database.execute("PRAGMA synchronous").fetchone() == (2,)


@pytest.mark.parametrize("of_one_thread", [True, False])
def test_a_database_of_one_thread_is_of_no_other(tmp_path, of_one_thread):
    with (
        closing(open_database(tmp_path / "f.db", of_one_thread=of_one_thread)) as db,
        ThreadPoolExecutor(1) as pool,
    ):
        error = pool.submit(db.execute, "SELECT 1").exception()

    assert isinstance(error, sqlite3.ProgrammingError) == of_one_thread


def test_a_database_that_another_begins_at_this_moment_is_waited_for(tmp_path, monkeypatch):
    """SQLite itself gives up at once where the log is to be switched, whatever its patience."""
    waits = []
    with closing(sqlite3.connect(tmp_path / "f.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("CREATE TABLE t (i)")

        def wait(seconds):
            waits.append(seconds)
            other.execute("COMMIT")

        monkeypatch.setattr(files.time, "sleep", wait)
        with closing(open_database(tmp_path / "f.db")) as db:
            assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert len(waits) == 1


def test_a_database_that_another_does_not_let_go_of_is_refused(tmp_path, monkeypatch):
    """After the wait, which has an end."""
    clock = itertools.count()
    with closing(sqlite3.connect(tmp_path / "f.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(files.time, "sleep", lambda _: None)
        monkeypatch.setattr(files.time, "monotonic", lambda: next(clock))
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            open_database(tmp_path / "f.db")
    assert 5 <= next(clock) < 10


def test_what_is_no_database_is_refused_and_not_changed(tmp_path):
    path = tmp_path / "f.db"
    path.write_bytes(b"anything else" * 100)

    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        open_database(path)
    assert path.read_bytes() == b"anything else" * 100


def write(database, *statements):
    with transaction(database):
        for statement in statements:
            database.execute(statement)


def test_a_transaction_is_whole_or_nothing(database):
    with pytest.raises(sqlite3.IntegrityError):
        write(database, "INSERT INTO t VALUES (1)", "INSERT INTO t VALUES (1)")
    write(database, "INSERT INTO t VALUES (2)")

    assert database.execute("SELECT i FROM t").fetchall() == [(2,)]


def test_a_commit_that_fails_leaves_no_transaction_open(database):
    """Or no other could begin, as long as the process lives."""
    database.execute("CREATE TABLE of (i INTEGER REFERENCES t (i) DEFERRABLE INITIALLY DEFERRED) STRICT")
    database.execute("PRAGMA foreign_keys = ON")
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
        write(database, "INSERT INTO of VALUES (1)")
    write(database, "INSERT INTO t VALUES (2)")

    assert database.execute("SELECT count(*) FROM of").fetchone() == (0,)


def test_an_error_that_ended_the_transaction_is_the_one_that_is_raised(database):
    """A full disk ends it; a second end would hide why."""
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        write(database, "INSERT INTO t VALUES (1)", "INSERT OR ROLLBACK INTO t VALUES (1)")

    assert database.execute("SELECT count(*) FROM t").fetchone() == (0,)
