"""Sealed keys: the passphrase opens them, as they were, and nothing else does."""

import pytest

from lepton_fl.errors import IdentityRefused, VerificationFailed
from lepton_fl.fleet.pki import sealed
from lepton_fl.fleet.pki.sealed import seal, unseal
from lepton_fl.secagg import decode, encode

SECRETS = {"root": b"one", "roster": b"two"}


def test_the_cost_of_a_guess_is_128_mib():
    """By scrypt's own parameters, as they stand in the file."""
    _, log2_n, r, p, *_ = decode(seal(SECRETS, "passphrase"))

    assert (log2_n, r, p) == (17, 8, 1)


def test_what_was_sealed_comes_out(quick_scrypt):
    """With the passphrase, in whichever Unicode form a keyboard gives it."""
    data = seal(SECRETS, "caf\u00e9 au lait")

    assert unseal(data, "cafe\u0301 au lait", file="root.sealed") == SECRETS
    assert b"one" not in data


def test_no_two_sealings_are_alike(quick_scrypt):
    """Salt and nonce are new each time."""
    assert len({seal(SECRETS, "passphrase") for _ in range(3)}) == 3


def test_another_passphrase_is_refused(quick_scrypt):
    """In one line that names the file."""
    with pytest.raises(IdentityRefused, match=r"root\.sealed: the passphrase is wrong"):
        unseal(seal(SECRETS, "passphrase"), "Passphrase", file="root.sealed")


def test_every_bit_is_authenticated(quick_scrypt, monkeypatch):
    """One bit of each byte of the file: parameters, salt, nonce, ciphertext and the frame round them."""
    data = seal(SECRETS, "passphrase")
    derived = {}
    cipher = sealed._cipher

    # The same salt and cost, the same key: derived once for the sake of the test's time.
    def once(*given):
        if given not in derived:
            derived[given] = cipher(*given)
        return derived[given]

    monkeypatch.setattr(sealed, "_cipher", once)
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1
        with pytest.raises((IdentityRefused, VerificationFailed)):
            unseal(bytes(changed), "passphrase", file="f")

    assert unseal(data, "passphrase", file="f") == SECRETS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (0, "lepton-fl/sealed/2"),
        (1, 40),
        (1, 21),
        (1, 13),
        (1, -1),
        (2, 1 << 20),
        (3, 0),
        (4, b""),
        (5, b"x"),
    ],
)
def test_a_file_does_not_choose_our_cost(quick_scrypt, monkeypatch, field, value):
    """Out of bounds is refused before any of it is computed."""
    monkeypatch.setattr(sealed, "Scrypt", None)
    fields = [*decode(sealed_file())]
    fields[field] = value

    with pytest.raises(VerificationFailed, match="parameters"):
        unseal(encode(*fields), "passphrase", file="f")


def sealed_file():
    return encode("lepton-fl/sealed/1", 17, 8, 1, bytes(16), bytes(12), bytes(32))


@pytest.mark.parametrize("data", [b"", b"\0", sealed_file()[:-1], sealed_file() + b"\0", encode("a")])
def test_what_is_no_sealed_file_is_told_apart(data):
    """From a wrong passphrase."""
    with pytest.raises(VerificationFailed, match="not a file of sealed keys"):
        unseal(data, "passphrase", file="f")
