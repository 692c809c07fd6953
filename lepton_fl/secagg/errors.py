"""What ends a round of secure aggregation, or puts a site out of it.

::

    ProtocolError
    └── SecaggError                exit
        ├── PolicyViolation         4    the round asks for less than this site, or the protocol, insists on
        ├── Equivocation            5    the parties were not told the same
        ├── BadPhase                5    out of order, a second time, or of a round that is over
        ├── BadCertificate          5    a party is not who the roster says
        ├── BadSignature            5    a party did not sign what came in its name
        ├── BadPayload              5    malformed, misrouted or altered
        ├── BadShare                5    a share, or what shares add up to, is not what was committed to
        ├── OtherRoster             5    a party goes by another version of the roster
        ├── SessionLost             5    the session cannot serve the attempt; an ordinary one follows
        ├── TooFewParticipants      6    below the threshold; a new attempt may follow
        └── SumOutOfRange           5    the sum is none of encoded updates

Messages name phases, parties and counts: never a key, a share, a seed or a coordinate.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from lepton_fl.errors import PolicyRefused, ProtocolError

SERVER = 0
"""The culprit where the server is; party ids begin at 101."""


class Phase(StrEnum):
    """The exchanges of a round, in their order; each is a request of the server and a site's reply."""

    ADVERTISE = "advertise"
    SHARE = "share"
    MASK = "mask"
    CONFIRM = "confirm"
    UNMASK = "unmask"
    OVER = "over"
    """Finished or given up: no secret is left, and nothing new is answered."""


class SecaggError(ProtocolError):
    """The protocol was broken or cannot go on.

    `culprit` is the party in whose name the fault came, `SERVER`, or None where that cannot be known. A
    server that passes a party's fault on is at fault as well: it looks for the same ones.
    """

    retry: ClassVar[bool] = False
    """Whether a new attempt, with the same cohort, may succeed without anybody being put out."""

    def __init__(self, message: str, *, phase: Phase, culprit: int | None = None) -> None:
        # What a client tells the server holds nothing of its records; `public` may name phase and culprit.
        who = {None: "", SERVER: ", by the server"}.get(culprit, f", by party {culprit}")
        super().__init__(f"{phase}: {message}{who}", public=f"{type(self).__name__} in {phase}{who}")
        self.phase = phase
        self.culprit = culprit


class PolicyViolation(SecaggError, PolicyRefused):
    """The round asks for less protection than this site or the protocol insists on."""

    exit_code = 4


class Equivocation(SecaggError):
    """The parties were told different things, or a party was told what cannot be true for all."""


class BadPhase(SecaggError):
    """A message out of order, another one in a phase that was answered, or of a round that is over."""


class BadCertificate(SecaggError):
    """A party's certificate is not the consortium's, not in force, revoked or off the roster."""


class BadSignature(SecaggError):
    """What came in a party's name was not signed by it, or not for this."""


class BadPayload(SecaggError):
    """Malformed, of another length or type, misrouted, altered, or a key of low order."""


class BadShare(SecaggError):
    """A share differs from its commitment, or the shares of a dealer rebuild another secret."""


class OtherRoster(SecaggError):
    """The server goes by another version of the roster than the site; the newer one is on its way."""

    retry = True


class SessionLost(SecaggError):
    """A session attempt cannot go on. Nothing was opened; an ordinary one may follow, and names cheats."""

    retry = True


class TooFewParticipants(SecaggError):
    """Fewer parties than the threshold. Nothing was opened; a new attempt may follow."""

    exit_code = 6
    retry = True


class SumOutOfRange(SecaggError):
    """The sum cannot be one of encoded updates: somebody uploaded something else, who is not known."""
