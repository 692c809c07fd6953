"""What both a site and the server derive: commitments, and the keys of masks. All of it bound to r1."""

from __future__ import annotations

import hashlib

from lepton_fl.secagg.encoding import digest, encode
from lepton_fl.secagg.keys import MaskKey, OneTimeKey, Suite, kdf
from lepton_fl.secagg.masks import Words
from lepton_fl.secagg.messages import SECRET_BYTES


def seed_commitment(suite: Suite, r1: bytes, party: int, seed: bytes) -> bytes:
    """To the seed of a party's self-mask. Hiding as well as binding: it has 256 random bits."""
    return digest(suite, "b", r1, party, seed)


def share_commitments(suite: Suite, r1: bytes, dealer: int, holder: int, share: bytes) -> bytes:
    """To a holder's two shares, of the self-mask's seed and of the mask key's; nothing to no share."""
    if not share:
        return b""
    seed, key = share[:SECRET_BYTES], share[SECRET_BYTES:]
    return share_commitment(suite, "bs", r1, dealer, holder, seed) + share_commitment(
        suite, "ms", r1, dealer, holder, key
    )


def share_commitment(suite: Suite, tag: str, r1: bytes, dealer: int, holder: int, share: bytes) -> bytes:
    """To one share; `tag` is `bs` for one of the self-mask's seed, `ms` for one of the mask key's."""
    return digest(suite, tag, r1, dealer, holder, share)


def box_key(suite: Suite, secret: bytes, r1: bytes, sender: int, receiver: int) -> OneTimeKey:
    """Of an envelope's box: one direction, one use."""
    return OneTimeKey(kdf(secret, r1, suite, "channel", sender, receiver))


def box_aad(suite: Suite, r1: bytes, sender: int, receiver: int, x: int) -> bytes:
    """What a box is bound to; `x` is that of the receiver's shares, 0 where it holds none."""
    return encode(suite, "box", r1, sender, receiver, x)


def self_mask(suite: Suite, r1: bytes, party: int, seed: bytes) -> bytes:
    """Key of the mask that only a party's own seed opens."""
    return kdf(seed, r1, suite, "selfmask", party)


def pair_mask(
    suite: Suite, r1: bytes, key: MaskKey, me: int, peer: int, public: bytes, offer: bytes
) -> bytes:
    """Key of the mask of two parties, by `me`'s mask key; `offer` is the lower party's to the higher.

    Raises:
        VerificationFailed: the peer's public key is of low order, or the offer is not for this pair.
    """
    pair = min(me, peer), max(me, peer)
    secret = key.secret(public, r1, *pair) if me < peer else key.accept(public, offer, r1, *pair)
    return kdf(secret, r1, suite, "pairmask", *pair)


def mask_sign(me: int, peer: int) -> int:
    """Of the pair's mask in `me`'s vector: the lower party adds it."""
    return 1 if me < peer else -1


def words_digest(words: Words) -> bytes:
    """SHA-256 of a vector's little-endian bytes."""
    return hashlib.sha256(words.astype("<u4", copy=False).data).digest()
