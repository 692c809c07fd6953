"""A ledger's files as they are read: rows, one after another, and what lies beside them. Writes nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lepton_fl.errors import ConfigError, LeptonError, Unwritable, VerificationFailed
from lepton_fl.privacy.ledger.book import Book
from lepton_fl.privacy.ledger.entries import TAG, Entry
from lepton_fl.privacy.ledger.receipts import NO_ENTRY, Head, Statement
from lepton_fl.secagg.encoding import decode
from lepton_fl.secagg.identity import IdentityKey, verify

FORMAT = 2
_NEVER = "CREATE TRIGGER {} BEFORE {} ON entries BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
SCHEMA = (
    "CREATE TABLE entries (seq INTEGER PRIMARY KEY, body BLOB NOT NULL, signature BLOB NOT NULL) STRICT",
    _NEVER.format("entries_are_never_changed", "UPDATE"),
    _NEVER.format("entries_are_never_removed", "DELETE"),
)
HEAD = "lepton-fl/ledger-head/1"
SLOT = 512
"""Bytes of `ledger.head` for each of its two notes, a disk's smallest sector: of a write that is cut short
the other one is left."""
NOTE = 9 + 16 + 9 + 32 + 9 + 64
"""Bytes of a note: the encoding of counter, digest and signature."""
RESTORE = "bring the ledger's files back from the backup, then lepton-fl budget recover"

Row = tuple[int, bytes, bytes]
"""Number, body and signature."""

_MACHINE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}
"""SQLite's codes for what the disk or the system refuses; any other is of a file that is not sound."""


SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""What reading a database raises; the second where SQLite quotes a damaged text, its own schema's."""


@dataclass(frozen=True, slots=True)
class Custody:
    """Where a ledger's companions lie: beside it, under its name."""

    ledger: Path

    @property
    def key(self) -> Path:
        """What signs it."""
        return self.ledger.with_suffix(".key")

    @property
    def new_key(self) -> Path:
        """The key of a ledger whose first entry may not be on disk yet."""
        return self.ledger.with_suffix(".key.new")

    @property
    def head(self) -> Path:
        """Its head after each entry, apart from the database: entries missing at its end are missed."""
        return self.ledger.with_suffix(".head")

    @property
    def receipts(self) -> Path:
        """What others have seen of it."""
        return self.ledger.with_suffix(".receipts")

    def notes(self) -> bytes:
        """What `head` holds, for `noted_end`; nothing where it is gone.

        To be read before the entries: another process may charge meanwhile, and notes its charge after it.
        """
        try:
            return self.head.read_bytes()
        except FileNotFoundError:
            return b""

    def of_a_ledger(self) -> Path | None:
        """A file that only a ledger which was begun leaves beside itself."""
        return next((file for file in (self.key, self.head, self.receipts) if file.exists()), None)


