"""Writes secagg_primitives.json: known answers for the primitives of LSA1, one fact each.

Uses reference/primitives.py, which has nothing of lepton_fl, so that it can disagree with it.
`python tests/vectors/make_secagg_primitives.py [FILE]`
"""

import hashlib
import json
import struct
import sys
from pathlib import Path

from reference import primitives as p

HERE = Path(__file__).parent


def fixed(name, size=32):
    """Bytes that look random and are the same each time."""
    return hashlib.shake_256(name.encode()).digest(size)


def numbers(name, count):
    return [int.from_bytes(fixed(f"{name} {i}", 4), "little") for i in range(count)]


def mask(name, *, start, count):
    key = fixed(name)
    return {"start": start, "count": count, "key": key.hex(), "words": p.mask_words(key, start, count)}


def applied(name, *, signs, start=0, count=9):
    vector = numbers(name, count)
    keys = [(sign, fixed(f"{name} key {i}")) for i, sign in enumerate(signs)]
    return {
        "start": start,
        "vector": vector,
        "signed_keys": [[sign, key.hex()] for sign, key in keys],
        "masked": p.masked(vector, keys, start),
    }


def encoded(name, *, coordinates, weight=1, **quantiser):
    key = fixed(name)
    words = p.quantise(coordinates, weight=weight, rounding_key=key, **quantiser)
    return {
        **quantiser,
        "weight": weight,
        "rounding_key": key.hex(),
        "coordinates": coordinates,
        "words": words,
    }


def decoded(*, words, n, total_weight, **quantiser):
    means = p.dequantise(words, total_weight=total_weight, **quantiser)
    return {**quantiser, "words": words, "n": n, "total_weight": total_weight, "means": means}


def shared(name, *, threshold, xs, size=64):
    secret = fixed(name, size)
    rows = [fixed(f"{name} {k}", size) for k in range(1, threshold)]
    shares = p.shamir_deal(secret, rows, xs)
    used = dict(list(zip(xs, shares, strict=True))[-threshold:])
    if p.shamir_reconstruct(used, max(xs)) != secret:
        raise ArithmeticError(name)
    return {
        "threshold": threshold,
        "secret": secret.hex(),
        "coefficients": [row.hex() for row in rows],
        "shares": {str(x): share.hex() for x, share in zip(xs, shares, strict=True)},
    }


def derived(*, salt, labels):
    ikm = fixed("ikm")
    return {"ikm": ikm.hex(), "salt": salt.hex(), "labels": labels, "key": p.kdf(ikm, salt, *labels).hex()}


def box(name, *, plaintext, aad):
    key = fixed(name)
    return {
        "key": key.hex(),
        "plaintext": plaintext.hex(),
        "aad": aad.hex(),
        "box": p.seal(key, plaintext, aad).hex(),
    }


def plain_agreement(name):
    one, other = fixed(f"{name} one"), fixed(f"{name} other")
    public = p.x25519_public(other)
    return {
        "seed": one.hex(),
        "public": p.x25519_public(one).hex(),
        "peer": public.hex(),
        "secret": p.x25519(one, public).hex(),
    }


def hybrid_public(purpose):
    seed = fixed(f"hybrid {purpose}")
    return {"purpose": purpose, "seed": seed.hex(), "public": p.hybrid_keys(seed, purpose)[3].hex()}


def hybrid_pair(name):
    """The lower site's offer, with the coins that an implementation would draw."""
    seeds = low, high = fixed(f"{name} low"), fixed(f"{name} high")
    (low_scalar, _, _, low_public), (_, ek, dk, high_public) = (p.hybrid_keys(seed, "mask") for seed in seeds)
    r1, ids = fixed("r1"), [101, 205]
    part = p.pair_part(low, r1, *ids)
    kem_secret, ciphertext = p.ml_kem_encapsulate(ek, fixed(f"{name} coins"))
    if p.ml_kem_decapsulate(dk, ciphertext) != kem_secret:
        raise ArithmeticError(name)
    return {
        "low_seed": low.hex(),
        "high_seed": high.hex(),
        "low_public": low_public.hex(),
        "high_public": high_public.hex(),
        "r1": r1.hex(),
        "ids": ids,
        "offer": p.pair_offer(part, kem_secret, ciphertext, r1, *ids).hex(),
        "secret": (p.x25519(low_scalar, high_public[:32]) + part).hex(),
    }


def hybrid_channel(name):
    sender, receiver = (p.hybrid_keys(fixed(f"{name} {end}"), "channel") for end in ("sender", "receiver"))
    kem_secret, ciphertext = p.ml_kem_encapsulate(receiver[1], fixed(f"{name} coins"))
    agreed = p.x25519(sender[0], receiver[3][:32])
    return {
        "receiver_seed": fixed(f"{name} receiver").hex(),
        "sender_public": sender[3].hex(),
        "offer": ciphertext.hex(),
        "secret": (agreed + kem_secret + hashlib.sha256(ciphertext).digest()).hex(),
    }


