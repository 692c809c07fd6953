"""A site's side of an ordinary attempt of one round: five exchanges, each a function of a request.

Pure: what it is told, random bytes, the time and a memory are arguments. An error in a phase ends the
attempt for this site, and every secret of it is forgotten.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import VerificationFailed
from lepton_fl.secagg import masks, shamir
from lepton_fl.secagg.context import Consortium, Context, Floor, History, begin, release
from lepton_fl.secagg.derivation import (
    box_aad,
    box_key,
    mask_sign,
    pair_mask,
    seed_commitment,
    self_mask,
    share_commitments,
    words_digest,
)
from lepton_fl.secagg.errors import SERVER, BadPayload, BadSignature, Phase
from lepton_fl.secagg.exchanges import EncodedUpdate, SiteAttempt, held
from lepton_fl.secagg.fixedpoint import Quantiser
from lepton_fl.secagg.identity import IdentityKey
from lepton_fl.secagg.keys import ChannelKey, MaskKey
from lepton_fl.secagg.messages import (
    NONCE_BYTES,
    SECRET_BYTES,
    Advert,
    Confirm,
    Confirmed,
    Envelope,
    Header,
    MaskedUpdate,
    Parties,
    Post,
    Roll,
    Shares,
    Unmask,
    advert_digest,
    well_formed,
)
from lepton_fl.secagg.session import Session, root


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What a site computed; in clear."""

    vector_L: NDArray[np.float32]
    weight: int = 1

    def encode(self, context: Context, *, random: Callable[[int], bytes] = os.urandom) -> EncodedUpdate:
        """As words, for one attempt.

        Raises:
            BadReply: a coordinate is not finite, or the weight is out of range.
            ValueError: its length is not the context's, or it is weighted and the context is not.
        """
        if len(self.vector_L) != context.coordinates or (self.weight != 1 and not context.weighted):
            raise ValueError(
                f"an update of {len(self.vector_L)} coordinates and weight {self.weight}: the context has "
                f"{context.coordinates}, {'any weight' if context.weighted else 'weight 1'}"
            )
        quantiser: Quantiser = context.quantiser
        words = quantiser.encode(self.vector_L, weight=self.weight, rounding_key=random(masks.KEY_BYTES))
        if context.weighted:
            words = np.concatenate([words, quantiser.weight_limbs(self.weight)])
        return EncodedUpdate(words)


@dataclass(slots=True)
class _Peer:
    """What a neighbour's advert says."""

    key: bytes
    not_after: int
    """Of its certificate."""
    channel: bytes
    mask: bytes
    holders: Parties


