"""The entries of a ledger: canonical bytes, each with its number, the digest of the one before, a signature.

An entry's body is the encoding (secagg/encoding.py) of `tag, number, digest of the entry before, time, data
set, kind, fields`; its signature is by the ledger's key over the body; its digest is SHA-256 over both. So a
digest holds all that went before it, and one signature, the last, vouches for every entry.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, ClassVar, Self, TypeAlias

from lepton_fl.errors import VerificationFailed
from lepton_fl.privacy.accounting import Event
from lepton_fl.privacy.ledger import events
from lepton_fl.secagg.encoding import Value, decode, encode, shaped
from lepton_fl.secagg.identity import IdentityKey, verify

TAG = "lepton-fl/ledger-entry/2"
_RENEWAL = "lepton-fl/ledger-renewal/1"
NOTHING = bytes(32)
"""The digest before the first entry."""
_FLOAT = struct.Struct("<d")
_ROUNDS = 1 << 31


@dataclass(frozen=True, slots=True)
class Opening:
    """The first entry: the public key that signs this ledger."""

    kind: ClassVar[str] = "opening"
    key: bytes

    def fields(self) -> Sequence[Value]:
        return (self.key,)

    @classmethod
    def of(cls, stored: tuple[Any, ...]) -> Self:
        return cls(*shaped(stored, bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """One round of one run, as it is charged: event as data, and to what it belongs.

    Spent from the moment that it is written, which is before the first row is read for the round.
    """

    kind: ClassVar[str] = "charge"
    study: str
    study_name: str
    run: str
    round: int
    event: Event
    clip: float
    unit: str
    delta: float
    """The study's delta, at which its own epsilon is stated."""
    fingerprint: str
    """SHA-256 of the data trained on: evidence of the version; the budget does not depend on it."""

    def __post_init__(self) -> None:
        if not 0 <= self.round < _ROUNDS:
            raise ValueError(f"round {self.round} must be from 0 to {_ROUNDS - 1}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta {self.delta} must be above 0 and below 1")
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise ValueError(f"clip {self.clip} must be finite, above 0")
        if self.event.steps < 1:
            raise ValueError(f"steps {self.event.steps}: a round that is charged has one at least")

    def fields(self) -> Sequence[Value]:
        return self.run, self.round, self.terms()

    def terms(self, *, public: bool = False) -> bytes:
        """What the rounds of a run have in common; `public` without what tells of the data."""
        return encode(
            self.study,
            self.study_name,
            *events.to_value(self.event),
            _FLOAT.pack(self.clip),
            self.unit,
            _FLOAT.pack(self.delta),
            "" if public else self.fingerprint,
        )

    @classmethod
    def of(cls, stored: tuple[Any, ...]) -> Self:
        run, round, terms = shaped(stored, str, int, bytes)
        return cls(run=run, round=round, **_terms(terms))


@lru_cache(maxsize=256)
def _terms(stored: bytes) -> dict[str, Any]:
    # Cached: all rounds of a run share them, and a ledger is read whole when it is opened.
    study, name, mechanism, parameters, clip, unit, delta, fingerprint = decode(
        stored, str, str, str, tuple, bytes, str, bytes, str
    )
    return {
        "study": study,
        "study_name": name,
        "event": events.from_value(mechanism, parameters),
        "clip": _FLOAT.unpack(clip)[0],
        "unit": unit,
        "delta": _FLOAT.unpack(delta)[0],
        "fingerprint": fingerprint,
    }


@dataclass(frozen=True, slots=True)
class RecoveredCharge:
    """A round that receipts show and the ledger had lost: charged once more by it, under no limit."""

    kind: ClassVar[str] = "recovered"
    charge: Charge

    def fields(self) -> Sequence[Value]:
        return self.charge.fields()

    @classmethod
    def of(cls, stored: tuple[Any, ...]) -> Self:
        return cls(Charge.of(stored))


@dataclass(frozen=True, slots=True)
class Commit:
    """A charged round is about to leave: the SHA-256 of what leaves."""

    kind: ClassVar[str] = "commit"
    run: str
    round: int
    sha256: bytes

    def fields(self) -> Sequence[Value]:
        return self.run, self.round, self.sha256

    @classmethod
    def of(cls, stored: tuple[Any, ...]) -> Self:
        return cls(*shaped(stored, str, int, bytes))


