"""Sessions of LSA1 in whole numbers of Python, from the section of that name in docs/protocol.md alone.

Like primitives.py: nothing of lepton_fl, and plain rather than fast. A party here may be all sites at once,
since it has all of their secrets.
"""

import hashlib
import hmac
import struct

from reference import primitives as p


def sha(*values):
    return hashlib.sha256(p.encode(*values)).digest()


def packed(parties):
    return b"".join(struct.pack("<Q", party) for party in parties)


def little(words):
    return b"".join(struct.pack("<I", word) for word in words)


def ends(i, j):
    return min(i, j), max(i, j)


def root(suite, r1, low_to_high, high_to_low, low, high):
    """Of the two channel secrets of a pair, in an ordinary round."""
    return p.kdf(low_to_high + high_to_low, r1, suite, "session root", low, high)


def session_id(suite, r1, survivors):
    return sha(suite, "session id", r1, packed(survivors))


def hkdf_expand(key, info, length):
    """RFC 5869, section 2.3."""
    okm, block, count = b"", b"", 0
    while len(okm) < length:
        count += 1
        block = hmac.new(key, block + info + bytes([count]), hashlib.sha256).digest()
        okm += block
    return okm[:length]


def step_keys(suite, root_key, session, step, low, high):
    """(box low to high, box high to low, pair seed, confirmation low to high, high to low) of one step."""
    chain = root_key
    for number in range(step + 1):
        okm = hkdf_expand(chain, p.encode(suite, "session step", session, number, low, high), 192)
        chain = okm[:32]
    return [okm[at : at + 32] for at in range(32, 192, 32)]


class Step:
    """One session attempt, of all sites. `draws[i]` are b, k and the rows of i; `roots` are by pair."""

    def __init__(self, suite, ctx, session, step, cohort, threshold, roots, draws):
        self.suite, self.cohort, self.draws = suite, cohort, draws
        self.threshold = threshold
        self.sctx = sha(suite, "session ctx", ctx, session, step)
        pairs = [(i, j) for i in cohort for j in cohort if i < j]
        self.keys = {pair: step_keys(suite, roots[pair], session, step, *pair) for pair in pairs}
        self.shares = {}
        for i, (b, k, *rows) in draws.items():
            dealt = p.shamir_deal(b + k, rows, range(1, len(cohort) + 1))
            self.shares.update({(i, j): share for j, share in zip(cohort, dealt, strict=True)})
        self.adverts = {i: self.advert(i) for i in draws}

    def key(self, purpose, sender, receiver):
        """A key of the pair for one direction."""
        place = {"box": 0, "confirmation": 3}[purpose] + (sender > receiver)
        return self.keys[ends(sender, receiver)][place]

    def seed(self, i, j):
        return self.keys[ends(i, j)][2]

    def commitments(self, i, j):
        share = self.shares[i, j]
        return sha(self.suite, "session bs", self.sctx, i, j, share[:32]) + sha(
            self.suite, "session ks", self.sctx, i, j, share[32:]
        )

    def box(self, i, j):
        commitments = self.commitments(i, j)
        x = 1 + self.cohort.index(j)
        aad = p.encode(self.suite, "session box", self.sctx, i, j, x, commitments)
        return p.chacha20_poly1305(self.key("box", i, j), commitments[:12], self.shares[i, j], aad)

    def advert(self, i):
        b, k = self.draws[i][:2]
        others = [j for j in self.cohort if j != i]
        seeds = [sha(self.suite, "session pair", self.sctx, *ends(i, j), self.seed(i, j)) for j in others]
        recovery = p.seal(
            p.kdf(k, self.sctx, self.suite, "session recovery", i),
            b"".join(self.seed(i, j) for j in others),
            p.encode(self.suite, "session recovery", self.sctx, i),
        )
        return p.encode(
            self.suite,
            "session advert",
            self.sctx,
            sha(self.suite, "session b", self.sctx, i, b),
            sha(self.suite, "session k", self.sctx, i, k),
            b"".join(seeds),
            b"".join(self.commitments(i, j) for j in self.cohort),
            b"".join(self.box(i, j) for j in others),
            recovery,
        )

    def enrol(self, u1):
        """U1 is fixed. The roll of each of its parties."""
        self.u1 = u1
        digests = b"".join(sha(self.suite, "session advert digest", self.adverts[j]) for j in u1)
        self.r1 = sha(self.suite, "session r1", self.sctx, packed(u1), digests)
        rolls = {}
        for i in u1:
            others = [j for j in u1 if j != i]
            rolls[i] = p.encode(
                self.suite,
                "session roll",
                packed(u1),
                digests,
                b"".join(self.commitments(j, i) for j in others),
                b"".join(self.box(j, i) for j in others),
            )
        return rolls

    def self_key(self, i, b):
        return p.kdf(b, self.r1, self.suite, "session selfmask", i)

    def pair_key(self, i, j, seed):
        return p.kdf(seed, self.r1, self.suite, "session pairmask", *ends(i, j))

    def mask(self, i, encoded):
        """The masked words, and what goes with them."""
        keys = [(1, self.self_key(i, self.draws[i][0]))]
        keys += [(1 if i < j else -1, self.pair_key(i, j, self.seed(i, j))) for j in self.u1 if j != i]
        words = p.masked(encoded, keys)
        return words, p.encode(self.suite, "session masked", self.r1, hashlib.sha256(little(words)).digest())

    def confirmation(self, sender, receiver, u3):
        statement = p.encode(self.suite, "session confirm", self.r1, packed(u3))
        return hmac.new(self.key("confirmation", sender, receiver), statement, hashlib.sha256).digest()

    def confirm(self, i, u3):
        joined = b"".join(self.confirmation(i, j, u3) for j in u3 if j != i)
        return p.encode(self.suite, "session confirm", self.r1, joined)

    def confirmed(self, i, u3, confirming):
        others = [j for j in confirming if j != i]
        joined = b"".join(self.confirmation(j, i, u3) for j in others)
        return p.encode(self.suite, "session confirmed", packed(others), joined)

    def opened(self, i, u3):
        """Of each dealer the share that its fate calls for."""
        return [self.shares[j, i][:32] if j in u3 else self.shares[j, i][32:] for j in self.u1]

    def unmask(self, i, u3):
        return p.encode(self.suite, "session unmask", self.r1, b"".join(self.opened(i, u3)))

    def total(self, words_of, u3, unmasking):
        """As the server does: every secret from shares, seeds from what k opens; the masks taken out."""
        total = [sum(column) % 2**32 for column in zip(*(words_of[i] for i in u3), strict=True)]
        responders = unmasking[: self.threshold]
        for j in self.u1:
            place = self.u1.index(j)
            points = {1 + self.cohort.index(i): self.opened(i, u3)[place] for i in responders}
            secret = p.shamir_reconstruct(points, len(self.cohort))
            if j in u3:
                total = p.masked(total, [(-1, self.self_key(j, secret))])
                continue
            for i in u3:
                # What R_j holds, which the receiver of the advert opens with k.
                assert secret == self.draws[j][1]
                total = p.masked(total, [(-1 if i < j else 1, self.pair_key(i, j, self.seed(i, j)))])
        return total