class SiteRound(SiteAttempt):
    """A site in an ordinary attempt: `advertise`, `share`, `mask`, `confirm`, `unmask`, in this order."""

    _order = tuple(Phase)

    def __init__(
        self,
        context: Context,
        update: EncodedUpdate,
        *,
        identity: IdentityKey,
        certificate: bytes,
        party: int,
        consortium: Consortium,
        history: History,
        floor: Floor | None = None,
        sessions: bool = False,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """`certificate` is that of `identity` for `party`, as signed. Takes the update over.

        With `sessions`, what later rounds can resume is kept: `session`.

        Raises:
            PolicyViolation: the context is below the floor.
            ValueError: the update is not of the context's length, the party not of its cohort, or the
                roster at hand not its.
        """
        super().__init__(context, update, party=party, history=history, floor=floor, random=random)
        if consortium.roster.version != context.roster:
            raise ValueError(
                f"the context is of roster {context.roster}, at hand is {consortium.roster.version}"
            )
        self.session: Session | None = None
        """After the release, on a complete graph, where all survivors' shares were good."""
        self._graph = context.cohort.graph
        self._sessions = sessions and self._graph.complete
        self._identity = identity
        self._certificate = certificate
        self._consortium = consortium
        # Secrets of the attempt.
        self._channel_key: ChannelKey | None = None
        self._mask_key: MaskKey | None = None
        self._sent: dict[int, bytes] = {}
        """Channel secrets of this site's envelopes, until those of the others' are there."""
        self._roots: dict[int, bytes] = {}
        # Public.
        self._peers: dict[int, _Peer] = {}
        self._active: Parties = ()
        """U2 as this site sees it, itself among them."""
        self._bad: Parties = ()

    def share(self, request: bytes, now: datetime) -> bytes:
        """Check who takes part (a `Roll`), and deal this site's secrets to its holders: `Shares`.

        Raises:
            Equivocation: the roll is not true of this site, or an advert is of another context.
            BadCertificate, BadSignature, BadPayload: an advert is not what it should be.
            TooFewParticipants: fewer parties than the quorum.
        """
        return self._answer(Phase.SHARE, request, lambda: self._share(request, now))

    def forget(self) -> None:
        super().forget()
        self._channel_key = self._mask_key = None
        self._sent, self._roots = {}, {}

    def _advertise(self) -> bytes:
        begin(self.context, self._history)
        self._channel_key = ChannelKey(self._random(SECRET_BYTES), self._suite)
        self._mask_key = MaskKey(self._random(SECRET_BYTES), self._suite)
        self._advert = Advert.sign(
            self._suite,
            self._identity,
            certificate=self._certificate,
            context=self.context.digest,
            channel=self._channel_key.public,
            mask=self._mask_key.public,
            nonce=self._random(NONCE_BYTES),
        ).encode(self._suite)
        return self._advert

    def _share(self, request: bytes, now: datetime) -> bytes:
        phase, suite, me = Phase.SHARE, self._suite, self.party
        roll = well_formed(Roll.decode, suite, request, phase, SERVER)
        self._check_roll(roll.parties, roll.digests, advert_digest(suite, self._advert))
        self._read_adverts(roll, now)
        self._roll = roll.parties
        self._r1 = r1 = roll.transcript(suite, self.context.digest)

        channel_key, mask_key = held(self._channel_key), held(self._mask_key)
        self._seed = self._random(SECRET_BYTES)
        holders = self._peers[me].holders
        dealt = shamir.deal(
            self._seed + mask_key.seed,
            threshold=self._graph.threshold,
            xs=range(1, len(holders) + 1),
            random=self._random,
        )
        share_of = dict(zip(holders, dealt, strict=True))
        self._shares[me] = share_of[me]
        seed = seed_commitment(suite, r1, me, self._seed)
        envelopes = []
        for peer_id, peer in self._neighbours():
            share = share_of.get(peer_id, b"")
            try:
                secret, channel_offer = channel_key.offer(peer.channel)
                mask_offer = mask_key.offer(peer.mask, r1, me, peer_id) if me < peer_id else b""
            except VerificationFailed as error:
                raise BadPayload(error.message, phase=phase, culprit=peer_id) from None
            if self._sessions:
                self._sent[peer_id] = secret
            x = 1 + holders.index(peer_id) if share else 0
            envelopes.append(
                Envelope.sign(
                    suite,
                    self._identity,
                    r1,
                    (me, peer_id),
                    seed,
                    box=box_key(suite, secret, r1, me, peer_id).seal(
                        share, box_aad(suite, r1, me, peer_id, x)
                    ),
                    commitments=share_commitments(suite, r1, me, peer_id, share),
                    channel_offer=channel_offer,
                    mask_offer=mask_offer,
                )
            )
        return Shares(
            seed=seed,
            own=share_commitments(suite, r1, me, me, share_of[me]),
            envelopes=tuple(envelopes),
        ).encode(suite)

    def _read_adverts(self, roll: Roll, now: datetime) -> None:
        """The peers: this site, whom it drew, and who drew it."""
        phase, suite, me = Phase.SHARE, self._suite, self.party
        digests = dict(zip(roll.parties, roll.digests, strict=True))
        keys: list[bytes] = []
        for encoded in roll.adverts:
            advert = well_formed(Advert.decode, suite, encoded, phase, SERVER)
            certificate = self._consortium.certificate(advert.certificate, phase=phase, now=now)
            party = certificate.party
            if self._peers and party <= max(self._peers):
                raise self._equivocation("adverts are not in ascending order, each party once")
            if digests.get(party) != advert_digest(suite, encoded):
                raise self._equivocation(f"the roll has another advert of party {party}, or none")
            if advert.context != self.context.digest:
                raise self._equivocation(f"party {party} was told of another round, model or study")
            try:
                advert.verify(suite, certificate.key)
            except VerificationFailed as error:
                raise BadSignature(error.message, phase=phase, culprit=party) from None
            holders = self._graph.holders(party, advert.nonce, self.context.digest, suite)
            self._peers[party] = _Peer(
                certificate.key, certificate.not_after, advert.channel, advert.mask, holders
            )
            keys += [advert.channel, advert.mask]
        if len(set(keys)) < len(keys):
            raise self._equivocation("two keys are the same")
        if me not in self._peers:
            raise self._equivocation("the adverts are without this site's")
        mine = self._peers[me].holders
        if not set(mine) & set(roll.parties) <= set(self._peers):
            raise self._equivocation("the advert of a party that holds this site's shares is kept back")
        if any(me not in peer.holders and party not in mine for party, peer in self._peers.items()):
            raise self._equivocation("an advert is of a party that is no neighbour")

    def _mask(self, request: bytes) -> MaskedUpdate:
        phase, suite, me, r1 = Phase.MASK, self._suite, self.party, self._r1
        post = well_formed(Post.decode, suite, request, phase, SERVER)
        if me in post.senders or not set(post.senders) <= set(self._peers):
            raise self._equivocation("an envelope is of a party that is no neighbour")
        self._active = tuple(sorted([*post.senders, me]))
        holding = len(set(self._active) & set(self._peers[me].holders))
        needed = self.context.cohort.quorum if self._graph.complete else self._graph.threshold
        if holding < needed:
            raise self._too_few("sites with shares", holding, needed)
        mask_key = held(self._mask_key)
        bad: list[int] = []
        keys = [(1, self_mask(suite, r1, me, self._seed))]
        for sender, seed, envelope in zip(post.senders, post.seeds, post.envelopes, strict=True):
            peer = self._peers[sender]
            try:
                envelope.verify(suite, peer.key, r1, (sender, me), seed)
            except VerificationFailed as error:
                raise BadSignature(error.message, phase=phase, culprit=sender) from None
            try:
                key = pair_mask(suite, r1, mask_key, me, sender, peer.mask, envelope.mask_offer)
            except VerificationFailed as error:
                # Without it there is no mask with this sender, and the server says that it takes part.
                raise BadPayload(error.message, phase=phase, culprit=sender) from None
            keys.append((mask_sign(me, sender), key))
            try:
                self._open(sender, peer, envelope)
            except VerificationFailed:
                bad.append(sender)
        self._bad = tuple(bad)
        words = self._words()
        masks.apply(words, keys)
        header = Header.sign(
            suite,
            self._identity,
            r1,
            me,
            len(words),
            digest=words_digest(words),
            bad=self._bad,
        )
        # Envelopes and masks are made: neither key has any further use at its own site.
        self._channel_key = self._mask_key = None
        self._seed, self._sent = b"", {}
        return MaskedUpdate(header.encode(suite), words)

    def _open(self, sender: int, peer: _Peer, envelope: Envelope) -> None:
        """Keep the shares in an envelope, if they are those committed to."""
        suite, me, r1 = self._suite, self.party, self._r1
        x = 1 + peer.holders.index(me) if me in peer.holders else 0
        secret = held(self._channel_key).accept(peer.channel, envelope.channel_offer)
        key = box_key(suite, secret, r1, sender, me)
        share = key.open(envelope.box, box_aad(suite, r1, sender, me, x))
        if share_commitments(suite, r1, sender, me, share) != envelope.commitments or bool(share) != bool(x):
            raise VerificationFailed("shares are not those committed to")
        if x:
            self._shares[sender] = share
        if self._sessions:
            sent = self._sent[sender]
            self._roots[sender] = root(suite, r1, me, sender, sent=sent, received=secret)

    def _confirm(self, request: bytes) -> bytes:
        survivors = self._read_survivors(request)
        # Or a server could withhold envelopes, cut the graph of masks into islands and read each one's sum.
        if not set(survivors.parties) & set(self._peers) <= set(self._active):
            raise self._equivocation("a neighbour that sent no envelope is said to survive")
        self._survivors = survivors
        return Confirm.sign(self._suite, self._identity, self._r1, survivors).encode(self._suite)

    def _unmask(self, request: bytes) -> bytes:
        phase, suite = Phase.UNMASK, self._suite
        confirmed = well_formed(Confirmed.decode, suite, request, phase, SERVER)
        witnesses = set(self._peers[self.party].holders) & set(self._survivors.parties)
        if not set(confirmed.parties) <= witnesses:
            raise self._equivocation("a confirmation is of a party that cannot give one to this site")
        if len(confirmed.parties) < self._graph.threshold:
            raise self._too_few("confirmations", len(confirmed.parties), self._graph.threshold)
        for party, confirm in zip(confirmed.parties, confirmed.confirms, strict=True):
            try:
                confirm.verify(suite, self._peers[party].key, self._r1, self._survivors)
            except VerificationFailed:
                raise BadSignature(
                    f"party {party} has not confirmed the survivors that this site was told of",
                    phase=phase,
                    culprit=SERVER,
                ) from None
        shares = self._to_release(SECRET_BYTES)
        reply = Unmask.sign(suite, self._identity, self._r1, self.party, self._survivors, shares)
        session = self._resumable()
        # Released before it leaves: the other order could let a crash have an update added twice.
        release(self.context, self._history)
        self.forget()
        self.session = session
        return reply.encode(suite)

    def _resumable(self) -> Session | None:
        """What is kept of this attempt: a root with every other survivor, or nothing."""
        members = self._survivors.parties
        roots = {peer: self._roots[peer] for peer in members if peer in self._roots}
        if len(roots) < len(members) - 1:
            return None
        expires = min(self._peers[member].not_after for member in members)
        return Session(self.context, self._r1, self.party, members=members, roots=roots, expires=expires)

    def _neighbours(self) -> list[tuple[int, _Peer]]:
        return [(party, peer) for party, peer in sorted(self._peers.items()) if party != self.party]