@dataclass(frozen=True, slots=True)
class Release:
    """Something is about to leave without noise."""

    kind: ClassVar[str] = "release"
    study: str
    run: str
    what: str

    def fields(self) -> Sequence[Value]:
        return self.study, self.run, self.what

    @classmethod
    def of(cls, stored: tuple[Any, ...]) -> Self:
        return cls(*shaped(stored, str, str, str))


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """The privacy officer begins the budget of a data-set id anew."""

    kind: ClassVar[str] = "renewal"
    ledger: bytes
    """Public key of the one ledger that this is for."""
    data_set: str
    number: int
    """1, 2, ...: so that none can be used twice."""
    reason: str
    officer: bytes
    """The officer's public key."""
    signature: bytes

    @classmethod
    def sign(cls, key: IdentityKey, *, ledger: bytes, data_set: str, number: int, reason: str) -> Self:
        """The officer's word."""
        return cls(
            ledger=ledger,
            data_set=data_set,
            number=number,
            reason=reason,
            officer=key.public,
            signature=key.sign(_RENEWAL, ledger, data_set, number, reason),
        )

    def check(self) -> None:
        """That the officer named here signed this.

        Raises:
            VerificationFailed: not so.
        """
        verify(self.officer, self.signature, _RENEWAL, self.ledger, self.data_set, self.number, self.reason)

    def fields(self) -> Sequence[Value]:
        return self.ledger, self.data_set, self.number, self.reason, self.officer, self.signature

    @classmethod
    def of(cls, stored: tuple[Any, ...]) -> Self:
        ledger, data_set, number, reason, officer, signature = shaped(
            stored, bytes, str, int, str, bytes, bytes
        )
        return cls(
            ledger=ledger,
            data_set=data_set,
            number=number,
            reason=reason,
            officer=officer,
            signature=signature,
        )


@dataclass(frozen=True, slots=True)
class Recovery:
    """A person had the ledger go on after part of it was lost: which lost heads are settled by that."""

    kind: ClassVar[str] = "recovery"
    settled: tuple[tuple[bytes, int, bytes], ...]
    """Public key of the ledger, counter and digest of each."""
    lost: int
    """Entries that no receipt explains, by the highest counter that was seen."""

    def fields(self) -> Sequence[Value]:
        return list(self.settled), self.lost

    @classmethod
    def of(cls, stored: tuple[Any, ...]) -> Self:
        settled, lost = shaped(stored, tuple, int)
        return cls(tuple(shaped(one, bytes, int, bytes) for one in settled), lost)


Content: TypeAlias = Opening | Charge | RecoveredCharge | Commit | Release | Renewal | Recovery
_KINDS: dict[str, Any] = {
    kind.kind: kind for kind in (Opening, Charge, RecoveredCharge, Commit, Release, Renewal, Recovery)
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry as it was read, or as it is to be written."""

    seq: int
    previous: bytes
    at: str
    """UTC, by the site's clock."""
    data_set: str
    """Empty where an entry is of no data set."""
    content: Content
    body: bytes
    signature: bytes

    @classmethod
    def write(
        cls, key: IdentityKey, content: Content, *, seq: int, previous: bytes, data_set: str = ""
    ) -> Self:
        """A new entry, signed."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        body = encode(TAG, seq, previous, at, data_set, content.kind, content.fields())
        return cls(seq, previous, at, data_set, content, body, key.sign(TAG, body))

    @classmethod
    def read(cls, body: bytes, signature: bytes) -> Self:
        """The entry with this body. Its signature and its place are for the caller to check.

        Raises:
            VerificationFailed: it is malformed.
            ConfigError: it was written by a later release.
        """
        tag, seq, previous, at, data_set, kind, stored = decode(body, str, int, bytes, str, str, str, tuple)
        if tag != TAG or kind not in _KINDS:
            raise VerificationFailed("malformed: no entry of this format")
        try:
            content = _KINDS[kind].of(stored)
        except (TypeError, ValueError, struct.error) as error:
            raise VerificationFailed(f"malformed: {error}") from None
        return cls(seq, previous, at, data_set, content, body, signature)

    @property
    def digest(self) -> bytes:
        """What the next entry holds of this one, and of all before."""
        return hashlib.sha256(encode(self.body, self.signature)).digest()
