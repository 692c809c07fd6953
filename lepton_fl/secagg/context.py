"""What all parties of a round have to agree on before anything of it is worth a signature."""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from lepton_fl.errors import IdentityRefused, VerificationFailed
from lepton_fl.secagg.encoding import digest, encode
from lepton_fl.secagg.errors import SERVER, BadCertificate, BadPhase, Equivocation, Phase, PolicyViolation
from lepton_fl.secagg.fixedpoint import LIMBS, Quantiser
from lepton_fl.secagg.graph import COMPLETE, LEAST_SHARE, Graph, degree_and_threshold, smallest_group
from lepton_fl.secagg.identity import FIRST_PARTY, LAST_PARTY, IdentityCertificate, Roster
from lepton_fl.secagg.keys import Suite

DIGEST_BYTES = 32
RUN_BYTES = 16


def pack(parties: Iterable[int]) -> bytes:
    """Party ids as the wire has them: 8 bytes each, little-endian."""
    return b"".join(party.to_bytes(8, "little") for party in parties)


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """The sites that a round was called for, and what they are protected against.

    `threshold` is floor(2n/3) + 1 of the whole cohort, of those who stayed away as well: otherwise a server
    could open two sums of one round by calling a part of the cohort each time.

    Guarantee: the server and `colluders` of the sites together learn the sum over at least `quorum` sites
    and nothing else about the others' updates; once a round. `n - quorum` sites may drop out, at any time.

    Raises:
        PolicyViolation: 2 threshold > n + colluders does not hold, so that two sums could be opened; or a
            sum would have one honest site only.
        ValueError: the parties are not ascending party ids, or a number is out of range.
    """

    parties: tuple[int, ...]
    colluders: int
    """Most sites that may collude with the server."""
    min_sites: int = 3
    """Fewest in a sum, for the study's own reasons (shared noise: its min_survivors); see `quorum`."""

    def __post_init__(self) -> None:
        if list(self.parties) != sorted(set(self.parties)):
            raise ValueError("a cohort's parties are in ascending order, each once")
        if not all(FIRST_PARTY <= party <= LAST_PARTY for party in self.parties):
            raise ValueError(f"a party id is {FIRST_PARTY} to {LAST_PARTY}")
        if self.colluders < 0 or not 0 <= self.min_sites <= self.n:
            raise ValueError(f"colluders {self.colluders}, min_sites {self.min_sites} of {self.n}")
        if 2 * self.threshold <= self.n + self.colluders or self.honest < 2:
            raise PolicyViolation(
                f"{self.colluders} colluders of {self.n} sites are too many: at a threshold of "
                f"{self.threshold}, at most {max_colluders(self.n)}",
                phase=Phase.ADVERTISE,
            )

    @property
    def n(self) -> int:
        return len(self.parties)

    @property
    def threshold(self) -> int:
        return 2 * self.n // 3 + 1

    @property
    def quorum(self) -> int:
        """Fewest sites whose sum is opened."""
        return max(self.threshold, self.min_sites)

    @property
    def honest(self) -> int:
        """Fewest honest sites in a sum."""
        return self.quorum - self.colluders

    @functools.cached_property
    def digest(self) -> bytes:
        return digest("lepton-fl/secagg/cohort/1", pack(self.parties))

    @functools.cached_property
    def graph(self) -> Graph:
        """Complete up to 128 sites; above, of the least degree that the bounds of graph.py allow."""
        found = None
        if self.n > COMPLETE:
            least = -(-self.n // LEAST_SHARE)
            found = degree_and_threshold(
                self.n,
                colluders=max(self.colluders, least),
                dropouts=max(self.n - self.quorum, least),
            )
        degree, threshold = found or (self.n - 1, self.threshold)
        return Graph(parties=self.parties, degree=degree, threshold=threshold)

    @property
    def hidden_among(self) -> int:
        """Fewest honest sites that an update is summed with, itself included.

        In a drawn graph this holds but for a probability of 2^-40.
        """
        graph = self.graph
        if graph.complete:
            return self.honest
        return smallest_group(self.n, graph.degree, graph.threshold, colluders=self.colluders)

    def promise(self) -> str:
        """What a member of this cohort gets, in one sentence."""
        spare = self.n - self.quorum
        formula = ""
        if self.graph.complete:
            formula = f"{'t' if self.quorum == self.threshold else 'min_sites'} - n_C = "
        against = "the server alone"
        if self.colluders:
            against = f"the server together with up to {self.colluders} of {self.n} sites"
        may_drop = {0: "no site may drop out", 1: "1 site may drop out"}.get(
            spare, f"{spare} sites may drop out"
        )
        return (
            f"Against {against}, hidden among at least {formula}{self.hidden_among} honest sites; {may_drop}."
        )


def max_colluders(n: int) -> int:
    """Most colluders that a cohort of n can be protected against; -1 where there is no protection at all.

    The largest n_C with 2t > n + n_C and t - n_C >= 2.
    """
    threshold = 2 * n // 3 + 1
    return max(min(2 * threshold - n - 1, threshold - 2), -1)


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What a site insists on, whatever a study asks.

    Clip, sigma and rounds are judged where the study is: a context has the digest of the one study that the
    site's policy admitted.
    """

    min_sites: int = 3
    """Fewest sites in a sum. Of a sum of two, each sees the other's part."""
    colluders: int = 0
    """Fewest colluders that a cohort must be protected against."""

    def check(self, context: Context) -> None:
        """That the context meets it.

        Raises:
            PolicyViolation: it does not.
        """
        cohort = context.cohort
        for name, found, least in (
            ("min_sites", cohort.quorum, self.min_sites),
            ("colluders", cohort.colluders, self.colluders),
        ):
            if found < least:
                raise PolicyViolation(
                    f"{name} is {found}, this site's policy asks for {least}", phase=Phase.ADVERTISE
                )


@dataclass(frozen=True, kw_only=True)
class Context:
    """One attempt of one round. Each party makes it from what it knows and received, none is sent it.

    Guarantee: parties with equal digests agree on every field; two that differ in any cannot finish a round
    together. Everything that is signed, derived or committed to in the round is bound to the digest.

    Raises:
        ValueError: a field is out of range, or `quantiser` has no headroom for the cohort.
    """

    run: bytes
    """16 random bytes."""
    kind: str
    """What is added up, as "train"; a round may have one sum of each kind."""
    round: int
    attempt: int
    """1, 2, ... within the round."""
    cohort: Cohort
    coordinates: int
    """Of an update."""
    quantiser: Quantiser
    weighted: bool
    """Whether four limbs of the site's weight follow the coordinates. Never under differential privacy."""
    model: bytes
    """`model_digest` of what this party received."""
    study: bytes
    """The study's id, 32 bytes: the privacy parameters, among all else that was agreed."""
    roster: int
    """The roster's version."""
    suite: Suite = Suite.LSA1

    def __post_init__(self) -> None:
        if (len(self.run), len(self.model), len(self.study)) != (RUN_BYTES, DIGEST_BYTES, DIGEST_BYTES):
            raise ValueError("a context's run is 16 bytes, its model and study are 32")
        if min(self.round, self.attempt, self.coordinates, self.roster) < 1:
            raise ValueError("a context's round, attempt, coordinates and roster are 1 or more")
        if self.quantiser.max_n < self.cohort.n:
            raise ValueError(
                f"the quantiser is for {self.quantiser.max_n} sites, the cohort has {self.cohort.n}"
            )

    @property
    def words(self) -> int:
        """Length of an encoded update."""
        return self.coordinates + (LIMBS if self.weighted else 0)

    @functools.cached_property
    def digest(self) -> bytes:
        quantiser, graph = self.quantiser, self.cohort.graph
        return digest(
            self.suite,
            "ctx",
            self.run,
            self.kind,
            self.round,
            self.attempt,
            self.cohort.digest,
            self.cohort.colluders,
            self.cohort.min_sites,
            self.cohort.threshold,
            graph.degree,
            graph.threshold,
            self.coordinates,
            [
                struct.pack("<d", quantiser.clip),
                quantiser.bits,
                quantiser.max_n,
                quantiser.max_weight,
                quantiser.tails,
            ],
            int(self.weighted),
            self.model,
            self.study,
            self.roster,
        )


def model_digest(tensors: Iterable[tuple[str, str, tuple[int, ...], bytes | memoryview]]) -> bytes:
    """SHA-256 over name, type (as `<f4`), shape and little-endian bytes of every tensor, in this order."""
    state = hashlib.sha256(encode("lepton-fl/secagg/model/1"))
    for name, dtype, shape, data in tensors:
        view = memoryview(data).cast("B")
        # encode(name, dtype, shape, data), without a copy of the data.
        state.update(encode(name, dtype, shape) + len(view).to_bytes(8, "little") + b"b")
        state.update(view)
    return state.digest()


@dataclass(frozen=True)
class Consortium:
    """Whose word counts for who the parties are."""

    root_key: bytes
    roster: Roster
    _known: dict[bytes, IdentityCertificate] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Verified certificates by their bytes: rounds are many, members few."""

    def certificate(self, signed: bytes, *, phase: Phase, now: datetime) -> IdentityCertificate:
        """The certificate of a present member.

        Raises:
            BadCertificate: it is not.
        """
        certificate = self._known.get(signed)
        if certificate is not None and certificate.not_before <= now.timestamp() < certificate.not_after:
            return certificate
        party = None
        try:
            certificate = IdentityCertificate.read(signed, self.root_key)
            party = certificate.party
            certificate.check(self.roster, now)
        except (VerificationFailed, IdentityRefused) as error:
            raise BadCertificate(error.message, phase=phase, culprit=party) from None
        self._known[signed] = certificate
        return certificate


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What a site remembers of a round, on disk."""

    run: bytes
    kind: str
    round: int
    cohort: bytes
    """`Cohort.digest`."""
    number: int
    released: bool


class History(Protocol):
    """A site's memory of rounds. `write` returns once a crash cannot undo it."""

    def read(self, run: bytes, kind: str, round: int) -> Attempt | None:
        """The last one written for this round."""

    def write(self, attempt: Attempt) -> None:
        """In place of the last one written for its round."""


class Forgetful:
    """A history in memory: for simulations and tests, where a crash ends everything."""

    def __init__(self) -> None:
        self._last: dict[tuple[bytes, str, int], Attempt] = {}

    def read(self, run: bytes, kind: str, round: int) -> Attempt | None:
        return self._last.get((run, kind, round))

    def write(self, attempt: Attempt) -> None:
        self._last[attempt.run, attempt.kind, attempt.round] = attempt


def begin(context: Context, history: History) -> None:
    """Enter an attempt of a round, and remember so.

    Guarantee: over all attempts, this site releases its part of one sum at most; and since every attempt
    needs more than 2/3 of one cohort, no round ever yields two sums.

    Raises:
        BadPhase: the site has released in this round, or has seen this attempt or a later one.
        Equivocation: an earlier attempt had another cohort.
    """
    last = history.read(context.run, context.kind, context.round)
    if last is not None:
        if last.released:
            raise BadPhase(f"round {context.round} is released", phase=Phase.ADVERTISE, culprit=SERVER)
        if context.attempt <= last.number:
            raise BadPhase(
                f"attempt {context.attempt} after attempt {last.number}",
                phase=Phase.ADVERTISE,
                culprit=SERVER,
            )
        if context.cohort.digest != last.cohort:
            raise Equivocation(
                f"attempt {context.attempt} has another cohort", phase=Phase.ADVERTISE, culprit=SERVER
            )
    history.write(_attempt(context, released=False))


def release(context: Context, history: History) -> None:
    """Remember that this site's part of the sum leaves; before it does.

    Raises:
        BadPhase: this is not the attempt that the site is in, or it has released in the round.
    """
    last = history.read(context.run, context.kind, context.round)
    if last is None or last.released or last.number != context.attempt:
        raise BadPhase("this attempt is not the last, or is released", phase=Phase.UNMASK, culprit=SERVER)
    history.write(_attempt(context, released=True))


def _attempt(context: Context, *, released: bool) -> Attempt:
    return Attempt(
        run=context.run,
        kind=context.kind,
        round=context.round,
        cohort=context.cohort.digest,
        number=context.attempt,
        released=released,
    )
