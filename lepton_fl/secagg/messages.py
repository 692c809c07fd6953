"""What the parties of a round send each other, as bytes. One form each; whatever has another is refused.

A message is `encode(suite, name, fields ...)`. Lists of parties are packed, 8 bytes each, ascending. The
masked vector itself travels beside its message, as little-endian 32-bit words.

Decoding checks form alone: types, lengths, order. Who signed, and whether it fits, is the reader's to check.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from lepton_fl.errors import VerificationFailed
from lepton_fl.secagg.context import DIGEST_BYTES, pack
from lepton_fl.secagg.encoding import Value, decode, digest, encode, shaped
from lepton_fl.secagg.errors import BadPayload, Phase
from lepton_fl.secagg.identity import IdentityKey, verify
from lepton_fl.secagg.keys import Suite
from lepton_fl.secagg.masks import Words

NONCE_BYTES = 16
BOX_TAG_BYTES = 16
SECRET_BYTES = 32
"""Of the self-mask's seed and of the mask key's; their shares are as long."""
SIGNATURE_BYTES = 64
PUBLIC_BYTES = {Suite.LSA1: 32, Suite.LSA1_PQ: 32 + 1184}
"""Of a public key: X25519, and ML-KEM-768 after it."""

Parties: TypeAlias = tuple[int, ...]
Form = TypeVar("Form")


def unpack(data: bytes) -> Parties:
    """The party ids that `pack` wrote.

    Raises:
        VerificationFailed: they are not whole or not ascending, each once.
    """
    if len(data) % 8:
        raise VerificationFailed("party ids are 8 bytes each")
    parties = tuple(int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8))
    if any(a >= b for a, b in itertools.pairwise(parties)):
        raise VerificationFailed("party ids are not in ascending order, each once")
    return parties


def read(data: bytes, suite: Suite, name: str, *types: type) -> tuple[Any, ...]:
    found_suite, found_name, *fields = decode(data, str, str, *types)
    if (found_suite, found_name) != (suite, name):
        raise VerificationFailed(f"a message `{name}` of {suite} was due")
    return tuple(fields)


def sized(**lengths: tuple[bytes, int]) -> None:
    for name, (value, length) in lengths.items():
        if len(value) != length:
            raise VerificationFailed(f"{name} has {len(value)} bytes, not {length}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Advert:
    """A site takes part, with these keys."""

    certificate: bytes
    context: bytes
    channel: bytes
    mask: bytes
    nonce: bytes
    """16 bytes: fresh, and what the site's draw of holders follows from."""
    signature: bytes

    @classmethod
    def sign(cls, suite: Suite, identity: IdentityKey, **fields: bytes) -> Advert:
        unsigned = cls(**fields, signature=b"")
        return cls(**fields, signature=identity.sign(suite, *unsigned._signed()))

    def _signed(self) -> tuple[Value, ...]:
        return "advert", self.certificate, self.context, self.channel, self.mask, self.nonce

    def verify(self, suite: Suite, key: bytes) -> None:
        """That the owner of `key` signed it.

        Raises:
            VerificationFailed: not so.
        """
        verify(key, self.signature, suite, *self._signed())

    def encode(self, suite: Suite) -> bytes:
        return encode(suite, *self._signed(), self.signature)

    @classmethod
    def decode(cls, suite: Suite, data: bytes) -> Advert:
        certificate, context, channel, mask, nonce, signature = read(data, suite, "advert", *[bytes] * 6)
        sized(
            context=(context, DIGEST_BYTES),
            channel=(channel, PUBLIC_BYTES[suite]),
            mask=(mask, PUBLIC_BYTES[suite]),
            nonce=(nonce, NONCE_BYTES),
            signature=(signature, SIGNATURE_BYTES),
        )
        return cls(
            certificate=certificate,
            context=context,
            channel=channel,
            mask=mask,
            nonce=nonce,
            signature=signature,
        )