def unusable(path: Path, error: Exception) -> Unwritable | VerificationFailed:
    """SQLite's or the system's error as one line: of the machine, or of a file that is not sound."""
    said = f"{path}: cannot be used as a ledger: {error}"
    if isinstance(error, OSError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in _MACHINE:
        return Unwritable(
            said, fix="lepton-fl client doctor -c site.toml", public="the site cannot write its ledger"
        )
    return VerificationFailed(said, fix=RESTORE)


def check_format(path: Path, written: int, schema: list[str]) -> None:
    """That a database is a ledger of this format, and guarded as this release guards it.

    Raises:
        ConfigError: it is another release's.
        VerificationFailed: its schema was changed.
    """
    if written != FORMAT:
        raise ConfigError(
            f"{path}: ledger format {written}, this release reads {FORMAT}",
            fix="move it away, and lower budget.epsilon_total by what it says was spent",
        )
    if schema != list(SCHEMA):
        raise VerificationFailed(f"{path}: its tables or triggers are not a ledger's", fix=RESTORE)


def follow(path: Path, book: Book, rows: Iterable[Row], *, each_signature: bool = False) -> None:
    """Apply `rows` to `book`. The first row is the entry that the book ends with, where it has any.

    Guarantee: where this returns, the ledger's key has signed every entry, in this order. The signature of
    the last row is verified, which by the digests that they hold vouches for all before; with
    `each_signature` all are.

    Raises:
        VerificationFailed: an entry was changed, is missing or contradicts those before; it is named.
        ConfigError: an entry was written by a later release.
    """
    last: Entry | None = None
    known = book.head.counter
    if known == 0:
        known = -1
    for seq, body, signature in rows:
        if seq == known:
            if _entry(path, seq, body, signature, book.key).digest != book.head.digest:
                raise _broken(path, seq, "is another than it was when this process read it")
            known = 0
            continue
        if seq != book.head.counter + 1:
            raise _broken(path, book.head.counter + 1, "is missing")
        last = _entry(path, seq, body, signature, book.key)
        if last.previous != book.head.digest:
            # Of two neighbours that disagree, the one whose own signature holds was not changed.
            raise _broken(path, seq - 1 if seq > 1 and _signed(last, book.key) else seq, "was changed")
        try:
            book.apply(last)
        except VerificationFailed as error:
            signed = _signed(last, book.key)
            raise _broken(path, seq, error.message if signed else f"was changed: {error.message}") from None
        if (each_signature or seq == 1) and not _signed(last, book.key):
            raise _broken(path, seq, "was changed: its signature is not the ledger's")
    if known > 0:
        raise _broken(path, known, "is gone: an older copy was put in its place")
    if last is not None and not _signed(last, book.key):
        raise _broken(path, last.seq, "was changed: its signature is not the ledger's")


def is_settled(book: Book, entry_at: Callable[[int], Entry], told: Statement) -> bool:
    """Whether a recovery has answered for all that a statement shows.

    It is of a head that is gone, or of one before it, and what it says was charged is in the ledger. Else who
    has kept the statements of a lost ledger could stop the site anew with each of them.
    """
    if told.head.counter > book.lost_ends.get(told.ledger, NO_ENTRY).counter:
        return False
    return (
        not told.round
        or (told.ledger, told.entry.digest) in book.settled
        or (
            told.ledger == book.key
            and told.entry.counter <= book.head.counter
            and entry_at(told.entry.counter).digest == told.entry.digest
        )
    )


def check_seen(
    path: Path, book: Book, entry_at: Callable[[int], Entry], *, key: bytes, seen: Head, witness: str
) -> None:
    """That a ledger has the head `seen` that `witness` saw of the ledger with the public `key`.

    Raises:
        VerificationFailed: it is behind, replaced or one of two.
    """
    if (key, seen.digest) in book.settled:
        return
    if key != book.key:
        raise VerificationFailed(
            f"{path}: {witness} has seen another ledger of this site, up to entry {seen.counter}: this one "
            "was put in its place",
            fix=RESTORE,
        )
    if seen.counter > book.head.counter:
        raise VerificationFailed(
            f"{path}: ends at entry {book.head.counter}, and {witness} has seen entry {seen.counter}: an "
            "older copy, or its end is lost",
            fix=RESTORE,
        )
    if entry_at(seen.counter).digest != seen.digest:
        raise VerificationFailed(
            f"{path}: entry {seen.counter} is another than {witness} has seen: two agents have written "
            "copies of this ledger, or an older copy was written on",
            fix="stop the other agent, then lepton-fl budget recover",
        )


def noted_end(notes: bytes, key: bytes) -> Head | None:
    """The highest head in a ledger's `Custody.notes` that its key signed; None where there is none."""
    found = []
    for start in (0, SLOT):
        try:
            counter, digest, signature = decode(notes[start : start + NOTE], int, bytes, bytes)
            verify(key, signature, HEAD, counter, digest)
        except VerificationFailed:
            continue
        found.append(Head(counter, digest))
    return max(found, key=lambda head: head.counter, default=None)


def read_key(path: Path) -> IdentityKey:
    """The key in a file of the site.

    Raises:
        ConfigError: it cannot be read, or others may.
        VerificationFailed: it holds no key.
    """
    try:
        data, mode = path.read_bytes(), path.stat().st_mode & 0o077
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if mode:
        raise ConfigError(
            f"{path}: others may read or write it (mode has {mode:03o} for them)", fix=f"chmod 600 {path}"
        )
    try:
        return IdentityKey.read(data)
    except VerificationFailed as error:
        raise VerificationFailed(f"{path}: {error.message}", fix=RESTORE) from None


def _entry(path: Path, seq: int, body: object, signature: object, key: bytes) -> Entry:
    if not isinstance(body, bytes) or not isinstance(signature, bytes):
        raise _broken(path, seq, "was changed: it is not made of bytes")
    try:
        entry = Entry.read(body, signature)
    except LeptonError as error:
        if isinstance(error, ConfigError) and _signs(key, body, signature):
            raise ConfigError(f"{path}: entry {seq}: {error.message}", fix=error.fix) from None
        raise _broken(path, seq, f"was changed: {error.message}") from None
    if entry.seq != seq:
        raise _broken(path, seq, f"was changed: it says that it is entry {entry.seq}")
    return entry


def _signed(entry: Entry, key: bytes) -> bool:
    return _signs(key, entry.body, entry.signature)


def _signs(key: bytes, body: bytes, signature: bytes) -> bool:
    try:
        verify(key, signature, TAG, body)
    except VerificationFailed:
        return False
    return True


def _broken(path: Path, seq: int, why: str) -> VerificationFailed:
    return VerificationFailed(f"{path}: entry {seq} {why}", fix=RESTORE)
