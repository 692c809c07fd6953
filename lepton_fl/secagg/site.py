"""A site's side of one attempt of one round: five exchanges, each a function from a request to a reply.

Pure: what it is told, random bytes, the time and a memory are arguments. An error in a phase ends the
attempt for this site, and every secret of it is forgotten.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

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
from lepton_fl.secagg.errors import (
    SERVER,
    BadPayload,
    BadPhase,
    BadSignature,
    Equivocation,
    Phase,
    SecaggError,
    TooFewParticipants,
)
from lepton_fl.secagg.fixedpoint import Quantiser
from lepton_fl.secagg.identity import IdentityKey
from lepton_fl.secagg.keys import ChannelKey, MaskKey
from lepton_fl.secagg.masks import Words
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
    Survivors,
    Unmask,
    advert_digest,
    well_formed,
)

Reply = TypeVar("Reply")


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


class EncodedUpdate:
    """An update as words mod 2^32: still in clear, without a wire form. It can be masked once."""

    __slots__ = ("_words", "length")

    def __init__(self, words: Words) -> None:
        self._words: Words | None = words
        self.length = len(words)

    def take(self) -> Words:
        """The words, which are the taker's from now on.

        Raises:
            RuntimeError: they were taken before: an update is masked once.
        """
        words, self._words = self._words, None
        if words is None:
            raise RuntimeError("an encoded update is masked a second time")
        return words


@dataclass(slots=True)
class _Peer:
    """What a neighbour's advert says."""

    key: bytes
    channel: bytes
    mask: bytes
    holders: Parties


