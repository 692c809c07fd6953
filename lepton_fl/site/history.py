"""The secure rounds that a site was in, on its own disk: so that no update is ever added up a second time."""

from __future__ import annotations

import hmac
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lepton_fl.errors import ConfigError, LeptonError, VerificationFailed
from lepton_fl.files import open_database
from lepton_fl.secagg.context import Attempt
from lepton_fl.secagg.encoding import digest
from lepton_fl.site.config import SiteFiles

MAX_RUNS = 100_000
"""Runs that are remembered, some 300 bytes each. None is forgotten: a server could bring it back."""
_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS attempts (
    run BLOB NOT NULL,
    kind TEXT NOT NULL,
    round INTEGER NOT NULL,
    cohort BLOB NOT NULL,
    number INTEGER NOT NULL,
    released INTEGER NOT NULL,
    digest BLOB NOT NULL,
    PRIMARY KEY (run, kind)
) STRICT, WITHOUT ROWID
"""


class DiskHistory:
    """A `History` that outlives the process; for each run and kind, its last round.

    Guarantee: what `write` has returned from stays, whatever becomes of the process or the power (SQLite WAL,
    synchronous FULL). The rounds of a run only count upwards, so one that comes before the last is over, and
    is said to be released: a few bytes a run are enough. A row that is not as it was written is refused.
    """

    def __init__(self, path: Path) -> None:
        """Open the file at `path`, made with mode 0600 where there is none.

        Raises:
            ConfigError: it cannot be used.
        """
        self.path = path
        try:
            self._db = open_database(path)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from None
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        try:
            found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found == "ok" and version == 0:
                self._db.execute(_SCHEMA)
                self._db.execute(f"PRAGMA user_version = {_VERSION}")
            (self._runs,) = self._db.execute("SELECT count(*) FROM attempts").fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        if found != "ok":
            raise self._unusable(found)
        if version not in (0, _VERSION):
            raise ConfigError(f"{self.path}: format {version}, this release reads {_VERSION}")

    def close(self) -> None:
        """Close the file; a closed history lets the site into no round."""
        self._db.close()

    def read(self, run: bytes, kind: str, round: int) -> Attempt | None:
        """The last attempt at this round; at one before the run's last, an attempt that is released.

        Raises:
            VerificationFailed: what is there is not what was written.
            LeptonError: the file cannot be read.
        """
        with self._io():
            row = self._db.execute(
                "SELECT round, cohort, number, released, digest FROM attempts WHERE run = ? AND kind = ?",
                (run, kind),
            ).fetchone()
        if row is None:
            return None
        last, cohort, number, released, written = row
        found = Attempt(run=run, kind=kind, round=last, cohort=cohort, number=number, released=bool(released))
        if not hmac.compare_digest(_digest(found), written):
            raise VerificationFailed(
                f"{self.path}: what it says of run {run.hex()} is not what was written there", fix=_RESTORE
            )
        if last < round:
            return None
        return replace(found, round=round, released=found.released or last > round)

    def write(self, attempt: Attempt) -> None:
        """Remember an attempt at the run's last round, in place of what was remembered of the run.

        Raises:
            LeptonError: it cannot be written; or there is no room for another run.
        """
        values = (
            attempt.run,
            attempt.kind,
            attempt.round,
            attempt.cohort,
            attempt.number,
            int(attempt.released),
            _digest(attempt),
        )
        with self._io():
            known = self._db.execute(
                "UPDATE attempts SET round = ?3, cohort = ?4, number = ?5, released = ?6, digest = ?7"
                " WHERE run = ?1 AND kind = ?2",
                values,
            ).rowcount
            if known:
                return
            if self._runs >= MAX_RUNS:
                raise LeptonError(
                    f"{self.path}: remembers {self._runs} runs, and no more",
                    public="the site takes no more runs",
                )
            self._db.execute("INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            self._runs += 1

    @contextmanager
    def _io(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            # No refusal for good: a full disk may have room again.
            raise LeptonError(
                f"{self.path}: the site's memory of rounds cannot be used: {error}",
                public="the site cannot remember the round",
            ) from None

    def _unusable(self, error: object) -> ConfigError:
        return ConfigError(f"{self.path}: the site's memory of rounds cannot be used: {error}", fix=_RESTORE)


_RESTORE = "bring rounds.db back from the backup, as ledger.db; see docs/fleet.md where there is none"


def open_history(files: SiteFiles) -> DiskHistory:
    """The history of a site; made before its ledger, so that a ledger is never there without it.

    Raises:
        ConfigError: it is gone, or cannot be used.
    """
    check_history(files)
    return DiskHistory(files.history)


def check_history(files: SiteFiles) -> None:
    """That the history of a site which has a ledger is there.

    Raises:
        ConfigError: it is not; with a new one, an update could be added up a second time.
    """
    if files.ledger.exists() and not files.history.exists():
        raise ConfigError(
            f"{files.history}: is gone, and this site has a ledger: only there is recorded in which sums its "
            "updates are",
            fix=_RESTORE,
        )


def _digest(attempt: Attempt) -> bytes:
    return digest(
        "lepton-fl/site-history/1",
        attempt.run,
        attempt.kind,
        attempt.round,
        attempt.cohort,
        attempt.number,
        int(attempt.released),
    )