NARROW = {"clip": 1.0, "bits": 8, "max_weight": 1}
WIDE = {"clip": 0.1, "bits": 27, "max_weight": 1}
WEIGHTED = {"clip": 2.5, "bits": 24, "max_weight": 50_000}
MOST = 10 * (2**26 - 1)
EIGHTHS = [k / 8 / 127 for k in range(-20, 21)]


def as_float32(values):
    """The nearest float32, written as the float64 that it is."""
    return [struct.unpack("<f", struct.pack("<f", value))[0] for value in values]


SCENARIOS = {
    "a mask from its first word": ("mask", mask("mask", start=0, count=20)),
    "a mask from the middle of a block": ("mask", mask("mask", start=7, count=20)),
    "a mask whose block number needs more than 32 bits": ("mask", mask("far", start=2**34 - 6, count=20)),
    "one mask is added": ("apply", applied("added", signs=[1])),
    "one mask is taken away": ("apply", applied("taken", signs=[-1])),
    "several masks of both signs": ("apply", applied("several", signs=[1, -1, -1, 1, 1])),
    "several masks from a later word": ("apply", applied("later", signs=[1, -1], start=1_000_003)),
    "no mask": ("apply", applied("none", signs=[])),
    "coordinates between two steps": (
        "encode",
        encoded("between", coordinates=as_float32(EIGHTHS), **NARROW),
    ),
    "coordinates on a step": (
        "encode",
        encoded("on", coordinates=[-1.0, -0.5, 0.0, -0.0, 0.5, 1.0], clip=1.0, bits=2, max_weight=1),
    ),
    "coordinates beyond the clip": (
        "encode",
        encoded("beyond", coordinates=as_float32([-3e38, -1.01, 1.01, 7.0, 3e38]), **NARROW),
    ),
    "fine steps": (
        "encode",
        encoded("fine", coordinates=as_float32([0.1, -0.1, 0.01, -0.0123, 1e-9, -1e-30, 0.0999]), **WIDE),
    ),
    "a weight below the largest": (
        "encode",
        encoded("light", coordinates=as_float32([-2.5, 2.5, 9.0, 0.7, -0.7]), weight=12_345, **WEIGHTED),
    ),
    "a weight so small that the clip is less than a step": (
        "encode",
        encoded("tiny", coordinates=[-1.0, 1.0] * 8, weight=1, clip=1.0, bits=8, max_weight=1000),
    ),
    "a sum of ten": (
        "decode",
        decoded(words=[0, 1, 2**32 - 1, MOST, 2**32 - MOST], n=10, total_weight=10, **WIDE),
    ),
    "a weighted sum": (
        "decode",
        decoded(words=[0, 12_345_678, 2**32 - 12_345_678], n=7, total_weight=123_456, **WEIGHTED),
    ),
    "a weight of one word": ("limbs", {"weight": 65_535, "limbs": p.limbs(65_535)}),
    "the largest weight": ("limbs", {"weight": 2**64 - 1, "limbs": p.limbs(2**64 - 1)}),
    "a weight of mixed limbs": (
        "limbs",
        {"weight": 0x0123_4567_89AB_CDEF, "limbs": p.limbs(0x0123456789ABCDEF)},
    ),
    "three of five": ("shares", shared("three of five", threshold=3, xs=[1, 2, 3, 4, 5])),
    "all of four": ("shares", shared("all of four", threshold=4, xs=[1, 2, 3, 4])),
    "one of two, which is no secret": ("shares", shared("one of two", threshold=1, xs=[1, 2])),
    "the last x of GF(2^8)": ("shares", shared("last of 8", threshold=3, xs=[1, 128, 254, 255])),
    "the first x of GF(2^16)": ("shares", shared("first of 16", threshold=3, xs=[256, 1, 2, 255])),
    "the last x of GF(2^16)": ("shares", shared("last of 16", threshold=4, xs=[1, 256, 32_768, 65_535, 2])),
    "a secret of one byte": ("shares", shared("one byte", threshold=2, xs=[3, 1, 2], size=1)),
    "a key with one label": ("kdf", derived(salt=bytes(32), labels=[p.LSA1])),
    "a key without salt": ("kdf", derived(salt=b"", labels=[p.LSA1, "selfmask", 101])),
    "a key bound to two parties": ("kdf", derived(salt=fixed("r1"), labels=[p.LSA1, "pairmask", 101, 205])),
    "a key bound to them the other way round": (
        "kdf",
        derived(salt=fixed("r1"), labels=[p.LSA1, "pairmask", 205, 101]),
    ),
    "a box with two shares": (
        "box",
        box("box", plaintext=fixed("shares", 64), aad=p.encode(fixed("r1"), 1, 2, 3)),
    ),
    "an empty box": ("box", box("empty", plaintext=b"", aad=b"")),
    "X25519": ("agree", plain_agreement("agree")),
    "a hybrid mask key": ("hybrid public", hybrid_public("mask")),
    "a hybrid channel key": ("hybrid public", hybrid_public("channel")),
    "a hybrid pair, from either seed": ("hybrid pair", hybrid_pair("pair")),
    "a hybrid channel": ("hybrid channel", hybrid_channel("channel")),
}


def main():
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "secagg_primitives.json"
    rows = [{"name": name, "kind": kind, **facts} for name, (kind, facts) in SCENARIOS.items()]
    target.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
