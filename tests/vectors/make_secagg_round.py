"""Writes secagg_round.json: whole rounds of LSA1, every byte that is sent and every word that is added.

Written from docs/protocol.md alone. Uses reference/primitives.py, which has nothing of lepton_fl, so that it
can disagree with it; Ed25519 is the `cryptography` library's, which is deterministic (RFC 8032).
`python tests/vectors/make_secagg_round.py [FILE]`
"""

import hashlib
import json
import struct
import sys
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from reference import primitives as p

HERE = Path(__file__).parent
SUITE = "lepton-fl/secagg/LSA1"
PARTIES = [101, 205, 4711, 2**40]
CLIP, BITS, COORDINATES = 0.5, 16, 11


def fixed(name, size=32):
    """Bytes that look random and are the same each time."""
    return hashlib.shake_256(name.encode()).digest(size)


def sha(*values):
    return hashlib.sha256(p.encode(*values)).digest()


def sign(seed, *values):
    return Ed25519PrivateKey.from_private_bytes(seed).sign(p.encode(*values))


def public(seed):
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def packed(parties):
    return b"".join(struct.pack("<Q", party) for party in parties)


def certificate(party):
    body = [
        party,
        f"site-{party}",
        public(fixed(f"identity {party}")),
        1_700_000_000,
        1_900_000_000,
        party % 1000,
    ]
    return p.encode(body, sign(fixed("root"), "lepton-fl/identity-certificate/1", *body))


def context(colluders, threshold, weighted, max_weight, *, round=3, attempt=2, parties=PARTIES):
    cohort = sha("lepton-fl/secagg/cohort/1", packed(parties))
    quantiser = [struct.pack("<d", CLIP), BITS, len(parties), max_weight, 0]
    graph = (len(parties) - 1, threshold)
    return sha(
        SUITE, "ctx", fixed("run", 16), "train", round, attempt, cohort, colluders, 3, threshold, *graph,
        COORDINATES, quantiser, int(weighted), fixed("model"), fixed("study"), 5,
    )  # fmt: skip


def commitments(r1, dealer, holder, share):
    return sha(SUITE, "bs", r1, dealer, holder, share[:32]) + sha(SUITE, "ms", r1, dealer, holder, share[32:])


def pair_mask(r1, scalar, peer_public, one, other):
    low, high = min(one, other), max(one, other)
    return p.kdf(p.x25519(scalar, peer_public), r1, SUITE, "pairmask", low, high)


def little(words):
    return b"".join(struct.pack("<I", word) for word in words)


def encoded_update(name, weight=1, max_weight=1):
    update = [
        (int.from_bytes(fixed(f"update {name} {c}", 4), "little") / 2**31 - 1) for c in range(COORDINATES)
    ]
    return p.quantise(
        update,
        clip=CLIP,
        bits=BITS,
        max_weight=max_weight,
        weight=weight,
        rounding_key=fixed(f"rounding {name}"),
    )


