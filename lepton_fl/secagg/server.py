"""The server's side of an ordinary attempt: what sites send goes in, requests and the sum come out.

Pure, as the sites' side. A reply that is not what it should be raises, naming its sender, and changes
nothing: the caller notes who it was and goes on without that site.
"""

from __future__ import annotations

import hmac
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVarTuple, Unpack

import numpy as np

from lepton_fl.errors import VerificationFailed
from lepton_fl.secagg.context import DIGEST_BYTES, Consortium, Context
from lepton_fl.secagg.derivation import (
    mask_sign,
    pair_mask,
    seed_commitment,
    self_mask,
    share_commitment,
)
from lepton_fl.secagg.errors import (
    BadPayload,
    BadPhase,
    BadSignature,
    Phase,
)
from lepton_fl.secagg.exchanges import ServerAttempt, Sum
from lepton_fl.secagg.keys import SEED_BYTES, ChannelKey, MaskKey, Suite
from lepton_fl.secagg.masks import Words
from lepton_fl.secagg.messages import (
    Advert,
    Confirm,
    Confirmed,
    Envelope,
    Header,
    Parties,
    Post,
    Roll,
    Shares,
    Unmask,
    advert_digest,
    well_formed,
)
from lepton_fl.secagg.session import ServerSession

Expected = TypeVarTuple("Expected")

_PROBES = {suite: ChannelKey(bytes(SEED_BYTES), suite) for suite in Suite}
"""No secret: with any key at all a point of low order gives zero, and a malformed key an error."""


@dataclass(slots=True, kw_only=True)
class _Party:
    """What the server has of a party; each phase adds to it."""

    key: bytes
    advert: Advert
    encoded: bytes
    holders: Parties
    neighbours: Parties = ()
    """In the roll, itself left out."""
    shares: Shares | None = None
    envelopes: Mapping[int, Envelope] = field(default_factory=dict)
    bad: Parties = ()
    confirm: Confirm | None = None


