"""What a site says to join, and the proof that one institution holds both of its keys."""

from __future__ import annotations

import re

from lepton_fl.errors import IdentityRefused, VerificationFailed
from lepton_fl.fleet.pki.tokens import Token
from lepton_fl.fleet.protocol import fleet_pb2 as pb
from lepton_fl.secagg.encoding import Value
from lepton_fl.secagg.identity import IdentityKey, verify
from lepton_fl.study import NAME_PATTERN

_TAG = "lepton-fl/joining/1"


def make_joining(token: Token, identity: IdentityKey, csr: bytes) -> pb.JoinRequest:
    """The request of the site that `token` invites."""
    said = _said(token.fingerprint, token.id, token.site, csr, identity.public)
    return pb.JoinRequest(
        token_id=token.id,
        token_secret=token.secret,
        site=token.site,
        csr=csr,
        identity_key=identity.public,
        identity_proof=identity.sign(_TAG, *said),
    )


def verify_joining(asked: pb.JoinRequest, fingerprint: bytes) -> None:
    """That the identity key's owner asks this, and of the consortium with this fingerprint.

    The certificate request proves the TLS key in the same way: `certificates.read_csr`.

    Raises:
        IdentityRefused: not so.
    """
    if not re.fullmatch(NAME_PATTERN, asked.site):
        raise IdentityRefused("request to join: what it names is no site's name")
    said = _said(fingerprint, asked.token_id, asked.site, asked.csr, asked.identity_key)
    try:
        verify(asked.identity_key, asked.identity_proof, _TAG, *said)
    except VerificationFailed:
        raise IdentityRefused("request to join: no proof that the site holds its identity key") from None


def _said(fingerprint: bytes, token_id: bytes, site: str, csr: bytes, key: bytes) -> tuple[Value, ...]:
    return fingerprint, token_id, site, csr, key
