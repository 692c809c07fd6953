"""What others have seen of a ledger, so that one that was rolled back, replaced or cloned is told.

A site states its ledger's head with each join and each round; the server and the peers countersign what they
saw. The digest of a head holds every entry before it, so a ledger that does not have the head of a receipt
has lost entries, or there are two of it. No I/O but the file in which a site keeps the receipts it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from lepton_fl.errors import ConfigError, VerificationFailed
from lepton_fl.files import write_atomic
from lepton_fl.privacy.ledger.entries import NOTHING, Charge
from lepton_fl.secagg.encoding import decode, encode, shaped
from lepton_fl.secagg.identity import IdentityKey, verify

MAX_STATEMENT = 16 << 10
"""Bytes. One has about seven hundred."""
_STATEMENT = "lepton-fl/ledger-statement/1"
_IDENTITY = "lepton-fl/ledger-statement-of-a-site/1"
_RECEIPT = "lepton-fl/ledger-receipt/1"


@dataclass(frozen=True, slots=True)
class Head:
    """Where a ledger ends."""

    counter: int
    """How many entries it has."""
    digest: bytes
    """Of the last one, and so of all."""

    def __str__(self) -> str:
        return f"{self.counter}:{self.digest.hex()[:16]}"


NO_ENTRY = Head(0, NOTHING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What a site says of its ledger: its head, and the round that leaves. Signed by the ledger's key.

    And by the site's identity key, where it has one: a ledger's key alone could be anybody's, who then says
    that it is the site's.
    """

    site: str
    ledger: bytes
    """Public key of the ledger."""
    data_set: str
    head: Head
    run: str
    round: int
    """0 where no round leaves, as when a site joins."""
    terms: bytes = field(repr=False)
    """What the round was charged, without its fingerprint; empty where no round leaves."""
    entry: Head
    """The entry that charged it: what is stated twice is one charge, and two of one round are two ledgers."""
    settled: tuple[tuple[bytes, Head], ...]
    """The highest head of each ledger that a recovery found lost, by the public key of that ledger."""
    identity: bytes
    """Public key of the site among the sites; empty where it has none."""
    signed: bytes = field(repr=False)
    """What travels and is stored."""

    @classmethod
    def issue(
        cls,
        key: IdentityKey,
        *,
        site: str,
        data_set: str,
        head: Head,
        run: str = "",
        charge: Charge | None = None,
        entry: Head = NO_ENTRY,
        settled: Sequence[tuple[bytes, Head]] = (),
        identity: IdentityKey | None = None,
    ) -> Self:
        """A signed statement; `entry` is the one with the `charge`."""
        round, terms = (0, b"") if charge is None else (charge.round, charge.terms(public=True))
        lost = tuple((of, found.counter, found.digest) for of, found in settled)
        named = b"" if identity is None else identity.public
        body = (
            *(site, key.public, data_set, head.counter, head.digest),
            *(run, round, terms, entry.counter, entry.digest, lost, named),
        )
        second = b"" if identity is None else identity.sign(_IDENTITY, *body)
        return cls._of(body, encode(body, key.sign(_STATEMENT, *body), second))

    @classmethod
    def read(cls, signed: bytes) -> Self:
        """The statement in `signed`, once its signatures by the keys that it names have been verified.

        Whose key `identity` is, the caller asks the roster.

        Raises:
            VerificationFailed: it is too long, malformed or not signed by those keys.
        """
        if len(signed) > MAX_STATEMENT:
            raise VerificationFailed(f"a statement of {len(signed)} bytes, at most {MAX_STATEMENT} are read")
        body, signature, second = decode(signed, tuple, bytes, bytes)
        read = cls._of(body, signed)
        verify(read.ledger, signature, _STATEMENT, *body)
        if read.identity:
            verify(read.identity, second, _IDENTITY, *body)
        return read

    @classmethod
    def _of(cls, body: tuple[Any, ...], signed: bytes) -> Self:
        site, ledger, data_set, counter, digest, run, round, terms, seq, charged, lost, identity = shaped(
            body, str, bytes, str, int, bytes, str, int, bytes, int, bytes, tuple, bytes
        )
        head, entry = Head(counter, digest), Head(seq, charged)
        told = (0 < seq <= counter, bool(terms)) if round else (entry == NO_ENTRY, not terms)
        sized = {len(digest), len(charged)} == {len(NOTHING)} and all(isinstance(one, tuple) for one in lost)
        if counter < 1 or round < 0 or not all(told) or not sized:
            raise VerificationFailed("malformed: no statement of a ledger")
        ends = (shaped(one, bytes, int, bytes) for one in lost)
        return cls(
            site=site,
            ledger=ledger,
            data_set=data_set,
            head=head,
            run=run,
            round=round,
            terms=terms,
            entry=entry,
            settled=tuple((of, Head(at, found)) for of, at, found in ends),
            identity=identity,
            signed=signed,
        )

    @property
    def charge(self) -> Charge | None:
        """What the round that leaves was charged; None where none leaves."""
        return Charge.of((self.run, self.round, self.terms)) if self.round else None


