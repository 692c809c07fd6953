"""Who may be here: what the register says of the certificate that a connection was made with."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from lepton_fl.errors import IdentityRefused
from lepton_fl.fleet.pki.authority import ServerIdentity
from lepton_fl.fleet.pki.certificates import SiteCertificate, read_site
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.server.enrolment import renew
from lepton_fl.fleet.server.register import Register


@dataclass(slots=True, kw_only=True)
class Admission:
    """A site that was let in."""

    party: int
    certificate: SiteCertificate
    looked: int
    """At which state of the register."""

    @property
    def site(self) -> str:
        return self.certificate.site


class Gate:
    """Asked on every call, and again and again while a stream is open."""

    def __init__(self, register: Register, identity: ServerIdentity) -> None:
        self._register = register
        self._identity = identity
        self._state = 0

    def changed(self) -> None:
        """The register may say something else now: everybody is looked up again."""
        self._state += 1

    def admit(self, pem: bytes) -> Admission:
        """The site that the certificate of a TLS connection proves, now. Empty: it showed none.

        Raises:
            IdentityRefused: absent, not in force, of no use here, revoked, or of nobody we know.
        """
        if not pem:
            raise IdentityRefused("certificate: none was shown")
        certificate = read_site(pem, issuer=self._identity.issuing)
        party = self._register.admit(certificate, _now())
        return Admission(party=party, certificate=certificate, looked=self._state)

    def check(self, admission: Admission) -> None:
        """Does it still hold? Cheap: asked once a second of every open stream.

        Raises:
            IdentityRefused: expired or revoked since.
        """
        admission.certificate.check_time(_now())
        if admission.looked != self._state:
            self._register.admit(admission.certificate, _now())
            admission.looked = self._state

    def renew(self, admission: Admission, request: pb.RenewRequest) -> pb.RenewReply:
        """A new certificate for the site.

        Raises:
            IdentityRefused: the request is malformed, or the site was revoked.
        """
        return renew(self._register, self._identity.folder, admission.certificate, request, _now())


def _now() -> datetime:
    return datetime.now(UTC)
