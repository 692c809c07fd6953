"""The server's side of a session attempt: what sites send goes in, requests and the sum come out. Pure."""

from __future__ import annotations

import hmac
import itertools
from dataclasses import dataclass

import numpy as np

from lepton_fl.errors import VerificationFailed
from lepton_fl.secagg.context import DIGEST_BYTES, Context
from lepton_fl.secagg.derivation import mask_sign
from lepton_fl.secagg.errors import BadPayload, BadPhase, BadShare, Phase, SessionLost
from lepton_fl.secagg.exchanges import ServerAttempt, Sum
from lepton_fl.secagg.keys import Suite
from lepton_fl.secagg.masks import Words
from lepton_fl.secagg.messages import SECRET_BYTES, Advert, Parties, cut, well_formed
from lepton_fl.secagg.session import (
    pair_commitment,
    pair_mask,
    recovery_aad,
    recovery_commitment,
    recovery_key,
    seed_commitment,
    self_mask,
    session_context,
    share_commitment,
)
from lepton_fl.secagg.session_messages import (
    SessionAdvert,
    SessionConfirm,
    SessionConfirmed,
    SessionHeader,
    SessionRoll,
    SessionUnmask,
    advert_digest,
    transcript,
)


@dataclass(slots=True, kw_only=True)
class _Party:
    """What the server has of a party; the parts of the advert by the other party."""

    advert: SessionAdvert
    encoded: bytes
    pairs: dict[int, bytes]
    commitments: dict[int, bytes]
    boxes: dict[int, bytes]
    macs: dict[int, bytes]