def advance(known: Iterable[Statement], shown: Statement) -> None:
    """That a site's ledger has not gone back behind what a witness knows of it.

    `known` are the last statements of that site's ledgers. What a recovery has settled is gone, and was
    charged; whether it was, only the site's own auditors can see.

    Raises:
        VerificationFailed: the ledger has gone back, is another, or is one of two with the same key.
    """
    settled = dict(shown.settled)
    for seen in known:
        if settled.get(seen.ledger, NO_ENTRY).counter >= seen.head.counter:
            continue
        if seen.ledger != shown.ledger:
            if seen.data_set == shown.data_set:
                raise VerificationFailed(
                    f"{shown.site}: shows another ledger for data set {shown.data_set} than before: the one "
                    f"before ended at {seen.head}, and was replaced or lost"
                )
        elif shown.head.counter < seen.head.counter or (
            shown.head.counter == seen.head.counter and shown.head.digest != seen.head.digest
        ):
            raise VerificationFailed(
                f"{shown.site}: the ledger shows head {shown.head} after {seen.head}: it was rolled back, or "
                "two agents write it"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """A statement as the server or a peer has seen it, by its signature."""

    statement: Statement
    witness: str
    key: bytes
    """The witness's public key."""
    signed: bytes = field(repr=False)
    """What travels and is stored."""

    @classmethod
    def issue(cls, key: IdentityKey, *, witness: str, statement: Statement) -> Self:
        """Countersign a statement; the caller has judged its head by `advance`."""
        body = (statement.signed, witness, key.public)
        signed = encode(body, key.sign(_RECEIPT, *body))
        return cls(statement=statement, witness=witness, key=key.public, signed=signed)

    @classmethod
    def read(cls, signed: bytes) -> Self:
        """The receipt in `signed`, once both signatures have been verified.

        Whose key `key` is, the caller asks the roster.

        Raises:
            VerificationFailed: it is malformed or not signed by the keys that it names.
        """
        body, signature = decode(signed, tuple, bytes)
        stated, witness, key = shaped(body, bytes, str, bytes)
        verify(key, signature, _RECEIPT, *body)
        return cls(statement=Statement.read(stated), witness=witness, key=key, signed=signed)


def to_bytes(receipts: list[Receipt]) -> bytes:
    """Receipts as a file."""
    return encode([receipt.signed for receipt in receipts])


def from_file(path: Path) -> list[Receipt]:
    """The receipts in a file that `to_bytes` made.

    Raises:
        ConfigError: it cannot be read.
        VerificationFailed: it holds something else, or a receipt whose signatures are not right.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: receipts cannot be read: {error.strerror}") from None
    try:
        (listed,) = decode(data, tuple)
        return [Receipt.read(*shaped((signed,), bytes)) for signed in listed]
    except VerificationFailed as error:
        raise VerificationFailed(
            f"{path}: {error.message}", fix="bring it back from the backup, or get the receipts again"
        ) from None


class Kept:
    """The highest receipt of each witness, on the site's own disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = from_file(path) if path.exists() else []
        self._highest = {_of(one): one for one in sorted(found, key=lambda one: one.statement.head.counter)}

    def __iter__(self) -> Iterator[Receipt]:
        return iter(self._highest.values())

    def keep(self, receipt: Receipt, *, settled: Callable[[Statement], bool]) -> None:
        """Keep a receipt, durably, where it is the highest of its witness, or that is one of a lost end."""
        held = self._highest.get(_of(receipt))
        if (
            held is None
            or held.statement.head.counter < receipt.statement.head.counter
            or settled(held.statement)
        ):
            highest = {**self._highest, _of(receipt): receipt}
            write_atomic(self.path, to_bytes(list(highest.values())), mode=0o600)
            self._highest = highest


def _of(receipt: Receipt) -> tuple[str, bytes]:
    # Not by the witness's key: a server that takes another each day is one witness, and fills no disk.
    return receipt.witness, receipt.statement.ledger
