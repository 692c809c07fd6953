"""What others have seen of a ledger, so that one that was rolled back, replaced or cloned is told.

A site states its ledger's head with each join and each round; the server and the peers countersign what they
saw. The digest of a head holds every entry before it, so a ledger that does not have the head of a receipt
has lost entries, or there are two of it. No I/O but the file in which a site keeps the receipts it was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from lepton_fl.errors import ConfigError, VerificationFailed
from lepton_fl.files import write_atomic
from lepton_fl.privacy.ledger.entries import NOTHING, Charge
from lepton_fl.secagg.encoding import decode, encode, shaped
from lepton_fl.secagg.identity import IdentityKey, verify

_STATEMENT = "lepton-fl/ledger-statement/1"
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


def advance(known: Head | None, shown: Head) -> Head:
    """What a witness knows of a ledger that shows the head `shown`, where it knew `known`.

    Raises:
        VerificationFailed: the ledger has gone back, or is one of two with the same key.
    """
    if known is not None and (
        shown.counter < known.counter or (shown.counter == known.counter and shown.digest != known.digest)
    ):
        raise VerificationFailed(
            f"the ledger shows head {shown} after {known}: it was rolled back, or two agents write it"
        )
    return shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What a site says of its ledger, signed by the ledger's key: its head, and the round that leaves."""

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
    signed: bytes = field(repr=False)
    """What travels and is stored."""

    @classmethod
    def issue(
        cls, key: IdentityKey, *, site: str, data_set: str, head: Head, run: str, charge: Charge | None
    ) -> Self:
        """A signed statement."""
        round, terms = (0, b"") if charge is None else (charge.round, charge.terms(public=True))
        body = (site, key.public, data_set, head.counter, head.digest, run, round, terms)
        return cls.read(encode(body, key.sign(_STATEMENT, *body)))

    @classmethod
    def read(cls, signed: bytes) -> Self:
        """The statement in `signed`, once its signature by the key that it names has been verified.

        Raises:
            VerificationFailed: it is malformed or not signed by that key.
        """
        body, signature = decode(signed, tuple, bytes)
        site, ledger, data_set, counter, digest, run, round, terms = shaped(
            body, str, bytes, str, int, bytes, str, int, bytes
        )
        verify(ledger, signature, _STATEMENT, *body)
        if counter < 1 or len(digest) != len(NOTHING) or round < 0 or bool(round) != bool(terms):
            raise VerificationFailed("malformed: no statement of a ledger")
        return cls(
            site=site,
            ledger=ledger,
            data_set=data_set,
            head=Head(counter, digest),
            run=run,
            round=round,
            terms=terms,
            signed=signed,
        )

    @property
    def charge(self) -> Charge | None:
        """What the round that leaves was charged; None where none leaves."""
        return Charge.of((self.run, self.round, self.terms)) if self.round else None


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
        return cls.read(encode(body, key.sign(_RECEIPT, *body)))

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
        self._highest = {(one.witness, one.key, one.statement.ledger): one for one in found}

    def __iter__(self) -> Iterator[Receipt]:
        return iter(self._highest.values())

    def keep(self, receipt: Receipt) -> None:
        """Keep a receipt, durably, where it is the highest of its witness."""
        of = receipt.witness, receipt.key, receipt.statement.ledger
        held = self._highest.get(of)
        if held is None or held.statement.head.counter < receipt.statement.head.counter:
            highest = {**self._highest, of: receipt}
            write_atomic(self.path, to_bytes(list(highest.values())), mode=0o600)
            self._highest = highest
