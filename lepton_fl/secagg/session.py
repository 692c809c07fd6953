"""Sessions: what a pair of sites keeps of an ordinary round, so that later rounds need no new key exchange.

docs/protocol.md, "Sessions". Pure, and in memory alone: nothing here is ever written to a disk.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from lepton_fl.secagg.context import Context, pack
from lepton_fl.secagg.encoding import digest, encode
from lepton_fl.secagg.keys import KEY_BYTES, NONCE_BYTES, OneTimeKey, Suite, kdf
from lepton_fl.secagg.messages import Parties, Survivors

MAX_STEPS = 256
"""Steps of a session. After them comes an ordinary round: what a reader of a site's memory has ends there."""
_FIELDS = 6
"""Of a step's key block: the next chain key, two box keys, the pair's seed, two confirmation keys."""


def ends(me: int, peer: int) -> tuple[int, int]:
    """The lower and the higher of two parties."""
    return (me, peer) if me < peer else (peer, me)


def root(suite: Suite, r1: bytes, me: int, peer: int, *, sent: bytes, received: bytes) -> bytes:
    """What two sites keep of an ordinary attempt: the same at both ends, and known to nobody else.

    `sent` is the channel secret of `me`'s envelope to `peer`, `received` that of the other way.
    """
    secrets = sent + received if me < peer else received + sent
    return kdf(secrets, r1, suite, "session root", *ends(me, peer))


def session_id(suite: Suite, r1: bytes, members: Iterable[int]) -> bytes:
    """Of the session that an ordinary attempt leaves to its survivors."""
    return digest(suite, "session id", r1, pack(members))


def session_context(context: Context, session: bytes, step: int) -> bytes:
    """sctx: the context's digest, in one step of one session."""
    return digest(context.suite, "session ctx", context.digest, session, step)


@dataclass(slots=True)
class PairKeys:
    """What two sites share in one step. Each key is for one use."""

    seal: OneTimeKey
    """Of the box to the peer."""
    open: OneTimeKey
    """Of the box from the peer."""
    seed: bytes
    """Of the mask of the pair: all that is opened where one of the two drops out."""
    mac: bytes
    """Of the confirmation to the peer."""
    peer_mac: bytes
    """Of the confirmation from the peer."""


class Session:
    """A site's side of a session: a chain key for each other member, and the number of the next step.

    Guarantee: a step's keys are given out once, and the state after it does not tell them; nor does it tell
    those of any step before. A step's keys tell nothing of another step's.
    """

    def __init__(
        self,
        context: Context,
        r1: bytes,
        party: int,
        *,
        members: Parties,
        roots: Mapping[int, bytes],
        expires: int,
    ) -> None:
        """What `party` keeps of an ordinary attempt; `roots` are by the other members of U3.

        `expires` is the first `not_after` of a member's certificate, in seconds since 1970.
        """
        self.id = session_id(context.suite, r1, members)
        self.party = party
        self.next = 0
        """The next step; those before are over."""
        self._of = _scope(context)
        self._expires = expires
        self._chains = dict(roots)

    def serves(self, context: Context, session: bytes, step: int, now: datetime) -> bool:
        """Whether an attempt in this context may be step `step` of this session."""
        return (
            hmac.compare_digest(session, self.id)
            and context.attempt == 1
            and _scope(context) == self._of
            and now.timestamp() < self._expires
            and context.cohort.graph.complete
            and set(context.cohort.parties) - {self.party} <= self._chains.keys()
            and self.next <= step < MAX_STEPS
        )

    def enter(self, step: int, suite: Suite) -> dict[int, PairKeys]:
        """The keys of this step with each other member; the chains go past it, and what came before is gone.

        Raises:
            ValueError: the step is over, or beyond the last.
        """
        if not self.next <= step < MAX_STEPS:
            raise ValueError(f"step {step}: the next is {self.next}, the last {MAX_STEPS - 1}")
        found = {}
        for peer in self._chains:
            chain = self._chains[peer]
            lower, higher = ends(self.party, peer)
            for passed in range(self.next, step):
                (chain,) = _expand(chain, suite, self.id, passed, lower, higher, fields=1)
            after, up, down, seed, mac_up, mac_down = _expand(chain, suite, self.id, step, lower, higher)
            if peer < self.party:
                up, down, mac_up, mac_down = down, up, mac_down, mac_up
            found[peer] = PairKeys(OneTimeKey(up), OneTimeKey(down), seed, mac_up, mac_down)
            self._chains[peer] = after
        self.next = step + 1
        return found

    def end(self) -> None:
        """Drop all keys; the session serves no attempt any more."""
        self.next = MAX_STEPS
        self._chains = {}


