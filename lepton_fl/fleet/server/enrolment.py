"""The service of the enrolment port: what the consortium is, and the requests of invited sites."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import grpc
from grpc import aio

from lepton_fl.errors import IdentityRefused, LeptonError, VerificationFailed
from lepton_fl.fleet.pki.authority import Issuing, read_consortium
from lepton_fl.fleet.pki.certificates import SiteCertificate
from lepton_fl.fleet.pki.joining import verify_joining
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.fleet.protocol.methods import enrolment_handlers
from lepton_fl.fleet.server.register import Register, Request

log = logging.getLogger(__name__)

MESSAGE_LIMIT = 16 << 10
"""Bytes of one message on the enrolment port; the listener's `grpc.max_receive_message_length`."""

REFUSALS_LOGGED = 30
"""Refusals in a minute that are logged."""

_STATES = {
    "pending": pb.JoinReply.PENDING,
    "approved": pb.JoinReply.APPROVED,
    "rejected": pb.JoinReply.REJECTED,
}


class _Sparingly:
    """Strangers are refused as often as they like; the disk is not theirs to fill with our words about it."""

    def __init__(self) -> None:
        self._minute = 0
        self._told = 0

    def may_tell(self) -> bool:
        minute = int(time.monotonic() // 60)
        if minute != self._minute:
            self._minute, self._told = minute, 0
        self._told += 1
        return self._told <= REFUSALS_LOGGED


def _now() -> datetime:
    return datetime.now(UTC)


def enrolment_service(
    register: Register, pki: Path, *, fleet_address: str, clock: Callable[[], datetime] = _now
) -> grpc.GenericRpcHandler:
    """The service of a grpc.aio server's enrolment port; `fleet_address` is told to approved sites.

    Not to be used from another thread than the one that opened the register.
    """
    consortium = read_consortium(pki)
    document = consortium.encode()
    refusals = _Sparingly()

    async def tell_consortium(_: pb.ConsortiumRequest, __: object) -> pb.ConsortiumReply:
        return pb.ConsortiumReply(document=document)

    async def join(
        asked: pb.JoinRequest, context: aio.ServicerContext[pb.JoinRequest, pb.JoinReply]
    ) -> pb.JoinReply:
        try:
            issuing = Issuing.open(pki)
        except LeptonError as error:
            # Our own files, of which a stranger is told nothing.
            log.warning("enrolment cannot be served: %s", error)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server cannot enrol sites now")
        request = Request(
            token_id=asked.token_id,
            secret=asked.token_secret,
            site=asked.site,
            csr=asked.csr,
            identity_key=asked.identity_key,
        )
        now = clock()
        try:
            verify_joining(asked, consortium.fingerprint)
            decision = register.request(request, issuing, now)
        except (IdentityRefused, VerificationFailed) as error:
            if refusals.may_tell():
                # The site's name is a stranger's word: as a Python literal it cannot forge a line of the log.
                log.warning(
                    "enrolment of %.80r from %s refused: %s", asked.site, context.peer(), error.message
                )
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        log.info("enrolment of %s: %s", asked.site, decision.state)
        approved = decision.state == "approved"
        return pb.JoinReply(
            state=_STATES[decision.state],
            certificate=decision.tls_certificate,
            chain=issuing.pem if approved else b"",
            identity_certificate=decision.identity_certificate,
            roster=decision.roster,
            fleet_address=fleet_address if approved else "",
            time=int(now.timestamp()),
        )

    return enrolment_handlers(tell_consortium, join)


def renew(
    register: Register, pki: Path, certificate: SiteCertificate, asked: pb.RenewRequest, now: datetime
) -> pb.RenewReply:
    """A new TLS certificate for the site that calls with `certificate`, for Fleet.Renew.

    Raises:
        IdentityRefused: the site is not admitted, or its request is malformed.
    """
    issuing = Issuing.open(pki)
    pem = register.renew(certificate, asked.csr, issuing, now)
    log.info("renewed the certificate of %s", certificate.site)
    return pb.RenewReply(certificate=pem, chain=issuing.pem)