def whole_round(*, masking=PARTIES, advertising=PARTIES, weights=None):
    """`advertising` is U1 (and U2), `masking` is U3, in that order of the phases."""
    n = len(PARTIES)
    threshold = 2 * n // 3 + 1
    max_weight = max(weights.values()) if weights else 1
    ctx = context(1, threshold, weights is not None, max_weight)
    draws, encoded, messages = {}, {}, {}
    scalar, seed, share_of, words_of = {}, {}, {}, {}

    # Advertise
    adverts = {}
    for i in advertising:
        sizes = [32, 32, 16, 32, *[64] * (threshold - 1)]
        draws[i] = [fixed(f"draw {place} of {i}", size) for place, size in enumerate(sizes)]
        channel, mask, nonce = draws[i][:3]
        scalar[i] = (channel, mask)
        fields = ["advert", certificate(i), ctx, p.x25519_public(channel), p.x25519_public(mask), nonce]
        adverts[i] = p.encode(SUITE, *fields, sign(fixed(f"identity {i}"), SUITE, *fields))
        weight = weights[i] if weights else 1
        encoded[i] = encoded_update(f"{i}", weight, max_weight) + (p.limbs(weight) if weights else [])

    # Share
    digests = [sha(SUITE, "advert digest", adverts[i]) for i in advertising]
    r1 = sha(SUITE, "r1", ctx, packed(advertising), b"".join(digests))
    roll = p.encode(SUITE, "roll", packed(advertising), b"".join(digests), [adverts[i] for i in advertising])
    envelopes, seed_commitment, own = {}, {}, {}
    for i in advertising:
        seed[i] = draws[i][3]
        shares = p.shamir_deal(seed[i] + scalar[i][1], draws[i][4:], range(1, n + 1))
        share_of.update({(i, j): share for j, share in zip(PARTIES, shares, strict=True)})
        seed_commitment[i] = sha(SUITE, "b", r1, i, seed[i])
        own[i] = commitments(r1, i, i, share_of[i, i])
        for j in advertising:
            if j == i:
                continue
            key = p.kdf(p.x25519(scalar[i][0], p.x25519_public(scalar[j][0])), r1, SUITE, "channel", i, j)
            aad = p.encode(SUITE, "box", r1, i, j, 1 + PARTIES.index(j))
            fields = [p.seal(key, share_of[i, j], aad), commitments(r1, i, j, share_of[i, j]), b"", b""]
            signature = sign(fixed(f"identity {i}"), SUITE, "envelope", r1, i, j, seed_commitment[i], *fields)
            envelopes[i, j] = [*fields, signature]
    shared = {
        i: p.encode(
            SUITE, "shares", seed_commitment[i], own[i], [envelopes[i, j] for j in advertising if j != i]
        )
        for i in advertising
    }

    # Mask
    posts, headers = {}, {}
    for i in masking:
        senders = [j for j in advertising if j != i]
        seeds = b"".join(seed_commitment[j] for j in senders)
        posts[i] = p.encode(SUITE, "post", packed(senders), seeds, [envelopes[j, i] for j in senders])
        keys = [(1, p.kdf(seed[i], r1, SUITE, "selfmask", i))]
        for j in senders:
            key = pair_mask(r1, scalar[i][1], p.x25519_public(scalar[j][1]), i, j)
            keys.append((1 if i < j else -1, key))
        words_of[i] = p.masked(encoded[i], keys)
        digest = hashlib.sha256(little(words_of[i])).digest()
        signature = sign(fixed(f"identity {i}"), SUITE, "masked", r1, i, len(words_of[i]), digest, b"")
        headers[i] = p.encode(SUITE, "masked", digest, b"", signature)

    # Confirm, unmask
    survivors = packed(masking)
    u3 = sha(SUITE, "U3", survivors)
    confirm = {i: sign(fixed(f"identity {i}"), SUITE, "confirm", r1, u3) for i in masking}
    unmask = {}
    for i in masking:
        opened = b"".join(share_of[j, i][:32] if j in masking else share_of[j, i][32:] for j in advertising)
        signature = sign(fixed(f"identity {i}"), SUITE, "unmask", r1, i, u3, opened)
        unmask[i] = p.encode(SUITE, "unmask", opened, signature)

    # The server: rebuilds every secret from shares, and takes the masks out.
    total = [sum(column) % 2**32 for column in zip(*words_of.values(), strict=True)]
    responders = masking[:threshold]
    for j in advertising:
        half = slice(0, 32) if j in masking else slice(32, 64)
        points = {1 + PARTIES.index(i): share_of[j, i][half] for i in responders}
        secret = p.shamir_reconstruct(points, n)
        if j in masking:
            total = p.masked(total, [(-1, p.kdf(secret, r1, SUITE, "selfmask", j))])
        else:
            for i in masking:
                key = pair_mask(r1, secret, p.x25519_public(scalar[i][1]), i, j)
                total = p.masked(total, [(-1 if i < j else 1, key)])
    assert total == [sum(column) % 2**32 for column in zip(*(encoded[i] for i in masking), strict=True)]

    messages = {
        "adverts": adverts,
        "roll": roll,
        "shares": shared,
        "posts": posts,
        "headers": headers,
        "survivors": p.encode(SUITE, "survivors", survivors),
        "confirms": {i: p.encode(SUITE, "confirm", signature) for i, signature in confirm.items()},
        "confirmed": p.encode(SUITE, "confirmed", survivors, b"".join(confirm.values())),
        "unmasks": unmask,
    }
    return {
        "parties": PARTIES,
        "root": fixed("root"),
        "identities": {i: fixed(f"identity {i}") for i in PARTIES},
        "certificates": {i: certificate(i) for i in PARTIES},
        "run": fixed("run", 16),
        "model": fixed("model"),
        "study": fixed("study"),
        "clip": CLIP,
        "bits": BITS,
        "max_weight": max_weight,
        "weighted": weights is not None,
        "coordinates": COORDINATES,
        "context": ctx,
        "draws": draws,
        "encoded": encoded,
        "messages": messages,
        "masked": words_of,
        "total": total,
    }


SCENARIOS = {
    "four sites": whole_round,
    "one leaves after it shared": lambda: whole_round(masking=[101, 4711, 2**40]),
    "one never came": lambda: whole_round(masking=PARTIES[1:], advertising=PARTIES[1:]),
    "four sites with weights": lambda: whole_round(
        weights=dict(zip(PARTIES, [1, 70_000, 2**33, 5], strict=True))
    ),
}


def plain(value):
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return value


def write(scenarios, name):
    """A line for each scenario, to the file that the command line names, or to `name` beside this one."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / name
    rows = [{"name": name, **plain(scenario())} for name, scenario in scenarios.items()]
    target.write_text(
        json.dumps(rows, indent=None, separators=(",", ":")).replace('},{"name"', '},\n{"name"') + "\n"
    )


def main():
    write(SCENARIOS, "secagg_round.json")


if __name__ == "__main__":
    main()