def advert_digest(suite: Suite, advert: bytes) -> bytes:
    return digest(suite, "advert digest", advert)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roll:
    """The server's request to share: who takes part, and the adverts that concern the receiver."""

    parties: Parties
    digests: tuple[bytes, ...]
    """`advert_digest` of each."""
    adverts: tuple[bytes, ...]
    """The receiver's own and its neighbours', ascending by party."""

    def transcript(self, suite: Suite, context: bytes) -> bytes:
        """r1: what everything that follows is bound to."""
        return digest(suite, "r1", context, pack(self.parties), b"".join(self.digests))

    def encode(self, suite: Suite) -> bytes:
        return encode(suite, "roll", pack(self.parties), b"".join(self.digests), self.adverts)

    @classmethod
    def decode(cls, suite: Suite, data: bytes) -> Roll:
        packed, digests, adverts = read(data, suite, "roll", bytes, bytes, tuple)
        parties = unpack(packed)
        sized(digests=(digests, DIGEST_BYTES * len(parties)))
        return cls(
            parties=parties,
            digests=cut(digests, DIGEST_BYTES),
            adverts=shaped(adverts, *[bytes] * len(adverts)),
        )


def cut(data: bytes, size: int) -> tuple[bytes, ...]:
    return tuple(data[at : at + size] for at in range(0, len(data), size))


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What one site has for another, sealed; by the server's hands."""

    box: bytes
    """The two shares, sealed; of nothing where the receiver holds none."""
    commitments: bytes
    """To each of the two shares, or empty."""
    channel_offer: bytes
    mask_offer: bytes
    signature: bytes

    @classmethod
    def sign(
        cls,
        suite: Suite,
        identity: IdentityKey,
        r1: bytes,
        ends: tuple[int, int],
        seed: bytes,
        **fields: bytes,
    ) -> Envelope:
        """`ends` are sender and receiver; `seed` is the commitment to the sender's self-mask's seed."""
        unsigned = cls(**fields, signature=b"")
        return cls(**fields, signature=identity.sign(suite, *unsigned._signed(r1, ends, seed)))

    def _signed(self, r1: bytes, ends: tuple[int, int], seed: bytes) -> tuple[Value, ...]:
        return "envelope", r1, *ends, seed, *self._fields()[:-1]

    def _fields(self) -> tuple[bytes, ...]:
        return self.box, self.commitments, self.channel_offer, self.mask_offer, self.signature

    def verify(self, suite: Suite, key: bytes, r1: bytes, ends: tuple[int, int], seed: bytes) -> None:
        """That the owner of `key` signed it, between these ends.

        Raises:
            VerificationFailed: not so.
        """
        verify(key, self.signature, suite, *self._signed(r1, ends, seed))

    @classmethod
    def of(cls, fields: Any) -> Envelope:
        if not isinstance(fields, tuple):
            raise VerificationFailed("an envelope is a list")
        box, commitments, channel_offer, mask_offer, signature = shaped(fields, *[bytes] * 5)
        # For whom there have to be shares follows from the graph, which the reader has.
        shares = 2 * SECRET_BYTES if commitments else 0
        sized(
            box=(box, shares + BOX_TAG_BYTES),
            commitments=(commitments, 2 * DIGEST_BYTES if shares else 0),
            signature=(signature, SIGNATURE_BYTES),
        )
        return cls(
            box=box,
            commitments=commitments,
            channel_offer=channel_offer,
            mask_offer=mask_offer,
            signature=signature,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """A site's reply to a `Roll`."""

    seed: bytes
    """Commitment to the self-mask's seed; those of the mask key are its public key."""
    own: bytes
    """Commitments to the two shares that the site keeps."""
    envelopes: tuple[Envelope, ...]
    """One for each neighbour in the roll, ascending by party: the receiver's id is not in it but signed."""

    def encode(self, suite: Suite) -> bytes:
        return encode(suite, "shares", self.seed, self.own, [e._fields() for e in self.envelopes])

    @classmethod
    def decode(cls, suite: Suite, data: bytes) -> Shares:
        seed, own, envelopes = read(data, suite, "shares", bytes, bytes, tuple)
        sized(seed=(seed, DIGEST_BYTES), own=(own, 2 * DIGEST_BYTES))
        return cls(seed=seed, own=own, envelopes=tuple(map(Envelope.of, envelopes)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """The server's request to mask: the envelopes for the receiver."""

    senders: Parties
    seeds: tuple[bytes, ...]
    envelopes: tuple[Envelope, ...]

    def encode(self, suite: Suite) -> bytes:
        fields = [e._fields() for e in self.envelopes]
        return encode(suite, "post", pack(self.senders), b"".join(self.seeds), fields)

    @classmethod
    def decode(cls, suite: Suite, data: bytes) -> Post:
        packed, seeds, envelopes = read(data, suite, "post", bytes, bytes, tuple)
        senders = unpack(packed)
        sized(seeds=(seeds, DIGEST_BYTES * len(senders)))
        if len(envelopes) != len(senders):
            raise VerificationFailed(f"{len(envelopes)} envelopes of {len(senders)} senders")
        return cls(
            senders=senders, seeds=cut(seeds, DIGEST_BYTES), envelopes=tuple(map(Envelope.of, envelopes))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What goes with a masked vector."""

    digest: bytes
    """SHA-256 of the vector's little-endian bytes."""
    bad: Parties
    """Senders whose shares did not open or were not those committed to."""
    signature: bytes

    @classmethod
    def sign(
        cls,
        suite: Suite,
        identity: IdentityKey,
        r1: bytes,
        party: int,
        words: int,
        *,
        digest: bytes,
        bad: Parties,
    ) -> Header:
        signed = cls._signed(r1, party, words, digest, bad)
        return cls(digest=digest, bad=bad, signature=identity.sign(suite, *signed))

    @staticmethod
    def _signed(r1: bytes, party: int, words: int, digest: bytes, bad: Parties) -> tuple[Value, ...]:
        return "masked", r1, party, words, digest, pack(bad)

    def verify(self, suite: Suite, key: bytes, r1: bytes, party: int, words: int) -> None:
        """That `party`, owner of `key`, signed it for a vector of so many words.

        Raises:
            VerificationFailed: not so.
        """
        verify(key, self.signature, suite, *self._signed(r1, party, words, self.digest, self.bad))

    def encode(self, suite: Suite) -> bytes:
        return encode(suite, "masked", self.digest, pack(self.bad), self.signature)

    @classmethod
    def decode(cls, suite: Suite, data: bytes) -> Header:
        digest, bad, signature = read(data, suite, "masked", bytes, bytes, bytes)
        sized(digest=(digest, DIGEST_BYTES), signature=(signature, SIGNATURE_BYTES))
        return cls(digest=digest, bad=unpack(bad), signature=signature)


@dataclass(frozen=True, slots=True, eq=False)
class MaskedUpdate:
    """An update that may leave its site: uniform words to whoever lacks one of its masks."""

    header: bytes
    words: Words


def to_wire(masked: MaskedUpdate) -> tuple[bytes, memoryview]:
    """The header, and the vector's bytes, little-endian, without a copy where the machine is.

    The only way from an update to bytes.
    """
    return masked.header, masked.words.astype("<u4", copy=False).data.cast("B")


@dataclass(frozen=True, slots=True)
class Survivors:
    """The server's request to confirm: U3, whose vectors it has."""

    parties: Parties

    def encode(self, suite: Suite) -> bytes:
        return encode(suite, "survivors", pack(self.parties))

    @classmethod
    def decode(cls, suite: Suite, data: bytes) -> Survivors:
        (packed,) = read(data, suite, "survivors", bytes)
        return cls(unpack(packed))

    def digest(self, suite: Suite) -> bytes:
        return digest(suite, "U3", pack(self.parties))


@dataclass(frozen=True, slots=True)
class Confirm:
    """A site's word on which survivors it was told of; one a round."""

    signature: bytes

    @classmethod
    def sign(cls, suite: Suite, identity: IdentityKey, r1: bytes, survivors: Survivors) -> Confirm:
        return cls(identity.sign(suite, "confirm", r1, survivors.digest(suite)))

    def verify(self, suite: Suite, key: bytes, r1: bytes, survivors: Survivors) -> None:
        """That the owner of `key` was told of these survivors.

        Raises:
            VerificationFailed: not so.
        """
        verify(key, self.signature, suite, "confirm", r1, survivors.digest(suite))

    def encode(self, suite: Suite) -> bytes:
        return encode(suite, "confirm", self.signature)

    @classmethod
    def decode(cls, suite: Suite, data: bytes) -> Confirm:
        (signature,) = read(data, suite, "confirm", bytes)
        sized(signature=(signature, SIGNATURE_BYTES))
        return cls(signature)


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmed:
    """The server's request to unmask: the confirmations of the receiver's holders."""

    parties: Parties
    confirms: tuple[Confirm, ...]

    def encode(self, suite: Suite) -> bytes:
        return encode(suite, "confirmed", pack(self.parties), b"".join(c.signature for c in self.confirms))

    @classmethod
    def decode(cls, suite: Suite, data: bytes) -> Confirmed:
        packed, signatures = read(data, suite, "confirmed", bytes, bytes)
        parties = unpack(packed)
        sized(confirmations=(signatures, SIGNATURE_BYTES * len(parties)))
        return cls(parties=parties, confirms=tuple(map(Confirm, cut(signatures, SIGNATURE_BYTES))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmask:
    """A site's shares: of the self-mask of each survivor, of the mask key of each that dropped out."""

    shares: tuple[bytes, ...]
    """Of those whose envelope the site had and found good, and its own; ascending by party."""
    signature: bytes

    @classmethod
    def sign(
        cls,
        suite: Suite,
        identity: IdentityKey,
        r1: bytes,
        party: int,
        survivors: Survivors,
        shares: Iterable[bytes],
    ) -> Unmask:
        shares = tuple(shares)
        signed = cls._signed(suite, r1, party, survivors, shares)
        return cls(shares=shares, signature=identity.sign(suite, *signed))

    @staticmethod
    def _signed(
        suite: Suite, r1: bytes, party: int, survivors: Survivors, shares: tuple[bytes, ...]
    ) -> tuple[Value, ...]:
        return "unmask", r1, party, survivors.digest(suite), b"".join(shares)

    def verify(self, suite: Suite, key: bytes, r1: bytes, party: int, survivors: Survivors) -> None:
        """That `party`, owner of `key`, sent these shares for these survivors.

        Raises:
            VerificationFailed: not so.
        """
        verify(key, self.signature, suite, *self._signed(suite, r1, party, survivors, self.shares))

    def encode(self, suite: Suite) -> bytes:
        return encode(suite, "unmask", b"".join(self.shares), self.signature)

    @classmethod
    def decode(cls, suite: Suite, data: bytes) -> Unmask:
        shares, signature = read(data, suite, "unmask", bytes, bytes)
        sized(
            shares=(shares, len(shares) // SECRET_BYTES * SECRET_BYTES),
            signature=(signature, SIGNATURE_BYTES),
        )
        return cls(shares=cut(shares, SECRET_BYTES), signature=signature)


def well_formed(
    decode: Callable[[Suite, bytes], Form], suite: Suite, data: bytes, phase: Phase, sender: int
) -> Form:
    """`decode(suite, data)`, whose form is the sender's fault.

    Raises:
        BadPayload: it is malformed.
    """
    try:
        return decode(suite, data)
    except VerificationFailed as error:
        raise BadPayload(error.message, phase=phase, culprit=sender) from None
