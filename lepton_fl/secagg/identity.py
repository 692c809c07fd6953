"""Who a party is towards the other parties: a key, a certificate for it, and the roster of all members.

Apart from TLS, which tells a site and a server who the other is: these tell the sites who the other sites
are, so that a server can neither invent a party nor leave one's key exchanged for its own.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from lepton_fl.errors import IdentityRefused, VerificationFailed
from lepton_fl.secagg.encoding import Value, decode, digest, encode, shaped

_CERTIFICATE = "lepton-fl/identity-certificate/1"
_ROSTER = "lepton-fl/roster/1"
_KEY = "lepton-fl/identity-key/1"

FIRST_PARTY = 101
"""Smallest party id; what is below is for nodes that are no sites."""
LAST_PARTY = (1 << 63) - 1


class IdentityKey:
    """An Ed25519 key that signs statements of a party. It is no TLS key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = key.public_key().public_bytes_raw()
        """32 bytes."""

    @classmethod
    def generate(cls) -> IdentityKey:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def read(cls, data: bytes) -> IdentityKey:
        """The key that `to_bytes` wrote.

        Raises:
            VerificationFailed: there is none in `data`.
        """
        try:
            key = load_pem_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise VerificationFailed("not an Ed25519 private key in PEM")
        return cls(key)

    def to_bytes(self) -> bytes:
        """PKCS#8 in PEM, in clear: for a file of mode 0600 only."""
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def sign(self, tag: str, *values: Value) -> bytes:
        """Signature over the encoding; `tag` says what for and serves nothing else."""
        return self._key.sign(encode(tag, *values))


def verify(key: bytes, signature: bytes, tag: str, *values: Value) -> None:
    """That the owner of the public `key` signed this.

    Raises:
        VerificationFailed: not so.
    """
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, encode(tag, *values))
    except (InvalidSignature, ValueError):
        raise VerificationFailed(f"a signature is not its signer's ({tag})") from None


