"""Who the parties are and how what they sign becomes bytes: the ground of secure aggregation. No I/O."""

from lepton_fl.secagg.encoding import decode, digest, encode
from lepton_fl.secagg.identity import (
    IdentityCertificate,
    IdentityKey,
    Member,
    Roster,
    key_digest,
    verify,
)

__all__ = [
    "IdentityCertificate",
    "IdentityKey",
    "Member",
    "Roster",
    "decode",
    "digest",
    "encode",
    "key_digest",
    "verify",
]
