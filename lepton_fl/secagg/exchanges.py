"""What an ordinary attempt and one in a session have in common, at either end: phases, dropouts, the sum."""

from __future__ import annotations

import hashlib
import hmac
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from lepton_fl.errors import VerificationFailed
from lepton_fl.secagg import masks, shamir
from lepton_fl.secagg.context import Context, Floor, History
from lepton_fl.secagg.derivation import words_digest
from lepton_fl.secagg.errors import (
    SERVER,
    BadPayload,
    BadPhase,
    BadShare,
    Equivocation,
    Phase,
    SecaggError,
    SumOutOfRange,
    TooFewParticipants,
)
from lepton_fl.secagg.masks import Words
from lepton_fl.secagg.messages import MaskedUpdate, Parties, Survivors, well_formed

Reply = TypeVar("Reply")


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


def held(secret: Reply | None) -> Reply:
    """A secret that has to be there still."""
    if secret is None:
        raise RuntimeError("a secret of the round is used after it was dropped")
    return secret


class SiteAttempt(ABC):
    """A site in one attempt of one round.

    The same request again is answered with the same reply; another one in an answered phase is `BadPhase`.

    Guarantee, against the server and `colluders` of the other sites together: what this returns tells them
    the sum over at least `quorum` sites, this one's update in it, and nothing else about this site's update;
    at most one such sum a round. Between the first and last phases nobody but this object can open the mask.

    Raises (all methods): a SecaggError. After one in a phase that was due, the attempt is over.
    """

    _order: ClassVar[tuple[Phase, ...]]

    def __init__(
        self,
        context: Context,
        update: EncodedUpdate,
        *,
        party: int,
        history: History,
        floor: Floor | None = None,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """Takes the update over.

        Raises:
            PolicyViolation: the context is below the floor.
            ValueError: the update is not of the context's length, or the party not of its cohort.
        """
        (floor or Floor()).check(context)
        if update.length != context.words or party not in context.cohort.parties:
            raise ValueError(f"party {party}, {update.length} words: not of this context")
        self.context = context
        self.party = party
        self.phase = Phase.ADVERTISE
        self._suite = context.suite
        self._history = history
        self._random = random
        self._answered: dict[Phase, tuple[bytes, object]] = {}
        # Secrets, each there from the phase that makes it to `forget`.
        self._update: EncodedUpdate | None = update
        self._seed = b""
        """Of the self-mask."""
        self._shares: dict[int, bytes] = {}
        """By dealer, both shares of each."""
        # Public.
        self._advert = b""
        self._roll: Parties = ()
        """U1."""
        self._r1 = b""
        self._survivors = Survivors(())

    def advertise(self) -> bytes:
        """Enter the attempt. The update is final from here on, and remembered as one attempt.

        Raises:
            BadPhase: the site has released in this round, or saw this attempt or a later one.
            Equivocation: an earlier attempt was of another cohort.
        """
        return self._answer(Phase.ADVERTISE, b"", self._advertise)

    def mask(self, request: bytes) -> MaskedUpdate:
        """Check what the others sent, and mask the update, in place.

        Raises:
            Equivocation, BadSignature, BadPayload: something is not for this site, or not its sender's.
            TooFewParticipants: fewer parties than are needed.
        """
        return self._answer(Phase.MASK, request, lambda: self._mask(request))

    def confirm(self, request: bytes) -> bytes:
        """Say, once, which survivors this site was told of (`Survivors`).

        Raises:
            Equivocation: they cannot be the survivors; each must have masked with all of its neighbours.
            TooFewParticipants: fewer than the quorum.
        """
        return self._answer(Phase.CONFIRM, request, lambda: self._confirm(request))

    def unmask(self, request: bytes) -> bytes:
        """With enough confirmations of the same survivors, release the shares.

        The history has it as released, on disk, before this returns; and every secret is forgotten.

        Raises:
            BadSignature: a confirmation is forged, or is of other survivors (in a session it does not count).
            TooFewParticipants: fewer confirmations than the threshold.
        """
        return self._answer(Phase.UNMASK, request, lambda: self._unmask(request))

    def forget(self) -> None:
        """Drop every secret and the update; the attempt is over for this site. Safe at any time."""
        self.phase = Phase.OVER
        self._update = None
        self._seed = b""
        self._shares = {}
        self._answered.pop(Phase.MASK, None)

    @abstractmethod
    def _advertise(self) -> bytes: ...

    @abstractmethod
    def _mask(self, request: bytes) -> MaskedUpdate: ...

    @abstractmethod
    def _confirm(self, request: bytes) -> bytes: ...

    @abstractmethod
    def _unmask(self, request: bytes) -> bytes: ...

    def _fail(self) -> None:
        """A check has failed in a phase that was due."""
        self.forget()

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
            self._fail()
            raise
        self._answered[phase] = digest, made
        self.phase = self._order[self._order.index(phase) + 1]
        return made

    def _words(self) -> Words:
        """The encoded update, to be masked in place."""
        words, self._update = held(self._update).take(), None
        return words

    def _check_roll(self, parties: Parties, digests: tuple[bytes, ...], own: bytes) -> None:
        """`own` is the digest of this site's advert."""
        cohort = self.context.cohort
        if not set(parties) <= set(cohort.parties):
            raise self._equivocation("the roll has a party that is not of the cohort")
        if self.party not in parties:
            raise self._equivocation("the roll is without this site")
        if digests[parties.index(self.party)] != own:
            raise self._equivocation("the roll has another advert of this site")
        if len(parties) < cohort.quorum:
            raise self._too_few("adverts", len(parties), cohort.quorum)

    def _read_survivors(self, request: bytes) -> Survivors:
        """U3, with this site in it, of U1."""
        survivors = well_formed(Survivors.decode, self._suite, request, Phase.CONFIRM, SERVER)
        if self.party not in survivors.parties or not set(survivors.parties) <= set(self._roll):
            raise self._equivocation("the survivors are without this site, or not all of the roll")
        if len(survivors.parties) < self.context.cohort.quorum:
            raise self._too_few("survivors", len(survivors.parties), self.context.cohort.quorum)
        return survivors

    def _to_release(self, size: int) -> list[bytes]:
        """Of each dealer the share that its fate calls for: the first `size` bytes if it survives."""
        alive = set(self._survivors.parties)
        return [
            share[:size] if dealer in alive else share[size:]
            for dealer, share in sorted(self._shares.items())
        ]

    def _equivocation(self, message: str) -> SecaggError:
        return Equivocation(message, phase=self._current, culprit=SERVER)

    def _too_few(self, what: str, found: int, needed: int) -> SecaggError:
        return TooFewParticipants(f"{found} {what}, at least {needed} are needed", phase=self._current)

    @property
    def _current(self) -> Phase:
        """The phase that is being answered: the one after the last that was."""
        return self._order[len(self._answered)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sum:
    """What a round is for."""

    mean_L: NDArray[np.float64]
    """Weighted mean of the clipped updates."""
    survivors: Parties
    """Whose updates are in it."""
    total_weight: int
    accused: Mapping[int, Parties]
    """Dealers whose shares their holders found bad, and those holders. One of the two is at fault."""


class ServerAttempt:
    """A server in one attempt of one round.

    In each phase: one call for each reply as it arrives, then the call that ends the phase and returns the
    next request to each site. A site that does not reply in time is left out by not calling; the same reply
    again is ignored.

    Guarantee: with honest sites, of which as many as the quorum reply in every phase, `result` is the sum
    over the survivors, or an error that names who cheated, where that can be seen. Memory: one vector.

    Raises (each call for a reply): BadPhase out of order, or for another reply than before; BadPayload,
    BadCertificate, BadSignature with the sender as the culprit. Nothing is changed by a reply refused.
    Raises (each call that ends a phase): TooFewParticipants: below the quorum.
    """

    _order: ClassVar[tuple[Phase, ...]]

    def __init__(self, context: Context) -> None:
        self.context = context
        self.phase = Phase.ADVERTISE
        self._suite = context.suite
        self._replies: dict[tuple[Phase, int], bytes] = {}
        self._r1 = b""
        self._survivors = Survivors(())
        """U3."""
        self._alive: frozenset[int] = frozenset()
        """The same."""
        self._total: Words = np.zeros(context.words, np.uint32)
        self._opened: defaultdict[int, dict[int, bytes]] = defaultdict(dict)
        """Valid shares: dealer, then holder."""

    @property
    def released(self) -> Parties:
        """Who has sent its shares."""
        return tuple(sorted(party for phase, party in self._replies if phase is Phase.UNMASK))

    def _check_length(self, party: int, words: Words) -> None:
        length = self.context.words
        if words.dtype != np.dtype("<u4") or words.shape != (length,):
            raise BadPayload(f"a vector that is not {length} words", phase=Phase.MASK, culprit=party)

    def _check_digest(self, party: int, words: Words, digest: bytes) -> None:
        if not hmac.compare_digest(words_digest(words), digest):
            raise BadPayload("a vector that is not the one announced", phase=Phase.MASK, culprit=party)

    def _survived(self, sharers: Iterable[int]) -> dict[int, bytes]:
        """U3 is fixed: those of `sharers` whose vector is there. `Survivors` for each of them."""
        survivors = tuple(p for p in sharers if (Phase.MASK, p) in self._replies)
        self._next(Phase.MASK, len(survivors), "masked vectors")
        self._survivors = Survivors(survivors)
        self._alive = frozenset(survivors)
        return dict.fromkeys(survivors, self._survivors.encode(self._suite))

    def _keep(self, party: int, held: Iterable[int], shares: Iterable[bytes], good: Good) -> None:
        """A holder's shares, by dealer: those that are `good(dealer, share)`.

        Raises:
            BadShare: one is not. The others count.
        """
        wrong = []
        for dealer, share in zip(held, shares, strict=True):
            if good(dealer, share):
                self._opened[dealer][party] = share
            else:
                wrong.append(dealer)
        if wrong:
            raise BadShare(f"wrong shares of the secrets of {wrong}", phase=Phase.UNMASK, culprit=party)

    def _rebuild(self, dealer: int, holders: Parties, threshold: int, accusers: Parties = ()) -> bytes:
        """A dealer's secret, from the shares of `holders`; `accusers` found theirs bad."""
        shares = self._opened[dealer]
        if len(shares) < threshold:
            message = f"{len(shares)} shares of the secret of party {dealer}, {threshold} are needed"
            if len(shares) + len(accusers) >= threshold:
                message += f"; {len(accusers)} holders found theirs bad"
                raise BadShare(message, phase=Phase.UNMASK, culprit=dealer)
            raise TooFewParticipants(message, phase=Phase.UNMASK)
        # The lowest, so that most dealers have the same ones and Lagrange's coefficients are made once.
        by_x = {1 + holders.index(holder): share for holder, share in shares.items()}
        chosen = {x: by_x[x] for x in sorted(by_x)[:threshold]}
        return shamir.reconstruct(chosen, parties=len(holders))

    def _rebuilt(self, dealer: int, found: bytes, committed: bytes) -> None:
        if not hmac.compare_digest(found, committed):
            raise BadShare(
                "its shares rebuild another secret than it committed to", phase=Phase.UNMASK, culprit=dealer
            )

    def _read_sum(
        self, masks_left: Iterable[tuple[int, bytes]], accused: Mapping[int, Parties], threads: int
    ) -> Sum:
        """Take the masks out of the total, and read it.

        Raises:
            SumOutOfRange: somebody uploaded what is no encoded update.
        """
        masks.apply(self._total, masks_left, threads=threads)
        context, n = self.context, len(self._survivors.parties)
        words, limbs = self._total[: context.coordinates], self._total[context.coordinates :]
        try:
            weight = context.quantiser.total_weight(limbs, n=n) if context.weighted else n
            mean = context.quantiser.decode(words, n=n, total_weight=weight)
        except VerificationFailed as error:
            raise SumOutOfRange(error.message, phase=Phase.UNMASK) from None
        return Sum(mean_L=mean, survivors=self._survivors.parties, total_weight=weight, accused=accused)

    def _due(self, phase: Phase) -> None:
        if phase is not self.phase:
            raise BadPhase(f"the server is in phase {self.phase}", phase=phase)

    def _seen(self, phase: Phase, party: int, reply: bytes) -> bool:
        """Whether this reply is there already.

        Raises:
            BadPhase: another one is, or the phase is not this one.
        """
        earlier = self._replies.get((phase, party))
        if earlier is not None:
            if earlier != reply:
                raise BadPhase("another reply in a phase that was answered", phase=phase, culprit=party)
            return True
        if phase is not self.phase:
            raise BadPhase(f"a reply when the server is in phase {self.phase}", phase=phase, culprit=party)
        return False

    def _check_survivor(self, phase: Phase, party: int) -> None:
        if party not in self._alive:
            raise BadPhase("a reply of a party that is no survivor", phase=phase, culprit=party)

    def _next(self, phase: Phase, found: int, what: str, needed: int | None = None) -> None:
        self._due(phase)
        needed = self.context.cohort.quorum if needed is None else needed
        if found < needed:
            raise TooFewParticipants(f"{found} {what}, at least {needed} are needed", phase=phase)
        self.phase = self._order[self._order.index(phase) + 1]


Good = Callable[[int, bytes], bool]
