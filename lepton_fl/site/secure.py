"""The site's side of secure aggregation: what it computed leaves masked, or not at all.

`Aggregation` is what the mod asks of it. A deployed site has `LSA1`, or nothing and refuses.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from lepton_fl.errors import BadRequest, PolicyRefused
from lepton_fl.messages import (
    PHASES,
    SUMS,
    Assignment,
    SecureRequest,
    masked_reply,
    read_secure,
    secure_reply,
)
from lepton_fl.privacy.discrete_gaussian import sample
from lepton_fl.secagg.context import Consortium, Context, Floor, History
from lepton_fl.secagg.errors import BadPhase, OtherRoster, Phase
from lepton_fl.secagg.exchanges import EncodedUpdate
from lepton_fl.secagg.fixedpoint import Update
from lepton_fl.secagg.identity import IdentityKey, Roster
from lepton_fl.secagg.masks import Words
from lepton_fl.secagg.session import Session
from lepton_fl.secagg.session_site import SessionRound
from lepton_fl.secagg.site import SiteRound
from lepton_fl.secure_rounds import (
    EVALUATE_SUM,
    context_of,
    count_noise,
    digest_of,
    encode_counts,
    group_with,
    resumes,
    shared_lattice,
)
from lepton_fl.tasks import Arrays
from lepton_fl.tasks.arrays import size_of
from lepton_fl.training.noise import Noise

log = logging.getLogger(__name__)

MAX_OPEN = 16
"""Runs whose rounds are open at a time."""
_BY_TYPE = {kind: phase for phase, kind in PHASES.items()}
_NONE: Words = np.empty(0, np.uint32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """A secure round that this site will take part in, checked before anything is spent on it."""

    message: Message
    assignment: Assignment
    context: Context
    consortium: Consortium
    """With the roster of `context`: a newer one that comes while the site trains is for the next attempt."""
    floor: Floor


def begun(message: Message, assignment: Assignment, site: str, roster: Roster, model: Arrays) -> Context:
    """The context of the round that `message` begins, as this site makes it.

    Raises:
        BadRequest: the kind of sum is not that of the message, or the round not one of this kind.
        PolicyViolation: as `context_of`.
    """
    study, kind = assignment.study, SUMS[message.metadata.message_type]
    if read_secure(message).kind != kind:
        raise BadRequest(f"message: of type {message.metadata.message_type}, and not to sum {kind}")
    # One number, so that there is one such sum in a run, of whatever model and cohort.
    if kind == EVALUATE_SUM and assignment.round != study.evaluation_round:
        raise BadRequest(f"round {assignment.round}: histograms are summed in {study.evaluation_round}")
    return context_of(
        study,
        names=group_with(site, study, kind, assignment.cohort, assignment.round),
        run=assignment.run,
        kind=kind,
        round=assignment.round,
        roster=roster,
        parameters=size_of(model),
        model=digest_of(model),
    )


class Aggregation(ABC):
    """How what a site computed leaves it, under a study with secure aggregation."""

    def join(self, assignment: Assignment) -> None:  # noqa: B027 - most can take part in what is proposed
        """Whether this site can take part in a run that is proposed to it.

        Raises:
            PolicyRefused: it cannot.
        """

    @abstractmethod
    def check(self, message: Message, assignment: Assignment, model: Arrays, floor: Floor) -> Ticket:
        """Whether this site can take part in the round that `message` begins; nothing is spent yet.

        Raises:
            PolicyRefused, SecaggError: it cannot.
        """

    @abstractmethod
    def enter(self, ticket: Ticket, words: Words) -> Message:
        """The reply to the message that began the round. `words` are the encoded update, in clear."""

    @abstractmethod
    def answer(self, message: Message, assignment: Assignment) -> Message:
        """The reply to a later exchange.

        Raises:
            SecaggError: it is not one that an honest server makes, or the round cannot go on.
        """


class NoAggregation(Aggregation):
    """The site has no identity among the sites, so it refuses: before a run begins, and in each round."""

    def join(self, assignment: Assignment) -> None:
        raise _no_identity(assignment)

    def check(self, message: Message, assignment: Assignment, model: Arrays, floor: Floor) -> Ticket:  # noqa: ARG002 - an Aggregation's form
        raise _no_identity(assignment)

    def enter(self, ticket: Ticket, words: Words) -> Message:  # noqa: ARG002 - the same
        raise _no_identity(ticket.assignment)

    def answer(self, message: Message, assignment: Assignment) -> Message:  # noqa: ARG002 - the same
        raise _no_identity(assignment)


def _no_identity(assignment: Assignment) -> PolicyRefused:
    return PolicyRefused(
        f"study {assignment.study.study.name} needs secure aggregation, and this site has no identity "
        "among the sites: an update without it would be seen by the server",
        fix="lepton-fl enroll join TOKEN --server HOST:PORT -c site.toml",
        public="secure aggregation is not available at the site",
    )


def encoded(update_L: Update, assignment: Assignment, context: Context, noise: Noise) -> Words:
    """A site's update as words to be added up, with its share of the noise where the study shares it."""
    quantiser, number = context.quantiser, assignment.round
    cut = quantiser.clip_ratio(update_L)
    if cut:
        log.info("%.2g of the update's coordinates were cut to %g", cut, quantiser.clip)
    words_L = quantiser.encode(update_L, weight=1, rounding_key=noise.key("rounding", number))
    lattice = shared_lattice(assignment.study, context.cohort.n, context.coordinates)
    if lattice is not None:
        drawn_L = sample(lattice.share, len(words_L), key=noise.key("noise share", number))
        words_L += drawn_L.astype(np.uint32)
    return words_L


