"""A ledger judged offline, by its files alone: nothing is written, and no private key is needed."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from lepton_fl.errors import ConfigError, VerificationFailed
from lepton_fl.privacy.accounting import epsilon
from lepton_fl.privacy.ledger import receipts
from lepton_fl.privacy.ledger.book import Book, Budget
from lepton_fl.privacy.ledger.chain import (
    RESTORE,
    SQLITE_ERRORS,
    Custody,
    Row,
    check_format,
    check_seen,
    follow,
    is_settled,
    noted_end,
    read_key,
    unusable,
)
from lepton_fl.privacy.ledger.entries import Charge, Entry, RecoveredCharge, Renewal
from lepton_fl.privacy.ledger.receipts import Receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class Audited:
    """A ledger of which every entry, signature and digest was verified."""

    path: Path
    book: Book
    charges: tuple[tuple[Entry, Charge], ...]
    """Since each data set's last renewal."""
    renewals: tuple[Renewal, ...]
    compared: tuple[str, ...]
    """What the ledger was compared with: its key, its noted end, who gave receipts."""


def audit(path: Path, *, given: Iterable[Receipt] = (), key: bytes | None = None) -> Audited:
    """Verify the ledger at `path`: the database, each entry, each signature, and what lies beside it.

    Args:
        path: The ledger, or a copy of it.
        given: Receipts that were got from the witnesses, beside those that the site has kept.
        key: The public key that must sign it; by default that of `ledger.key`, where it is there.

    Raises:
        VerificationFailed: naming the first entry that is not as it was written, or what is missing.
        ConfigError: the file cannot be read, or is of another format.
    """
    custody = Custody(path)
    if not path.is_file():
        raise ConfigError(f"{path}: is no ledger")
    # All that the entries are held against is read before them: an agent may charge meanwhile.
    in_use, notes = custody.key.exists(), custody.notes()
    kept = receipts.from_file(custody.receipts) if custody.receipts.exists() else []
    book, compared = Book(), []
    try:
        with closing(_connect(path)) as db:
            _check_database(path, db)
            rows = db.execute("SELECT seq, body, signature FROM entries ORDER BY seq").fetchall()
    except SQLITE_ERRORS as error:
        raise unusable(path, error) from None
    follow(path, book, rows, each_signature=True)
    if not rows:
        raise VerificationFailed(f"{path}: entry 1 is missing", fix=RESTORE)
    if key is None and in_use:
        key = read_key(custody.key).public
    if key is not None:
        if key != book.key:
            raise VerificationFailed(f"{path}: is signed by key {book.key.hex()}, not by {key.hex()}")
        compared.append("key")
    end = noted_end(notes, book.key)
    if end is None and in_use:
        raise VerificationFailed(f"{custody.head}: is gone or damaged, and its ledger is in use", fix=RESTORE)

    def entry_at(seq: int) -> Entry:
        return Entry.read(*rows[seq - 1][1:])

    seen = [] if end is None else [(book.key, end, custody.head.name)]
    for one in (*kept, *given):
        told = one.statement
        if is_settled(book, entry_at, told):
            compared.append(one.witness)
        else:
            seen.append((told.ledger, told.head, one.witness))
    for of, head, witness in seen:
        check_seen(path, book, entry_at, key=of, seen=head, witness=witness)
        compared.append(witness)
    charges, renewals = _read(rows)
    return Audited(
        path=path,
        book=book,
        charges=tuple(charges),
        renewals=tuple(renewals),
        compared=tuple(dict.fromkeys(compared)),
    )


def check_limits(audited: Audited, budget: Budget, *, officer: bytes | None) -> None:
    """That what was charged is within what the policy allows, and who renewed it is the policy's officer.

    Raises:
        VerificationFailed: naming the first entry that is beyond.
    """
    for renewal in audited.renewals:
        if renewal.data_set == budget.data_set and renewal.officer != officer:
            raise VerificationFailed(
                f"{audited.path}: renewal {renewal.number} of data set {budget.data_set} is by key "
                f"{renewal.officer.hex()}, not by the officer of {budget.file} (budget.officer_key)"
            )
    mine = [(entry, charge) for entry, charge in audited.charges if entry.data_set == budget.data_set]
    _check_within(audited, mine, budget.delta_total, budget.epsilon_total, f"{budget.file}, epsilon_total")
    for study in dict.fromkeys(charge.study for _, charge in mine):
        of_study = [(entry, charge) for entry, charge in mine if charge.study == study]
        delta = max(charge.delta for _, charge in of_study)
        limit = f"{budget.file}, epsilon_per_study"
        _check_within(audited, of_study, delta, budget.epsilon_per_study, limit)


def _check_within(
    audited: Audited, charges: Sequence[tuple[Entry, Charge]], delta: float, allowed: float, limit: str
) -> None:
    def spent(first: int) -> float:
        """Epsilon of the `first` charges."""
        counted = Counter(charge.event for _, charge in charges[:first])
        return epsilon([event.times(rounds) for event, rounds in counted.items()], delta)

    if spent(len(charges)) <= allowed:
        return
    # Each charge adds, so the first beyond the limit is found by halving.
    within, beyond = 0, len(charges)
    while beyond - within > 1:
        middle = (within + beyond) // 2
        within, beyond = (middle, beyond) if spent(middle) <= allowed else (within, middle)
    entry, _ = charges[beyond - 1]
    raise VerificationFailed(
        f"{audited.path}: entry {entry.seq} takes data set {entry.data_set} to epsilon {spent(beyond):.3g} "
        f"at delta {delta:g}, allowed {allowed:g} ({limit}); spent in all {spent(len(charges)):.3g}"
    )


def _connect(path: Path) -> sqlite3.Connection:
    # Without a write-ahead log nobody has the file open: then nothing is made beside it, not even for a lock.
    log = path.with_name(path.name + "-wal")
    how = "mode=ro" if log.exists() else "immutable=1"
    return sqlite3.connect(f"file:{quote(str(path.absolute()))}?{how}", uri=True, isolation_level=None)


def _check_database(path: Path, db: sqlite3.Connection) -> None:
    schema = [sql for (sql,) in db.execute("SELECT sql FROM sqlite_master ORDER BY rowid")]
    check_format(path, db.execute("PRAGMA user_version").fetchone()[0], schema)
    (said, *_) = db.execute("PRAGMA quick_check").fetchone()
    if said != "ok":
        raise VerificationFailed(f"{path}: the database is damaged: {said}", fix=RESTORE)


def _read(rows: Iterable[Row]) -> tuple[list[tuple[Entry, Charge]], list[Renewal]]:
    charges: list[tuple[Entry, Charge]] = []
    renewals = []
    for _, body, signature in rows:
        entry = Entry.read(body, signature)
        content = entry.content
        charge = content.charge if isinstance(content, RecoveredCharge) else content
        if isinstance(charge, Charge):
            charges.append((entry, charge))
        elif isinstance(content, Renewal):
            charges = [(of, charge) for of, charge in charges if of.data_set != entry.data_set]
            renewals.append(content)
    return charges, renewals
