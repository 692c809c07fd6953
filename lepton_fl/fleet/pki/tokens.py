"""An invitation as one word to paste: `lfl1-`, then id, secret, fingerprint, site and checksum in base 64."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from dataclasses import dataclass, field

from lepton_fl.errors import IdentityRefused
from lepton_fl.study import NAME_PATTERN

PREFIX = "lfl1-"
ID_BYTES, SECRET_BYTES, FINGERPRINT_BYTES, CHECK_BYTES = 8, 16, 32, 4
_FIXED = ID_BYTES + SECRET_BYTES + FINGERPRINT_BYTES + CHECK_BYTES
_ASK = "paste the whole line that `lepton-fl enroll invite` printed, or ask the operator for a new one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """What lets one site ask, once, to be enrolled; and by which that site knows the consortium."""

    site: str
    id: bytes
    secret: bytes = field(repr=False)
    fingerprint: bytes
    """Of the consortium that the site means to join."""

    def __str__(self) -> str:
        """As it is told to the site, secret included."""
        payload = self.id + self.secret + self.fingerprint + self.site.encode()
        return PREFIX + _word(payload + _check(payload))

    @classmethod
    def read(cls, text: str) -> Token:
        """The token that `text` is; white space, as mail puts it in, is ignored.

        Raises:
            IdentityRefused: it is none, or not the whole of one.
        """
        text = "".join(text.split())
        if not text.startswith(PREFIX):
            raise IdentityRefused(f"invitation: a token begins with {PREFIX}, this does not", fix=_ASK)
        word = text.removeprefix(PREFIX)
        try:
            data = base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            data = b""
        if _word(data) != word:
            # The last character has bits that stand for nothing, and decoding does not look at them.
            data = b""
        payload, check = data[:-CHECK_BYTES], data[-CHECK_BYTES:]
        whole = len(data) > _FIXED and hmac.compare_digest(_check(payload), check)
        site = payload[_FIXED - CHECK_BYTES :].decode("ascii", "replace")
        if not whole or not re.fullmatch(NAME_PATTERN, site):
            raise IdentityRefused("invitation: the token is cut short or mistyped", fix=_ASK)
        return cls(
            site=site,
            id=payload[:ID_BYTES],
            secret=payload[ID_BYTES : ID_BYTES + SECRET_BYTES],
            fingerprint=payload[ID_BYTES + SECRET_BYTES : _FIXED - CHECK_BYTES],
        )


def _word(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _check(payload: bytes) -> bytes:
    # Against slips of people and mail only: who forges a token can compute this too.
    return hashlib.sha256(payload).digest()[:CHECK_BYTES]