def encoded_counts(
    counts_2B: NDArray[np.int64], assignment: Assignment, context: Context, noise: Noise
) -> Words:
    """A site's histogram as words to be added up, with its share of the noise where the study adds any."""
    integers_L = encode_counts(counts_2B, context.quantiser)
    cut = np.count_nonzero(integers_L * context.quantiser.clip != counts_2B.ravel() * context.quantiser.half)
    if cut:
        log.warning("%d counts were cut: sums over so many sites have no room for them", cut)
    share = count_noise(assignment.study, context.cohort.n)
    if share:
        integers_L += sample(share, len(integers_L), key=noise.key("noise on counts", assignment.round))
    return integers_L.astype(np.uint32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Who this site is towards the other sites."""

    name: str
    party: int
    identity: IdentityKey
    certificate: bytes
    """Of `identity`, as signed."""
    consortium: Callable[[], Consortium]
    """With the newest roster that the site holds."""
    history: History


@dataclass(slots=True)
class _Open:
    """A round that this site is in."""

    assignment: Assignment
    floor: Floor
    words: Words
    """In clear, for another attempt; dropped with the release."""
    attempt: SiteRound | SessionRound
    session: Session | None = None
    """That the next round may resume: the one of this attempt, or the one that it leaves."""


class LSA1(Aggregation):
    """docs/protocol.md, over Flower messages.

    Guarantee: that of `SiteAttempt`, for each round. What is kept between messages is in this process alone:
    after a crash the site sits out the round, and is in the next. A session is resumed where the server
    proposes the one that this site has, and it serves; else the round is an ordinary one.
    """

    def __init__(self, membership: Membership, *, random: Callable[[int], bytes] | None = None) -> None:
        """`random` for simulations that must come out the same again; else the operating system's."""
        self._membership = membership
        self._random: dict[str, Any] = {} if random is None else {"random": random}
        self._open: dict[tuple[str, str], _Open] = {}
        """By run and kind."""

    def check(self, message: Message, assignment: Assignment, model: Arrays, floor: Floor) -> Ticket:
        request = read_secure(message)
        if request.attempt != 1:
            raise BadRequest("message: a round begins with its first attempt")
        consortium = self._consortium(request)
        try:
            context = begun(message, assignment, self._membership.name, consortium.roster, model)
        except ValueError as error:
            raise BadRequest(f"message: there is no such secure round: {error}") from None
        floor.check(context)
        if self._membership.history.read(context.run, context.kind, context.round) is not None:
            raise BadPhase("this site has been in this round", phase=Phase.ADVERTISE)
        return Ticket(
            message=message, assignment=assignment, context=context, consortium=consortium, floor=floor
        )

    def enter(self, ticket: Ticket, words: Words) -> Message:
        key = ticket.assignment.run, ticket.context.kind
        before, request = self._open.get(key), read_secure(ticket.message)
        session = None if before is None else before.session
        if session and not session.serves(ticket.context, request.session, request.step, datetime.now(UTC)):
            session = None
        if before is None or before.attempt.context.cohort != ticket.context.cohort:
            log.info("run %s: %s", ticket.assignment.run, ticket.context.cohort.promise())
        self._forget(key)
        while len(self._open) >= MAX_OPEN:
            self._forget(next(iter(self._open)))
        attempt = (
            self._resumed(session, ticket, words, request.step)
            if session
            else self._ordinary(ticket.assignment, ticket.context, words, ticket.consortium, ticket.floor)
        )
        advert = attempt.advertise()
        self._open[key] = _Open(ticket.assignment, ticket.floor, words, attempt, session)
        return secure_reply(ticket.message, advert)

    def answer(self, message: Message, assignment: Assignment) -> Message:
        phase, request = _BY_TYPE[message.metadata.message_type], read_secure(message)
        found = self._open.get((assignment.run, request.kind))
        if found is None or found.assignment != assignment:
            raise BadPhase("this site is not in this round", phase=phase)
        if phase is Phase.ADVERTISE:
            return secure_reply(message, self._again(found, request))
        if request.attempt != found.attempt.context.attempt:
            raise BadPhase(f"attempt {request.attempt} is not the one this site is in", phase=phase)
        match phase:
            case Phase.SHARE if isinstance(found.attempt, SiteRound):
                return secure_reply(message, found.attempt.share(request.body, datetime.now(UTC)))
            case Phase.MASK:
                return masked_reply(message, found.attempt.mask(request.body))
            case Phase.CONFIRM:
                return secure_reply(message, found.attempt.confirm(request.body))
            case Phase.UNMASK:
                reply = found.attempt.unmask(request.body)
                # Released: there is no other attempt that they could be in.
                found.words = _NONE
                if isinstance(found.attempt, SiteRound):
                    found.session = found.attempt.session
                return secure_reply(message, reply)
            case _:
                raise BadPhase("a session has no such exchange", phase=phase)

    def _again(self, found: _Open, request: SecureRequest) -> bytes:
        """The advert of another attempt at the same round, with the same update."""
        context = found.attempt.context
        if request.attempt == context.attempt:
            # Asked a second time, as by a server that was not there to take the answer.
            return found.attempt.advertise()
        # Before the attempt that there is ends: a message that was late must not end it.
        if request.attempt < context.attempt or not len(found.words):
            raise BadPhase(
                f"attempt {request.attempt} after attempt {context.attempt}, or after the release",
                phase=Phase.ADVERTISE,
            )
        consortium = self._consortium(request)
        found.attempt.forget()
        found.session = None
        again = replace(context, attempt=request.attempt, roster=consortium.roster.version)
        found.attempt = self._ordinary(found.assignment, again, found.words, consortium, found.floor)
        return found.attempt.advertise()

    def _consortium(self, request: SecureRequest) -> Consortium:
        consortium = self._membership.consortium()
        if request.roster != consortium.roster.version:
            raise OtherRoster(
                f"the server goes by roster {request.roster}, this site holds {consortium.roster.version}",
                phase=Phase.ADVERTISE,
            )
        return consortium

    def _ordinary(
        self, assignment: Assignment, context: Context, words: Words, consortium: Consortium, floor: Floor
    ) -> SiteRound:
        member = self._membership
        return SiteRound(
            context,
            # Its own copy: it is masked in place.
            EncodedUpdate(words.copy()),
            identity=member.identity,
            certificate=member.certificate,
            party=member.party,
            consortium=consortium,
            history=member.history,
            floor=floor,
            sessions=resumes(assignment.study, context.kind),
            **self._random,
        )

    def _resumed(self, session: Session, ticket: Ticket, words: Words, step: int) -> SessionRound:
        return SessionRound(
            ticket.context,
            EncodedUpdate(words.copy()),
            session=session,
            step=step,
            history=self._membership.history,
            floor=ticket.floor,
            **self._random,
        )

    def _forget(self, key: tuple[str, str]) -> None:
        found = self._open.pop(key, None)
        if found is not None:
            found.attempt.forget()
