"""What the parties of a session attempt send each other, as bytes: parts of one length each, joined.

In the order of the cohort, of U1 or of U3, the sender left out where it is no part. As in messages.py,
decoding checks form alone. `Survivors` are those of an ordinary attempt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lepton_fl.secagg.context import DIGEST_BYTES, pack
from lepton_fl.secagg.encoding import digest, encode
from lepton_fl.secagg.keys import Suite
from lepton_fl.secagg.messages import BOX_TAG_BYTES, SECRET_BYTES, Parties, cut, read, sized, unpack

COMMITMENTS_BYTES = 2 * DIGEST_BYTES
BOX_BYTES = 2 * SECRET_BYTES + BOX_TAG_BYTES
MAC_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionAdvert:
    """A site takes part in a step, and deals its secrets to the whole cohort."""

    context: bytes
    """sctx."""
    seed: bytes
    """Commitment to the seed of the self-mask."""
    key: bytes
    """Commitment to what opens `recovery`."""
    pairs: tuple[bytes, ...]
    """Commitments to the pair seeds, for each other party."""
    commitments: tuple[bytes, ...]
    """To the shares of each party, its own among them."""
    boxes: tuple[bytes, ...]
    """The shares of each other party, sealed."""
    recovery: bytes
    """The pair seeds, sealed."""

    def encode(self, suite: Suite) -> bytes:
        return encode(
            suite,
            "session advert",
            self.context,
            self.seed,
            self.key,
            b"".join(self.pairs),
            b"".join(self.commitments),
            b"".join(self.boxes),
            self.recovery,
        )

    @classmethod
    def decode(cls, suite: Suite, data: bytes, n: int) -> SessionAdvert:
        """Of a cohort of n."""
        context, seed, key, pairs, commitments, boxes, recovery = read(
            data, suite, "session advert", *[bytes] * 7
        )
        sized(
            context=(context, DIGEST_BYTES),
            seed=(seed, DIGEST_BYTES),
            key=(key, DIGEST_BYTES),
            pairs=(pairs, DIGEST_BYTES * (n - 1)),
            commitments=(commitments, COMMITMENTS_BYTES * n),
            boxes=(boxes, BOX_BYTES * (n - 1)),
            recovery=(recovery, SECRET_BYTES * (n - 1) + BOX_TAG_BYTES),
        )
        return cls(
            context=context,
            seed=seed,
            key=key,
            pairs=cut(pairs, DIGEST_BYTES),
            commitments=cut(commitments, COMMITMENTS_BYTES),
            boxes=cut(boxes, BOX_BYTES),
            recovery=recovery,
        )


def advert_digest(suite: Suite, advert: bytes) -> bytes:
    return digest(suite, "session advert digest", advert)


def transcript(suite: Suite, context: bytes, parties: Parties, digests: Iterable[bytes]) -> bytes:
    """r1, of sctx, U1 and its adverts: what everything that follows is bound to."""
    return digest(suite, "session r1", context, pack(parties), b"".join(digests))


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRoll:
    """The server's request to mask: who takes part, and what they have for the receiver."""

    parties: Parties
    """U1."""
    digests: tuple[bytes, ...]
    """`advert_digest` of each."""
    commitments: tuple[bytes, ...]
    """To the receiver's shares, of each other party."""
    boxes: tuple[bytes, ...]

    def encode(self, suite: Suite) -> bytes:
        return encode(
            suite,
            "session roll",
            pack(self.parties),
            b"".join(self.digests),
            b"".join(self.commitments),
            b"".join(self.boxes),
        )

    @classmethod
    def decode(cls, suite: Suite, data: bytes) -> SessionRoll:
        packed, digests, commitments, boxes = read(data, suite, "session roll", *[bytes] * 4)
        parties = unpack(packed)
        others = max(len(parties) - 1, 0)
        sized(
            digests=(digests, DIGEST_BYTES * len(parties)),
            commitments=(commitments, COMMITMENTS_BYTES * others),
            boxes=(boxes, BOX_BYTES * others),
        )
        return cls(
            parties=parties,
            digests=cut(digests, DIGEST_BYTES),
            commitments=cut(commitments, COMMITMENTS_BYTES),
            boxes=cut(boxes, BOX_BYTES),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionHeader:
    """What goes with a masked vector."""

    r1: bytes
    """Of this step, as in every reply after it: one that comes late is none of another step."""
    digest: bytes
    """SHA-256 of the vector's little-endian bytes."""

    def encode(self, suite: Suite) -> bytes:
        return encode(suite, "session masked", self.r1, self.digest)

    @classmethod
    def decode(cls, suite: Suite, data: bytes) -> SessionHeader:
        r1, found = read(data, suite, "session masked", bytes, bytes)
        sized(r1=(r1, DIGEST_BYTES), digest=(found, DIGEST_BYTES))
        return cls(r1=r1, digest=found)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionConfirm:
    """A site's word, to each other survivor, on which survivors it was told of."""

    r1: bytes
    macs: tuple[bytes, ...]

    def encode(self, suite: Suite) -> bytes:
        return encode(suite, "session confirm", self.r1, b"".join(self.macs))

    @classmethod
    def decode(cls, suite: Suite, data: bytes, n: int) -> SessionConfirm:
        """Among n survivors."""
        r1, macs = read(data, suite, "session confirm", bytes, bytes)
        sized(r1=(r1, DIGEST_BYTES), confirmations=(macs, MAC_BYTES * (n - 1)))
        return cls(r1=r1, macs=cut(macs, MAC_BYTES))


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionConfirmed:
    """The server's request to unmask: what others confirmed to the receiver."""

    parties: Parties
    macs: tuple[bytes, ...]

    def encode(self, suite: Suite) -> bytes:
        return encode(suite, "session confirmed", pack(self.parties), b"".join(self.macs))

    @classmethod
    def decode(cls, suite: Suite, data: bytes) -> SessionConfirmed:
        packed, macs = read(data, suite, "session confirmed", bytes, bytes)
        parties = unpack(packed)
        sized(confirmations=(macs, MAC_BYTES * len(parties)))
        return cls(parties=parties, macs=cut(macs, MAC_BYTES))


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionUnmask:
    """A site's shares: of the self-mask of each survivor, of k of each that dropped out."""

    r1: bytes
    shares: tuple[bytes, ...]
    """For each party of U1."""

    def encode(self, suite: Suite) -> bytes:
        return encode(suite, "session unmask", self.r1, b"".join(self.shares))

    @classmethod
    def decode(cls, suite: Suite, data: bytes, n: int) -> SessionUnmask:
        """Among n parties of U1."""
        r1, shares = read(data, suite, "session unmask", bytes, bytes)
        sized(r1=(r1, DIGEST_BYTES), shares=(shares, SECRET_BYTES * n))
        return cls(r1=r1, shares=cut(shares, SECRET_BYTES))
