"""The operator's desk: the files and tables that commands on the server's machine share with the server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lepton_fl.errors import ConfigError

if TYPE_CHECKING:
    from lepton_fl.fleet.server.config import ServerFiles
    from lepton_fl.fleet.server.lock import Running
    from lepton_fl.fleet.server.register import Register, SiteRow
    from lepton_fl.fleet.server.studies import SessionRow, Studies


def server_files(config: Path) -> ServerFiles:
    """The server.toml at `config`.

    Raises:
        ConfigError: it is missing or malformed.
    """
    from lepton_fl.fleet.server.config import load_server

    if not config.exists():
        raise ConfigError(f"{config}: no such file", fix="lepton-fl init DIR --template server")
    return load_server(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """What the operator's commands work on: the files and tables that they share with the server."""

    files: ServerFiles
    register: Register
    studies: Studies

    @property
    def server(self) -> Running | None:
        """The server that runs, if one does."""
        from lepton_fl.fleet.server.lock import running

        return running(self.files)

    def sites(self) -> list[SiteRow]:
        return self.register.sites(datetime.now(UTC))

    def connected(self) -> dict[int, SessionRow]:
        """Sites that are connected now, by their party; none where no server runs."""
        if self.server is None:
            return {}
        return {row.party: row for row in self.studies.sessions() if row.connected}


@contextmanager
def open_desk(config: Path) -> Iterator[Desk]:
    """The operator's desk of the server.toml at `config`.

    Raises:
        ConfigError: it is missing or malformed, or its database cannot be used.
    """
    from lepton_fl.fleet.server.database import Database
    from lepton_fl.fleet.server.register import Register
    from lepton_fl.fleet.server.studies import Studies

    files = server_files(config)
    database = Database(files.database)
    try:
        yield Desk(files=files, register=Register(database), studies=Studies(database))
    finally:
        database.close()
