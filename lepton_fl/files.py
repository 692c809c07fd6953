"""Files and databases that a crash cannot leave half written, and locks that it cannot leave behind."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace the file at `path` by `data` so that no crash leaves half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # Made anew: what lies there, in a folder that others may write in, may be theirs, or a link.
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def lock(path: Path, *, patience: float = 0.0) -> int | None:
    """Have `path`, made with mode 0600, for this process alone; an open file, whose end is the lock's.

    None: another process has it, also after `patience` seconds.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() >= until:
                os.close(handle)
                return None
            time.sleep(0.05)


def open_database(path: Path, *, patience: float = 30.0, of_one_thread: bool = False) -> sqlite3.Connection:
    """A connection to the SQLite file at `path`, made with mode 0600 where there is none.

    Every commit is on disk before it returns. `patience` is how many seconds to wait while another process
    writes. Several threads may have it, one at a time, unless it is `of_one_thread`.

    Raises:
        OSError, sqlite3.Error: it cannot be used.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    db = sqlite3.connect(path, isolation_level=None, timeout=patience, check_same_thread=of_one_thread)
    try:
        write_ahead(db)
    except BaseException:
        db.close()
        raise
    return db


def write_ahead(db: sqlite3.Connection) -> None:
    """Have a database log ahead of its writes: every commit is in that log on disk before it returns.

    Raises:
        sqlite3.Error: it cannot, also after five seconds where others begin the same database at once.
    """
    until = time.monotonic() + 5.0
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            # For this switch alone SQLite does not wait by itself.
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() >= until:
                raise
            time.sleep(0.02)
    # FULL: a commit returns only when the log is on disk.
    db.execute("PRAGMA synchronous = FULL")


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of the block's writes, or none; nobody else writes meanwhile."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        # Where the disk failed, SQLite may have ended it already.
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
