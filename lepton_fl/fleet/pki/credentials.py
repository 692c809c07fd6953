"""Keys and certificates as gRPC takes them."""

from __future__ import annotations

import logging

import grpc

from lepton_fl.errors import LeptonError
from lepton_fl.fleet.pki.authority import ServerIdentity

log = logging.getLogger(__name__)


def fleet_credentials(identity: ServerIdentity) -> grpc.ServerCredentials:
    """Mutual TLS: callers have a certificate by the issuing authority; what it says is yet to be checked."""
    return _credentials(identity, mutual=True)


def enrolment_credentials(identity: ServerIdentity) -> grpc.ServerCredentials:
    """TLS for callers that have no certificate yet."""
    return _credentials(identity, mutual=False)


def _credentials(identity: ServerIdentity, *, mutual: bool) -> grpc.ServerCredentials:
    """Credentials that follow the files: gRPC asks for them at every handshake."""
    held = identity

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal held
        before = held
        try:
            held = held.refreshed()
        except (LeptonError, OSError) as error:
            # What was is still good.
            log.warning("the server's certificate cannot be read again: %s", error)
        return None if held is before else _configuration(held, mutual=mutual)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(identity, mutual=mutual),
        changed,  # type: ignore[arg-type]  # None is gRPC's "as before"; its types leave it out
        require_client_authentication=mutual,
    )


def _configuration(identity: ServerIdentity, *, mutual: bool) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(identity.key_pem, identity.chain_pem)],
        root_certificates=identity.client_trust_pem if mutual else None,
    )
