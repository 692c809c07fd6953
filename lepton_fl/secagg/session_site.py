"""A site's side of a session attempt: four exchanges, each a function from a request to a reply. Pure."""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable

from lepton_fl.errors import VerificationFailed
from lepton_fl.secagg import masks, shamir
from lepton_fl.secagg.context import Context, Floor, History, begin, release
from lepton_fl.secagg.derivation import mask_sign, words_digest
from lepton_fl.secagg.errors import SERVER, BadPayload, Phase
from lepton_fl.secagg.exchanges import EncodedUpdate, SiteAttempt
from lepton_fl.secagg.messages import SECRET_BYTES, MaskedUpdate, Parties, well_formed
from lepton_fl.secagg.session import (
    PairKeys,
    Session,
    box_aad,
    box_nonce,
    confirmation,
    pair_commitment,
    pair_mask,
    recovery_aad,
    recovery_commitment,
    recovery_key,
    seed_commitment,
    self_mask,
    session_context,
    share_commitments,
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


class SessionRound(SiteAttempt):
    """A site in a session attempt: `advertise`, `mask`, `confirm`, `unmask`, in this order.

    After an error in a phase that was due the session is over as well as the attempt. An ordinary attempt at
    the round may follow, with the same update.
    """

    _order = (Phase.ADVERTISE, Phase.MASK, Phase.CONFIRM, Phase.UNMASK, Phase.OVER)

    def __init__(
        self,
        context: Context,
        update: EncodedUpdate,
        *,
        session: Session,
        step: int,
        history: History,
        floor: Floor | None = None,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """`session` is one that `serves` this context and step. Takes the update over.

        Raises:
            PolicyViolation: the context is below the floor.
            ValueError: the update is not of the context's length, or the party not of its cohort.
        """
        super().__init__(context, update, party=session.party, history=history, floor=floor, random=random)
        self._session = session
        self._step = step
        self._sctx = session_context(context, session.id, step)
        self._others: Parties = tuple(p for p in context.cohort.parties if p != self.party)
        # Secrets of the step.
        self._pairs: dict[int, PairKeys] = {}
        """Until the mask is made; box keys are gone with their boxes."""
        self._macs: dict[int, tuple[bytes, bytes]] = {}
        """Keys of the confirmations to and from each other party of U1."""

    def forget(self) -> None:
        super().forget()
        self._pairs, self._macs = {}, {}

    def _fail(self) -> None:
        self.forget()
        self._session.end()

    def _advertise(self) -> bytes:
        suite, sctx, me = self._suite, self._sctx, self.party
        begin(self.context, self._history)
        # Past the step before anything of it leaves: no key of it can be made a second time.
        pairs = self._session.enter(self._step, suite)
        self._pairs = {peer: pairs[peer] for peer in self._others}
        self._seed, key = self._random(SECRET_BYTES), self._random(SECRET_BYTES)
        parties = self.context.cohort.parties
        dealt = shamir.deal(
            self._seed + key,
            threshold=self.context.cohort.threshold,
            xs=range(1, len(parties) + 1),
            random=self._random,
        )
        share_of = dict(zip(parties, dealt, strict=True))
        self._shares[me] = share_of[me]
        commitments = {p: share_commitments(suite, sctx, me, p, share) for p, share in share_of.items()}
        boxes = [
            self._pairs[peer].seal.seal(
                share_of[peer],
                box_aad(suite, sctx, me, peer, self._x(peer), commitments[peer]),
                nonce=box_nonce(commitments[peer]),
            )
            for peer in self._others
        ]
        seeds = b"".join(self._pairs[peer].seed for peer in self._others)
        self._advert = SessionAdvert(
            context=sctx,
            seed=seed_commitment(suite, sctx, me, self._seed),
            key=recovery_commitment(suite, sctx, me, key),
            pairs=tuple(pair_commitment(suite, sctx, me, p, self._pairs[p].seed) for p in self._others),
            commitments=tuple(commitments.values()),
            boxes=tuple(boxes),
            recovery=recovery_key(suite, sctx, me, key).seal(seeds, recovery_aad(suite, sctx, me)),
        ).encode(suite)
        return self._advert

    def _mask(self, request: bytes) -> MaskedUpdate:
        suite, me = self._suite, self.party
        roll = well_formed(SessionRoll.decode, suite, request, Phase.MASK, SERVER)
        self._check_roll(roll.parties, roll.digests, advert_digest(suite, self._advert))
        self._roll = roll.parties
        self._r1 = r1 = transcript(suite, self._sctx, roll.parties, roll.digests)
        others = [party for party in roll.parties if party != me]
        keys = [(1, self_mask(suite, r1, me, self._seed))]
        for sender, commitments, box in zip(others, roll.commitments, roll.boxes, strict=True):
            try:
                self._open(sender, commitments, box)
            except VerificationFailed as error:
                raise BadPayload(error.message, phase=Phase.MASK, culprit=sender) from None
            keys.append((mask_sign(me, sender), pair_mask(suite, r1, me, sender, self._pairs[sender].seed)))
        words = self._words()
        masks.apply(words, keys)
        # What made the masks has no further use at its own site.
        self._macs = {peer: (self._pairs[peer].mac, self._pairs[peer].peer_mac) for peer in others}
        self._seed, self._pairs = b"", {}
        header = SessionHeader(r1=r1, digest=words_digest(words))
        return MaskedUpdate(header.encode(suite), words)

    def _open(self, sender: int, commitments: bytes, box: bytes) -> None:
        """Keep the shares in a box, if they are those committed to."""
        suite, sctx, me = self._suite, self._sctx, self.party
        aad = box_aad(suite, sctx, sender, me, self._x(me), commitments)
        share = self._pairs[sender].open.open(box, aad, nonce=box_nonce(commitments))
        if not hmac.compare_digest(share_commitments(suite, sctx, sender, me, share), commitments):
            raise VerificationFailed("shares are not those committed to")
        self._shares[sender] = share

    def _confirm(self, request: bytes) -> bytes:
        self._survivors = survivors = self._read_survivors(request)
        macs = tuple(
            confirmation(self._suite, self._macs[peer][0], self._r1, survivors)
            for peer in survivors.parties
            if peer != self.party
        )
        self._macs = {peer: (b"", theirs) for peer, (_, theirs) in self._macs.items()}
        return SessionConfirm(r1=self._r1, macs=macs).encode(self._suite)

    def _unmask(self, request: bytes) -> bytes:
        suite, needed = self._suite, self.context.cohort.threshold
        confirmed = well_formed(SessionConfirmed.decode, suite, request, Phase.UNMASK, SERVER)
        if not set(confirmed.parties) <= set(self._survivors.parties) - {self.party}:
            raise self._equivocation("a confirmation is of a party that cannot give one to this site")
        # One that is wrong counts for nothing, and does no harm: the server cannot tell, and passes it on.
        right = 1 + sum(
            hmac.compare_digest(mac, self._expected(party))
            for party, mac in zip(confirmed.parties, confirmed.macs, strict=True)
        )
        if right < needed:
            raise self._too_few("confirmations", right, needed)
        reply = SessionUnmask(r1=self._r1, shares=tuple(self._to_release(SECRET_BYTES)))
        # Released before it leaves: the other order could let a crash have an update added twice.
        release(self.context, self._history)
        self.forget()
        return reply.encode(suite)

    def _expected(self, party: int) -> bytes:
        return confirmation(self._suite, self._macs[party][1], self._r1, self._survivors)

    def _x(self, holder: int) -> int:
        """Where a holder's shares are."""
        return 1 + self.context.cohort.parties.index(holder)
