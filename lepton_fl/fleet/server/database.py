"""The server's one SQLite file, which the server and the operator's commands share.

Each module declares its own tables. Writers take turns; whoever polls `version` sees that another process
has written.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lepton_fl.errors import ConfigError
from lepton_fl.files import open_database, transaction

_FORMAT = 1


class Database:
    """A connection. Every commit is on disk before it returns (WAL, synchronous FULL).

    Not to be shared between threads.
    """

    def __init__(self, path: Path, *, patience: float = 30.0) -> None:
        """Open the file at `path`, made with mode 0600 in a folder of mode 0700 where there is none.

        `patience` is how many seconds to wait while another process writes.

        Raises:
            ConfigError: it cannot be opened, or is another release's.
        """
        self.path = path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._db = open_database(path, patience=patience, of_one_thread=True)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA foreign_keys = ON")
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found not in (0, _FORMAT):
                raise ConfigError(f"{path}: database format {found}, this release reads {_FORMAT}")
            if found != _FORMAT:
                # Not each time: it is a commit, at which the server looks at everything again.
                self._db.execute(f"PRAGMA user_version = {_FORMAT}")
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{path}: the server's database cannot be used: {error}") from None

    def declare(self, schema: str) -> None:
        """Make the tables that `schema` names (CREATE ... IF NOT EXISTS), if they are not there."""
        with self.transaction():
            for statement in filter(None, (part.strip() for part in schema.split(";"))):
                self._db.execute(statement)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the block's writes, or none; nobody else writes meanwhile."""
        with transaction(self._db):
            yield

    def execute(self, sql: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """One statement."""
        return self._db.execute(sql, values)

    def rows(self, sql: str, values: tuple[Any, ...] = ()) -> list[sqlite3.Row]:
        """What a SELECT finds; columns by name."""
        return self._db.execute(sql, values).fetchall()

    def version(self) -> int:
        """Another number after another connection has committed."""
        return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def close(self) -> None:
        self._db.close()
