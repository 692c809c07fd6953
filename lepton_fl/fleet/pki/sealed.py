"""Private keys at rest, under a passphrase: scrypt makes the key, ChaCha20-Poly1305 seals.

The file is the encoding (secagg/encoding.py) of `tag, log2 n, r, p, salt, nonce, ciphertext`; all before
the ciphertext is authenticated with it.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from lepton_fl.errors import IdentityRefused, VerificationFailed
from lepton_fl.secagg.encoding import decode, encode

_TAG = "lepton-fl/sealed/1"
_LOG2_N, _R, _P = 17, 8, 1
"""128 MiB and a third of a second for each guess."""
_LOG2_N_ALLOWED = range(14, 21)
"""What a file may ask of us: up to 1 GiB."""
_SALT, _NONCE = 16, 12


def seal(secrets: Mapping[str, bytes], passphrase: str) -> bytes:
    """`secrets`, readable with `passphrase` only."""
    salt, nonce = os.urandom(_SALT), os.urandom(_NONCE)
    head = encode(_TAG, _LOG2_N, _R, _P, salt, nonce)
    plain = encode([(name, secret) for name, secret in sorted(secrets.items())])
    return head + encode(_cipher(passphrase, salt, _LOG2_N, _R, _P).encrypt(nonce, plain, head))


def unseal(sealed: bytes, passphrase: str, *, file: str) -> dict[str, bytes]:
    """What was sealed; `file` is named in errors.

    Raises:
        VerificationFailed: this is no sealed file, or asks for parameters out of bounds.
        IdentityRefused: the passphrase is wrong, or a bit of the file has changed.
    """
    try:
        tag, log2_n, r, p, salt, nonce, sealed_secrets = decode(
            sealed, str, int, int, int, bytes, bytes, bytes
        )
    except VerificationFailed:
        raise VerificationFailed(f"{file}: not a file of sealed keys") from None
    if (tag, r, p, len(salt), len(nonce)) != (_TAG, _R, _P, _SALT, _NONCE) or log2_n not in _LOG2_N_ALLOWED:
        raise VerificationFailed(f"{file}: sealed with parameters that this release does not use")
    head = encode(tag, log2_n, r, p, salt, nonce)
    try:
        plain = _cipher(passphrase, salt, log2_n, r, p).decrypt(nonce, sealed_secrets, head)
    except InvalidTag:
        raise IdentityRefused(f"{file}: the passphrase is wrong, or the file has been changed") from None
    (pairs,) = decode(plain, tuple)
    return dict(pairs)


def _cipher(passphrase: str, salt: bytes, log2_n: int, r: int, p: int) -> ChaCha20Poly1305:
    # One passphrase, typed on two systems, may be different code points.
    text = unicodedata.normalize("NFC", passphrase).encode()
    return ChaCha20Poly1305(Scrypt(salt=salt, length=32, n=1 << log2_n, r=r, p=p).derive(text))