class ServerSession:
    """What the server knows of a session: who has it, and which step is next. No secret."""

    def __init__(self, context: Context, r1: bytes, survivors: Parties, holders: Iterable[int]) -> None:
        """After an ordinary attempt with these survivors; `holders` are those that released."""
        self.id = session_id(context.suite, r1, survivors)
        self._of = _scope(context)
        self._holders = frozenset(holders)
        self._next = 0

    def step(self, context: Context) -> int | None:
        """The number of the next step, which is then taken; None where the session cannot serve."""
        if (
            _scope(context) != self._of
            or not self._holders.issuperset(context.cohort.parties)
            or not context.cohort.graph.complete
            or self._next >= MAX_STEPS
        ):
            return None
        step, self._next = self._next, self._next + 1
        return step


class _Scope(NamedTuple):
    run: bytes
    kind: str
    suite: Suite
    roster: int


def _scope(context: Context) -> _Scope:
    """What a session is for."""
    return _Scope(context.run, context.kind, context.suite, context.roster)


def _expand(
    chain: bytes, suite: Suite, session: bytes, step: int, lower: int, higher: int, *, fields: int = _FIELDS
) -> tuple[bytes, ...]:
    # The chain key is uniform already: HKDF's second half is enough.
    info = encode(suite, "session step", session, step, lower, higher)
    block = HKDFExpand(SHA256(), KEY_BYTES * fields, info).derive(chain)
    return tuple(block[at : at + KEY_BYTES] for at in range(0, len(block), KEY_BYTES))


def seed_commitment(suite: Suite, sctx: bytes, party: int, seed: bytes) -> bytes:
    """B: to the seed of a party's self-mask."""
    return digest(suite, "session b", sctx, party, seed)


def recovery_commitment(suite: Suite, sctx: bytes, party: int, key: bytes) -> bytes:
    """K: to what opens a party's pair seeds of this step, should it drop out."""
    return digest(suite, "session k", sctx, party, key)


def pair_commitment(suite: Suite, sctx: bytes, me: int, peer: int, seed: bytes) -> bytes:
    """P: to the seed of a pair's mask, the same at both ends."""
    return digest(suite, "session pair", sctx, *ends(me, peer), seed)


def share_commitment(suite: Suite, tag: str, sctx: bytes, dealer: int, holder: int, share: bytes) -> bytes:
    """To one share; `tag` is `session bs` for one of the self-mask's seed, `session ks` for one of k."""
    return digest(suite, tag, sctx, dealer, holder, share)


def share_commitments(suite: Suite, sctx: bytes, dealer: int, holder: int, share: bytes) -> bytes:
    """C: to a holder's two shares."""
    half = len(share) // 2
    return share_commitment(suite, "session bs", sctx, dealer, holder, share[:half]) + share_commitment(
        suite, "session ks", sctx, dealer, holder, share[half:]
    )


def box_nonce(commitments: bytes) -> bytes:
    """Of the box with the shares committed to: as fresh as they are, whatever becomes of a site's memory."""
    return commitments[:NONCE_BYTES]


def box_aad(suite: Suite, sctx: bytes, sender: int, receiver: int, x: int, commitments: bytes) -> bytes:
    """What a box of shares is bound to; `x` is that of the receiver's shares."""
    return encode(suite, "session box", sctx, sender, receiver, x, commitments)


def recovery_key(suite: Suite, sctx: bytes, party: int, key: bytes) -> OneTimeKey:
    """Of the box with a party's pair seeds."""
    return OneTimeKey(kdf(key, sctx, suite, "session recovery", party))


def recovery_aad(suite: Suite, sctx: bytes, party: int) -> bytes:
    return encode(suite, "session recovery", sctx, party)


def self_mask(suite: Suite, r1: bytes, party: int, seed: bytes) -> bytes:
    """Key of the mask that only a party's own seed opens."""
    return kdf(seed, r1, suite, "session selfmask", party)


def pair_mask(suite: Suite, r1: bytes, me: int, peer: int, seed: bytes) -> bytes:
    """Key of the mask of two parties: of this step's seed, in this roll."""
    return kdf(seed, r1, suite, "session pairmask", *ends(me, peer))


def confirmation(suite: Suite, key: bytes, r1: bytes, survivors: Survivors) -> bytes:
    """One site's word to another on which survivors it was told of."""
    return hmac.digest(key, encode(suite, "session confirm", r1, pack(survivors.parties)), "sha256")