class ServerRound(ServerAttempt):
    """A server in an ordinary attempt.

    `advertised` and `share_requests`, `shared` and `mask_requests`, `masked` and `confirm_requests`,
    `confirmed` and `unmask_requests`, `unmasked` and `result`.

    Who cheats is named where a signature shows it.
    """

    _order = tuple(Phase)

    def __init__(self, context: Context, consortium: Consortium) -> None:
        super().__init__(context)
        self._graph = context.cohort.graph
        self._consortium = consortium
        self._parties: dict[int, _Party] = {}
        self._keys: set[bytes] = set()
        self._sharers: Parties = ()
        """U2."""

    # Advertise

    def advertised(self, party: int, reply: bytes, now: datetime) -> None:
        """An `Advert` has come from this party."""
        phase = Phase.ADVERTISE
        if self._seen(phase, party, reply):
            return
        advert = well_formed(Advert.decode, self._suite, reply, phase, party)
        certificate = self._consortium.certificate(advert.certificate, phase=phase, now=now)
        if certificate.party != party or party not in self.context.cohort.parties:
            raise BadPayload(
                "an advert of another party, or of none of the cohort", phase=phase, culprit=party
            )
        if advert.context != self.context.digest:
            raise BadPayload("an advert of another context", phase=phase, culprit=party)
        self._signed(party, advert.verify, self._suite, certificate.key)
        keys = {advert.channel, advert.mask}
        for key in keys:
            # Passed on, it would end the attempt for every honest site.
            try:
                _PROBES[self._suite].offer(key)
            except VerificationFailed as error:
                raise BadPayload(error.message, phase=phase, culprit=party) from None
        if len(keys) < 2 or keys & self._keys:
            raise BadPayload("a key that is another's already", phase=phase, culprit=party)
        holders = self._graph.holders(party, advert.nonce, self.context.digest, self._suite)
        self._keys |= keys
        self._parties[party] = _Party(key=certificate.key, advert=advert, encoded=reply, holders=holders)
        self._replies[phase, party] = reply

    def share_requests(self) -> dict[int, bytes]:
        """No more adverts: U1 is fixed. A `Roll` for each of its parties."""
        parties = tuple(sorted(self._parties))
        self._next(Phase.ADVERTISE, len(parties), "adverts")
        present = set(parties)
        neighbours: dict[int, set[int]] = {party: set() for party in parties}
        for party in parties:
            for holder in present.intersection(self._parties[party].holders) - {party}:
                neighbours[party].add(holder)
                neighbours[holder].add(party)
        digests = tuple(advert_digest(self._suite, self._parties[party].encoded) for party in parties)
        requests = {}
        for party in parties:
            self._parties[party].neighbours = tuple(sorted(neighbours[party]))
            dealt_with = sorted([party, *neighbours[party]])
            adverts = tuple(self._parties[other].encoded for other in dealt_with)
            roll = Roll(parties=parties, digests=digests, adverts=adverts)
            requests[party] = roll.encode(self._suite)
            self._r1 = self._r1 or roll.transcript(self._suite, self.context.digest)
        return requests

    # Share

    def shared(self, party: int, reply: bytes) -> None:
        """`Shares` have come from this party."""
        if self._seen(Phase.SHARE, party, reply):
            return
        suite, state = self._suite, self._known(party)
        shares = well_formed(Shares.decode, suite, reply, Phase.SHARE, party)
        if len(shares.envelopes) != len(state.neighbours):
            raise BadPayload("not one envelope for each neighbour", phase=Phase.SHARE, culprit=party)
        envelopes = dict(zip(state.neighbours, shares.envelopes, strict=True))
        for receiver, envelope in envelopes.items():
            self._signed(party, envelope.verify, suite, state.key, self._r1, (party, receiver), shares.seed)
            if bool(envelope.commitments) != (receiver in state.holders):
                raise BadPayload(
                    "shares for who holds none, or none for who does", phase=Phase.SHARE, culprit=party
                )
        state.shares, state.envelopes = shares, envelopes
        self._replies[Phase.SHARE, party] = reply

    def mask_requests(self) -> dict[int, bytes]:
        """No more shares: U2 is fixed. A `Post` for each of its parties."""
        self._sharers = tuple(sorted(party for party, state in self._parties.items() if state.shares))
        self._next(Phase.SHARE, len(self._sharers), "sites with shares")
        return {party: self._post(party).encode(self._suite) for party in self._sharers}

    def _post(self, receiver: int) -> Post:
        senders = tuple(p for p in self._parties[receiver].neighbours if self._parties[p].shares)
        return Post(
            senders=senders,
            seeds=tuple(_there(self._parties[p].shares).seed for p in senders),
            envelopes=tuple(self._parties[p].envelopes[receiver] for p in senders),
        )

    # Mask

    def masked(self, party: int, header: bytes, words: Words) -> None:
        """A whole masked vector has come from this party; it is added to the total, and not kept."""
        if self._seen(Phase.MASK, party, header):
            return
        state = self._known(party)
        if state.shares is None:
            raise BadPhase("a masked vector without shares before", phase=Phase.MASK, culprit=party)
        read = well_formed(Header.decode, self._suite, header, Phase.MASK, party)
        self._check_length(party, words)
        self._signed(party, read.verify, self._suite, state.key, self._r1, party, len(words))
        self._check_digest(party, words, read.digest)
        if not set(read.bad) <= set(self._post(party).senders):
            raise BadPayload("it accuses who sent it nothing", phase=Phase.MASK, culprit=party)
        np.add(self._total, words, out=self._total)
        state.bad = read.bad
        self._replies[Phase.MASK, party] = header

    def confirm_requests(self) -> dict[int, bytes]:
        """No more vectors: U3 is fixed. `Survivors` for each of them."""
        return self._survived(self._sharers)

    # Confirm

    def confirmed(self, party: int, reply: bytes) -> None:
        """A `Confirm` has come from this party."""
        if self._seen(Phase.CONFIRM, party, reply):
            return
        state = self._survivor(Phase.CONFIRM, party)
        confirm = well_formed(Confirm.decode, self._suite, reply, Phase.CONFIRM, party)
        self._signed(party, confirm.verify, self._suite, state.key, self._r1, self._survivors)
        state.confirm = confirm
        self._replies[Phase.CONFIRM, party] = reply

    def unmask_requests(self) -> dict[int, bytes]:
        """No more confirmations: `Confirmed` for each survivor whose holders gave enough of them."""
        confirmed = {p: state.confirm for p, state in self._parties.items() if state.confirm is not None}
        requests = {}
        for party in confirmed:
            witnesses = tuple(p for p in self._parties[party].holders if p in confirmed)
            if len(witnesses) >= self._graph.threshold:
                confirms = tuple(confirmed[p] for p in witnesses)
                requests[party] = Confirmed(parties=witnesses, confirms=confirms).encode(self._suite)
        self._next(
            Phase.CONFIRM, len(requests), "sites with enough confirmations", self.context.cohort.threshold
        )
        return requests

    # Unmask

    def unmasked(self, party: int, reply: bytes) -> None:
        """An `Unmask` has come from this party.

        Raises:
            BadShare: one of its shares is not the one that its dealer committed to. The others count.
        """
        if self._seen(Phase.UNMASK, party, reply):
            return
        suite, state = self._suite, self._survivor(Phase.UNMASK, party)
        unmask = well_formed(Unmask.decode, suite, reply, Phase.UNMASK, party)
        held = [d for d in sorted([party, *state.neighbours]) if self._deals(d, party) and d not in state.bad]
        if len(unmask.shares) != len(held):
            raise BadPayload(
                f"{len(unmask.shares)} shares, not {len(held)}", phase=Phase.UNMASK, culprit=party
            )
        self._signed(party, unmask.verify, suite, state.key, self._r1, party, self._survivors)
        self._replies[Phase.UNMASK, party] = reply

        def good(dealer: int, share: bytes) -> bool:
            tag, committed = self._committed(dealer, party)
            found = share_commitment(suite, tag, self._r1, dealer, party, share)
            return hmac.compare_digest(found, committed)

        self._keep(party, held, unmask.shares, good)

    def _deals(self, dealer: int, holder: int) -> bool:
        state = self._parties[dealer]
        return state.shares is not None and holder in state.holders

    def _committed(self, dealer: int, holder: int) -> tuple[str, bytes]:
        """Which of a holder's two shares is opened, and its dealer's commitment to it."""
        state = self._parties[dealer]
        own = _there(state.shares).own
        commitments = own if dealer == holder else state.envelopes[holder].commitments
        if dealer in self._alive:
            return "bs", commitments[:DIGEST_BYTES]
        return "ms", commitments[DIGEST_BYTES:]

    def result(self, *, threads: int = 1) -> Sum:
        """Remove the masks and read the sum.

        Raises:
            TooFewParticipants: some secret has fewer shares than the threshold.
            BadShare: a dealer's shares rebuild another secret than the one it committed to, or so many of
                its holders found theirs bad that it cannot be rebuilt.
            BadPayload: a party's offer for a pair's mask is not one (LSA1-PQ).
            SumOutOfRange: somebody uploaded what is no encoded update.
        """
        self._due(Phase.UNMASK)
        self.phase = Phase.OVER
        return self._read_sum(self._remaining(), self._accused(), threads)

    def session(self) -> ServerSession | None:
        """After the sum: what the sites that released can resume, where they can."""
        if not self._graph.complete or self._accused():
            return None
        return ServerSession(self.context, self._r1, self._survivors.parties, self.released)

    def _remaining(self) -> list[tuple[int, bytes]]:
        """Keys of the masks in the total, with the signs that take them out."""
        suite, r1, alive = self._suite, self._r1, self._alive
        keys = []
        for dealer in self._sharers:
            state = self._parties[dealer]
            secret = self._rebuild(
                dealer, state.holders, self._graph.threshold, self._accused().get(dealer, ())
            )
            if dealer in alive:
                found = seed_commitment(suite, r1, dealer, secret)
                self._rebuilt(dealer, found, _there(state.shares).seed)
                keys.append((-1, self_mask(suite, r1, dealer, secret)))
                continue
            key = MaskKey(secret, suite)
            self._rebuilt(dealer, key.public, state.advert.mask)
            for peer in sorted(alive.intersection(state.neighbours)):
                # The lower of the two made the offer.
                lower, higher = min(dealer, peer), max(dealer, peer)
                offer = self._parties[lower].envelopes[higher].mask_offer
                public = self._parties[peer].advert.mask
                try:
                    mask = pair_mask(suite, r1, key, dealer, peer, public, offer)
                except VerificationFailed as error:
                    raise BadPayload(error.message, phase=Phase.UNMASK, culprit=lower) from None
                keys.append((-mask_sign(peer, dealer), mask))
        return keys

    def _accused(self) -> dict[int, Parties]:
        accused: defaultdict[int, list[int]] = defaultdict(list)
        for party in self._survivors.parties:
            for dealer in self._parties[party].bad:
                accused[dealer].append(party)
        return {dealer: tuple(by) for dealer, by in accused.items()}

    def _known(self, party: int) -> _Party:
        if party not in self._parties:
            raise BadPhase("a reply without an advert before", phase=self.phase, culprit=party)
        return self._parties[party]

    def _survivor(self, phase: Phase, party: int) -> _Party:
        self._check_survivor(phase, party)
        return self._parties[party]

    def _signed(self, party: int, verify: Callable[[Unpack[Expected]], None], *expected: *Expected) -> None:
        try:
            verify(*expected)
        except VerificationFailed as error:
            raise BadSignature(error.message, phase=self.phase, culprit=party) from None


def _there(shares: Shares | None) -> Shares:
    if shares is None:
        raise RuntimeError("shares are used of a party that sent none")
    return shares