class SessionServerRound(ServerAttempt):
    """A server in a session attempt.

    `advertised` and `mask_requests`, `masked` and `confirm_requests`, `confirmed` and `unmask_requests`,
    `unmasked` and `result`.

    Raises (besides): SessionLost: the session cannot serve the attempt; an ordinary one can follow.
    """

    _order = (Phase.ADVERTISE, Phase.MASK, Phase.CONFIRM, Phase.UNMASK, Phase.OVER)

    def __init__(self, context: Context, session: bytes, step: int) -> None:
        super().__init__(context)
        self.session = session
        self.step = step
        self._sctx = session_context(context, session, step)
        self._parties: dict[int, _Party] = {}
        self._roll: Parties = ()
        """U1."""

    def advertised(self, party: int, reply: bytes) -> None:
        """A `SessionAdvert` has come from this party.

        Raises:
            SessionLost: it is the advert of an ordinary attempt.
        """
        phase, suite, cohort = Phase.ADVERTISE, self._suite, self.context.cohort
        if self._seen(phase, party, reply):
            return
        if party not in cohort.parties:
            raise BadPayload("an advert of none of the cohort", phase=phase, culprit=party)
        try:
            advert = SessionAdvert.decode(suite, reply, cohort.n)
        except VerificationFailed:
            # Its signature is nobody's business: it asks for another attempt, and gives nothing for this one.
            well_formed(Advert.decode, suite, reply, phase, party)
            raise SessionLost(f"party {party} is not in the session", phase=phase) from None
        if not hmac.compare_digest(advert.context, self._sctx):
            raise BadPayload("an advert of another context", phase=phase, culprit=party)
        others = [other for other in cohort.parties if other != party]
        self._parties[party] = _Party(
            advert=advert,
            encoded=reply,
            pairs=dict(zip(others, advert.pairs, strict=True)),
            commitments=dict(zip(cohort.parties, advert.commitments, strict=True)),
            boxes=dict(zip(others, advert.boxes, strict=True)),
            macs={},
        )
        self._replies[phase, party] = reply

    def mask_requests(self) -> dict[int, bytes]:
        """No more adverts: U1 is fixed. A `SessionRoll` for each of its parties.

        Raises:
            SessionLost: two parties have not the same keys. One cheats; who is not to be seen.
        """
        parties, suite = tuple(sorted(self._parties)), self._suite
        self._next(Phase.ADVERTISE, len(parties), "adverts")
        for a, b in itertools.combinations(parties, 2):
            if not hmac.compare_digest(self._parties[a].pairs[b], self._parties[b].pairs[a]):
                raise SessionLost(f"parties {a} and {b} have different keys", phase=Phase.ADVERTISE)
        self._roll = parties
        digests = tuple(advert_digest(suite, self._parties[party].encoded) for party in parties)
        self._r1 = transcript(suite, self._sctx, parties, digests)
        requests = {}
        for party in parties:
            others = [self._parties[other] for other in parties if other != party]
            requests[party] = SessionRoll(
                parties=parties,
                digests=digests,
                commitments=tuple(other.commitments[party] for other in others),
                boxes=tuple(other.boxes[party] for other in others),
            ).encode(suite)
        return requests

    def masked(self, party: int, header: bytes, words: Words) -> None:
        """A whole masked vector has come from this party; it is added to the total, and not kept."""
        if self._seen(Phase.MASK, party, header):
            return
        if party not in self._parties:
            raise BadPhase("a masked vector without an advert before", phase=Phase.MASK, culprit=party)
        read = well_formed(SessionHeader.decode, self._suite, header, Phase.MASK, party)
        self._check_r1(party, read.r1)
        self._check_length(party, words)
        self._check_digest(party, words, read.digest)
        np.add(self._total, words, out=self._total)
        self._replies[Phase.MASK, party] = header

    def confirm_requests(self) -> dict[int, bytes]:
        """No more vectors: U3 is fixed. `Survivors` for each of them."""
        return self._survived(self._roll)

    def confirmed(self, party: int, reply: bytes) -> None:
        """A `SessionConfirm` has come from this party. What it says only its receivers can verify."""
        if self._seen(Phase.CONFIRM, party, reply):
            return
        self._check_survivor(Phase.CONFIRM, party)
        survivors = self._survivors.parties

        def decode(suite: Suite, data: bytes) -> SessionConfirm:
            return SessionConfirm.decode(suite, data, len(survivors))

        confirm = well_formed(decode, self._suite, reply, Phase.CONFIRM, party)
        self._check_r1(party, confirm.r1)
        others = [other for other in survivors if other != party]
        self._parties[party].macs = dict(zip(others, confirm.macs, strict=True))
        self._replies[Phase.CONFIRM, party] = reply

    def unmask_requests(self) -> dict[int, bytes]:
        """No more confirmations: `SessionConfirmed` for each survivor that gave its own."""
        confirmed = [p for p in self._survivors.parties if self._parties[p].macs]
        threshold = self.context.cohort.threshold
        self._next(Phase.CONFIRM, len(confirmed), "sites that confirmed", threshold)
        requests = {}
        for party in confirmed:
            witnesses = tuple(p for p in confirmed if p != party)
            macs = tuple(self._parties[p].macs[party] for p in witnesses)
            requests[party] = SessionConfirmed(parties=witnesses, macs=macs).encode(self._suite)
        return requests

    def unmasked(self, party: int, reply: bytes) -> None:
        """A `SessionUnmask` has come from this party.

        Raises:
            BadShare: one of its shares is not the one that its dealer committed to. The others count.
        """
        if self._seen(Phase.UNMASK, party, reply):
            return
        self._check_survivor(Phase.UNMASK, party)

        def decode(suite: Suite, data: bytes) -> SessionUnmask:
            return SessionUnmask.decode(suite, data, len(self._roll))

        unmask = well_formed(decode, self._suite, reply, Phase.UNMASK, party)
        self._check_r1(party, unmask.r1)
        self._replies[Phase.UNMASK, party] = reply

        def good(dealer: int, share: bytes) -> bool:
            committed = self._parties[dealer].commitments[party]
            tag, committed = (
                ("session bs", committed[:DIGEST_BYTES])
                if dealer in self._alive
                else ("session ks", committed[DIGEST_BYTES:])
            )
            found = share_commitment(self._suite, tag, self._sctx, dealer, party, share)
            return hmac.compare_digest(found, committed)

        self._keep(party, self._roll, unmask.shares, good)

    def result(self, *, threads: int = 1) -> Sum:
        """Remove the masks and read the sum.

        Raises:
            TooFewParticipants: some secret has fewer shares than the threshold.
            BadShare: a dealer's shares rebuild another secret than the one it committed to, or one that does
                not open its pair seeds.
            SumOutOfRange: somebody uploaded what is no encoded update.
        """
        self._due(Phase.UNMASK)
        self.phase = Phase.OVER
        return self._read_sum(self._remaining(), {}, threads)

    def _check_r1(self, party: int, r1: bytes) -> None:
        if not hmac.compare_digest(r1, self._r1):
            raise BadPayload("a reply of another roll", phase=self.phase, culprit=party)

    def _remaining(self) -> list[tuple[int, bytes]]:
        """Keys of the masks in the total, with the signs that take them out."""
        suite, sctx, r1, cohort = self._suite, self._sctx, self._r1, self.context.cohort
        keys = []
        for dealer in self._roll:
            secret = self._rebuild(dealer, cohort.parties, cohort.threshold)
            advert = self._parties[dealer].advert
            if dealer in self._alive:
                self._rebuilt(dealer, seed_commitment(suite, sctx, dealer, secret), advert.seed)
                keys.append((-1, self_mask(suite, r1, dealer, secret)))
                continue
            self._rebuilt(dealer, recovery_commitment(suite, sctx, dealer, secret), advert.key)
            for peer, seed in self._recovered(dealer, secret).items():
                if peer in self._alive:
                    keys.append((-mask_sign(peer, dealer), pair_mask(suite, r1, dealer, peer, seed)))
        return keys

    def _recovered(self, dealer: int, key: bytes) -> dict[int, bytes]:
        """The pair seeds of a party that dropped out; those with survivors are the ones committed to."""
        suite, sctx, pairs = self._suite, self._sctx, self._parties[dealer].pairs
        try:
            box = self._parties[dealer].advert.recovery
            seeds = recovery_key(suite, sctx, dealer, key).open(box, recovery_aad(suite, sctx, dealer))
        except VerificationFailed as error:
            raise BadShare(error.message, phase=Phase.UNMASK, culprit=dealer) from None
        found = dict(zip(pairs, cut(seeds, SECRET_BYTES), strict=True))
        for peer in self._alive.intersection(found):
            self._rebuilt(dealer, pair_commitment(suite, sctx, dealer, peer, found[peer]), pairs[peer])
        return found
