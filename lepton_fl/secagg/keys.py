"""Keys of one round: agreement (X25519, with ML-KEM-768 in suite LSA1-PQ), derivation, and boxes for shares.

A site makes two key pairs for a round. The mask key's seed is what is shared among the others: whoever holds
it can rebuild every pair secret of that site, and this is how the masks of a site that dropped out are
removed. The channel key's seed never leaves the site.

In suite LSA1 a public key is the 32 bytes of X25519 and an offer is empty. In LSA1-PQ a public key is
`X25519 || ML-KEM-768` (1,216 bytes), both derived from the one seed, and an offer carries what only the
holder of the other's ML-KEM key can read. A secret then holds as long as either of the two does.

Bytes that came from a peer and are not what they should be raise VerificationFailed, without a culprit:
whoever calls knows whose they were.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import ClassVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from lepton_fl.errors import VerificationFailed
from lepton_fl.secagg.encoding import Value, encode

SEED_BYTES = 32
KEY_BYTES = 32

_X25519_BYTES = 32
_KEM_CIPHERTEXT_BYTES = 1088
NONCE_BYTES = 12


class Suite(StrEnum):
    """Which primitives; the first of the labels of everything that is hashed, derived or signed."""

    LSA1 = "lepton-fl/secagg/LSA1"
    LSA1_PQ = "lepton-fl/secagg/LSA1-PQ"


def kdf(ikm: bytes, salt: bytes, *labels: Value) -> bytes:
    """32 bytes: HKDF-SHA256 (RFC 5869) with `encode(*labels)` as info.

    Guarantee: other labels give independent keys; the labels are the suite, the tag that says what for,
    and what else the key is bound to.
    """
    return HKDF(SHA256(), KEY_BYTES, salt, encode(*labels)).derive(ikm)


class OneTimeKey:
    """A ChaCha20-Poly1305 key (RFC 8439) for one box: for sealing it at one end or opening it at the other.

    Its nonce is 0 where none is given, so a key that sealed twice would give both plaintexts away. Derive it
    with a label for the direction, and from keys that are fresh each time.
    """

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        self._key: bytes | None = key

    def seal(self, plaintext: bytes, aad: bytes, *, nonce: bytes = bytes(NONCE_BYTES)) -> bytes:
        """The box, 16 bytes longer than the plaintext.

        Raises:
            RuntimeError: the key has been used.
        """
        return self._spend().encrypt(nonce, plaintext, aad)

    def open(self, box: bytes, aad: bytes, *, nonce: bytes = bytes(NONCE_BYTES)) -> bytes:
        """What was sealed into the box.

        Raises:
            VerificationFailed: nothing was, with this key and `aad`.
            RuntimeError: the key has been used.
        """
        try:
            return self._spend().decrypt(nonce, box, aad)
        except InvalidTag:
            raise VerificationFailed("a box does not open: not its key, or not as it was sealed") from None

    def _spend(self) -> ChaCha20Poly1305:
        key, self._key = self._key, None
        if key is None:
            raise RuntimeError("a one-time key is used a second time")
        return ChaCha20Poly1305(key)


class _KeyPair:
    """X25519, and ML-KEM-768 beside it in LSA1-PQ, from one seed of 32 bytes."""

    _purpose: ClassVar[str]
    __slots__ = ("_dh", "_kem", "_seed", "public", "suite")

    def __init__(self, seed: bytes, suite: Suite) -> None:
        """The pair of a seed: 32 bytes from os.urandom, or those that were put together from shares.

        Raises:
            ValueError: the seed is not 32 bytes.
        """
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a key's seed is {SEED_BYTES} bytes, not {len(seed)}")
        self.suite = Suite(suite)  # a text that equals one is not one
        self._seed = seed
        self._kem: MLKEM768PrivateKey | None = None
        if self.suite is Suite.LSA1:
            self._dh = X25519PrivateKey.from_private_bytes(seed)
            self.public = self._dh.public_key().public_bytes_raw()
            """What is sent to everybody."""
        else:
            self._dh = X25519PrivateKey.from_private_bytes(self._derive(f"{self._purpose}-x25519"))
            self._kem = MLKEM768PrivateKey.from_seed_bytes(
                self._derive(f"{self._purpose}-ml-kem-d") + self._derive(f"{self._purpose}-ml-kem-z")
            )
            self.public = self._dh.public_key().public_bytes_raw() + self._kem.public_key().public_bytes_raw()

    def _derive(self, tag: str, salt: bytes = b"", *bound: Value) -> bytes:
        return kdf(self._seed, salt, self.suite, tag, *bound)

    def agree(self, peer: bytes) -> bytes:
        """The X25519 secret with a peer's public key (RFC 7748, section 6.1), the same 32 bytes at both ends.

        Raises:
            VerificationFailed: `peer` is no public key of this suite, or one of low order, with which the
                secret would be zero and known to everybody.
        """
        try:
            return self._dh.exchange(X25519PublicKey.from_public_bytes(self._halves(peer)[0]))
        except ValueError:
            raise VerificationFailed("a public key of low order: the secret would be zero") from None

    def _encapsulate(self, peer: bytes) -> tuple[bytes, bytes]:
        """A fresh secret for the peer and its ciphertext; both empty in LSA1."""
        key = self._halves(peer)[1]
        if self._kem is None:
            return b"", b""
        try:
            return MLKEM768PublicKey.from_public_bytes(key).encapsulate()
        except ValueError:
            raise VerificationFailed("malformed ML-KEM-768 public key") from None

    def _decapsulate(self, ciphertext: bytes) -> bytes:
        """The secret; other bytes without a sign where the ciphertext was changed."""
        length = 0 if self._kem is None else _KEM_CIPHERTEXT_BYTES
        if len(ciphertext) != length:
            raise VerificationFailed(
                f"malformed offer: a ciphertext of {len(ciphertext)} bytes, not {length}"
            )
        return b"" if self._kem is None else self._kem.decapsulate(ciphertext)

    def _halves(self, peer: bytes) -> tuple[bytes, bytes]:
        if len(peer) != len(self.public):
            raise VerificationFailed(f"a public key of {len(peer)} bytes, not {len(self.public)}")
        return peer[:_X25519_BYTES], peer[_X25519_BYTES:]


class ChannelKey(_KeyPair):
    """For boxes from one site to another. One direction at a time: each box has an offer of its own.

    Guarantee: `offer` and `accept` give the same secret at both ends of one offer, and in LSA1-PQ other
    secrets for other offers, so a changed one opens no box.
    """

    __slots__ = ()
    _purpose = "channel"

    def offer(self, peer: bytes) -> tuple[bytes, bytes]:
        """The secret for a box to the owner of `peer`, and the offer to send with it in clear.

        Raises:
            VerificationFailed: as `agree`.
        """
        shared, ciphertext = self._encapsulate(peer)
        return self.agree(peer) + _bound(shared, ciphertext), ciphertext

    def accept(self, peer: bytes, offer: bytes) -> bytes:
        """The secret of the box that the owner of `peer` sent with this offer.

        Raises:
            VerificationFailed: as `agree`, or the offer is malformed.
        """
        return self.agree(peer) + _bound(self._decapsulate(offer), offer)


class MaskKey(_KeyPair):
    """For the masks of pairs. Of two sites the one with the lower id makes the offer, the other accepts it.

    Guarantee: `secret` of the lower and `accept` of the higher are the same bytes, and either site's seed,
    with the other's public key and what was sent in clear, is enough to make them. In LSA1-PQ the lower
    site's part is derived from its seed, not from the encapsulation, which nobody could repeat.

    `bound` is what the secret belongs to: the round and the two ids, lower first.
    """

    __slots__ = ()
    _purpose = "mask"

    @property
    def seed(self) -> bytes:
        """What is shared among the others."""
        return self._seed

    def secret(self, peer: bytes, salt: bytes, *bound: Value) -> bytes:
        """The pair secret, by the seed of the lower site.

        Raises:
            VerificationFailed: as `agree`.
        """
        return self.agree(peer) + self._part(salt, *bound)

    def offer(self, peer: bytes, salt: bytes, *bound: Value) -> bytes:
        """What the lower site sends the higher in clear, so that it can `accept`; another one at each call.

        Raises:
            VerificationFailed: as `agree`.
        """
        if self._kem is None:
            return b""
        shared, ciphertext = self._encapsulate(peer)
        return ciphertext + _part_key(shared, salt, *bound).seal(self._part(salt, *bound), ciphertext)

    def accept(self, peer: bytes, offer: bytes, salt: bytes, *bound: Value) -> bytes:
        """The pair secret, by the seed of the higher site and the lower one's offer.

        Raises:
            VerificationFailed: as `agree`, or the offer is malformed or of another pair or round.
        """
        agreed = self.agree(peer)
        if self._kem is None:
            if offer:
                raise VerificationFailed("malformed offer: this suite has none")
            return agreed
        ciphertext, box = offer[:_KEM_CIPHERTEXT_BYTES], offer[_KEM_CIPHERTEXT_BYTES:]
        part = _part_key(self._decapsulate(ciphertext), salt, *bound).open(box, ciphertext)
        if len(part) != KEY_BYTES:
            raise VerificationFailed("malformed offer: its secret has not 32 bytes")
        return agreed + part

    def _part(self, salt: bytes, *bound: Value) -> bytes:
        return b"" if self._kem is None else self._derive("pq", salt, *bound)


def _part_key(shared: bytes, salt: bytes, *bound: Value) -> OneTimeKey:
    return OneTimeKey(kdf(shared, salt, Suite.LSA1_PQ, "pq-box", *bound))


def _bound(shared: bytes, ciphertext: bytes) -> bytes:
    """ML-KEM does not promise that a secret has one ciphertext only; with its digest it has."""
    return shared + hashlib.sha256(ciphertext).digest() if ciphertext else b""