class SiteRound:
    """A site in one attempt of one round.

    `advertise`, `share`, `mask`, `confirm`, `unmask`, in this order. The same request again is answered with
    the same reply; another one in an answered phase is `BadPhase`.

    Guarantee, against the server and `colluders` of the other sites together: what this returns tells them
    the sum over at least `quorum` sites, this one's update in it, and nothing else about this site's update;
    at most one such sum a round. Between the first and last phases nobody but this object can open the mask.

    Raises (all methods): a SecaggError. After one in a phase that was due, the attempt is over.
    """

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
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """`certificate` is that of `identity` for `party`, as signed. Takes the update over.

        Raises:
            PolicyViolation: the context is below the floor.
            ValueError: the update is not of the context's length, the party not of its cohort, or the
                roster at hand not its.
        """
        (floor or Floor()).check(context)
        if update.length != context.words or party not in context.cohort.parties:
            raise ValueError(f"party {party}, {update.length} words: not of this context")
        if consortium.roster.version != context.roster:
            raise ValueError(
                f"the context is of roster {context.roster}, at hand is {consortium.roster.version}"
            )
        self.context = context
        self.party = party
        self.phase = Phase.ADVERTISE
        self._suite = context.suite
        self._graph = context.cohort.graph
        self._identity = identity
        self._certificate = certificate
        self._consortium = consortium
        self._history = history
        self._random = random
        self._answered: dict[Phase, tuple[bytes, object]] = {}
        self._update: EncodedUpdate | None = update
        # Secrets of the attempt, each there from the phase that makes it to `forget`.
        self._channel_key: ChannelKey | None = None
        self._mask_key: MaskKey | None = None
        self._seed = b""
        self._shares: dict[int, bytes] = {}
        """By dealer, both shares of each."""
        # Public.
        self._advert = b""
        self._peers: dict[int, _Peer] = {}
        self._roll: Parties = ()
        self._r1 = b""
        self._active: Parties = ()
        """U2 as this site sees it, itself among them."""
        self._bad: Parties = ()
        self._survivors = Survivors(())

    def advertise(self) -> bytes:
        """Enter the attempt: an `Advert`. The update is final from here on, and remembered as one attempt.

        Raises:
            BadPhase: the site has released in this round, or saw this attempt or a later one.
            Equivocation: an earlier attempt was of another cohort.
        """
        return self._answer(Phase.ADVERTISE, b"", self._advertise)

    def share(self, request: bytes, now: datetime) -> bytes:
        """Check who takes part (a `Roll`), and deal this site's secrets to its holders: `Shares`.

        Raises:
            Equivocation: the roll is not true of this site, or an advert is of another context.
            BadCertificate, BadSignature, BadPayload: an advert is not what it should be.
            TooFewParticipants: fewer parties than the quorum.
        """
        return self._answer(Phase.SHARE, request, lambda: self._share(request, now))

    def mask(self, request: bytes) -> MaskedUpdate:
        """Check the envelopes of the others (a `Post`) and mask the update, in place.

        Raises:
            Equivocation, BadSignature, BadPayload: an envelope is not for this site, or not its sender's.
            TooFewParticipants: fewer than the threshold hold this site's shares.
        """
        return self._answer(Phase.MASK, request, lambda: self._mask(request))

    def confirm(self, request: bytes) -> bytes:
        """Sign, once, which survivors this site was told of (`Survivors`): `Confirm`.

        Raises:
            Equivocation: they cannot be the survivors; each must have masked with all of its neighbours.
            TooFewParticipants: fewer than the quorum.
        """
        return self._answer(Phase.CONFIRM, request, lambda: self._confirm(request))

    def unmask(self, request: bytes) -> bytes:
        """With enough confirmations of the same survivors (`Confirmed`), release the shares: `Unmask`.

        The history has it as released, on disk, before this returns; and every secret is forgotten.

        Raises:
            BadSignature: a confirmation is forged, or is of other survivors.
            TooFewParticipants: fewer confirmations than the threshold.
        """
        return self._answer(Phase.UNMASK, request, lambda: self._unmask(request))

    def forget(self) -> None:
        """Drop every secret and the update; the attempt is over for this site. Safe at any time."""
        self.phase = Phase.OVER
        self._update = self._channel_key = self._mask_key = None
        self._seed = b""
        self._shares = {}
        self._answered.pop(Phase.MASK, None)

    def _answer(self, phase: Phase, request: bytes, reply: Callable[[], Reply]) -> Reply:
        digest = hashlib.sha256(request).digest()
        if phase in self._answered:
            seen, answer = self._answered[phase]
            if seen != digest:
                raise BadPhase("another request in a phase that was answered", phase=phase, culprit=SERVER)
            return answer  # type: ignore[return-value]
        if phase is not self.phase:
            raise BadPhase(f"this site is in phase {self.phase}", phase=phase, culprit=SERVER)
        # On before anything leaves, and over unless all goes well: no error leaves a phase to be tried again.
        self.phase = Phase.OVER
        try:
            made = reply()
        except BaseException:
            self.forget()
            raise
        self._answered[phase] = digest, made
        following = list(Phase)
        self.phase = following[following.index(phase) + 1]
        return made

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
        self._check_roll(roll)
        self._read_adverts(roll, now)
        self._roll = roll.parties
        self._r1 = r1 = roll.transcript(suite, self.context.digest)

        channel_key, mask_key = _held(self._channel_key), _held(self._mask_key)
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

    def _check_roll(self, roll: Roll) -> None:
        cohort = self.context.cohort
        if not set(roll.parties) <= set(cohort.parties):
            raise self._equivocation("the roll has a party that is not of the cohort")
        if self.party not in roll.parties:
            raise self._equivocation("the roll is without this site")
        own = roll.digests[roll.parties.index(self.party)]
        if own != advert_digest(self._suite, self._advert):
            raise self._equivocation("the roll has another advert of this site")
        if len(roll.parties) < cohort.quorum:
            raise self._too_few("adverts", len(roll.parties), cohort.quorum)

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
            self._peers[party] = _Peer(certificate.key, advert.channel, advert.mask, holders)
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
        mask_key = _held(self._mask_key)
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
        words = _held(self._update).take()
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
        self._channel_key = self._mask_key = self._update = None
        self._seed = b""
        return MaskedUpdate(header.encode(suite), words)

    def _open(self, sender: int, peer: _Peer, envelope: Envelope) -> None:
        """Keep the shares in an envelope, if they are those committed to."""
        suite, me, r1 = self._suite, self.party, self._r1
        x = 1 + peer.holders.index(me) if me in peer.holders else 0
        secret = _held(self._channel_key).accept(peer.channel, envelope.channel_offer)
        key = box_key(suite, secret, r1, sender, me)
        share = key.open(envelope.box, box_aad(suite, r1, sender, me, x))
        if share_commitments(suite, r1, sender, me, share) != envelope.commitments or bool(share) != bool(x):
            raise VerificationFailed("shares are not those committed to")
        if x:
            self._shares[sender] = share

    def _confirm(self, request: bytes) -> bytes:
        phase, suite, cohort = Phase.CONFIRM, self._suite, self.context.cohort
        survivors = well_formed(Survivors.decode, suite, request, phase, SERVER)
        alive = set(survivors.parties)
        if self.party not in alive or not alive <= set(self._roll):
            raise self._equivocation("the survivors are without this site, or not all of the roll")
        # Or a server could withhold envelopes, cut the graph of masks into islands and read each one's sum.
        if not alive & set(self._peers) <= set(self._active):
            raise self._equivocation("a neighbour that sent no envelope is said to survive")
        if len(alive) < cohort.quorum:
            raise self._too_few("survivors", len(alive), cohort.quorum)
        self._survivors = survivors
        return Confirm.sign(suite, self._identity, self._r1, survivors).encode(suite)

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
        alive = set(self._survivors.parties)
        shares = [
            share[:SECRET_BYTES] if dealer in alive else share[SECRET_BYTES:]
            for dealer, share in sorted(self._shares.items())
        ]
        reply = Unmask.sign(suite, self._identity, self._r1, self.party, self._survivors, shares)
        # Released before it leaves: the other order could let a crash have an update added twice.
        release(self.context, self._history)
        self.forget()
        return reply.encode(suite)

    def _neighbours(self) -> list[tuple[int, _Peer]]:
        return [(party, peer) for party, peer in sorted(self._peers.items()) if party != self.party]

    def _equivocation(self, message: str) -> SecaggError:
        return Equivocation(message, phase=self._current, culprit=SERVER)

    def _too_few(self, what: str, found: int, needed: int) -> SecaggError:
        return TooFewParticipants(f"{found} {what}, at least {needed} are needed", phase=self._current)

    @property
    def _current(self) -> Phase:
        """The phase that is being answered: the one after the last that was."""
        return list(Phase)[len(self._answered)]


def _held(secret: Reply | None) -> Reply:
    if secret is None:
        raise RuntimeError("a secret of the round is used after it was dropped")
    return secret
