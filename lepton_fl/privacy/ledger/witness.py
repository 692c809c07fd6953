"""A witness of other sites' ledgers: what the server, or a peer, has seen of them, on its own disk.

The same for both. Nothing here knows how a statement came, or whose identity key is whose.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lepton_fl.errors import ConfigError, Unwritable, VerificationFailed
from lepton_fl.files import open_database, transaction
from lepton_fl.privacy.ledger.receipts import Receipt, Statement, advance
from lepton_fl.secagg.identity import IdentityKey

_FORMAT = 1
MAX_LEDGERS = 64
"""Ledgers and data sets of one site that are known. A site could name others without end."""
MAX_CHARGES = 100_000
"""Charges of one site that are remembered, the last ones; of those before a recovery knows the number."""
# `known`: the last of each ledger and data set that did not go back. `rounds`: each charge that left, by its
# entry; of ledgers that went back too, since it left all the same.
_SCHEMA = """
CREATE TABLE known (
    site TEXT NOT NULL,
    ledger BLOB NOT NULL,
    data_set TEXT NOT NULL,
    signed BLOB NOT NULL,
    receipt BLOB,
    PRIMARY KEY (site, ledger, data_set)
) STRICT;
CREATE TABLE rounds (
    id INTEGER PRIMARY KEY,
    site TEXT NOT NULL,
    ledger BLOB NOT NULL,
    entry BLOB NOT NULL,
    signed BLOB NOT NULL,
    UNIQUE (site, ledger, entry)
) STRICT
"""


class Witness:
    """What one party has seen of others' ledgers, and its word for it.

    Guarantee: of a ledger that once passed `see`, no older head passes afterwards, whatever becomes of this
    process; nor, once `countersign` has given a receipt for it, of the machine's power. Every charge that
    `see` was told of is in `receipts`, also of a ledger that was refused: of each site the last `MAX_CHARGES`
    nearly, since who states what nobody can check must not fill this disk.
    """

    def __init__(self, path: Path, *, name: str, key: IdentityKey) -> None:
        """Open the file at `path`, made with mode 0600 where there is none, as the witness `name`.

        Raises:
            ConfigError: it cannot be used, or is another release's.
        """
        self.path = path
        self.name = name
        self._key = key
        self._sites: dict[str, dict[tuple[bytes, str], Statement]] = {}
        self._charges: dict[str, int] = {}
        """How many are remembered of a site, once it was asked."""
        with self._io():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._db = open_database(path)
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        with self._io():
            # A commit survives the process. That of a receipt, which is FULL, the power too, and takes along
            # all before it: the disk is waited for once for many statements.
            self._db.execute("PRAGMA synchronous = NORMAL")
        with self._writing():
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found == 0:
                for table in _SCHEMA.split(";"):
                    self._db.execute(table)
                self._db.execute(f"PRAGMA user_version = {_FORMAT}")
        if found not in (0, _FORMAT):
            raise ConfigError(f"{self.path}: format {found}, this release reads {_FORMAT}")

    @property
    def key(self) -> bytes:
        """Public; signs its receipts."""
        return self._key.public

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def see(self, statement: Statement, *, before: Sequence[Statement] = ()) -> None:
        """Judge a ledger by its last statement, and remember it; `before` are earlier ones of the site.

        Raises:
            VerificationFailed: the ledger has gone back, as `advance` says.
            Unwritable: it cannot be remembered.
        """
        known = self._known(statement.site)
        try:
            _judge(known, statement)
            refused = None
        except VerificationFailed as error:
            refused = error
        added = 0
        with self._writing():
            for told in (*before, statement):
                if told.round:
                    added += self._db.execute(
                        "INSERT OR IGNORE INTO rounds (site, ledger, entry, signed) VALUES (?, ?, ?, ?)",
                        (told.site, told.ledger, told.entry.digest, told.signed),
                    ).rowcount
            charges = self._make_room(statement.site, added)
            if refused is None:
                self._db.execute(
                    "INSERT OR REPLACE INTO known (site, ledger, data_set, signed) VALUES (?, ?, ?, ?)",
                    (statement.site, statement.ledger, statement.data_set, statement.signed),
                )
        self._charges[statement.site] = charges
        if refused is not None:
            raise refused
        # Last, of those that it knows.
        known.pop((statement.ledger, statement.data_set), None)
        known[statement.ledger, statement.data_set] = statement

    def _make_room(self, site: str, added: int) -> int:
        """How many charges of a site are remembered, after its oldest have gone where they were too many."""
        if site in self._charges:
            charges = self._charges[site] + added
        else:
            (charges,) = self._db.execute("SELECT count(*) FROM rounds WHERE site = ?", (site,)).fetchone()
        if charges <= MAX_CHARGES:
            return int(charges)
        # Some more than need be, so that they are not looked for each time.
        room = charges - MAX_CHARGES + MAX_CHARGES // 100
        gone = self._db.execute(
            "DELETE FROM rounds WHERE id IN (SELECT id FROM rounds WHERE site = ? ORDER BY id LIMIT ?)",
            (site, room),
        )
        return int(charges) - gone.rowcount

    def countersign(self) -> list[Receipt]:
        """Receipts for the ledgers that were seen since the last time: one each, for the last statement.

        Raises:
            Unwritable: it cannot be remembered, so none is given.
        """
        with self._io():
            new = self._db.execute(
                "SELECT site, ledger, data_set FROM known WHERE receipt IS NULL"
            ).fetchall()
        if not new:
            return []
        made = [self._receipt(self._known(site)[ledger, data_set]) for site, ledger, data_set in new]
        with self._io():
            self._db.execute("PRAGMA synchronous = FULL")
        try:
            with self._writing():
                self._db.executemany(
                    "UPDATE known SET receipt = ? WHERE site = ? AND ledger = ? AND data_set = ?",
                    [(one.signed, *row) for one, row in zip(made, new, strict=True)],
                )
        finally:
            with self._io():
                self._db.execute("PRAGMA synchronous = NORMAL")
        return made

    def highest(self, site: str) -> list[Receipt]:
        """Its word for how far it knows each ledger of a site."""
        return [self._receipt(told) for told in self._known(site).values()]

    def receipts(self, site: str) -> list[Receipt]:
        """Its word for all it has seen of a site: each charge, and how far each ledger was."""
        rounds = [self._receipt(self._own(signed)) for signed in self._rounds(site)]
        return rounds + self.highest(site)

    def last(self, site: str, *, rounds: int) -> list[bytes]:
        """What to tell another witness of a site: its last few charges, and how far each ledger is, last.

        Empty where nothing is known. As they were signed: the other one verifies them.
        """
        return [*self._rounds(site, rounds), *(told.signed for told in self._known(site).values())]

    def _receipt(self, statement: Statement) -> Receipt:
        return Receipt.issue(self._key, witness=self.name, statement=statement)

    def _known(self, site: str) -> dict[tuple[bytes, str], Statement]:
        """How far each ledger of a site is known, the last that was heard of last."""
        if site not in self._sites:
            with self._io():
                rows = self._db.execute("SELECT signed FROM known WHERE site = ? ORDER BY rowid", (site,))
                told = [self._own(signed) for (signed,) in rows]
            self._sites[site] = {(one.ledger, one.data_set): one for one in told}
        return self._sites[site]

    def _own(self, signed: bytes) -> Statement:
        try:
            return Statement.read(signed)
        except VerificationFailed as error:
            # Not the site's fault: nobody is refused for it.
            raise self._unusable(error) from None

    def _rounds(self, site: str, last: int = -1) -> list[bytes]:
        """The last few charges of a site, or all, oldest first."""
        with self._io():
            rows = self._db.execute(
                "SELECT signed FROM rounds WHERE site = ? ORDER BY id DESC LIMIT ?", (site, last)
            ).fetchall()
        return [signed for (signed,) in reversed(rows)]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._io(), transaction(self._db):
            yield

    @contextmanager
    def _io(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> Unwritable:
        return Unwritable(
            f"{self.path}: what was seen of other ledgers cannot be used: {error}",
            fix="make room on the disk, and see that the file is its owner's; remove it where it is damaged: "
            "other witnesses still know",
            public="the witness cannot write what it sees",
        )


def _judge(known: Mapping[tuple[bytes, str], Statement], shown: Statement) -> None:
    advance(known.values(), shown)
    if len(known) >= MAX_LEDGERS and (shown.ledger, shown.data_set) not in known:
        raise VerificationFailed(
            f"{shown.site}: shows one more data set than the {MAX_LEDGERS} that are known of a site"
        )