def key_digest(key: bytes) -> bytes:
    """What a roster holds of a member's public key."""
    return digest(_KEY, key)


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityCertificate:
    """The consortium's word that a key is a party's. Times in whole seconds of Unix time."""

    party: int
    name: str
    key: bytes
    not_before: int
    not_after: int
    serial: int
    signed: bytes = field(repr=False)
    """What travels and is stored."""

    @classmethod
    def issue(
        cls,
        root: IdentityKey,
        *,
        party: int,
        name: str,
        key: bytes,
        not_before: datetime,
        not_after: datetime,
        serial: int,
    ) -> IdentityCertificate:
        body = (party, name, key, int(not_before.timestamp()), int(not_after.timestamp()), serial)
        return cls.read(encode(body, root.sign(_CERTIFICATE, *body)), root.public)

    @classmethod
    def read(cls, signed: bytes, root_key: bytes) -> IdentityCertificate:
        """The certificate in `signed`, once its signature by `root_key` has been verified.

        Raises:
            VerificationFailed: it is malformed or not the consortium's.
        """
        body, signature = decode(signed, tuple, bytes)
        verify(root_key, signature, _CERTIFICATE, *body)
        party, name, key, not_before, not_after, serial = shaped(body, int, str, bytes, int, int, int)
        if not FIRST_PARTY <= party <= LAST_PARTY or len(key) != 32:
            raise VerificationFailed(f"identity certificate of {name}: malformed")
        return cls(
            party=party,
            name=name,
            key=key,
            not_before=not_before,
            not_after=not_after,
            serial=serial,
            signed=signed,
        )

    def check(self, roster: Roster, now: datetime) -> None:
        """That this is the key of a present member, now.

        Raises:
            IdentityRefused: it is not in force, is revoked, or the roster has another party, name or key.
        """
        if not self.not_before <= now.timestamp() < self.not_after:
            ends = datetime.fromtimestamp(self.not_after, UTC)
            raise IdentityRefused(
                f"identity certificate of {self.name}: not in force at {now:%Y-%m-%d %H:%M} UTC (ends "
                f"{ends:%Y-%m-%d %H:%M} UTC)",
                fix="set this machine's clock; if it is right, enrol the site anew",
            )
        member = roster.member(self.party)
        if self.serial in roster.revoked or member is None:
            raise IdentityRefused(f"{self.name} is not a member in roster {roster.version}")
        if member.name != self.name or not hmac.compare_digest(member.key_digest, key_digest(self.key)):
            raise IdentityRefused(f"{self.name}: roster {roster.version} has another name or key for it")


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """A party as the roster lists it."""

    party: int
    name: str
    key_digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """Who the consortium's members are, by the consortium's signature."""

    consortium: bytes
    """Its fingerprint, 32 bytes."""
    version: int
    """1, 2, ...; never goes back."""
    members: tuple[Member, ...]
    """By party."""
    revoked: frozenset[int]
    """Serials of identity certificates; never gets smaller."""
    signed: bytes = field(repr=False)
    """What travels and is stored."""

    def __hash__(self) -> int:
        # Not of every member, each time that something is looked up by the roster.
        return hash(self.signed)

    @classmethod
    def issue(
        cls,
        root: IdentityKey,
        *,
        consortium: bytes,
        version: int,
        members: Iterable[Member],
        revoked: Iterable[int],
    ) -> Roster:
        """A signed roster.

        Raises:
            VerificationFailed: two members share a party, a name or a key.
        """
        body = (
            consortium,
            version,
            [(m.party, m.name, m.key_digest) for m in sorted(members)],
            sorted(set(revoked)),
        )
        return cls.read(encode(body, root.sign(_ROSTER, *body)), root.public)

    @classmethod
    def read(cls, signed: bytes, root_key: bytes) -> Roster:
        """The roster in `signed`, once its signature by `root_key` has been verified.

        Raises:
            VerificationFailed: it is malformed or not the consortium's.
        """
        body, signature = decode(signed, tuple, bytes)
        verify(root_key, signature, _ROSTER, *body)
        consortium, version, listed, revoked = shaped(body, bytes, int, tuple, tuple)
        if not all(isinstance(row, tuple) for row in listed):
            raise VerificationFailed("roster: malformed")
        members = tuple(Member(*shaped(row, int, str, bytes)) for row in listed)
        once = all(
            len(set(column)) == len(members)
            for column in zip(*((m.party, m.name, m.key_digest) for m in members), strict=True)
        )
        in_order = list(members) == sorted(members) and list(revoked) == sorted(set(revoked))
        if version < 1 or not once or not in_order or not all(isinstance(s, int) for s in revoked):
            raise VerificationFailed("roster: malformed")
        return cls(
            consortium=consortium,
            version=version,
            members=members,
            revoked=frozenset(revoked),
            signed=signed,
        )

    def member(self, party: int) -> Member | None:
        """The member with this party id, if there is one."""
        return next((m for m in self.members if m.party == party), None)

    def supersedes(self, held: Roster | None) -> bool:
        """Whether this is newer than the one held; False where it is the same.

        Guarantee: along rosters for which this was true no version returns, no revoked serial comes back
        and no party changes its name or key while it is a member.

        Raises:
            VerificationFailed: this is older than the one held, or contradicts it.
        """
        if held is None:
            return True
        if self.signed == held.signed:
            return False
        if self.consortium != held.consortium:
            raise VerificationFailed("roster: of another consortium than the one held")
        if self.version <= held.version:
            raise VerificationFailed(
                f"roster: version {self.version} was offered, version {held.version} is held"
            )
        changed = [m.name for m in held.members if self.member(m.party) not in (None, m)]
        if changed or not held.revoked <= self.revoked:
            raise VerificationFailed(
                f"roster: version {self.version} contradicts version {held.version}"
                + (f" about {changed[0]}" if changed else ": it restores what was revoked")
            )
        return True
